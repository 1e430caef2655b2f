"""The output folder of an evaluation: made, and kept to one start at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alphamed.cluster.ledger import LOCK_FILE, Lock
from alphamed.errors import ConfigError
from alphamed.evaluation.settings import SETTINGS

LEFT_OVER = (LOCK_FILE, "engines")
"""What a start leaves that ended before it had written its settings."""


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ConfigError where `out` is a folder of other things: answers would be mixed with them. An earlier evaluation is
    taken up again, if its settings are the same."""
    if overwrite or not out.is_dir() or (out / SETTINGS).exists():
        return
    other = sorted(path.name for path in out.iterdir() if path.name not in LEFT_OVER and path.suffix != ".partial")
    if other:
        raise ConfigError(
            f"--out: {out} holds other files ({', '.join(other[:3])}{', ...' * (len(other) > 3)}) and no "
            f"evaluation; choose another folder, or put it there all the same with --overwrite"
        )


@contextlib.contextmanager
def held(out: Path, option: str = "--out", wait_s: float = 0.0) -> Iterator[None]:
    """Keep other starts out of a folder, which is made where it is not there. Whatever is read from it in order to be
    changed is read while it is held: another start could change it in between. Raises ConfigError where another start is at
    work there (for longer than `wait_s`), or the folder cannot be made."""
    lock = Lock(out, f"{option}:", "choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.take(wait_s)
    except OSError as error:
        raise ConfigError(f"{option}: {out} cannot be made or written ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()
