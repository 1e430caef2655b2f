"""Whole evaluations compared: answers read from their files, paired by question, p values adjusted. Pure except for
reading the files.

Files of both kinds are read: the evaluations of a run (`step_N.items.jsonl`) and those of `alphamed eval` (`items.jsonl`),
where a question may have several samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.data.attributes import values_of
from alphamed.evaluation.items import GradedAnswer, read_items, stats_of
from alphamed.evaluation.paired import Split, mcnemar, split_gain
from alphamed.evaluation.score import Z_95, wilson
from alphamed.records import Outcome
from alphamed.response_stats import ResponseStats


@dataclass(frozen=True, slots=True)
class AnsweredQuestion:
    """A model's answers to one question of a set, over all samples. `identity` is equal for the same question: text, options
    in the same order, key."""

    id: str
    identity: tuple[Any, ...]
    key: str
    options: int  # number of options shown; 0 where the variant hides them
    attributes: Mapping[str, int | None]  # field -> value
    outcomes: tuple[Outcome, ...]
    letters: tuple[str | None, ...]
    votes: tuple[str | None, ...]  # what each boxed answer counts as, see `variants.vote_of`
    stats: ResponseStats  # of all samples
    question: str

    @property
    def right(self) -> bool:
        """Whether the key is the most common answer among the samples; a tie counts as wrong."""
        others = Counter(vote for vote, outcome in zip(self.votes, self.outcomes) if outcome is Outcome.WRONG)
        return self.stats.correct > max(others.values(), default=0)


@dataclass(frozen=True, slots=True)
class AnsweredSet:
    """A set of questions with one model's answers. Shares are over all samples, intervals over questions."""

    name: str
    answers: Mapping[str, AnsweredQuestion]
    stats: ResponseStats

    @property
    def n(self) -> int:
        return len(self.answers)

    @property
    def samples(self) -> int:
        return self.stats.responses

    @property
    def accuracy(self) -> float:
        return self.stats.accuracy

    @property
    def boxed(self) -> float:
        return self.stats.share(self.stats.boxed)

    @property
    def among_boxed(self) -> float:
        """NaN where nothing is boxed."""
        return self.stats.correct / self.stats.boxed if self.stats.boxed else math.nan

    @property
    def tokens_mean(self) -> float:
        return self.stats.tokens_mean

    @property
    def chance(self) -> float:
        """Accuracy of picking letters blindly; NaN where no options were shown."""
        if not all(answer.options for answer in self.answers.values()):
            return math.nan
        return sum(1 / answer.options for answer in self.answers.values()) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.accuracy, self.n)

    @property
    def boxed_interval(self) -> tuple[float, float]:
        return wilson(self.boxed, self.n)

    @property
    def among_interval(self) -> tuple[float, float]:
        """Over the questions that have a boxed answer; 0..1 without one."""
        boxed = sum(answer.stats.boxed > 0 for answer in self.answers.values())
        return wilson(self.among_boxed, boxed) if boxed else (0.0, 1.0)

    @property
    def letters(self) -> tuple[Counter[str], Counter[str]]:
        """Letters of boxed answers, and the keys of the same questions. An answer without options may have none."""
        pairs = [
            (letter, answer.key)
            for answer in self.answers.values()
            for letter, outcome in zip(answer.letters, answer.outcomes)
            if outcome.boxed and letter
        ]
        return Counter(letter for letter, _ in pairs), Counter(key for _, key in pairs)

    def parts(self, attribute: str) -> dict[int | None, AnsweredSet]:
        """Value of an attribute -> the questions that have it, in order, those without one last."""
        groups: dict[int | None, list[AnsweredQuestion]] = {}
        for answer in self.answers.values():
            groups.setdefault(answer.attributes[attribute], []).append(answer)
        return {value: answered(self.name, groups[value]) for value in sorted(groups, key=lambda x: (x is None, x))}


@dataclass(frozen=True, slots=True)
class Paired:
    """The same questions answered by two models. `gained` are right in the second only, `lost` in the first only;
    `left_out` counts questions that only one model answered or that differ between the two."""

    n: int
    left_out: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    split: Split  # of the accuracies over these n questions

    @property
    def difference(self) -> float:
        """Share of questions right in the second minus that in the first."""
        return (len(self.gained) - len(self.lost)) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of `difference`: Wald's with half a question added to each cell (Agresti and Min 2005), which is
        valid for few flips too."""
        gained, lost, n = len(self.gained) + 0.5, len(self.lost) + 0.5, self.n + 2
        centre = (gained - lost) / n
        half = Z_95 * math.sqrt((gained + lost) / n - centre**2) / math.sqrt(n)
        return max(-1.0, centre - half), min(1.0, centre + half)

    @property
    def p(self) -> float:
        return mcnemar(len(self.gained), len(self.lost))


def answered(name: str, answers: Sequence[AnsweredQuestion]) -> AnsweredSet:
    stats = sum((answer.stats for answer in answers), ResponseStats())
    return AnsweredSet(name, {answer.id: answer for answer in answers}, stats)


def pair(first: AnsweredSet, second: AnsweredSet) -> Paired | None:
    """Pair two answered sets by question; None where no question is the same in both."""
    shared = [
        i for i, answer in first.answers.items() if i in second.answers and answer.identity == second.answers[i].identity
    ]
    if not shared:
        return None
    old, new = (answered(side.name, [side.answers[i] for i in shared]) for side in (first, second))
    right_before = {i for i, answer in old.answers.items() if answer.right}
    right_after = {i for i, answer in new.answers.items() if answer.right}
    return Paired(
        len(shared),
        len(first.answers.keys() | second.answers.keys()) - len(shared),
        tuple(i for i in shared if i in right_after and i not in right_before),
        tuple(i for i in shared if i in right_before and i not in right_after),
        split_gain(old.boxed, old.accuracy, new.boxed, new.accuracy),
    )


def holm(values: Sequence[float]) -> list[float]:
    """The p values of several tests adjusted for their number (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = highest
    return adjusted


# -------------------------------------------------------------------------------------------------------------- reading
def read_answered(path: Path) -> dict[str, AnsweredSet]:
    """Set name -> answers from an items file, in the order of the file; {} where there is none. ConfigError names a line
    that is not a graded answer."""
    sets: dict[str, list[AnsweredQuestion]] = {}
    for (name, _), samples in read_items(path).items():
        sets.setdefault(name, []).append(_answered_question(samples))
    return {name: answered(name, answers) for name, answers in sets.items()}


def _answered_question(samples: Sequence[GradedAnswer]) -> AnsweredQuestion:
    first = samples[0]
    question = first.asked.question
    return AnsweredQuestion(
        question.id,
        (question.question, question.context, tuple(question.options.items()), question.answer),
        question.answer,
        len(first.asked.shown.options),
        values_of(question),
        tuple(sample.outcome for sample in samples),
        tuple(sample.letter for sample in samples),
        tuple(sample.vote for sample in samples),
        stats_of(samples),
        question.question,
    )
