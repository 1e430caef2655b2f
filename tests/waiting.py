"""Waiting in tests: for a condition, under a limit that says "it hangs" and not "this machine is busy"."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 900.0
"""For whatever takes seconds where nothing else runs. Also the time-out of processes and calls that must end by themselves."""


def until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S, pause_s: float = 0.02) -> None:
    """Wait until `condition()` is true. It may itself fail where waiting has become pointless (a process that ended)."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s:.0f} s for {what}"
        time.sleep(pause_s)
