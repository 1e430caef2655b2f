"""From the rows of one file to rows of the schema: letters for lists of options, labels removed, keys as letters, ids made.

All readers of questions use `interpret`, so that a file means the same as a source, as a benchmark and as training data.
What was inferred and changed is recorded in a `Reading`, which cards, results and provenance contain.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alphamed.data.keys import MEANING, AnswerForm, Keyed, keys_of, read_keys
from alphamed.data.labels import without_labels
from alphamed.data.mcq import NoKey, QuestionError, RawRow, parse_question
from alphamed.data.text import counted, fingerprint

LETTERS = string.ascii_uppercase
SHOWN_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file was read. `forms`: field -> form of its keys; `labels_removed` and `ids_made` count rows; `repeats` names
    the rows without ids that repeat an earlier one."""

    forms: Mapping[str, AnswerForm] = field(default_factory=dict)
    labels_removed: int = 0
    ids_made: int = 0
    repeats: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        return {
            "keys": {name: str(form) for name, form in self.forms.items()},
            "labels_removed": self.labels_removed,
            "ids_made": self.ids_made,
            "repeats": list(self.repeats[:SHOWN_REPEATS]),
        }

    def notes(self) -> list[str]:
        """A line for each deviation from the schema."""
        lines = []
        if set(self.forms.values()) - {AnswerForm.LETTER}:
            lines.append(f"keys read as {', '.join(f'{MEANING[form]} ({name})' for name, form in self.forms.items())}")
        if self.labels_removed:
            lines.append(f"labels of options (A., (B), 3) ...) removed from {counted(self.labels_removed, 'question')}")
        if self.ids_made:
            lines.append(f"ids made from the content of {counted(self.ids_made, 'question')}, none had one")
        if self.repeats:
            lines.append(
                f"{counted(len(self.repeats), 'question')} of the same content as an earlier one (the first: "
                f"{self.repeats[0]}); drop_repeats=true of `alphamed data build` leaves them out"
            )
        return lines


def interpret(rows: Iterable[RawRow], declared: AnswerForm | None = None) -> tuple[list[RawRow], Reading]:
    """The rows of one file as rows of the schema, and how they were read; what cannot be a question has its problem.
    `declared` is the form of its keys where the user declares it. Raises DataError where the form cannot be inferred."""
    rows = list(rows)
    values = {
        place: dict(row.value) for place, row in enumerate(rows) if row.problem is None and isinstance(row.value, Mapping)
    }
    keyed: dict[int, Keyed] = {}
    labelled = 0
    for place, value in values.items():
        texts = _texts(value.get("options"))
        if texts is None:
            value["answer"] = _unread(value)
            continue
        bare, removed, problem = without_labels({letter: text for letter, text in texts.items() if text is not None})
        labelled += removed
        if problem is not None:
            rows[place] = replace(rows[place], problem=problem)
        listed = isinstance(value["options"], list)
        keyed[place] = Keyed(rows[place], texts, bare, not listed, keys_of(value))
    letters, forms = read_keys(list(keyed.values()), declared)
    for (place, keyed_row), letter in zip(keyed.items(), letters, strict=True):
        values[place] |= _options(keyed_row, letter)
    made, repeats = _make_ids(rows, values)
    interpreted = [
        replace(row, value=values[place]) if place in values and row.problem is None else row
        for place, row in enumerate(rows)
    ]
    return interpreted, Reading(forms, labelled, made, repeats)


def _texts(options: Any) -> dict[str, str | None] | None:
    """Letter -> text of options whose keys can be read; None where the schema's check will report what is wrong with
    them."""
    if isinstance(options, list) and len(options) <= len(LETTERS):
        options = dict(zip(LETTERS, options))
    elif isinstance(options, Mapping):  # Arrow fills letters that a row does not have with None
        options = {letter: text for letter, text in options.items() if text is not None}
        if list(options) != list(LETTERS[: len(options)]):
            return None
    else:
        return None
    return options if options and all(text is None or isinstance(text, str) for text in options.values()) else None


def _unread(value: Mapping[str, Any]) -> Any:
    """A placeholder for the key of a row whose options cannot be used: the options are reported, not the key."""
    return "?" if keys_of(value).stated else None


def _options(row: Keyed, letter: str | NoKey) -> dict[str, Any]:
    """`options` and `answer` of the schema: positions of a list without an option are closed up."""
    filled = [old for old, text in row.texts.items() if text is not None]
    new = dict(zip(filled, LETTERS))
    return {
        "options": {new[old]: row.bare[old] for old in filled},
        "answer": new[letter] if isinstance(letter, str) else letter,
    }


def _make_ids(rows: list[RawRow], values: Mapping[int, dict[str, Any]]) -> tuple[int, tuple[str, ...]]:
    """Give the rows of a file that has no ids ids of their content; returns how many, and which rows repeat an earlier one:
    the second copy's id ends in -2, the third's in -3."""
    if any(value.get("id") is not None for value in values.values()):
        return 0, ()
    first: dict[str, str] = {}
    copies: Counter[str] = Counter()
    repeats = []
    for place, value in values.items():
        row = rows[place]
        value["id"] = f"row {row.line}"  # for rows that are no question: their problem is reported, not their id
        if row.problem is not None:
            continue
        try:
            question = parse_question(value, row.where)
        except QuestionError:
            continue
        made = content_id(fingerprint(question), question.source)
        copies[made] += 1
        value["id"] = made if copies[made] == 1 else f"{made}-{copies[made]}"
        if copies[made] > 1:
            repeats.append(f"{row.where} repeats {first[made]}")
        first.setdefault(made, row.where)
    return copies.total(), tuple(repeats)


def content_id(content: str, source: str | None) -> str:
    """`medqa-` or, without a source, `q-`, and the 16 digits of the fingerprint."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", (source or "q").partition("/")[0])
    return f"{name or 'q'}-{content}"
