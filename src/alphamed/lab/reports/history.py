"""What became of each question while a run trained on it: when it was first solved, whether it was forgotten. Pure.

A question counts as solved at a step where more than half of its responses are right: with four options one lucky guess
among eight responses is no news (it happens 9 times in 10).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Past:
    """The visits to one question in order: (step, right responses, responses)."""

    source: str | None
    attributes: Mapping[str, int | None]  # field -> value
    visits: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def first_solved(self) -> int | None:
        """The first step at which it was solved."""
        return next((step for step, right, total in self.visits if 2 * right > total), None)

    @property
    def solved_last(self) -> bool:
        _, right, total = self.visits[-1]
        return 2 * right > total

    @property
    def forgotten(self) -> bool:
        """Solved once, and no longer when it was last asked."""
        return self.first_solved is not None and not self.solved_last


@dataclass(frozen=True, slots=True)
class History:
    """Counts over questions. asked = at_once + later + never; `forgotten` are part of the first two."""

    asked: int
    again: int  # asked at more than one step
    at_once: int  # solved when first asked
    later: int  # solved for the first time at a later visit
    never: int
    forgotten: int
    first_asked: Mapping[int, int]  # step -> questions asked there for the first time
    first_solved: Mapping[int, int]  # step -> questions solved there for the first time
    tested: int  # solved, and asked once more at a later step: only these can be forgotten


def history(pasts: Iterable[Past]) -> History:
    """Sum up the pasts of a run's questions."""
    asked = again = at_once = later = never = forgotten = tested = 0
    first_asked: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for past in pasts:
        asked += 1
        again += len(past.visits) > 1
        first_asked[past.visits[0][0]] += 1
        solved = past.first_solved
        if solved is None:
            never += 1
            continue
        first[solved] += 1
        at_once, later = at_once + (solved == past.visits[0][0]), later + (solved != past.visits[0][0])
        tested += past.visits[-1][0] > solved
        forgotten += past.forgotten
    return History(
        asked,
        again,
        at_once,
        later,
        never,
        forgotten,
        dict(sorted(first_asked.items())),
        dict(sorted(first.items())),
        tested,
    )
