"""The scores of an evaluation with 95% intervals, and the conclusions that a before and an after allow.

An answer is *boxed* when the response ended in time with a readable letter in its box, right or wrong. So
accuracy = boxed rate x accuracy among boxed answers: the first factor is format, only the second can be knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from alphamed.records import ScoredGroup
from alphamed.response_stats import ResponseStats

Z_95 = 1.959963984540054
"""97.5% quantile of the normal distribution."""


def wilson(value: float, n: float) -> tuple[float, float]:
    """95% Wilson score interval of a share `value` of n cases (or so many effective ones); 0..1 without cases. Where each
    case is itself a mean of several samples it is wider than it need be, never narrower: such a case varies less than a
    yes or no."""
    if not n:
        return 0.0, 1.0
    z2 = Z_95**2
    centre = (value + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    # at 0 and 1 the bound is exact, rounding would leave 1e-18
    return (0.0 if value == 0 else centre - half), (1.0 if value == 1 else centre + half)


@dataclass(frozen=True, slots=True)
class Share:
    """`count` of `total` cases with its 95% Wilson score interval (Wilson 1927; never leaves 0..1, holds at 0 and n).
    Without cases the value is NaN and the interval 0..1."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.value, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{percent(self.value)} [{percent(low)}, {percent(high)}]" if self.total else "no cases"


@dataclass(frozen=True, slots=True)
class Score:
    """Result of one question set. `truncated`: cut by the token limit, which with `reward.truncated: grade` may be correct
    all the same. `chance` is the mean of 1 / options: what picking letters blindly gives."""

    n: int
    boxed: Share
    accuracy: Share
    accuracy_among_boxed: Share
    truncated: Share
    failed: Share
    tokens_mean: float
    tokens_max: int
    chance: float


class Change(StrEnum):
    """A share after against before: apart only where the two 95% intervals do not touch (stricter than p < 0.05)."""

    ROSE = "rose"
    FELL = "fell"
    OPEN = "open"


def score(groups: Sequence[ScoredGroup]) -> Score:
    """Score graded responses; every response counts once. ValueError without any."""
    stats = ResponseStats.of_groups(groups)
    n = stats.responses
    if not n:
        raise ValueError("an evaluation without graded responses has no score; give it questions")
    return Score(
        n,
        boxed=Share(stats.boxed, n),
        accuracy=Share(stats.correct, n),
        accuracy_among_boxed=Share(stats.correct, stats.boxed),
        truncated=Share(stats.truncated, n),
        failed=Share(stats.failed, n),
        tokens_mean=stats.tokens_mean,
        tokens_max=stats.tokens_max,
        chance=sum(len(group.outcomes) / len(group.group.question.options) for group in groups) / n,
    )


def change(before: Share, after: Share) -> Change:
    """Whether a share moved by more than both intervals allow. OPEN where either has no cases."""
    if not before.total or not after.total:
        return Change.OPEN
    if after.interval[0] > before.interval[1]:
        return Change.ROSE
    if after.interval[1] < before.interval[0]:
        return Change.FELL
    return Change.OPEN


def verdict(before: Score, after: Score, blind: float = 0.0) -> list[str]:
    """The conclusions that two evaluations of the same questions allow, in sentences. `blind`: the best accuracy that is known
    to be had without reading the questions, where it is above chance.

    A risen boxed rate is called format. Knowledge is spoken of only where accuracy among boxed answers rose outside its
    interval, and not by leaving the harder questions unboxed, and more are right of all than without reading; a rise that the
    boxed rate alone explains is called that.
    """
    sentences = [_format(before.boxed, after.boxed)]
    accuracy = change(before.accuracy, after.accuracy)
    among = change(before.accuracy_among_boxed, after.accuracy_among_boxed)
    sentences.append(
        {
            Change.ROSE: f"More questions are answered correctly: {_moved(before.accuracy, after.accuracy)}.",
            Change.FELL: f"Fewer questions are answered correctly: {_moved(before.accuracy, after.accuracy)}.",
            Change.OPEN: f"The share of correct answers did not move outside its interval: "
            f"{_moved(before.accuracy, after.accuracy)}.",
        }[accuracy]
    )
    sentences.append(_knowledge(before, after, accuracy, among, max(blind, after.chance)))
    if change(before.truncated, after.truncated) == Change.ROSE:
        sentences.append(f"More responses run into the token limit: {_moved(before.truncated, after.truncated)}.")
    return sentences


def _format(before: Share, after: Share) -> str:
    moved, trend = _moved(before, after), change(before, after)
    return {
        Change.ROSE: f"The answer format was learnt: the share of boxed answers rose, {moved}.",
        Change.FELL: f"The answer format was lost in part: the share of boxed answers fell, {moved}.",
        Change.OPEN: f"The share of boxed answers did not move outside its interval: {moved}.",
    }[trend]


def _knowledge(before: Score, after: Score, accuracy: Change, among: Change, blind: float) -> str:
    old, new = before.accuracy_among_boxed, after.accuracy_among_boxed
    if not old.total or not new.total:
        return f"Accuracy among boxed answers cannot be compared: {old.total} boxed answers before, {new.total} after."
    moved = _moved(old, new)
    if among == Change.ROSE and accuracy != Change.ROSE and change(before.boxed, after.boxed) == Change.FELL:
        return (
            f"No gain in knowledge is shown: among boxed answers more are right, {moved}, but fewer are boxed and no "
            f"more are right of all; the questions that are still boxed may be the easy ones."
        )
    if among == Change.ROSE and after.accuracy.interval[0] <= blind:
        return (
            f"No gain in knowledge is shown: among boxed answers more are right, {moved}, but of all answers "
            f"({after.accuracy}) not more than without reading the question ({percent(blind)})."
        )
    if among == Change.ROSE:
        return f"Knowledge: among boxed answers more are right than before, outside the intervals, {moved}."
    if among == Change.FELL:
        return f"Among boxed answers fewer are right than before: {moved}."
    chance = (
        f" That is not shown to be better than picking letters blindly ({percent(after.chance)})."
        if new.interval[0] <= after.chance
        else ""
    )
    if accuracy == Change.ROSE:
        return (
            f"That is format, not knowledge: among boxed answers accuracy did not rise outside its interval, "
            f"{moved}.{chance}"
        )
    return f"No gain in knowledge is shown: among boxed answers accuracy stayed within its interval, {moved}.{chance}"


def _moved(before: Share, after: Share) -> str:
    return f"{before} -> {after}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def points(share: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * share:+.1f}"
