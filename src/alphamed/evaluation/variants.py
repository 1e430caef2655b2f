"""Changed forms of a question that ask whether a model knows the answer or the form: pure functions with seeds.

    shuffled            the options in another order, the key at another letter
    none_of_the_others  the key's text is replaced by NONE; its letter stays right
    one_removed         one wrong option less
    free                no options are shown; the boxed text is compared with the options' texts

A function returns None where the question has no such form: options that speak of other options ("both A and C") lose
their sense when others move or go, and two options cannot lose one.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from alphamed.answers.extraction import boxed_text
from alphamed.data.option_order import refers_to_options, shuffle_options
from alphamed.data.text import normalised_option, words
from alphamed.hashing import draw
from alphamed.records import Question

NONE = "None of the other options"
"""Not "of the above": it may be the first option."""
# "Which of the following is true?" asks of its options; "... is the most likely diagnosis?" can be answered without.
_ASKS_OF_OPTIONS = re.compile(r"\bexcept\b|\b(?:in)?correct\b|\b(?:true|false|right|wrong)\b|\bstatements?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Variant:
    """`change` makes the question that is graded; with `hides_options` the prompt shows none of its options."""

    change: Callable[[Question, int], Question | None]
    hides_options: bool = False

    def shown(self, question: Question) -> Question:
        """What the prompt is made of."""
        return replace(question, options={}) if self.hides_options else question


def shuffled(question: Question, seed: int) -> Question | None:
    """The options in an order by seed and id in which the key has another letter than before."""
    if refers_to_options(question):
        return None
    old = list(question.options).index(question.answer)
    places = [place for place in range(len(question.options)) if place != old]
    place = min(places, key=lambda place: draw(seed, "shuffled", question.id, place))
    return shuffle_options(question, seed, 0, place)


def none_of_the_others(question: Question, seed: int) -> Question | None:
    """The right option's text gives way to NONE, at its own letter: who only recognises the key is wrong now."""
    if refers_to_options(question):
        return None
    return replace(question, options=dict(question.options) | {question.answer: NONE})


def one_removed(question: Question, seed: int) -> Question | None:
    """One wrong option, by seed and id, is left out; the others move up."""
    wrong = [letter for letter in question.options if letter != question.answer]
    if len(wrong) < 2 or refers_to_options(question):
        return None
    gone = min(wrong, key=lambda letter: draw(seed, "removed", question.id, letter))
    remaining = [letter for letter in question.options if letter != gone]
    return replace(
        question,
        options=dict(zip(string.ascii_uppercase, (question.options[letter] for letter in remaining))),
        answer=string.ascii_uppercase[remaining.index(question.answer)],
    )


def free(question: Question, seed: int) -> Question | None:
    """The question as it is: only its prompt differs. None where it cannot be answered without its options."""
    return None if refers_to_options(question) or _ASKS_OF_OPTIONS.search(question.question) else question


VARIANTS: dict[str, Variant] = {
    "shuffled": Variant(shuffled),
    "none_of_the_others": Variant(none_of_the_others),
    "one_removed": Variant(one_removed),
    "free": Variant(free, hides_options=True),
}


def free_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a response without options means, None where its last box holds none of them.

    Normalised texts are compared (case, punctuation and white space do not count): an option that equals the box, else the
    one option whose words are in the box in one piece ("\\boxed{start metformin}" means "Metformin"), the longest where
    one option holds another. Two different options in one box are no answer. It is a crude measure, to be read as such:
    synonyms ("acetylsalicylic acid" for "Aspirin") count as wrong, and so does a shortened answer.
    """
    content = boxed_text(text)
    if content is None:
        return None
    for letter, option in options.items():
        if normalised_option(option) == normalised_option(content):
            return letter
    contained = {
        letter: tuple(words(option))
        for letter, option in options.items()
        if words(option) and _holds(tuple(words(content)), tuple(words(option)))
    }
    longest = [letter for letter, option in contained.items() if all(_holds(option, other) for other in contained.values())]
    return longest[0] if len(longest) == 1 else None


def vote_of(letter: str | None, text: str) -> str:
    """What a boxed answer counts as in a majority vote: its letter, or the content of the box where that is no option."""
    return letter or f"={normalised_option(boxed_text(text) or '')}"


def _holds(text: tuple[str, ...], part: tuple[str, ...]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))
