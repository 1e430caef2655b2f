"""What a run believes of each question's pass rate, and from that how likely a group of answers to it teaches.

A pass rate p has a Beta(1/2 + r, 1/2 + w) distribution (Jeffreys' prior and r right, w wrong samples). The level of a
question counts as samples from before the first step: 1 is 5 of 5 right, 6 is 0 of 5. Every observation fades, by half each
`half_life_steps`, because the policy it was made of is gone; what is left in the end is a question nothing is known of.
Pure, without random numbers: the same results give the same beliefs.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from alphamed.config_sections import DynamicSamplingConfig
from alphamed.records import Outcome, Question, ScoredGroup
from alphamed.rollout.spec import stable_hash

JEFFREYS = 0.5
LEVELS = 6
FAILED = (Outcome.TIMEOUT, Outcome.CRASH)


@dataclass(slots=True)
class Evidence:
    """Samples of a question, as they counted at `step`, and how often it was passed over since it was asked last."""
    right: float = 0.0
    wrong: float = 0.0
    step: int = 0
    passes: int = 0


class PassRates:
    """The beliefs of a run whose groups hold `samples` answers."""

    def __init__(self, config: DynamicSamplingConfig, samples: int):
        self._half_life, self._annotation, self._samples = config.half_life_steps, config.annotation_weight, samples
        self._max_passes = config.max_passes
        self._evidence: dict[str, Evidence] = {}
        self.of_unknown = signal_chance(0.0, 0.0, samples)
        """Chance that a group teaches whose question nothing is known of."""

    def chance(self, question: Question, step: int) -> float:
        """Chance that a group asked in `step` holds right and wrong answers."""
        return signal_chance(*self.counts(question, step), self._samples)

    def counts(self, question: Question, step: int) -> tuple[float, float]:
        """Right and wrong samples of the question, with the weight that they have in `step`."""
        right = wrong = 0.0
        if question.level is not None:
            weight = self._annotation * self._fade(step)
            share = (LEVELS - question.level) / (LEVELS - 1)
            right, wrong = share * weight, (1 - share) * weight
        if found := self._evidence.get(question.id):
            fade = self._fade(step - found.step)
            right, wrong = right + fade * found.right, wrong + fade * found.wrong
        return right, wrong

    def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Take in groups graded in `step`. An answer is right or it is not; those that could not be graded say nothing."""
        for scored in groups:
            found = self._evidence.setdefault(scored.group.question.id, Evidence())
            fade = self._fade(step - found.step)
            right = sum(outcome == Outcome.CORRECT for outcome in scored.outcomes)
            wrong = sum(outcome not in (Outcome.CORRECT, *FAILED) for outcome in scored.outcomes)
            found.right, found.wrong, found.step = fade * found.right + right, fade * found.wrong + wrong, step

    def is_due(self, question_id: str) -> bool:
        """Whether the question was passed over too often to be passed over again: `max_passes` times, or some less (down to
        half), drawn for each question and each time, so that those passed over together are not all due together."""
        found = self._evidence.get(question_id)
        if not found:
            return False
        earlier = stable_hash("due", question_id, found.step) % (self._max_passes // 2 + 1)
        return found.passes >= self._max_passes - earlier

    def note_pass(self, question_id: str) -> None:
        self._evidence.setdefault(question_id, Evidence()).passes += 1

    def note_asked(self, question_id: str) -> None:
        if found := self._evidence.get(question_id):
            found.passes = 0

    def _fade(self, steps: int) -> float:
        return 0.5 ** (steps / self._half_life)

    def state(self) -> dict[str, Any]:
        """JSON-ready: about 60 bytes for each question that was asked or passed over."""
        return {id: [one.right, one.wrong, one.step, one.passes] for id, one in self._evidence.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._evidence = {id: Evidence(*values) for id, values in state.items()}


def signal_chance(right: float, wrong: float, samples: int) -> float:
    """Chance that `samples` answers are neither all right nor all wrong: 1 - E[p^G] - E[(1 - p)^G] for
    p ~ Beta(1/2 + right, 1/2 + wrong), whose moments are E[p^G] = prod over i < G of (a + i) / (a + b + i)."""
    a, b = JEFFREYS + right, JEFFREYS + wrong
    all_right = prod((a + i) / (a + b + i) for i in range(samples))
    all_wrong = prod((b + i) / (a + b + i) for i in range(samples))
    return 1.0 - all_right - all_wrong
