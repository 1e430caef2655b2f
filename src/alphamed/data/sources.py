"""Reads question files (any container of tables.py) and refuses or skips their bad rows.

A row's way: `read_rows` here, `reading.interpret` (letters, keys and ids as in the schema), `mcq.check_questions` (a `Question`,
or what is wrong with the row).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.data.keys import KEY_FIELDS, AnswerForm
from alphamed.data.mcq import RawRow, RowProblem, check_questions
from alphamed.data.reading import Reading, interpret
from alphamed.data.tables import KINDS, check_file, columns, kind_of, rows
from alphamed.data.text import counted
from alphamed.errors import DataError
from alphamed.jsonl import unique_keys
from alphamed.records import Question

COLUMNS = ("id", "question", "options", "answer", "context", "source", "level", "informativeness")
REQUIRED_COLUMNS = ("question", "options")


@dataclass(frozen=True, slots=True)
class LoadedQuestions:
    """The questions of some files in file order, the bad rows that were left out of them, and how each file was read."""

    questions: tuple[Question, ...]
    skipped: tuple[RowProblem, ...] = ()
    readings: tuple[Reading, ...] = ()


def load_questions(
    paths: Iterable[str | Path], bad_rows: BadRows = BadRows.REFUSE, answer: AnswerForm | None = None
) -> LoadedQuestions:
    """Read all files; ids must be unique across them. `answer` is the form of their keys where the user declares it.

    Raises DataError where a file cannot be read, holds no question, or, with BadRows.REFUSE, has any bad row.
    """
    files = [Path(path) for path in paths]
    _refuse_repeats(files)
    for file in files:
        check_file(file)
    interpreted = [interpret(read_rows(file), answer) for file in files]
    questions, problems = check_questions(row for file_rows, _ in interpreted for row in file_rows)
    if problems and bad_rows == BadRows.REFUSE:
        others = f"; {counted(len(problems) - 1, 'more bad row')}" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{others}; fix the data, or leave bad rows out with data.bad_rows=skip "
            f"(--bad-rows skip on the command line)",
            problems,
        )
    if not questions:
        raise DataError(
            f"{', '.join(map(str, files))}: no usable question, all {len(problems)} rows are bad "
            f"(the first: {problems[0]}); fix the data",
            problems,
        )
    return LoadedQuestions(tuple(questions), tuple(problems), tuple(reading for _, reading in interpreted))


def read_rows(file: Path) -> Iterator[RawRow]:
    """The rows of one file in the schema's form, unchecked. Raises DataError where it cannot be read."""
    check_file(file)
    if kind_of(file) in (".jsonl", ".json"):
        yield from rows(file)
        return
    names = columns(file) or []
    missing = [name for name in REQUIRED_COLUMNS if name not in names]
    if not set(KEY_FIELDS) & set(names):
        missing.append(KEY_FIELDS[0])
    if missing:
        raise DataError(
            f"{file}: has no column {', '.join(missing)}; its columns are {', '.join(names)}: rename or add what is missing"
        )
    for row in rows(file):
        yield row if row.problem else _from_table(row)


def _refuse_repeats(files: Sequence[Path]) -> None:
    if not files:
        raise DataError(f"no data file is given; name one ({KINDS})")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file}: named twice; name every data file once")
        seen.add(file.resolve())


# ----------------------------------------------------------------------------------------------------- tables of columns
def _from_table(row: RawRow) -> RawRow:
    """A row of a table in the form that JSON would give it, where tables are ambiguous."""
    value: dict[str, Any] = dict(row.value)
    try:
        value["options"] = _options(value["options"])
    except ValueError as error:
        return replace(row, problem=f"options cannot be used: {error}")
    for name in ("level", "informativeness"):
        number = value.get(name)
        if isinstance(number, float):  # pandas stores whole numbers with gaps as floats, the gaps as NaN
            value[name] = None if number != number else int(number) if number.is_integer() else number
    return replace(row, value=value)


def _options(options: Any) -> Any:
    """Options as letter -> text from a struct (absent letters are null), a map, a list of {letter, text} or JSON."""
    if isinstance(options, str):
        return json.loads(options, object_pairs_hook=unique_keys)
    if isinstance(options, dict):
        return {letter: text for letter, text in options.items() if text is not None}
    if not isinstance(options, list):
        return options
    if all(isinstance(item, tuple) for item in options):  # an Arrow map
        return unique_keys(options)
    if all(isinstance(item, dict) and {"letter", "text"} <= item.keys() for item in options):
        return unique_keys([(item["letter"], item["text"]) for item in options])
    return options
