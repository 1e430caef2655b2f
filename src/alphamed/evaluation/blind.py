"""What policies that do not read the question score on a set: a gain in knowledge is one above all of them.

Each policy chooses among the options of a question; where it likes several equally it takes one of them at random, and the
expected score is counted. Pure and without torch, so that data tools and reports share it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphamed.data.text import content_words, normalised_option
from alphamed.evaluation.score import wilson
from alphamed.records import Question

EXCESS = 0.05
"""Above chance, beyond the interval, from which on a policy is warned of."""

CONSTANT, EVER_KEY, LONGEST, SHORTEST, SHARED = (
    "best constant letter",
    "was ever a key",
    "longest option",
    "shortest option",
    "most words shared with the question",
)


@dataclass(frozen=True, slots=True)
class BlindScore:
    """Expected accuracy of one policy on `n` questions, and `chance`, the mean of 1 / options on the same ones. `detail` says
    what it was fitted on or which letter it is."""

    policy: str
    value: float
    n: int
    chance: float
    detail: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        """95%, Wilson."""
        return wilson(self.value, self.n)

    @property
    def beats_chance(self) -> bool:
        """Whether even the lower end of the interval is more than EXCESS above chance."""
        return self.interval[0] > self.chance + EXCESS

    def plain(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "accuracy": self.value,
            "ci_low": low,
            "ci_high": high,
            "chance": self.chance,
            "n": self.n,
            "detail": self.detail,
            "beats_chance": self.beats_chance,
        }


def blind_scores(questions: Sequence[Question], train: Sequence[Question] | None = None) -> list[BlindScore]:
    """The scores of all blind policies on a set; [] without questions.

    `was ever a key` picks an option that was right somewhere in `train`. Without `train` it is fitted on the set itself, for
    each question on all the others (leave one out): fitted on the question as well it would know the answer. The constant
    letter is the one that scores best on the set, so it is a little above chance on any.
    """
    if not questions:
        return []
    chance = sum(1 / len(q.options) for q in questions) / len(questions)
    keys = Counter(q.answer for q in questions)
    letter = max(sorted(keys), key=keys.__getitem__)
    return [
        BlindScore(CONSTANT, keys[letter] / len(questions), len(questions), chance, letter),
        _score(EVER_KEY, questions, chance, _ever_key(questions, train), _fitted_on(train)),
        _score(LONGEST, questions, chance, [_most(q, len) for q in questions]),
        _score(SHORTEST, questions, chance, [_most(q, lambda text: -len(text)) for q in questions]),
        _score(SHARED, questions, chance, [_most_shared(q) for q in questions]),
    ]


def _fitted_on(train: Sequence[Question] | None) -> str:
    return "fitted on all other questions of the set" if train is None else f"fitted on {len(train):,} training questions"


def _score(
    policy: str, questions: Sequence[Question], chance: float, liked: Iterable[Collection[str]], detail: str = ""
) -> BlindScore:
    """`liked`: per question the letters that the policy takes with equal probability."""
    hits = sum((q.answer in letters) / len(letters) for q, letters in zip(questions, liked, strict=True))
    return BlindScore(policy, hits / len(questions), len(questions), chance, detail)


def _ever_key(questions: Sequence[Question], train: Sequence[Question] | None) -> list[Collection[str]]:
    keys = Counter(normalised_option(q.options[q.answer]) for q in (questions if train is None else train))
    liked = []
    for q in questions:
        texts = {letter: normalised_option(text) for letter, text in q.options.items()}
        own = Counter() if train is not None else Counter([texts[q.answer]])
        liked.append([letter for letter, text in texts.items() if keys[text] > own[text]] or list(texts))
    return liked


def _most(question: Question, measure) -> list[str]:
    values = {letter: measure(text.strip()) for letter, text in question.options.items()}
    return _top(values)


def _most_shared(question: Question) -> list[str]:
    stem = set(content_words(question.question))
    return _top({letter: len(stem & set(content_words(text))) for letter, text in question.options.items()})


def _top(values: Mapping[str, float]) -> list[str]:
    best = max(values.values())
    return [letter for letter, value in values.items() if value == best]
