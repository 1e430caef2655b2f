"""Traces of single steps (`profile` in the configuration), and the names that stages have in them.

`kind: torch` writes `profile/step_NNNNNN_rank_R.json.gz` into the run directory, a Chrome trace for Perfetto or
chrome://tracing. `kind: nsys` marks the steps for Nsight Systems, under which the run was started (docs/training.md).
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from alphamed.config.choices import ProfileKind
from alphamed.config.schema import Config

FOLDER = "profile"


class StepProfiler:
    """Traces the configured steps of this rank, and does nothing in all others."""

    def __init__(self, config: Config, rank: int) -> None:
        self._folder, self._rank, self._kind = config.run_dir / FOLDER, rank, config.profile.kind
        self._steps = frozenset(config.profile.steps if rank in config.profile.ranks else ())

    def steps(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps as they come; from each that is traced until the next is asked for, or the loop is left, a trace runs."""
        for step in steps:
            with self._trace(step) if step in self._steps else contextlib.nullcontext():
                yield step

    def path(self, step: int) -> Path:
        return self._folder / f"step_{step:06d}_rank_{self._rank}.json.gz"

    @contextlib.contextmanager
    def _trace(self, step: int) -> Iterator[None]:
        with _cuda_range() if self._kind == ProfileKind.NSYS else self._chrome_trace(step), stage(f"step {step}"):
            yield

    @contextlib.contextmanager
    def _chrome_trace(self, step: int) -> Iterator[None]:
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        tracer = profile(activities=activities)
        tracer.start()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize()
            tracer.stop()
            self._write(tracer.export_chrome_trace, self.path(step))

    def _write(self, export, path: Path) -> None:
        partial = path.with_name(f".partial_{path.name}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            export(str(partial))
            os.replace(partial, path)
        except OSError as error:  # a run does not end for a trace
            print(f"{path}: the trace is not written ({error})", file=sys.stderr)


@contextlib.contextmanager
def _cuda_range() -> Iterator[None]:
    """What `nsys profile --capture-range=cudaProfilerApi` records."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """A range of this name in traces: torch's, and on CUDA those of NVTX. Also a decorator."""
    import torch

    on_gpu = torch.cuda.is_initialized()
    with torch.profiler.record_function(name):
        if on_gpu:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.nvtx.range_pop()
