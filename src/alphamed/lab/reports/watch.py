"""What the counts of a run's responses warn of, in sentences: one letter for all questions, format without knowledge, and
patterns that are no reasoning. Pure.

Rewards of multiple-choice questions can be earned without medicine. None of these sentences is a proof; each is a reason to
read the examples beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphamed.evaluation.score import percent
from alphamed.lab.reports.response_patterns import ResponsePattern
from alphamed.lab.reports.rollout_stats import Count, StepStats, together

EDGE_STEPS = 5
"""Recorded steps at either end that are compared; a run with fewer than twice as many is judged by its end alone."""
LEAST_ANSWERS = 20
COLLAPSED = 0.7
AHEAD = 0.25
"""One letter for all questions: at least COLLAPSED of the answers, and AHEAD more than among the keys (whose letters may be
skewed: 55% of PubMedQA's answers are "yes")."""
COMMON = 0.25
"""Share of responses from which on a pattern is worth a sentence."""

PATTERNS: Mapping[ResponsePattern, tuple[str, str]] = {
    ResponsePattern.BARE: ("Answers without reasoning", "of boxed responses have fewer than 5 words before the box"),
    ResponsePattern.AFTERWARDS: (
        "Reasoning after the answer",
        "of responses reason after their first box rather than before it",
    ),
    ResponsePattern.SEVERAL: ("Several boxes", "of responses have more than one box; the last one counts"),
    ResponsePattern.REPEATS: ("Repetition", "of responses repeat themselves (at least 40% of their last word 4-grams)"),
}
"""Title, what it is a share of."""
SPOKEN = (ResponsePattern.AFTERWARDS, ResponsePattern.SEVERAL, ResponsePattern.REPEATS)
"""Bare boxes have their sentence from the metrics, which a run without rollout files has too."""


@dataclass(frozen=True, slots=True)
class Collapse:
    """One letter given to nearly all questions: its share among the answers and among the keys of the same questions."""

    letter: str
    share: float
    key_share: float


@dataclass(frozen=True, slots=True)
class Ends:
    """The first and the last recorded steps put together; `first` is None where the run is too short to have two ends."""

    first: StepStats | None
    last: StepStats
    steps: int  # in each of them


def ends(steps: Sequence[StepStats]) -> Ends:
    edge = min(EDGE_STEPS, len(steps))
    return Ends(together(steps[:edge]) if len(steps) >= 2 * EDGE_STEPS else None, together(steps[len(steps) - edge :]), edge)


def collapse(answers: Counter[str], keys: Counter[str]) -> Collapse | None:
    """The letter that nearly all answers are, or None. `keys` are the right letters of the questions behind `answers`."""
    if answers.total() < LEAST_ANSWERS:
        return None
    letter, count = min(answers.items(), key=lambda item: (-item[1], item[0]))
    share, key_share = count / answers.total(), keys[letter] / max(keys.total(), 1)
    return Collapse(letter, share, key_share) if share >= COLLAPSED and share - key_share >= AHEAD else None


def collapse_words(found: Collapse, where: str) -> str:
    return (
        f"One letter for all questions: {where} {percent(found.share)} of the answers are {found.letter}, which is the "
        f"key of {percent(found.key_share)} of these questions. What is earned that way is no knowledge."
    )


def warnings(steps: Sequence[StepStats]) -> list[str]:
    """What the recorded steps, in order, warn of; [] where nothing does."""
    if not steps:
        return []
    edge = ends(steps)
    where = f"in the last {edge.steps} recorded step{'s' * (edge.steps != 1)}"
    found = []
    if (one := collapse(edge.last.answers, edge.last.keys)) is not None:
        found.append(collapse_words(one, where))
    found += [
        sentence for sentence in (_boxes_alone(edge), *(_pattern(edge, pattern, where) for pattern in SPOKEN)) if sentence
    ]
    return found


def _boxes_alone(edge: Ends) -> str | None:
    """A boxed rate that rose beyond its intervals while accuracy among boxed answers did not."""
    if edge.first is None:
        return None
    old, new = edge.first.whole, edge.last.whole
    if new.boxed.interval[0] <= old.boxed.interval[1] or not old.among_boxed.cases:
        return None
    if new.among_boxed.interval[0] > old.among_boxed.interval[1]:
        return None
    blind = edge.last.chance / edge.last.whole.responses
    return (
        f"More boxes, not more knowledge: {words(old.boxed)} of responses were boxed in the first {edge.steps} recorded "
        f"steps, {words(new.boxed)} in the last; among the boxed {words(old.among_boxed)} were right, then "
        f"{words(new.among_boxed)}. Picking letters blindly gives {percent(blind)}."
    )


def _pattern(edge: Ends, pattern: ResponsePattern, where: str) -> str | None:
    new, old = edge.last.response_patterns[pattern], edge.first.response_patterns[pattern] if edge.first else Count()
    if new.share is None or new.share < COMMON or (old.share is not None and new.share <= old.share):
        return None
    title, what = PATTERNS[pattern]
    before = f"; in the first {edge.steps} it was {percent(old.share)}" if old.share is not None else ""
    return f"{title}: {where} {percent(new.share)} {what}{before}."


def words(count: Count) -> str:
    """A share with its interval, for people."""
    low, high = count.interval
    return f"{percent(count.share)} [{percent(low)}, {percent(high)}]" if count.share is not None else "no cases"
