"""Recorded responses counted in one pass: per step, level, source, letter and pattern, and each question's history. Pure.

The responses to one question are correlated, so intervals use an effective number of responses: see `Count`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from alphamed.data.attributes import ATTRIBUTES, values_of
from alphamed.evaluation.score import wilson
from alphamed.lab.reports.history import QuestionHistory
from alphamed.lab.reports.response_patterns import ResponsePattern, response_patterns
from alphamed.records import Outcome, Question
from alphamed.rundir.rollout_files import Answers

QUOTED = 2
"""Examples of each pattern and letter, from the last step that has any, chosen by a hash."""

GROUPINGS = (*(attribute.axis for attribute in ATTRIBUTES), "sources")
"""What responses are grouped by, in addition to the counts over all of them."""


@dataclass(slots=True)
class Count:
    """How many responses (`hits` of `cases`) have a property; responses come in groups, those to one question at one step."""

    groups: int = 0
    cases: int = 0
    hits: int = 0
    _cases2: int = 0  # sums over the groups of cases^2, hits^2, hits x cases
    _hits2: int = 0
    _mixed: int = 0

    def add(self, hits: int, cases: int) -> None:
        """Add a group of responses; one without cases is not counted."""
        if cases:
            self.groups, self.cases, self.hits = self.groups + 1, self.cases + cases, self.hits + hits
            self._cases2, self._hits2 = self._cases2 + cases * cases, self._hits2 + hits * hits
            self._mixed += hits * cases

    def merge(self, other: Count) -> None:
        self.groups, self.cases, self.hits = self.groups + other.groups, self.cases + other.cases, self.hits + other.hits
        self._cases2, self._hits2 = self._cases2 + other._cases2, self._hits2 + other._hits2
        self._mixed += other._mixed

    @property
    def share(self) -> float | None:
        return self.hits / self.cases if self.cases else None

    @property
    def effective_cases(self) -> float:
        """How many independent responses would give as much information: cases divided by the design effect (Kish 1965), the
        variance of the share between groups over that of independent cases; at least the number of groups, at most that of
        cases. Where all or none are hits the variance between groups is no estimate, and each group counts once."""
        share = self.share
        if share is None or share in (0.0, 1.0) or self.groups < 2:
            return float(self.groups)
        between = self._hits2 - 2 * share * self._mixed + share * share * self._cases2
        variance = self.groups / (self.groups - 1) * max(between, 0.0) / self.cases**2
        independent = share * (1 - share) / self.cases
        return min(
            float(self.cases), max(float(self.groups), self.cases * independent / variance if variance else self.cases)
        )

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval for `effective_cases`; 0..1 without cases."""
        share = self.share
        return (0.0, 1.0) if share is None else wilson(share, self.effective_cases)


@dataclass(slots=True)
class ResponseCounts:
    """Counts and sums over the responses of a step, or over those to questions of one level, bin or source."""

    responses: int = 0
    reward: float = 0.0  # sum
    tokens: int = 0  # sum
    boxed: Count = field(default_factory=Count)
    correct: Count = field(default_factory=Count)
    among_boxed: Count = field(default_factory=Count)  # correct ones among the boxed

    def add(self, group: Answers) -> None:
        stats = group.stats
        self.responses += stats.responses
        self.reward += sum(group.rewards)
        self.tokens += stats.tokens
        self.boxed.add(stats.boxed, stats.responses)
        self.correct.add(stats.correct, stats.responses)
        self.among_boxed.add(stats.correct, stats.boxed)

    def merge(self, other: ResponseCounts) -> None:
        self.responses, self.reward = self.responses + other.responses, self.reward + other.reward
        self.tokens += other.tokens
        for mine, theirs in (
            (self.boxed, other.boxed),
            (self.correct, other.correct),
            (self.among_boxed, other.among_boxed),
        ):
            mine.merge(theirs)


