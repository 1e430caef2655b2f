"""Importing large libraries, quicker."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quick_imports(*without: str) -> Iterator[None]:
    """Import in this block what is large. No garbage is collected meanwhile, which is a quarter of the CPU time of importing
    vLLM, and later collections do not look at what was imported.

    `without`: modules that are absent inside the block, optional ones that a library imports in a `try`."""
    absent = [name for name in without if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: importing it raises ImportError
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        gc.freeze()
        if collecting:
            gc.enable()
