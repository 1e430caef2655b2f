"""Wall-clock seconds of the loop's stages, by metric name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Timer:
    """`with timer("time/sync_s"): ...` adds to `timer.seconds["time/sync_s"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
