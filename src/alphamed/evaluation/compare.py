"""Two evaluations of the same questions: McNemar's exact test, the questions that flipped, and what a gain is made of. Pure.

A gain in accuracy is a gain in boxed answers, in accuracy among boxed answers, or both; only the second can be knowledge.
"""
from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from alphamed.evaluation.score import Z_95, Score


@dataclass(frozen=True, slots=True)
class Paired:
    """The same questions answered twice; each of the four kinds in the order of the first answers."""
    both_right: tuple[Hashable, ...]
    only_first: tuple[Hashable, ...]
    only_second: tuple[Hashable, ...]
    both_wrong: tuple[Hashable, ...]

    @property
    def n(self) -> int:
        return len(self.both_right) + len(self.only_first) + len(self.only_second) + len(self.both_wrong)

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first, in shares; NaN without questions."""
        return (len(self.only_second) - len(self.only_first)) / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `difference`: Agresti and Min (2005), a Wald interval with half a question more in each cell,
        so that it holds for few flips. -1..1 without questions."""
        if not self.n:
            return -1.0, 1.0
        first, second, n = len(self.only_first) + 0.5, len(self.only_second) + 0.5, self.n + 2
        centre = (second - first) / n
        half = Z_95 * math.sqrt((first + second) / n - centre ** 2) / math.sqrt(n)
        return max(-1.0, centre - half), min(1.0, centre + half)

    @property
    def p(self) -> float:
        return mcnemar(len(self.only_first), len(self.only_second))


@dataclass(frozen=True, slots=True)
class Split:
    """A gain in accuracy in two parts that sum to it, in shares: by boxing more, by being right more often when boxed."""
    boxed: float
    among_boxed: float

    @property
    def gain(self) -> float:
        return self.boxed + self.among_boxed


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: were both kinds of flips equally likely, how often would they be split at least
    as unevenly (binomial with 1/2). 1 without flips."""
    flips, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    # in logarithms: 2 ** -flips underflows from 1,075 flips on
    logs = [math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
            for k in range(fewer + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def holm(values: Sequence[float]) -> list[float]:
    """The p values of several tests adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - place) * values[i]))
        adjusted[i] = highest
    return adjusted


def pair(first: Mapping[Hashable, bool], second: Mapping[Hashable, bool]) -> Paired:
    """Whether each question was answered right, twice; questions that only one side has are left out."""
    kinds: dict[tuple[bool, bool], list[Hashable]] = {(a, b): [] for a in (True, False) for b in (True, False)}
    for key, right in first.items():
        if key in second:
            kinds[bool(right), bool(second[key])].append(key)
    return Paired(tuple(kinds[True, True]), tuple(kinds[True, False]), tuple(kinds[False, True]), tuple(kinds[False, False]))


def split(before: Score, after: Score) -> Split:
    """What a change of accuracy is made of. With boxed rates b and accuracy among boxed a, accuracy is b x a, and

        b1 a1 - b0 a0 = (b1 - b0) (a0 + a1) / 2 + (a1 - a0) (b0 + b1) / 2

    (Shapley values: neither factor is taken to change first.) Where one side boxed nothing all of it is boxing."""
    b0, b1 = before.boxed.value, after.boxed.value
    a0, a1 = before.accuracy_among_boxed, after.accuracy_among_boxed
    if not a0.total or not a1.total:
        return Split(after.accuracy.value - before.accuracy.value, 0.0)
    return Split((b1 - b0) * (a0.value + a1.value) / 2, (a1.value - a0.value) * (b0 + b1) / 2)
