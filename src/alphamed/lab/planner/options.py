"""Checks the options of `alphamed plan` before anything is planned or written."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

from alphamed.config.schema import Config
from alphamed.config.sections import MAX_GPUS
from alphamed.errors import ConfigError


def check_options(options: Namespace, config: Config) -> None:
    """Refuse numbers without a meaning and files that cannot be written. Raises ConfigError."""
    for name in ("nodes", "prompt_tokens", "response_tokens", "storage"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')}: {value:g} is not a positive number")
    per_node = config.cluster.gpus_per_node
    if options.nodes is not None and options.nodes * per_node > MAX_GPUS:
        raise ConfigError(
            f"--nodes: {options.nodes} nodes of {per_node} GPUs are more than the {MAX_GPUS:,} GPUs that "
            f"can be planned; give at most {MAX_GPUS // per_node}"
        )
    for option, value, field, limit in (
        ("--prompt-tokens", options.prompt_tokens, "prompt.max_tokens", config.prompt.max_tokens),
        ("--response-tokens", options.response_tokens, "rollout.max_response_tokens", config.rollout.max_response_tokens),
    ):
        if value is not None and not 1 <= value <= limit:
            raise ConfigError(
                f"{option}: a mean of {value:g} is not between 1 and {field} ({limit}); give one that is, or raise {field}"
            )
    for option, path in (("--json", options.json), ("--html", options.html)):
        if path is not None:
            _check_file(option, path)


def _check_file(option: str, path: Path) -> None:
    if path.suffix != f".{option.removeprefix('--')}":  # a plan replaces only an older plan
        raise ConfigError(f"{option}: {str(path)!r} does not end in .{option.removeprefix('--')}; name such a file")
    if not path.parent.is_dir():
        raise ConfigError(
            f"{option}: the folder of {str(path)!r} does not exist; make {str(path.parent)!r} first, or choose another place"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"{option}: {str(path)!r} cannot be written, {str(path.parent)!r} is read-only; choose another place"
        )
