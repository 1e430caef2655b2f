"""Archives that are byte-identical for identical content, and the reading of archives from untrusted sources.

The first member, manifest.json, names every other one with size and SHA-256; nothing else is read, and nothing is written
before all of it has been checked.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from alphamed.errors import ConfigError
from alphamed.jsonl import require_regular

MANIFEST = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_BYTES = 2 << 30
"""Unpacked, and held in memory. A bundle holds questions and answers, no weights: 10,000 answers of 2,000 tokens are
0.1 GB."""
MAX_STREAM = MAX_BYTES + (256 << 20)
"""Unpacked, with tar's headers, which are read completely before they can be checked."""
COMPRESSION = 6
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive in memory: the manifest's own entries, and the content of every file by its name."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]


def write_archive(path: Path, entries: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write a .tar.gz with `entries` in its manifest. It contains no times, owners or machine names, and its order is
    fixed."""
    listed = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(files.items())
    }
    manifest = (
        json.dumps(
            {"format": FORMAT, **entries, "files": listed}, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False
        ).encode()
        + b"\n"
    )
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", COMPRESSION, raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in ((MANIFEST, manifest), *((name, files[name]) for name in listed)):
            member = tarfile.TarInfo(name)  # mtime 0, uid and gid 0, mode 0644
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def read_archive(path: Path) -> Archive:
    """Read and check an archive; nothing is written. Raises ConfigError naming the member and what is wrong with it."""
    try:
        require_regular(path)
        with gzip.open(path) as unpacked:
            packed = _Limited(path, unpacked)
            with tarfile.open(fileobj=packed, mode="r|") as tar:
                archive = _read(path, tar)
            while packed.read(CHUNK):  # to gzip's checksum at the end
                pass
            return archive
    except FileNotFoundError:
        raise ConfigError(f"bundle {path}: no such file; give a .tar.gz made by `alphamed bundle`") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ConfigError(
            f"bundle {path}: damaged or not a .tar.gz ({' '.join(str(error).split())}); fetch it again"
        ) from None


class _Limited(io.BufferedIOBase):
    """A stream that ends with ConfigError after MAX_STREAM bytes: a megabyte of gzip can hold a gigabyte."""

    def __init__(self, path: Path, stream: gzip.GzipFile):
        self._path, self._stream, self._remaining = path, stream, MAX_STREAM

    def read(self, size: int | None = -1) -> bytes:
        data = self._stream.read(size)
        self._remaining -= len(data)
        if self._remaining < 0:
            raise ConfigError(
                f"bundle {self._path}: unpacks to more than {MAX_STREAM:,} bytes; do not use it, fetch it again"
            )
        return data


def _read(path: Path, tar: tarfile.TarFile) -> Archive:
    first = tar.next()
    if first is None or first.name != MANIFEST or not first.isreg() or first.size > MAX_MANIFEST_BYTES:
        raise ConfigError(f"bundle {path}: does not begin with {MANIFEST}; give a .tar.gz made by `alphamed bundle`")
    manifest = _manifest(path, _content(tar, first))
    listed = manifest.pop("files")
    contents: dict[str, bytes] = {}
    total = 0
    while (member := tar.next()) is not None:
        problem = _member_problem(member, listed, contents)
        total += member.size
        if problem is None and total > MAX_BYTES:
            problem = f"makes the content larger than {MAX_BYTES >> 30} GiB"
        if problem is None:
            contents[member.name] = _content(tar, member)
            if hashlib.sha256(contents[member.name]).hexdigest() != listed[member.name]["sha256"]:
                problem = "is not what the manifest says (another SHA-256)"
        if problem:
            raise ConfigError(f"bundle {path}: {member.name[:200]!r} {problem}; do not use it, fetch it again")
    if missing := sorted(listed.keys() - contents.keys()):
        raise ConfigError(
            f"bundle {path}: {missing[0]} is missing"
            f"{f', and {len(missing) - 1} more' if missing[1:] else ''}; fetch it again"
        )
    return Archive(manifest, contents)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    assert stream is not None, f"{member.name} is not a regular file"
    parts = []
    while part := stream.read(CHUNK):
        parts.append(part)
    return b"".join(parts)


def _manifest(path: Path, content: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(content)
        names = tree["files"]
        well_formed = tree["format"] == FORMAT and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in names.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"bundle {path}: {MANIFEST} is damaged ({type(error).__name__}); fetch it again") from None
    if not well_formed:
        raise ConfigError(
            f"bundle {path}: its format is {tree['format']!r}, this version reads {FORMAT}; use the version that made it"
        )
    return tree


def _member_problem(member: tarfile.TarInfo, listed: Mapping[str, Any], contents: Mapping[str, bytes]) -> str | None:
    """What is wrong with a member before it is read."""
    place = PurePosixPath(member.name)
    if not member.isreg():
        return "is not a regular file"
    if place.is_absolute() or ".." in place.parts or "\\" in member.name or str(place) != member.name:
        return "would be written outside the bundle's folder"
    if not member.name.isprintable():
        return "has a name that cannot be written"
    if member.name not in listed:
        return "is not in the manifest"
    if member.name in contents:
        return "is there twice"
    if member.size != listed[member.name]["bytes"]:
        return f"has {member.size} bytes, the manifest says {listed[member.name]['bytes']}"
    return None
