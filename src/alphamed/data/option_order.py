"""The order of a question's options: new letters for them, and the questions whose options refer to others and keep theirs."""

from __future__ import annotations

import re
from dataclasses import replace

from alphamed.hashing import digest_of
from alphamed.records import Question

# Options that refer to other options by position ("all of the above", "both A and B", "none") lose their meaning elsewhere.
# One match leaves the whole question in its order; a false alarm ("hepatitis B and C") costs only that.
_OTHERS = r"above|previous|preceding|foregoing|following|these|those|them|other|options?|answers?|choices?|statements?"
_LETTER = r"""(?: (?-i: \b[A-J]\b ) | ["'(][a-j]["')] )"""
_REFERS = re.compile(
    rf"""
      \b(?:all|none|any|anyone|both|neither|either|no|two|three|only)\b [\w\s,]{{0,20}}? \b(?:{_OTHERS})\b
    | \b(?:options?|answers?|choices?)\b [\w\s]{{0,20}}? (?:\b(?:correct|true|false|right|wrong)\b|{_LETTER}|[1-9]\b)
    | ^\W* (?:all|any|none|both|neither|either|everything|nothing) \W*$
    | ^\W* (?:all|none|both|neither|either) \s+ (?:of|is|are|true|false|correct|incorrect|right|wrong) \b
    | {_LETTER} \s* (?:,|/|&|\+|\band\b|\bor\b) [\s,]* (?:and\s+|or\s+)? {_LETTER}
    | (?:\bonly\s+|\bsame\s+as\s+|\bsimilar\s+to\s+) {_LETTER} | {_LETTER} \s+ only\b
    | ^\W* (?:all\s+|both\s+)? [1-9] (?:\s*,\s*[1-9])* [\s,]* (?:and|or|&) \s* [1-9] \W* (?:(?:is|are|only)\b.*)? $
    | ^\W* (?:only\s+[1-9] | [1-9]\s+only) \W*$
    """,
    re.IGNORECASE | re.VERBOSE,
)
_STEM_REFERS = re.compile(r"\b(?i:options?|choices?|answers?)\s*\(?[A-J]\b")


def shuffle_options(question: Question, seed: int, epoch: int, place: int | None = None) -> Question:
    """The question with its option texts in an order that depends on (seed, epoch, id) and `place` alone.

    Letters stay A, B, C ...; the answer follows its text, to the letter number `place` (from 0) where that is given. A
    question whose options refer to others is left unchanged.
    """
    if refers_to_options(question):
        return question
    letters = list(question.options)
    order = sorted(letters, key=lambda letter: digest_of("options", seed, epoch, question.id, letter))
    if place is not None:
        order.remove(question.answer)
        order.insert(place, question.answer)
    return replace(
        question,
        options={new: question.options[old] for new, old in zip(letters, order)},
        answer=letters[order.index(question.answer)],
    )


def refers_to_options(question: Question) -> bool:
    """Whether an option (or the question itself) refers to options by their position; in doubt, yes."""
    return bool(_STEM_REFERS.search(question.question)) or any(map(_REFERS.search, question.options.values()))
