"""Which option a file marks as right: the form of its keys is inferred from all of its rows or declared, never assumed.

A key is a letter (either case), an index from 0 or from 1 (a number, or digits as text) or the option's own text. One value
alone often fits several forms: 2 of 4 options is C counted from 0 and B counted from 1. So the form is that of a whole file:
the one in which every key can be read. A file that several forms fit with different answers, or that no form fits, is
refused with a hint at what decides. A row may state its key in several fields (MedQA: text and letter): each field has a
form of its own, they must agree, and a field that is certain decides one that is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from alphamed.answers.folding import fold_characters
from alphamed.data.mcq import NoKey, RawRow, short
from alphamed.data.text import normalised_option
from alphamed.errors import DataError

KEY_FIELDS = ("answer", "answer_idx", "answer_index")
"""Where rows of the schema may state their key."""


class AnswerForm(StrEnum):
    """How a file names the right option."""

    LETTER = "letter"
    INDEX = "index"  # from 0
    INDEX1 = "index1"  # from 1
    TEXT = "text"  # the option's text, but for case, punctuation and white space


MEANING = {
    AnswerForm.LETTER: "letters",
    AnswerForm.INDEX: "numbers from 0",
    AnswerForm.INDEX1: "numbers from 1",
    AnswerForm.TEXT: "texts of options",
}


def form_of(place: str) -> tuple[str, AnswerForm | None]:
    """A FILE or NAME=PATH without the :FORM behind it, and that form; None where none is declared."""
    before, colon, form = place.rpartition(":")
    return (before, AnswerForm(form)) if colon and before and form in list(AnswerForm) else (place, None)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that a row of a public set states: upstream field -> value, unchanged. `form` is set where the row
    itself shows how its options are numbered. It replaces `answer` until the file's forms are known."""

    stated: Mapping[str, Any]
    form: AnswerForm | None = None


@dataclass(frozen=True, slots=True)
class Keyed:
    """A row whose key is to be read. `texts` has the option texts as the file has them, letter -> text (None: no option),
    `bare` the same without labels; `lettered` says that the file itself calls its options by these letters."""

    row: RawRow
    texts: Mapping[str, str | None]
    bare: Mapping[str, str | None]
    lettered: bool
    keys: Keys


Readings = list[dict[AnswerForm, str]]
"""Per row of a field: form -> the letter that its key names in that form; {} where it fits no form, or there is no key."""


def keys_of(value: Mapping[str, Any]) -> Keys:
    """The keys that a row states."""
    answer = value.get("answer")
    if isinstance(answer, Keys):
        return answer
    return Keys({name: value[name] for name in KEY_FIELDS if value.get(name) is not None})


def read_keys(rows: Sequence[Keyed], declared: AnswerForm | None) -> tuple[list[str | NoKey], dict[str, AnswerForm]]:
    """The letter of every row, or why it has none, and the form of every field that is read. Raises DataError where the form
    cannot be inferred."""
    fields = list(dict.fromkeys(name for row in rows for name in row.keys.stated))
    readings: dict[str, Readings] = {name: [_readings(row, name) for row in rows] for name in fields}
    readings = {
        name: column for name, column in readings.items() if any(column)
    }  # a field that holds no key at all is dropped
    stated = {row.keys.form for row in rows}
    if declared is None and len(stated) == 1:
        declared = stated.pop()
    forms = {name: _fitting(column) for name, column in readings.items()}
    if declared is not None and readings:
        forms = _declared(rows, readings, forms, declared)
    chosen = _chosen(rows, readings, forms)
    return [_key(row, place, readings, chosen) for place, row in enumerate(rows)], chosen


