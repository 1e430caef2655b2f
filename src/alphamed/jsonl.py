r"""JSON lines: the only reader and writer of files that hold one JSON value per line. Standard library only.

A line ends at the byte `\n` and nowhere else: U+2028, U+2029, U+0085 and the like may occur inside a JSON text, where
`str.splitlines` and files in text mode would split it. A byte order mark before a line and `\r` at its end are ignored. Half
a surrogate pair is read as JSON spells it (`\ud800`) and written in the same way, since UTF-8 cannot encode it.

Only regular files and links to them are opened: reading a named pipe or a device could block forever. Files whose name ends
in .gz are decompressed.
"""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ByteStream = gzip.GzipFile | io.BufferedReader
BOM = b"\xef\xbb\xbf"  # what some editors put in front of UTF-8
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path) -> None:
    """Raises OSError where `path` is not a regular file, before anything blocks on it."""
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))


@contextmanager
def opened(path: Path) -> Iterator[ByteStream]:
    """Open a regular file for reading bytes, decompressed where its name ends in .gz. Every failure is an OSError with a
    `strerror`."""
    require_regular(path)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OSError(errno.EIO, f"not a complete gzip file: {error}", str(path)) from None


def byte_lines(path: Path) -> Iterator[bytes]:
    """The lines with their line ends, which the last may lack. Raises OSError as `opened` does."""
    with opened(path) as stream:
        yield from stream


def parse(line: bytes) -> Any:
    """The value of one line. Raises ValueError with a short phrase that says what is wrong."""
    line = line.removeprefix(BOM).rstrip(b"\r\n")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"wrong encoding: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line is not UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:  # a repeated key, a number of 5,000 digits, brackets 10,000 deep
        raise ValueError(f"not JSON that can be used: {error}") from None


def is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as dict. Raises ValueError for a repeated key: the json module would keep the last one and silently lose
    an option."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r:.60} occurs twice")
    return tree


def encode(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8 that `parse` reads back as the same value. ValueError for NaN and infinities, which JSON cannot hold."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent).encode("utf-8", "backslashreplace")


def line(value: Any) -> bytes:
    """`value` as one line, with its line end."""
    return encode(value) + b"\n"
