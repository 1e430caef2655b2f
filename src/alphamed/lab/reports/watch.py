"""Warnings from the counts of a run's responses: one letter for all questions, format without knowledge, and patterns that are
no reasoning. Pure.

Rewards of multiple-choice questions can be earned without medical knowledge. No warning is a proof; each is a reason to read
the examples next to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphamed.evaluation.score import percent
from alphamed.lab.reports.response_patterns import ResponsePattern
from alphamed.lab.reports.rollout_stats import Count, StepStats, merged

EDGE_STEPS = 5
"""Steps at either end of a run that are compared; a run with fewer than twice as many has no beginning to compare."""
LEAST_ANSWERS = 20
COLLAPSED = 0.7
AHEAD = 0.25
"""One letter for all questions: at least COLLAPSED of the answers, and AHEAD more than among the keys (whose letters may be
skewed: 55% of PubMedQA's answers are "yes")."""
COMMON = 0.25
"""The smallest share of responses at which a pattern gets a warning."""

PATTERNS: Mapping[ResponsePattern, tuple[str, str]] = {
    ResponsePattern.BARE: ("Answers without reasoning", "of boxed responses have fewer than 5 words before the box"),
    ResponsePattern.AFTERWARDS: (
        "Reasoning after the answer",
        "of responses reason after their first box rather than before it",
    ),
    ResponsePattern.SEVERAL: ("Several boxes", "of responses have more than one box; the last one counts"),
    ResponsePattern.REPEATS: ("Repetition", "of responses repeat themselves (at least 40% of their last word 4-grams)"),
}
"""Pattern -> title, and what its share means."""
WARNED = (ResponsePattern.AFTERWARDS, ResponsePattern.SEVERAL, ResponsePattern.REPEATS)
"""Bare boxes have their warning from the metrics, which a run without rollout files has too."""


@dataclass(frozen=True, slots=True)
class Collapse:
    """One letter given to nearly all questions: its share among the answers and among the keys of the same questions."""

    letter: str
    share: float
    key_share: float


@dataclass(frozen=True, slots=True)
class Ends:
    """The first and the last recorded steps, merged; `first` is None where the run is too short to have two ends."""

    first: StepStats | None
    last: StepStats
    steps: int  # in each of them


def ends(steps: Sequence[StepStats]) -> Ends:
    """Merge the first and the last EDGE_STEPS of the recorded steps."""
    edge = min(EDGE_STEPS, len(steps))
    return Ends(merged(steps[:edge]) if len(steps) >= 2 * EDGE_STEPS else None, merged(steps[len(steps) - edge :]), edge)


def collapse(answers: Counter[str], keys: Counter[str]) -> Collapse | None:
    """The letter that nearly all answers are, or None. `keys` are the correct letters of the questions behind `answers`."""
    if answers.total() < LEAST_ANSWERS:
        return None
    letter, count = min(answers.items(), key=lambda item: (-item[1], item[0]))
    share, key_share = count / answers.total(), keys[letter] / max(keys.total(), 1)
    return Collapse(letter, share, key_share) if share >= COLLAPSED and share - key_share >= AHEAD else None


def collapse_sentence(collapsed: Collapse, where: str) -> str:
    return (
        f"One letter for all questions: {where} {percent(collapsed.share)} of the answers are {collapsed.letter}, which is the "
        f"key of {percent(collapsed.key_share)} of these questions. Rewards earned that way show no knowledge."
    )


def response_warnings(steps: Sequence[StepStats]) -> list[str]:
    """The warnings of the recorded steps, which come in order; [] where there are none."""
    if not steps:
        return []
    compared = ends(steps)
    where = f"in the last {compared.steps} recorded step{'s' * (compared.steps != 1)}"
    collapsed = collapse(compared.last.answers, compared.last.keys)
    sentences = [
        collapse_sentence(collapsed, where) if collapsed else None,
        _boxes_alone(compared),
        *(_pattern(compared, pattern, where) for pattern in WARNED),
    ]
    return [sentence for sentence in sentences if sentence]


def _boxes_alone(compared: Ends) -> str | None:
    """A warning where the boxed share rose beyond its intervals while accuracy among boxed answers did not."""
    if compared.first is None:
        return None
    old, new = compared.first.whole, compared.last.whole
    if new.boxed.interval[0] <= old.boxed.interval[1] or not old.among_boxed.cases:
        return None
    if new.among_boxed.interval[0] > old.among_boxed.interval[1]:
        return None
    chance = compared.last.chance / compared.last.whole.responses
    return (
        f"More boxes, not more knowledge: {share_text(old.boxed)} of responses were boxed in the first {compared.steps} recorded "
        f"steps, {share_text(new.boxed)} in the last; among the boxed {share_text(old.among_boxed)} were correct, then "
        f"{share_text(new.among_boxed)}. Picking letters at random gives {percent(chance)}."
    )


def _pattern(compared: Ends, pattern: ResponsePattern, where: str) -> str | None:
    """A warning where a pattern is common and more frequent than at the beginning."""
    new = compared.last.response_patterns[pattern]
    old = compared.first.response_patterns[pattern] if compared.first else Count()
    if new.share is None or new.share < COMMON or (old.share is not None and new.share <= old.share):
        return None
    title, meaning = PATTERNS[pattern]
    before = f"; in the first {compared.steps} it was {percent(old.share)}" if old.share is not None else ""
    return f"{title}: {where} {percent(new.share)} {meaning}{before}."


def share_text(count: Count) -> str:
    """A share with its interval, as text."""
    low, high = count.interval
    return f"{percent(count.share)} [{percent(low)}, {percent(high)}]" if count.share is not None else "no cases"
