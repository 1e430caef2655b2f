"""Which questions are asked next: those of the stream in its order, without those that are unlikely to give a signal.

The stream gives the order, and with it the epochs, the letters of options and any curriculum; here questions are only
skipped. A group has a signal where its rewards differ, whatever the reward is. A question is asked at once if its group is
at least as likely to have one as that of an unknown question, or if it was skipped `max_passes` times in a row
(some sooner), so that none starves. Where a search does not find enough of these, the likeliest of the others are asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from alphamed.config.choices import LevelsFrom
from alphamed.config.sections import DynamicSamplingConfig, LevelsConfig
from alphamed.data.stream import QuestionStream
from alphamed.records import DropReason, Question, ScoredGroup
from alphamed.rollout.belief import PassRates
from alphamed.rollout.curriculum import Curriculum


class QuestionSampler:
    """The questions of a run whose steps hold `per_step` groups of `samples` answers. With `choose` off they are the
    stream's, all of them, or what the curriculum of `levels` takes of it."""

    def __init__(
        self,
        config: DynamicSamplingConfig,
        stream: QuestionStream,
        samples: int,
        per_step: int,
        levels: LevelsConfig = LevelsConfig(),
        seed: int = 0,
        earns: tuple[float, float] | None = (1.0, 0.0),
    ):
        self._config, self._stream = config, stream
        self._look_at = config.search * per_step
        self._rates = PassRates(config, samples, earns)
        self._curriculum = Curriculum(levels, stream, self._rates, seed) if levels.schedule else None
        self._observes = config.choose or (self._curriculum is not None and levels.by == LevelsFrom.OBSERVED)
        self.skipped = 0
        """Questions skipped so far."""
        self._unlikely: list[Question] = []  # skipped since `drain_skipped`

    def take(self, n: int, step: int) -> list[Question]:
        """The next n questions to ask in `step`, in the order of the stream."""
        if not self._config.choose:
            return self._next(n, step)
        chosen: dict[int, Question] = {}  # place in the walk -> question
        others: dict[int, tuple[bool, float, Question]] = {}  # (met before in this walk, -chance, question)
        met: set[str] = set()
        for place in range(max(n, self._look_at)):
            (question,) = self._next(1, step)
            chance = self._rates.chance(question, step)
            due = chance >= self._rates.of_unknown or self._rates.is_due(question.id)
            if due and question.id not in met:
                chosen[place] = question
            else:
                others[place] = question.id in met, -chance, question
            met.add(question.id)
            if len(chosen) == n:
                break
        likeliest = sorted(others, key=lambda place: (*others[place][:2], place))[: n - len(chosen)]
        chosen |= {place: others.pop(place)[2] for place in likeliest}
        self._unlikely += [question for _, _, question in others.values()]
        self._note({question.id for question in chosen.values()}, met)
        return [chosen[place] for place in sorted(chosen)]

    def _next(self, n: int, step: int) -> list[Question]:
        return self._curriculum.take(n, step) if self._curriculum else self._stream.take(n)

    def drain_skipped(self) -> dict[DropReason, tuple[tuple[int, str], ...]]:
        """The questions drawn from the stream and not asked since the last call, as (epoch, id)."""
        skipped = {DropReason.UNLIKELY_SIGNAL: self._unlikely}
        if self._curriculum:
            skipped[DropReason.LEVEL], self._curriculum.skipped = self._curriculum.skipped, []
        self._unlikely = []
        return {
            reason: tuple((question.epoch or 0, question.id) for question in questions)
            for reason, questions in skipped.items()
            if questions
        }

    def level_metrics(self) -> dict[str, float]:
        """Of the questions that the curriculum gave since the last call."""
        return self._curriculum.metrics() if self._curriculum else {}

    def _note(self, asked: set[str], met: set[str]) -> None:
        for question_id in asked:
            self._rates.note_asked(question_id)
        for question_id in met - asked:
            self._rates.note_pass(question_id)
        self.skipped += len(met - asked)

    def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Learn from all groups graded in `step`, those that are dropped included."""
        if self._observes:
            self._rates.observe(groups, step)

    def state(self) -> dict[str, Any]:
        """Place in the stream and beliefs, JSON-ready."""
        state = {"stream": self._stream.state()}
        state |= {"pass_rates": self._rates.state()} if self._observes else {}
        return state | {"curriculum": self._curriculum.state()} if self._curriculum else state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken; without beliefs in it (choosing was off) with none."""
        self._stream.load_state(state["stream"])
        self._rates.load_state(state.get("pass_rates", {}))
        if self._curriculum:
            self._curriculum.load_state(state["curriculum"])
