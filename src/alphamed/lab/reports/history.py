"""The history of each question during a run: when it was first solved, whether it was forgotten. Pure.

A question counts as solved at a step where more than half of its responses are correct: with four options, at least one of
eight responses is a lucky guess 9 times in 10.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class QuestionHistory:
    """The visits to one question in order: (step, correct responses, responses)."""

    source: str | None
    attributes: Mapping[str, int | None]  # field -> value
    visits: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def first_solved(self) -> int | None:
        """The first step at which it was solved."""
        return next((step for step, correct, total in self.visits if 2 * correct > total), None)

    @property
    def solved_last(self) -> bool:
        _, correct, total = self.visits[-1]
        return 2 * correct > total

    @property
    def forgotten(self) -> bool:
        """Solved at some step, but not at the last visit."""
        return self.first_solved is not None and not self.solved_last


@dataclass(frozen=True, slots=True)
class QuestionCounts:
    """Counts over questions. visited = solved_first + solved_later + never_solved; `forgotten` are part of the first two."""

    visited: int
    revisited: int  # at more than one step
    solved_first: int  # at the first visit
    solved_later: int  # for the first time at a later visit
    never_solved: int
    forgotten: int
    new_at: Mapping[int, int]  # step -> questions visited there for the first time
    first_solved_at: Mapping[int, int]  # step -> questions solved there for the first time
    could_be_forgotten: int  # solved, and visited again at a later step


def count_questions(histories: Iterable[QuestionHistory]) -> QuestionCounts:
    """Counts over the histories of a run's questions."""
    visited = revisited = solved_first = solved_later = never_solved = forgotten = could_be_forgotten = 0
    new_at: Counter[int] = Counter()
    first_solved_at: Counter[int] = Counter()
    for history in histories:
        first_visit = history.visits[0][0]
        visited += 1
        revisited += len(history.visits) > 1
        new_at[first_visit] += 1
        solved = history.first_solved
        if solved is None:
            never_solved += 1
            continue
        first_solved_at[solved] += 1
        solved_first += solved == first_visit
        solved_later += solved != first_visit
        could_be_forgotten += history.visits[-1][0] > solved
        forgotten += history.forgotten
    return QuestionCounts(
        visited,
        revisited,
        solved_first,
        solved_later,
        never_solved,
        forgotten,
        dict(sorted(new_at.items())),
        dict(sorted(first_solved_at.items())),
        could_be_forgotten,
    )
