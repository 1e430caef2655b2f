"""Atomic writes (a file is the old or the complete new one, never part of it), JSON that every reader accepts, and a deadline for
work on a file system that may stop answering."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alphamed import jsonl
from alphamed.errors import ConfigError

T = TypeVar("T")
ANSWER_DEADLINE_S = 300.0
"""For a run's records in its directory, which take well below a second."""
SLOWEST_BYTES_PER_S = 20e6
"""A file system that is slower with large files counts as one that does not answer."""
SURROGATES = "backslashreplace"
"""Error handler for encoding texts: a byte ff in the name of a file is written as \\udcff and raises no error."""


def within_deadline(path: Path, work: str, function: Callable[[], T], deadline_s: float | None = None) -> T:
    """What `function` returns, which works on files at `path`. Raises TimeoutError naming path and work where it is not done within
    `deadline_s` (ANSWER_DEADLINE_S): a shared file system that has stopped answering holds a system call for ever.

    It runs in a thread of its own, which is left behind then, for nothing ends a call that hangs; it does not keep the process from
    ending."""
    deadline_s = ANSWER_DEADLINE_S if deadline_s is None else deadline_s
    values: list[T] = []
    errors: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        try:
            values.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            over.set()

    threading.Thread(target=run, name=f"files: {work}", daemon=True).start()
    if not over.wait(deadline_s):
        raise TimeoutError(errno.ETIMEDOUT, f"{work}: the file system gave no answer for {deadline_s:.0f} s", str(path))
    if errors:
        raise errors[0]
    return values[0]


def transfer_deadline_s(size: int) -> float:
    """For `within_deadline` where so many bytes are read or written."""
    return ANSWER_DEADLINE_S + size / SLOWEST_BYTES_PER_S


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary neighbour of `path`, then put it in place of `path` in one move.

    A process killed at any moment leaves the old file (or none) and at most a `*.partial` neighbour behind.
    """
    replace_files({path: write})


def replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """Like `replace_file` for several: none is moved to its place before all are complete, so that a full disk leaves no set
    without its card. Only a kill between two moves can leave new and old files side by side."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _naming(path):
                write(partials[path])
                with partials[path].open("rb") as file:
                    os.fsync(file.fileno())
        for path, partial in partials.items():
            os.replace(partial, path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file name to an error that lacks it: a full disk is reported by `write`, which does not know the name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary neighbour to fill in place of `path`, which may be an empty folder. It is renamed when the
    block succeeds; an error or Ctrl-C removes it, a kill at any moment leaves at most a `*.partial` neighbour."""
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _naming(path):
            partial.mkdir(parents=True)
            yield partial
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_folder(folder: Path, out: Path) -> None:
    """Copy a model's folder for `--out`, whole or not at all. Raises ConfigError."""
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out: {out} is not empty; name a new folder")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"--out: {out} is in the model's own folder; name a new folder elsewhere")

    def copy(source: str, destination: str) -> None:
        try:
            shutil.copy2(source, destination)
        except OSError as error:  # copytree itself would go on and end with a list of such
            raise ConfigError(
                f"--out: {source} cannot be copied to {out} ({error.strerror}); make room or choose another "
                f"place. Nothing was left half-written"
            ) from None

    with whole_folder(out) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True, copy_function=copy)


def replace_text(path: Path, text: str) -> None:
    """The text as UTF-8. Bytes of a file name that is not UTF-8 are written as escapes that JSON and YAML read."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8", errors=SURROGATES))


def replace_json(path: Path, value: Any) -> None:
    replace_file(path, lambda partial: partial.write_bytes(jsonl.encode(finite(value), indent=2) + b"\n"))


def append_json(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line to a JSONL file; it is on disk when this returns. A kill can leave an incomplete last line, which
    `read_json_lines` ignores and the next `append_json` removes."""
    append_json_lines(path, [row])


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines as `append_json` does, in one write. After a kill or on a full disk only the first of them may be
    there."""
    lines = _json_lines(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path), path.open("a+b") as file:
        if _last_line_is_incomplete(file):
            file.truncate(_last_line_end(path))
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_json_lines(path: Path, by_hand: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file; [] where there is no file. Raises ConfigError naming a line that is no JSON
    object.

    `by_hand`: a person wrote it; its last line counts even without a line end, and empty lines are skipped."""
    if not path.exists():
        return []
    rows, number = [], 0
    try:
        for number, line in enumerate(jsonl.byte_lines(path), start=1):
            if not by_hand and not line.endswith(b"\n") or by_hand and jsonl.is_blank(line):
                continue  # incomplete after a kill, or empty in a file written by hand
            rows.append(jsonl.parse(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("no JSON object")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); fix the file or its permissions") from None
    except ValueError as error:
        raise ConfigError(f"{path}: line {number} is {error}; remove it") from None
    return rows


def replace_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = _json_lines(rows)
    replace_file(path, lambda partial: partial.write_bytes(lines))


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(jsonl.line(finite(row)) for row in rows)


def finite(value: Any) -> Any:
    """The same value with NaN and infinities as None, which JSON can represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _last_line_is_incomplete(file) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _last_line_end(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
