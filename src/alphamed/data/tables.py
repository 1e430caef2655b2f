"""Files of rows in any container -> plain rows, unchanged: JSON lines, JSON, CSV, TSV (each also packed with
gzip) and Parquet.

All question files are read here: those of training, evaluation, benchmarks, `alphamed data` and local copies of public sets.
What a row means is decided elsewhere (sources.py, upstream.py).

CSV and TSV hold texts alone. They are read by the csv module and never by pandas, to which the options "None", "NA" and
"null" are missing values. An empty cell is a missing value, nothing else is.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed import jsonl
from alphamed.data.mcq import RawRow, short
from alphamed.errors import DataError

KINDS = ".jsonl, .json, .csv, .tsv (each also with .gz) or .parquet"
NESTED = ("options", "choices", "answers", "data", "context", "responses", "messages", "conversations")
"""Columns whose cells may hold a list or an object, as JSON or as Python writes it (what pandas makes of a dict)."""
WHOLE = ("level", "informativeness", "cop", "ra", "answer_index")
"""Columns of whole numbers in the schema and in public sets."""
_TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def kind_of(file: str | Path) -> str:
    """`.jsonl` of `x.jsonl` and of `X.JSONL.GZ`; empty where the suffix is that of no container."""
    name = Path(file).name.lower()
    packed = name.endswith(".gz")
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in _TEXT_SUFFIXES or (suffix == ".parquet" and not packed) else ""


def bare_name(file: str | Path) -> str:
    """The name without folder and suffixes: `mine` of `a/mine.jsonl.gz`. What a set is called by."""
    path = Path(file)
    return Path(path.stem).stem if path.suffix.lower() == ".gz" and kind_of(path) else path.stem


def rows(file: Path) -> Iterator[RawRow]:
    """The rows of one file, unchecked; one that cannot be read has a `problem`. DataError where the file cannot be read, or
    holds none."""
    check_file(file)
    empty = True
    try:
        for row in _READERS[kind_of(file)](file):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); fix the file or its permissions") from None
    if empty:
        raise DataError(f"{file}: is empty; give a file with questions")


def check_file(file: Path) -> None:
    """Raises DataError where `file` is not a regular file, or its suffix is not that of a container."""
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name the files in it ({KINDS})")
    if not file.exists():
        raise DataError(f"{file}: no such file; name an existing one ({KINDS})")
    try:
        jsonl.require_regular(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); save its content in a file and name that") from None
    if not kind_of(file):
        raise DataError(f"{file}: {file.suffix or 'a name without suffix'} is not supported; give {KINDS}")


def columns(file: Path) -> list[str] | None:
    """The names of a table's columns, or the keys of the first object in JSON; None where there is none. Raises DataError as
    `rows` does."""
    check_file(file)
    if kind_of(file) == ".parquet":
        return _parquet_names(file)
    if kind_of(file) in (".csv", ".tsv"):
        next(rows(file))  # raises the error of a broken file
        with jsonl.opened(file) as stream:
            return [name for name in _header(file, next(_records(file, stream))) if name]
    return next((list(row.value) for row in rows(file) if isinstance(row.value, Mapping)), None)


# ----------------------------------------------------------------------------------------------------------------- JSON
def _json_lines(file: Path) -> Iterator[RawRow]:
    """One row a line. Lines are cut as bytes, so that a badly encoded one is reported and the others still count."""
    for number, line in enumerate(jsonl.byte_lines(file), start=1):
        if number == 1:
            _refuse_utf16(file, line)
        if jsonl.is_blank(line):
            continue
        try:
            yield RawRow(str(file), number, jsonl.parse(line))
        except ValueError as problem:
            yield RawRow(str(file), number, problem=str(problem))


def _json(file: Path) -> Iterator[RawRow]:
    """An array of rows, an object of rows (each row's key is its `id`, unless it has one), or JSON lines under this name."""
    with jsonl.opened(file) as stream:
        content = stream.read()
    _refuse_utf16(file, content)
    content = content.removeprefix(jsonl.BOM).strip()
    try:
        tree = jsonl.parse(content) if content else []
    except ValueError as problem:
        if _is_json(content.partition(b"\n")[0]):  # the first line alone is a value
            yield from _json_lines(file)
            return
        raise DataError(
            f"{file}: {problem}{_ends_early(content)}; give an array of rows, an object of rows, or a row a line"
        ) from None
    if isinstance(tree, dict) and tree and all(isinstance(value, dict) for value in tree.values()):
        tree = [value if value.get("id") is not None else value | {"id": key} for key, value in tree.items()]
    for number, row in enumerate(tree if isinstance(tree, list) else [tree], start=1):
        yield RawRow(str(file), number, row)


def _is_json(line: bytes) -> bool:
    try:
        jsonl.parse(line)
    except ValueError:
        return False
    return True


def _ends_early(content: bytes) -> str:
    """Whether the file looks cut off: it begins a list or an object and does not end as one."""
    closing = {b"[": b"]", b"{": b"}"}.get(content[:1])
    return " (the file seems cut off)" if closing and not content.endswith(closing) else ""


def _refuse_utf16(file: Path, content: bytes) -> None:
    if content.startswith(_UTF16):
        raise DataError(f"{file}: is UTF-16; save it as UTF-8")


# ------------------------------------------------------------------------------------------------------------ CSV, TSV
def _delimited(file: Path) -> Iterator[RawRow]:
    """One row a record; the first names the columns. `line` is where a record begins."""
    csv.field_size_limit(sys.maxsize >> 32)  # of a cell; the module's own limit is 128 KiB
    with jsonl.opened(file) as stream:
        records = _records(file, stream)
        try:
            names = _header(file, next(records, []))
            begin = records.line_num + 1
            for cells in records:
                if cells:
                    yield _record(file, begin, names, cells)
                begin = records.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{file}: line {records.line_num} cannot be read as a table ({error}); write its texts in "
                f"double quotes, and a double quote inside them twice"
            ) from None


