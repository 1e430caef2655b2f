"""Recorded responses counted in one pass: per step, level, source, letter and pattern, and each question's history. Pure.

The responses to one question resemble each other, so intervals here count questions more than responses: see `Count`.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from alphamed.data.attributes import ATTRIBUTES, values_of
from alphamed.evaluation.score import wilson
from alphamed.lab.reports.history import Past
from alphamed.lab.reports.response_patterns import ResponsePattern, response_patterns
from alphamed.records import Outcome, Question
from alphamed.rundir.rollout_files import Answers

QUOTED = 2
"""Examples kept of each pattern and letter, from the last step that has any, chosen by a hash."""

PARTS = (*(one.axis for one in ATTRIBUTES), "sources")
"""What responses are counted by, beside all of them together."""


@dataclass(slots=True)
class Count:
    """How often something is so among responses that come in groups (those to one question at one step)."""

    groups: int = 0
    cases: int = 0
    hits: int = 0
    _cases2: int = 0  # sums over the groups of cases^2, hits^2, hits x cases
    _hits2: int = 0
    _mixed: int = 0

    def add(self, hits: int, cases: int) -> None:
        """One group of responses; without cases it does not count."""
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
        """How many independent responses would tell as much: cases over the design effect (Kish 1965), which is the
        variance of the share between groups over that of independent cases; from the number of groups to that of cases.
        Where all or none are hits the spread tells nothing and each group counts once."""
        share = self.share
        if share is None or share in (0.0, 1.0) or self.groups < 2:
            return float(self.groups)
        between = self._hits2 - 2 * share * self._mixed + share * share * self._cases2
        variance = self.groups / (self.groups - 1) * max(between, 0.0) / self.cases**2
        alone = share * (1 - share) / self.cases
        return min(float(self.cases), max(float(self.groups), self.cases * alone / variance if variance else self.cases))

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval for `effective_cases`; 0..1 without cases."""
        return wilson(self.share, self.effective_cases) if self.cases else (0.0, 1.0)


@dataclass(slots=True)
class Part:
    """What responses came to, of a step, or of those to questions of one level, bin or source."""

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

    def merge(self, other: Part) -> None:
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
    """The counts of one step, or of several put together. `parts` has them by the kinds of PARTS. `answers` are the letters
    of boxed responses, `keys` the right letters of the same responses, so that the two can be compared; `chance` is the sum
    over all responses of 1 / options."""

    step: int
    whole: Part = field(default_factory=Part)
    parts: dict[str, dict[str, Part]] = field(default_factory=lambda: {kind: {} for kind in PARTS})
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
                self.parts[kind].setdefault(name, Part()).merge(part)
        self.answers.update(other.answers)
        self.keys.update(other.keys)
        for pattern, count in other.response_patterns.items():
            self.response_patterns[pattern].merge(count)
        self.chance += other.chance


@dataclass(frozen=True, slots=True)
class Quote:
    """A response as an example of something."""

    step: int
    question: Question
    text: str
    outcome: str
    reward: float
    tokens: int
    letter: str | None


class RolloutStats:
    """All recorded steps of a run. `quotes` maps a pattern's name or a letter (of wrong answers) to examples."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.questions: dict[str, Past] = {}
        self.quotes: dict[str, list[Quote]] = {}

    def add(self, step: int, groups: Iterable[Answers]) -> None:
        """Count a step's groups; steps come in order."""
        found, candidates = StepStats(step), _Candidates(step)
        for group in groups:
            question, shown, stats = group.question, Counter(), group.stats
            found.whole.add(group)
            for kind, name in parts_of(question).items():
                found.parts[kind].setdefault(name, Part()).add(group)
            found.chance += len(group.outcomes) / len(question.options)
            for j, (text, outcome) in enumerate(zip(group.texts, group.outcomes)):
                for pattern in response_patterns(text, outcome):
                    shown[pattern] += 1
                    candidates.offer(pattern, group, j)
            for pattern in ResponsePattern:  # bare boxes are a share of boxed responses, as in METRICS
                found.response_patterns[pattern].add(
                    shown[pattern], stats.boxed if pattern is ResponsePattern.BARE else stats.responses
                )
            self._letters(found, group, candidates)
            past = self.questions.setdefault(question.id, Past(question.source, values_of(question)))
            past.visits.append((step, stats.correct, stats.responses))
        self.steps.append(found)
        self.quotes |= candidates.chosen()

    def _letters(self, found: StepStats, group: Answers, candidates: _Candidates) -> None:
        for j, (letter, outcome) in enumerate(zip(group.letters, group.outcomes)):
            if letter is not None and outcome.boxed:
                found.answers[letter] += 1
                found.keys[group.question.answer] += 1
                if outcome is Outcome.WRONG:
                    candidates.offer(letter, group, j)


def parts_of(question: Question) -> dict[str, str]:
    """Kind of PARTS -> the name under which a question counts: `level 3`, `no level`."""
    values = {one.axis: f"{one.unit} {one.of(question)}" if one.of(question) else f"no {one.unit}" for one in ATTRIBUTES}
    return values | {"sources": question.source or "no source"}


def together(steps: Sequence[StepStats]) -> StepStats:
    """Several steps as one; its number is that of the last, 0 without any."""
    total = StepStats(steps[-1].step if steps else 0)
    for one in steps:
        total.merge(one)
    return total


class _Candidates:
    """The examples of one step: of each kind the QUOTED responses with the smallest hashes."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._found: dict[str, list[tuple[str, str, int, Answers]]] = {}

    def offer(self, kind: str, group: Answers, j: int) -> None:
        digest = hashlib.sha256(f"{group.group_id}/{j}".encode()).hexdigest()
        self._found.setdefault(str(kind), []).append((digest, group.group_id, j, group))

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
                for _, _, j, group in heapq.nsmallest(QUOTED, found, key=lambda one: one[:3])
            ]
            for kind, found in self._found.items()
        }
