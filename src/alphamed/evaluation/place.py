"""The output folder of an evaluation: made, and kept to one start at a time."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alphamed.cluster.ledger import Lock
from alphamed.config import ConfigError


@contextlib.contextmanager
def held(out: Path, option: str = "--out", wait_s: float = 0.0) -> Iterator[None]:
    """Keep other starts out of a folder, which is made where it is not there. Whatever is read from it in order to be
    changed is read while it is held: another start could change it in between. Raises ConfigError where another start is at
    work there (for longer than `wait_s`), or the folder can not be made."""
    lock = Lock(out, f"{option}:", "choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.take(wait_s)
    except OSError as error:
        raise ConfigError(f"{option}: {out} can not be made or written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()