# ------------------------------------------------------------------------------------------------------------- one key
def _readings(row: Keyed, name: str) -> dict[AnswerForm, str]:
    """Form -> letter of every form in which the key can be read. A list position without an option has a letter too: a key
    that points to it shows how the file counts, if not which option is right."""
    value = row.keys.stated.get(name)
    letters, number = list(row.texts), _whole(value)
    by_form: dict[AnswerForm, str] = {}
    if isinstance(value, str) and (letter := fold_characters(value).strip().upper()) in row.texts:
        by_form[AnswerForm.LETTER] = letter
    if number is not None:
        for form, base in ((AnswerForm.INDEX, 0), (AnswerForm.INDEX1, 1)):
            if 0 <= number - base < len(letters):
                by_form[form] = letters[number - base]
    # Where a file calls its options by letters, "A" is a letter even if an option's text is "A" too (blood groups).
    if not (row.lettered and AnswerForm.LETTER in by_form) and len(same := _letters_of(value, row)) == 1:
        by_form[AnswerForm.TEXT] = same[0]
    return by_form


def _whole(value: Any) -> int | None:
    """The whole number that a value is, or spells in digits."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        text = value.strip().removesuffix(".0")  # as pandas writes a column of whole numbers with gaps
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 1000 else None
    return value if isinstance(value, int) else None


def _letters_of(value: Any, row: Keyed) -> list[str]:
    """The options that have this text: exactly, or else (where the key is no number) up to case, punctuation and white
    space."""
    number = _whole(value)
    text = value if isinstance(value, str) else str(number) if number is not None else None
    if text is None:
        return []
    for same in (str.strip, normalised_option) if number is None else (str.strip,):
        for options in (row.texts, row.bare):
            if matches := [
                letter for letter, option in options.items() if option is not None and same(option) == same(text)
            ]:
                return matches
    return []


# ----------------------------------------------------------------------------------------------------- a field's form
def _fitting(column: Readings) -> list[AnswerForm]:
    """The forms in which every key of a field can be read; keys that fit no form at all say nothing. Of forms that read all
    keys alike, only the first is returned."""
    readable = [reading for reading in column if reading]
    forms = [form for form in AnswerForm if all(form in reading for reading in readable)]
    return [
        form
        for i, form in enumerate(forms)
        if not any(all(reading[form] == reading[other] for reading in readable) for other in forms[:i])
    ]


def _declared(
    rows: Sequence[Keyed], readings: Mapping[str, Readings], forms: Mapping[str, list[AnswerForm]], declared: AnswerForm
) -> dict[str, list[AnswerForm]]:
    """The forms, with the declared one in place of the inferred ones where a field can be read so. Raises DataError where no
    field can: keys that are all read one option off are worse than none."""
    narrowed, applies = dict(forms), False
    for name, fitting in forms.items():
        reads = [reading for reading in readings[name] if reading]
        some = any(declared in reading for reading in reads)
        if all(declared in reading for reading in reads) if fitting else some:
            narrowed[name], applies = [declared], True
    if not applies:
        name, fitting = next(iter(forms.items()))
        place = next(i for i, reading in enumerate(readings[name]) if reading and declared not in reading)
        other = " or ".join(MEANING[form] for form in fitting) or "of another form"
        raise DataError(
            f"{rows[place].row.where}: keys are declared as {declared} ({MEANING[declared]}), but {name} of the "
            f"file holds {other} (here: {_shown(rows[place], name)}); {declare(*fitting)}"
        )
    return narrowed


def _chosen(
    rows: Sequence[Keyed], readings: Mapping[str, Readings], forms: Mapping[str, list[AnswerForm]]
) -> dict[str, AnswerForm]:
    """The form of every field. Raises DataError where several or none fit."""
    for name, fitting in forms.items():
        if not fitting:
            raise DataError(_mixed(rows, name, readings[name]))
    sure = {name: fitting[0] for name, fitting in forms.items() if len(fitting) == 1}
    chosen = dict(sure)
    for name, fitting in forms.items():
        if name in sure:
            continue
        agreeing = [
            form
            for form in fitting
            if sure
            and all(
                reading[form] == readings[other][place][sure[other]]
                for place, reading in enumerate(readings[name])
                if reading
                for other in sure
                if sure[other] in readings[other][place]
            )
        ]
        if len(agreeing) != 1:
            raise DataError(_undecided(rows, name, fitting, readings[name]))
        chosen[name] = agreeing[0]
    return chosen


def _mixed(rows: Sequence[Keyed], name: str, column: Readings) -> str:
    """The error for a field that no form fits: the first key that differs from the form of most."""
    readable = [place for place, reading in enumerate(column) if reading]
    counts = {form: sum(form in column[place] for place in readable) for form in AnswerForm}
    most = max(counts, key=lambda form: counts[form])
    odd = next(place for place in readable if most not in column[place])
    of_most = [place for place in readable if most in column[place]]
    usual = next((place for place in of_most if not set(column[place]) >= set(column[odd])), of_most[0])
    return (
        f"{rows[odd].row.where}: {name} {_shown(rows[odd], name)} is of another form than {counts[most]:,} of "
        f"{len(readable):,} keys of the file, {MEANING[most]} ({rows[usual].row.where}: {_shown(rows[usual], name)}); "
        f"correct the file, or, to treat keys of other forms as bad rows, {declare(most)}"
    )


def _undecided(rows: Sequence[Keyed], name: str, fitting: Sequence[AnswerForm], column: Readings) -> str:
    place = next(i for i, reading in enumerate(column) if reading and len({reading[form] for form in fitting}) > 1)
    return (
        f"{rows[place].row.file}: its keys ({name}) can be {' or '.join(MEANING[form] for form in fitting)}, and nothing "
        f"in the file says which ({rows[place].row.where}: {_shown(rows[place], name)} is option "
        f"{' or '.join(dict.fromkeys(column[place][form] for form in fitting))}); {declare(*fitting)}"
    )


def declare(*forms: AnswerForm) -> str:
    """How a user declares the form of a file's keys."""
    choices = forms or tuple(AnswerForm)
    return (
        f"declare their form: FILE:{' or FILE:'.join(choices)} with --from, --benchmarks and --against, answer: "
        f"{' or '.join(choices)} of a source in a recipe (files for training: write the set with `alphamed data build` "
        f"first)"
    )