@dataclass(slots=True)
class StepStats:
    """The counts of one step, or of several merged. `parts` has them by the kinds of GROUPINGS. `answers` are the letters of
    boxed responses, `keys` the correct letters of the same responses, so that the two can be compared; `chance` is the sum
    over all responses of 1 / options."""

    step: int
    whole: ResponseCounts = field(default_factory=ResponseCounts)
    parts: dict[str, dict[str, ResponseCounts]] = field(default_factory=lambda: {kind: {} for kind in GROUPINGS})
    answers: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    response_patterns: dict[ResponsePattern, Count] = field(
        default_factory=lambda: {pattern: Count() for pattern in ResponsePattern}
    )
    chance: float = 0.0

    def merge(self, other: StepStats) -> None:
        self.whole.merge(other.whole)
        for kind, theirs in other.parts.items():
            for name, part in theirs.items():
                self.parts[kind].setdefault(name, ResponseCounts()).merge(part)
        self.answers.update(other.answers)
        self.keys.update(other.keys)
        for pattern, count in other.response_patterns.items():
            self.response_patterns[pattern].merge(count)
        self.chance += other.chance


@dataclass(frozen=True, slots=True)
class Quote:
    """A response that the report shows as an example."""

    step: int
    question: Question
    text: str
    outcome: str
    reward: float
    tokens: int
    letter: str | None


class RolloutStats:
    """Counts over the recorded steps of a run. `quotes` maps a pattern's name or a letter (of wrong answers) to examples."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.questions: dict[str, QuestionHistory] = {}
        self.quotes: dict[str, list[Quote]] = {}

    def add(self, step: int, groups: Iterable[Answers]) -> None:
        """Count a step's groups; steps come in order."""
        stats, candidates = StepStats(step), _Candidates(step)
        for group in groups:
            question = group.question
            stats.whole.add(group)
            for kind, name in parts_of(question).items():
                stats.parts[kind].setdefault(name, ResponseCounts()).add(group)
            stats.chance += len(group.outcomes) / len(question.options)
            self._patterns(stats, group, candidates)
            self._letters(stats, group, candidates)
            history = self.questions.setdefault(question.id, QuestionHistory(question.source, values_of(question)))
            history.visits.append((step, group.stats.correct, group.stats.responses))
        self.steps.append(stats)
        self.quotes |= candidates.chosen()

    def _patterns(self, stats: StepStats, group: Answers, candidates: _Candidates) -> None:
        counts: Counter[ResponsePattern] = Counter()
        for j, (text, outcome) in enumerate(zip(group.texts, group.outcomes)):
            for pattern in response_patterns(text, outcome):
                counts[pattern] += 1
                candidates.offer(pattern, group, j)
        for pattern in ResponsePattern:  # bare boxes are a share of boxed responses, as in METRICS
            cases = group.stats.boxed if pattern is ResponsePattern.BARE else group.stats.responses
            stats.response_patterns[pattern].add(counts[pattern], cases)

    def _letters(self, stats: StepStats, group: Answers, candidates: _Candidates) -> None:
        for j, (letter, outcome) in enumerate(zip(group.letters, group.outcomes)):
            if letter is not None and outcome.boxed:
                stats.answers[letter] += 1
                stats.keys[group.question.answer] += 1
                if outcome is Outcome.WRONG:
                    candidates.offer(letter, group, j)


def parts_of(question: Question) -> dict[str, str]:
    """Kind of GROUPINGS -> the part that a question belongs to: `level 3`, `no level`."""
    parts = {"sources": question.source or "no source"}
    for attribute in ATTRIBUTES:
        value = attribute.of(question)
        parts[attribute.axis] = f"{attribute.unit} {value}" if value else f"no {attribute.unit}"
    return parts


def merged(steps: Sequence[StepStats]) -> StepStats:
    """The counts of several steps as those of one; its number is that of the last, 0 without any."""
    total = StepStats(steps[-1].step if steps else 0)
    for step in steps:
        total.merge(step)
    return total


class _Candidates:
    """The examples of one step: of each pattern or letter the QUOTED responses with the smallest hashes."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._responses: dict[str, list[tuple[str, str, int, Answers]]] = {}

    def offer(self, kind: str, group: Answers, j: int) -> None:
        digest = hashlib.sha256(f"{group.group_id}/{j}".encode()).hexdigest()
        self._responses.setdefault(str(kind), []).append((digest, group.group_id, j, group))

    def chosen(self) -> dict[str, list[Quote]]:
        return {
            kind: [
                Quote(
                    self.step,
                    group.question,
                    group.texts[j],
                    str(group.outcomes[j]),
                    group.rewards[j],
                    group.tokens[j],
                    group.letters[j],
                )
                for _, _, j, group in heapq.nsmallest(QUOTED, responses, key=lambda response: response[:3])
            ]
            for kind, responses in self._responses.items()
        }