def _records(file: Path, stream: jsonl.ByteStream) -> Any:
    """The csv module's reader. A byte that is not UTF-8 becomes half a surrogate pair (0xdc00 + byte)."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return csv.reader(text, "excel-tab" if kind_of(file) == ".tsv" else "excel", strict=True)


def _header(file: Path, names: Sequence[str]) -> list[str]:
    """The names of the columns. One without a name (pandas writes its row numbers so) is skipped."""
    if names and names[0].startswith(("\udcff\udcfe", "\udcfe\udcff")):
        _refuse_utf16(file, _UTF16[0])
    names = [name.strip() for name in names]
    if repeated := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{file}: has two columns called {short(repeated)}; rename one")
    return names


def _record(file: Path, line: int, names: Sequence[str], cells: Sequence[str]) -> RawRow:
    if len(cells) != len(names):
        return RawRow(str(file), line, problem=f"{len(cells)} cells in a table of {len(names)} columns")
    for name, cell in zip(names, cells):
        if wrong := next((character for character in cell if "\udc80" <= character <= "\udcff"), None):
            return RawRow(
                str(file),
                line,
                problem=f"wrong encoding: byte 0x{ord(wrong) - 0xDC00:02x} in {name or 'a cell'} is not UTF-8",
            )
    try:
        return RawRow(str(file), line, from_cells(dict(zip(names, cells))))
    except ValueError as error:
        return RawRow(str(file), line, problem=str(error))


def from_cells(cells: Mapping[str, str | None]) -> dict[str, Any]:
    """The row that a row of texts represents: None for an empty cell, lists, objects and whole numbers in the columns
    that hold them. ValueError names a list or an object that cannot be read."""
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if name}
    for name, cell in row.items():
        if cell is None or not cell.strip():
            row[name] = None
        elif name in NESTED and cell.strip()[0] in "[{" and cell.strip()[-1] in "]}":
            row[name] = _nested(name, cell.strip())
        elif name in WHOLE or (name == "answer" and row.get("choices")):  # MMLU's answer is a number
            row[name] = _whole(cell.strip())
    return row


def _nested(name: str, cell: str) -> Any:
    try:
        value = json.loads(cell, object_pairs_hook=jsonl.unique_keys)
    except json.JSONDecodeError as error:
        try:
            value = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            if name == "context":
                return cell
            raise ValueError(f"{name} cannot be used: not JSON ({error.msg} at character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be used: {error}") from None
    return cell if name == "context" and not isinstance(value, dict) else value  # a text that begins with a bracket


def _whole(cell: str) -> int | str:
    """A whole number, also as pandas writes a column with gaps (`3.0`); else the cell, for the check to name it."""
    digits = cell.removesuffix(".0")
    return int(digits) if digits.removeprefix("-").isdecimal() and digits.isascii() and len(digits) < 10 else cell


# -------------------------------------------------------------------------------------------------------------- Parquet
def _parquet(file: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=10_000):
                for value, problem in _parquet_rows(batch):
                    number += 1
                    yield RawRow(str(file), number, value, problem)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(file, error) from None


def _parquet_rows(batch: Any) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    try:
        yield from ((row, None) for row in batch.to_pylist())
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            row: dict[str, Any] = {}
            problem = None
            for name in batch.schema.names:
                try:
                    row[name] = batch.column(name)[i].as_py()
                except UnicodeDecodeError:
                    problem = problem or f"wrong encoding: {name} is not UTF-8"
            yield (None, problem) if problem else (row, None)


def _parquet_names(file: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(file).names)
    except (pa.ArrowException, OSError) as error:
        raise _no_parquet(file, error) from None


def _no_parquet(file: Path, error: Exception) -> DataError:
    return DataError(f"{file}: not a readable Parquet file ({short(str(error), 100)}); write it again")


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": _parquet,
}
