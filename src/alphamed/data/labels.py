"""Labels that option texts carry themselves ("A. Spleen", "(B) Liver", "3) Thymus"), and texts that only look so by chance.

Letters and numbers begin ordinary texts too: "C. difficile", "E. coli", "1.5 mg", "A: T". So labels count only where every
option of a question has one and they follow the options' order; then they are removed. Where labels with the question's own
letters are at other positions (an earlier shuffle left "C. Thymus" as option A), or only some options carry theirs, a prompt
would name two letters for one text: such a row is refused. All other texts stay as they are.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace

from alphamed.answers.folding import fold

_NAME = r"[A-Za-z] | [ivxIVX]{2,4} | 0 | [1-9][0-9]?"
_LABEL = re.compile(
    rf"""
    \s* (?: (?i:option|choice) \s+ )?
        (?: [(\[] \s* (?P<paired> {_NAME} ) \s* [)\]] [.:]? \s*                       # (A) text
          | (?P<paren> {_NAME} ) \s? [)] [.:]? \s*                                     # A) text
          | (?P<dot> [A-Za-z] | [ivxIVX]{{2,4}} ) (?: [.:\u3001] \s* | \s+ - \s+ )     # A. text, A: text, A - text
          | (?P<number> 0 | [1-9][0-9]? ) (?: [.:] \s+ | \u3001 \s* )                  # 1. text; 1.5 mg is none
        ) (?=\S)""",
    re.VERBOSE,
)
FEWEST = {"paren": (1, 1), "paired": (2, 2), "dot": (None, 3), "number": (None, 3)}
"""Style -> from how many labels on they are no coincidence where not all options have one: (where one is at a wrong
position, where all are at their own). No text begins with "b)" by chance, few with "(R)"; "C. albicans", "A: T" and "1. day"
do: None, in any number."""
ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
_CIRCLED = {0x2460 + i: f"({i + 1})" for i in range(20)}
_NUMBERS = re.compile(r"(?:[(]\d+[)][\s,\u3001]*)+")
LONGEST = 40  # characters of a label


@dataclass(frozen=True, slots=True)
class Label:
    """What a text begins with: the place that it names (from 0; the number 0 is -1), its style, and the text after it."""

    name: str
    place: int
    style: str  # of FEWEST
    number: bool
    rest: str


def label_of(text: str) -> Label | None:
    """The label after folding full-width forms, characters without width and circled digits."""
    plain = fold(text.translate(_CIRCLED))
    match = _LABEL.match(plain)
    if match is None:
        return None
    style, rest = match.lastgroup or "", plain[match.end() :]
    name = match[style]
    if name.isdecimal() and _NUMBERS.fullmatch(rest):
        return None  # (1)(2): statements that are picked together
    place = int(name) - 1 if name.isdecimal() else string.ascii_uppercase.index(name.upper()) if len(name) == 1 else -2
    if plain != text:
        rest = next(
            (text[at:] for at in range(1, min(len(text), LONGEST)) if fold(text[at:].translate(_CIRCLED)) == rest), rest
        )
    return Label(name, place, style, name.isdecimal(), rest.strip())


def without_labels(options: Mapping[str, str]) -> tuple[dict[str, str], bool, str | None]:
    """(options without the labels they carry, whether they carried any, why the question cannot be used or None)."""
    labels = _labels(options)
    if not labels:
        return dict(options), False, None
    places = {letter: place for place, letter in enumerate(options)}
    in_order = all(label.place == places[letter] for letter, label in labels.items())
    one_style = len({(label.style, label.number) for label in labels.values()}) == 1
    if len(labels) == len(options) and in_order and len({label.number for label in labels.values()}) == 1:
        bare = {letter: label.rest for letter, label in labels.items()}
        if not _are_texts(bare):
            return dict(options), False, None
        again, _, problem = without_labels(bare)  # "A) A. Spleen": labelled twice
        return (again, True, None) if problem is None else (dict(options), False, problem)
    return dict(options), False, _problem(options, labels, places, in_order) if one_style else None


def _labels(options: Mapping[str, str]) -> dict[str, Label]:
    """Letter -> label of the options that have one. Numbers count from 0 where one of them is 0; i, ii, iii are Roman where
    all are."""
    parsed = {letter: label_of(text) for letter, text in options.items()}
    labels = {letter: label for letter, label in parsed.items() if label is not None}
    names = [label.name.lower() for label in labels.values()]
    if any(len(name) > 1 and not name.isdecimal() for name in names):
        return (
            {letter: replace(label, place=ROMAN.index(label.name.lower())) for letter, label in labels.items()}
            if set(names) <= set(ROMAN)
            else {letter: label for letter, label in labels.items() if label.place >= -1}
        )
    if "0" in names:
        return {letter: replace(label, place=label.place + label.number) for letter, label in labels.items()}
    return labels


def _are_texts(bare: Mapping[str, str]) -> bool:
    """Whether the remaining texts still differ: in "1. day" and "2. day" the number is the meaning."""
    texts = {" ".join(text.split()) for text in bare.values()}
    return len(texts) == len(bare) and all(any(map(str.isalnum, text)) or len(text) < 4 for text in texts)


def _problem(
    options: Mapping[str, str], labels: Mapping[str, Label], places: Mapping[str, int], in_order: bool
) -> str | None:
    """Why labels that are not one for each option in order make a question unusable; None where they may be a
    coincidence."""
    distinct = {label.place for label in labels.values()}
    if len(distinct) < len(labels) or max(distinct) >= len(options):
        return None  # S. aureus, E. coli: not the letters of these options
    wrong, own = FEWEST[next(iter(labels.values())).style]
    if not in_order and (len(labels) == len(options) or wrong is not None and len(labels) >= wrong):
        letter = next(letter for letter, label in labels.items() if label.place != places[letter])
        return (
            f"option {letter} carries another label, {options[letter][:40]!r}: its options were put in another order "
            f"with their labels; remove the labels where the file was made"
        )
    if in_order and len(labels) < len(options) and len(labels) >= own:
        letters, letter = ", ".join(labels), next(letter for letter in options if letter not in labels)
        carry = f"option {letters} carries a label" if len(labels) == 1 else f"options {letters} carry labels"
        return f"{carry} ({options[next(iter(labels))][:40]!r}), option {letter} does not; remove them, or label all"
    return None