def _shown(row: Keyed, name: str) -> str:
    return f"{short(row.keys.stated.get(name))} of {sum(text is not None for text in row.texts.values())} options"


# ---------------------------------------------------------------------------------------------------------- a row's key
def _key(row: Keyed, place: int, readings: Mapping[str, Readings], chosen: Mapping[str, AnswerForm]) -> str | NoKey:
    """The letter that all fields of the row agree on, or why there is none."""
    letters: dict[str, str] = {}
    for name, form in chosen.items():
        if name not in row.keys.stated:
            continue
        if row.texts.get(letter := readings[name][place].get(form, "")) is not None:
            letters[name] = letter
        elif form != AnswerForm.TEXT or len(chosen) == 1 or not _several(row, name):
            return NoKey(
                f"{name} {short(row.keys.stated[name])} is not among the options "
                f"{', '.join(letter for letter, text in row.texts.items() if text is not None)}"
                + (f" (keys are {MEANING[form]})" if form != AnswerForm.LETTER else "")
            )
    if not letters:
        return _no_key(row)
    if len(set(letters.values())) > 1:
        statements = ", ".join(
            f"{name} {short(row.keys.stated[name])} is option {letter}" for name, letter in letters.items()
        )
        return NoKey(f"its keys contradict each other ({statements})")
    return next(iter(letters.values()))


def _several(row: Keyed, name: str) -> bool:
    value = row.keys.stated[name]
    return isinstance(value, str) and len(_letters_of(value, row)) > 1


def _no_key(row: Keyed) -> NoKey:
    stated = [(name, value) for name, value in row.keys.stated.items() if value is not None]
    if not stated:
        return NoKey("no answer")
    name, value = stated[0]
    return NoKey(
        f"{name} {short(value)} is not among the options "
        f"{', '.join(letter for letter, text in row.texts.items() if text is not None)}"
    )
