"""Writes questions as JSONL or Parquet, whole or not at all; a full disk is one clear error."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphamed import jsonl
from alphamed.errors import ConfigError, DataError
from alphamed.files import SURROGATES, replace_files
from alphamed.records import Question

ROW_GROUP = 50_000
Extra = Mapping[str, Any]
Writer = Callable[[Path], object]


def question_row(question: Question) -> dict[str, Any]:
    """The question as a row of the schema; what it lacks is left out."""
    row = {
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
        "context": question.context,
        "source": question.source,
        "level": question.level,
        "informativeness": question.informativeness,
    }
    return {key: value for key, value in row.items() if value is not None}


def question_writer(out: Path, questions: Sequence[Question], extras: Sequence[Extra] = ()) -> Writer:
    """What fills `out` (.jsonl or .parquet) with the questions; `extras` are further columns, one mapping a question.
    Raises ConfigError where the suffix is another."""
    check_suffix(out)
    rows = [question_row(question) | dict(extra) for question, extra in zip(questions, extras or [{}] * len(questions))]
    write = _write_jsonl if out.suffix == ".jsonl" else _write_parquet
    return lambda path: write(path, rows)


def check_suffix(out: Path) -> None:
    """Raises ConfigError where questions cannot be written under this name."""
    if out.suffix not in (".jsonl", ".parquet"):
        raise ConfigError(f"--out: {str(out)!r} ends neither in .jsonl nor in .parquet; choose one of the two")


def check_places(outputs: Mapping[str, Path | None], inputs: Mapping[str, Iterable[Path | None]], overwrite: bool) -> None:
    """Raises ConfigError where an output cannot be a file, is the same file as an input or another output, is in a folder
    that is read, or, without `overwrite`, exists already. Keys are the names that messages use; None: not given. To be
    called before anything is read, so that no mistake costs a file or an hour."""
    written: dict[Path, str] = {}
    read = {path.resolve(): (name, path) for name, paths in inputs.items() for path in paths if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if not path.name or path.exists() and not path.is_file():
            raise ConfigError(f"{name}: {str(path)!r} is not a file that can be written; give the name of one")
        place = path.resolve()
        if place in read:
            raise ConfigError(f"{name}: {path} is what {read[place][0]} reads; choose another file")
        if folder := next((place for place in place.parents if place in read and place.is_dir()), None):
            raise ConfigError(f"{name}: {path} is in {read[folder][1]}, which {read[folder][0]} reads; choose another place")
        if place in written:
            raise ConfigError(f"{name}: {path} is what {written[place]} writes; choose another file")
        written[place] = name
    if not overwrite and (
        existing := next(((name, path) for name, path in outputs.items() if path and path.exists()), None)
    ):
        raise ConfigError(
            f"{existing[0]}: {existing[1]} exists already; choose another name, or replace it with --overwrite"
        )


def beside(path: Path, suffix: str) -> Path:
    """The neighbour of `path` with another suffix; a path without a file name is returned unchanged, for `check_places` to
    refuse."""
    return path.with_suffix(suffix) if path.name else path


def write_all(writers: Mapping[Path, Writer]) -> None:
    """Write all files, then move them into place. Raises DataError where the disk is full or permissions are missing;
    nothing is left then."""
    with _disk_errors(", ".join(map(str, writers))):
        replace_files(writers)


def text_writer(text: str) -> Writer:
    return lambda path: path.write_text(text, encoding="utf-8", errors=SURROGATES)


def json_writer(value: Any) -> Writer:
    return lambda path: path.write_bytes(jsonl.encode(value, indent=2) + b"\n")


def content_sha256(questions: Iterable[Question]) -> str:
    """A hash of the questions in their order, the same for JSONL and Parquet."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps(question_row(question), ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # pyarrow's are OSError too
        reason = error.strerror or " ".join(str(error).split())
        raise DataError(
            f"{name}: cannot be written ({reason}); free space or choose another place. Nothing was left half-written"
        ) from None


def _write_jsonl(path: Path, rows: Iterable[Extra]) -> None:
    with path.open("wb") as file:
        file.writelines(map(jsonl.line, rows))


def _write_parquet(path: Path, rows: Sequence[Extra]) -> None:
    """Options become a struct with a field per letter, null where a question has no such letter: which `datasets`, pandas
    and our own reader accept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    letters = string.ascii_uppercase[: max((len(row["options"]) for row in rows), default=2)]
    fields = {
        "id": pa.string(),
        "question": pa.string(),
        "options": pa.struct([(letter, pa.string()) for letter in letters]),
        "answer": pa.string(),
        "context": pa.string(),
        "source": pa.string(),
        "level": pa.int64(),
    }
    if any("informativeness" in row for row in rows):
        fields["informativeness"] = pa.int64()
    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    schema = pa.schema(list(fields.items()) + [pa.field(key, types[kind]) for key, kind in _extra_kinds(rows, fields)])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, len(rows), ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(list(rows[first : first + ROW_GROUP]), schema=schema))


def _extra_kinds(rows: Iterable[Extra], known: Mapping[str, Any]) -> list[tuple[str, type]]:
    """The further columns in the order of their first appearance, each with the type of its values."""
    return list({key: type(value) for row in rows for key, value in row.items() if key not in known}.items())
