"""Hashes that are the same in every process and on every machine, and choices made by them."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stable_hash(*parts: object) -> int:
    """62 bits that are the same in every process and on every machine (Python's own hash of text is not)."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def digest_of(*parts: object) -> bytes:
    """16 bytes; the lengths of the parts are in them, so that ("ab", "c") and ("a", "bc") differ."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def draw(*parts: object) -> str:
    """A pseudo-random sort key that depends on its parts alone: choices made with it do not depend on file order or
    Python version."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()
