"""Notice a bad update and keep its batch: non-finite loss, or a loss or gradient norm far above what is usual.

The rule: a value is a spike when its absolute value exceeds SPIKE_FACTOR times the running median of the absolute
values of the last WINDOW steps (at least MINIMUM of them) and exceeds a floor. The floors keep quiet a quantity that
hovers around 0: a GRPO loss does, since advantages sum to 0 in a group, and reaches 1 only when ratios run away; a
gradient norm below 1 is below the usual clipping.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from alphamed.files import replace_file
from alphamed.records import Batch

SPIKE_FACTOR = 10.0
WINDOW = 50
MINIMUM = 10
FLOORS = {"policy/loss": 1.0, "policy/grad_norm": 1.0}
MAX_SPIKE_DUMPS = 5
"""A run that spikes for ever must not fill the disk; batches of non-finite steps are kept all the same, since the
policy stops the run after optimizer.max_skipped_steps of them."""


class SpikeWatch:
    """Remembers recent losses and gradient norms and reports outliers."""

    def __init__(self) -> None:
        self._recent = {name: deque[float](maxlen=WINDOW) for name in FLOORS}
        self._spikes = 0

    def check(self, metrics: Mapping[str, float | None]) -> str | None:
        """What is wrong with this step and worth a dump, or None. None as a value is a number that was not finite."""
        reasons = []
        for name, floor in FLOORS.items():
            if name not in metrics:
                continue
            value = metrics[name]
            if value is None or not math.isfinite(value):
                return f"{name} is not finite"
            usual = statistics.median(self._recent[name]) if len(self._recent[name]) >= MINIMUM else math.inf
            if abs(value) > max(SPIKE_FACTOR * usual, floor):
                reasons.append(f"{name} {value:.4g} is over {SPIKE_FACTOR:g} times its running median {usual:.4g}")
            if value:  # a step without a signal has no gradient; it says nothing of the usual
                self._recent[name].append(abs(value))
        self._spikes += bool(reasons)
        return "; ".join(reasons) if reasons and self._spikes <= MAX_SPIKE_DUMPS else None


def dump_batch(run_dir: Path, step: int, rank: int, reason: str, batch: Batch) -> Path:
    """Write this rank's part of a step's batch to run_dir/dumps/step_N/rank_R.pt and return the path.

    The file holds plain dicts, lists and CPU tensors under `batch` (the fields of `records.Batch`), with `step`,
    `reason` and `rollouts`, the Parquet file of the same step; `torch.load(path, weights_only=True)` reads it.
    """
    import torch

    path = run_dir / "dumps" / f"step_{step:06d}" / f"rank_{rank}.pt"
    content = {"step": step, "reason": reason, "rollouts": f"rollouts/step_{step:06d}.parquet", "batch": _plain(batch)}
    replace_file(path, lambda partial: torch.save(content, partial))
    return path


def _plain(value: Any) -> Any:
    """Records as dicts, sequences as lists, tensors as CPU copies of their own storage."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "detach"):
        return value.detach().cpu().clone()
    return value
