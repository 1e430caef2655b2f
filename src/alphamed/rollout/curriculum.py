"""Which levels are asked how often: weights that move over the steps, of annotated levels or of those a run has observed.

A question of the stream is asked with the chance weight / largest weight, else skipped, so that order, epochs and
letters stay the stream's. The draws follow from seed and place in the walk: the same results give the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, prod
from typing import Any

from alphamed.config.choices import LevelsFrom
from alphamed.config.sections import LevelsConfig, LevelWeights
from alphamed.data.stream import QuestionStream
from alphamed.errors import ConfigError
from alphamed.hashing import stable_hash
from alphamed.records import Question
from alphamed.rollout.belief import JEFFREYS, LEVELS, PassRates

SAMPLES = LEVELS - 1
"""A level counts how many of so many samples are right: 1 is all of them, 6 none."""
LOOK_AT = 200
"""Questions considered for each one asked, at most; then those that came nearest to being asked are."""
DRAWS = 2**62


class Curriculum:
    """The stream's questions, each as often as the weight of its level has it."""

    def __init__(self, config: LevelsConfig, stream: QuestionStream, rates: PassRates, seed: int):
        assert config.schedule, "a curriculum without a schedule"
        self._config, self._stream, self._rates, self._seed = config, stream, rates, seed
        self._walked = 0
        self._asked, self._levels, self._passed = 0, 0.0, 0  # since `metrics` was asked last
        self.skipped: list[Question] = []
        """Drawn from the stream and not asked, since it was emptied last."""

    def take(self, n: int, step: int) -> list[Question]:
        """The next n questions to ask in `step`, in the order of the stream."""
        weights = weights_at(self._config.schedule, step)
        top = max(weights)
        drawn: list[Question] = []
        asked: dict[int, Question] = {}  # place in this walk -> question
        passed: dict[int, tuple[float, Question]] = {}  # (how near it came, question)
        place = 0
        while len(asked) < n:
            (question,) = self._stream.take(1)
            drawn.append(question)
            draw = (stable_hash("level", self._seed, self._walked) + 0.5) / DRAWS
            self._walked += 1
            share = self.weight(question, weights, step) / top
            if draw < share:
                asked[place] = question
            elif share > 0:
                passed[place] = draw ** (1 / share), question  # Efraimidis and Spirakis: draws by weight, none twice
            place += 1
            if place >= LOOK_AT * n:
                for near in sorted(passed, key=lambda place: -passed[place][0])[: n - len(asked)]:
                    asked[near] = passed.pop(near)[1]
        self._count(list(asked.values()), place, step)
        self.skipped += [question for number, question in enumerate(drawn) if number not in asked]
        return [asked[place] for place in sorted(asked)]

    def weight(self, question: Question, weights: Sequence[float], step: int) -> float:
        """The weight of the question's level, or its mean over the levels that five more answers would show."""
        return sum(chance * weight for chance, weight in zip(self._chances(question, step), weights))

    def _chances(self, question: Question, step: int) -> tuple[float, ...]:
        if self._config.by == LevelsFrom.OBSERVED:
            return level_chances(*self._rates.counts(question, step))
        assert question.level is not None, f"{question.id} has no level"
        return tuple(float(level == question.level) for level in range(1, LEVELS + 1))

    def _count(self, asked: Sequence[Question], walked: int, step: int) -> None:
        self._asked += len(asked)
        self._passed += walked - len(asked)
        self._levels += sum(
            level * chance for question in asked for level, chance in enumerate(self._chances(question, step), start=1)
        )

    def metrics(self) -> dict[str, float]:
        """What was asked since the last call."""
        if not self._asked:
            return {}
        metrics = {"sampling/level_mean": self._levels / self._asked, "sampling/level_skipped": float(self._passed)}
        self._asked, self._levels, self._passed = 0, 0.0, 0
        return metrics

    def state(self) -> dict[str, Any]:
        return {"walked": self._walked}

    def load_state(self, state: dict[str, Any]) -> None:
        self._walked = state["walked"]


def weights_at(schedule: Sequence[LevelWeights], step: int) -> tuple[float, ...]:
    """The weights of the levels 1 to 6 in `step`: those of the first entry before it, of the last one after it, and on the
    straight line between neighbours."""
    later = next((i for i, entry in enumerate(schedule) if entry.step >= step), None)
    if later is None:
        return schedule[-1].weights
    if later == 0:
        return schedule[0].weights
    before, after = schedule[later - 1], schedule[later]
    share = (step - before.step) / (after.step - before.step)
    return tuple(old + share * (new - old) for old, new in zip(before.weights, after.weights))


def level_chances(right: float, wrong: float) -> tuple[float, ...]:
    """Chances of the levels 1 to 6: that 5, 4, ..., 0 of five more answers are right, for a pass rate distributed as
    Beta(1/2 + right, 1/2 + wrong) (the beta-binomial distribution). None is 0: no question is lost for good."""
    a, b = JEFFREYS + right, JEFFREYS + wrong

    def rising(x: float, n: int) -> float:
        return prod(x + i for i in range(n))

    return tuple(
        comb(SAMPLES, k) * rising(a, k) * rising(b, SAMPLES - k) / rising(a + b, SAMPLES) for k in range(SAMPLES, -1, -1)
    )


def check_levels(config: LevelsConfig, questions: Sequence[Question]) -> None:
    """Refuse annotated levels that the questions do not carry, or of which none has a weight. Raises ConfigError."""
    if not config.schedule or config.by == LevelsFrom.OBSERVED:
        return
    without = [question.id for question in questions if question.level is None]
    if without:
        raise ConfigError(
            f"data.levels.by: annotated, but {len(without)} of {len(questions)} questions have no level (the "
            f"first: {without[0]}); annotate them (alphamed data difficulty) or set it to observed"
        )
    present = sorted({question.level for question in questions if question.level is not None})
    for entry in config.schedule:
        if not any(entry.weights[level - 1] for level in present):
            raise ConfigError(
                f"data.levels.schedule: step {entry.step} gives no weight to a level that data.train has "
                f"({', '.join(map(str, present))}); give one of them a weight"
            )
