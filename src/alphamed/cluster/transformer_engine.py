"""Transformer Engine: whether it is installed, imports, and uses the cuDNN that torch has loaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from pathlib import Path

from alphamed.errors import ConfigError


@cache
def usable() -> bool:
    """Whether Transformer Engine is installed. Raises ConfigError where it is and cannot be used."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    if failure := problem():
        raise ConfigError(f"Transformer Engine: {failure}, or uninstall it: Megatron's local layers are then used")
    return True


def problem() -> str | None:
    """Why the installed Transformer Engine cannot be used, with the fix; None where it can. Imports it and torch.

    It loads the cuDNN that the dynamic loader finds first. Where that is a system's and not the one of torch's wheels, two
    are in the process, and torch refuses the older one or turns cuDNN attention off."""
    import torch

    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # ImportError, OSError of a library, RuntimeError of another version, ...
        return f"it does not import ({_line(error)}); install transformer-engine[pytorch] as requirements.txt pins it"
    fix = f"set LD_LIBRARY_PATH={Path(torch.__file__).parents[1] / 'nvidia' / 'cudnn' / 'lib'}"
    try:
        torch.backends.cudnn.version()
    except RuntimeError as error:
        return f"torch cannot use cuDNN once it is imported ({_line(error)}); {fix}"
    libraries = cudnn_libraries(Path("/proc/self/maps").read_text())
    if len(libraries) > 1:
        return f"two cuDNNs are in one process ({', '.join(libraries)}); {fix}"
    return None


def cudnn_libraries(maps: str) -> list[str]:
    """The main libraries of cuDNN among the files of a process's memory map (/proc/PID/maps), each once."""
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted({os.path.realpath(path) for path in paths if os.path.basename(path).startswith("libcudnn.so")})


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
