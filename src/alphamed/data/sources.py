"""Reads question files (JSONL, Parquet) and refuses or skips their bad rows."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.config_choices import BadRows
from alphamed.data.keys import KEY_FIELDS, AnswerForm
from alphamed.data.mcq import DataError, Row, RowProblem, check_questions, short
from alphamed.data.reading import Reading, interpret
from alphamed.data.text import counted
from alphamed.records import Question

COLUMNS = ("id", "question", "options", "answer", "context", "source", "level", "informativeness")
REQUIRED_COLUMNS = ("question", "options", "answer")
EXTRA_COLUMNS = ("licence", *KEY_FIELDS[1:])      # read where present, no part of a Question
_BOM = b"\xef\xbb\xbf"      # what some editors put in front of UTF-8


@dataclass(frozen=True, slots=True)
class LoadedQuestions:
    """The questions of some files in file order, the bad rows that were left out of them, and how each file was read."""
    questions: tuple[Question, ...]
    skipped: tuple[RowProblem, ...] = ()
    readings: tuple[Reading, ...] = ()


def load_questions(paths: Iterable[str | Path], bad_rows: BadRows = BadRows.REFUSE,
                   answer: AnswerForm | None = None) -> LoadedQuestions:
    """Read all files; ids must be unique across them. `answer` is the form of their keys where the user declares it.

    Raises DataError where a file can not be read, holds no question, or, with BadRows.REFUSE, has any bad row.
    """
    files = [Path(path) for path in paths]
    _refuse_repeats(files)
    readers = [_reader(file) for file in files]
    read = [interpret(reader(file), answer) for file, reader in zip(files, readers)]
    questions, problems = check_questions(row for rows, _ in read for row in rows)
    if problems and bad_rows == BadRows.REFUSE:
        others = f"; {counted(len(problems) - 1, 'more bad row')}" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{others}; mend the data, or leave bad rows out with data.bad_rows=skip "
                        f"(--bad-rows skip on the command line)",
                        problems)
    if not questions:
        raise DataError(f"{', '.join(map(str, files))}: no usable question, all {len(problems)} rows are bad "
                        f"(the first: {problems[0]}); mend the data", problems)
    return LoadedQuestions(tuple(questions), tuple(problems), tuple(reading for _, reading in read))


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of one file as they stand there, unchecked. Raises DataError where it can not be read."""
    yield from _reader(file)(file)


def _refuse_repeats(files: Sequence[Path]) -> None:
    if not files:
        raise DataError("no data file is given; name a .jsonl or .parquet file")
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file}: named twice; name every data file once")
        seen.add(file.resolve())


def _reader(file: Path) -> Callable[[Path], Iterator[Row]]:
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name the .jsonl or .parquet files in it")
    if not file.exists():
        raise DataError(f"{file}: no such file; name an existing .jsonl or .parquet file")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise DataError(f"{file}: {file.suffix or 'a name without suffix'} is not supported; give .jsonl or .parquet")
    return readers[file.suffix]


# ---------------------------------------------------------------------------------------------------------------- JSONL
def _read_jsonl(file: Path) -> Iterator[Row]:
    """One row a line. Lines are cut as bytes, so that a badly encoded one is reported and the others still count."""
    empty = True
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    empty = False
                    yield _parse_line(line.rstrip(b"\r\n"), str(file), number)
    except OSError as e:
        raise DataError(f"{file}: can not be read ({e.strerror}); mend the file or its permissions") from None
    if empty:
        raise DataError(f"{file}: is empty; give a file with one question a line")


def _parse_line(line: bytes, file: str, number: int) -> Row:
    try:
        return Row(file, number, json.loads(line.decode("utf-8"), object_pairs_hook=_unique_keys))
    except UnicodeDecodeError as e:
        return Row(file, number, problem=f"wrong encoding: byte 0x{line[e.start]:02x} at byte {e.start + 1} of the "
                                         "line is not UTF-8")
    except json.JSONDecodeError as e:
        return Row(file, number, problem=f"not JSON: {e.msg} at character {e.pos + 1}")
    except (ValueError, RecursionError) as e:      # a repeated key, a number of 5,000 digits, brackets 10,000 deep
        return Row(file, number, problem=f"not JSON that can be used: {e}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as dict. Plain json keeps the last of two equal keys, which would lose an option in silence."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {short(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return tree


# -------------------------------------------------------------------------------------------------------------- Parquet
def _read_parquet(file: Path) -> Iterator[Row]:
    """One row a Parquet row. Only the schema's columns are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if missing := [name for name in REQUIRED_COLUMNS if name not in table.schema_arrow.names]:
                raise DataError(f"{file}: has no column {', '.join(missing)}; its columns are "
                                f"{', '.join(table.schema_arrow.names)}: rename or add what is missing")
            if not table.metadata.num_rows:
                raise DataError(f"{file}: is empty; give a file with questions")
            columns = [name for name in (*COLUMNS, *EXTRA_COLUMNS) if name in table.schema_arrow.names]
            number = 0
            for batch in table.iter_batches(columns=columns):
                for i in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(batch, i, str(file), number)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{file}: not a readable Parquet file ({short(str(e), 100)}); write it again") from None


def _parquet_row(batch: Any, i: int, file: str, number: int) -> Row:
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError:
            return Row(file, number, problem=f"wrong encoding: {name} is not UTF-8")
    try:
        row["options"] = _parquet_options(row["options"])
    except ValueError as e:
        return Row(file, number, problem=f"options can not be used: {e}")
    for name in ("level", "informativeness"):
        value = row.get(name)
        if isinstance(value, float):     # pandas stores a column of whole numbers with gaps as floats, the gaps as NaN
            row[name] = None if value != value else int(value) if value.is_integer() else value
    return Row(file, number, row)


def _parquet_options(options: Any) -> Any:
    """Options as letter -> text from a struct (absent letters are null), a map, a list of {letter, text} or JSON."""
    if isinstance(options, str):
        return json.loads(options, object_pairs_hook=_unique_keys)
    if isinstance(options, dict):
        return {letter: text for letter, text in options.items() if text is not None}
    if not isinstance(options, list):
        return options
    if all(isinstance(item, tuple) for item in options):       # an Arrow map
        return _unique_keys(options)
    if all(isinstance(item, dict) and {"letter", "text"} <= item.keys() for item in options):
        return _unique_keys([(item["letter"], item["text"]) for item in options])
    return options
