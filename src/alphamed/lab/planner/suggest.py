"""Other layouts of a job's trainer, and overrides applied to a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from alphamed.config.loading import changed_config
from alphamed.errors import ConfigError
from alphamed.model.shape import context_sizes, tensor_sizes
from alphamed.planner.job import PlannedJob

Overrides = tuple[str, ...]
NODES_LEFT = 4
"""Layouts whose data ranks fill whole nodes are tried with fewer than so many nodes left for engines: 3 of 4 nodes, 4 of
6."""


def layouts(job: PlannedJob, gpus: int) -> Iterator[dict[str, int]]:
    """Every layout of a trainer on at most so many GPUs, of powers of two and the present sizes, or with data ranks that fill
    nodes. Tensor and context ranks, which communicate in every layer, stay within a node."""
    powers = {2**power for power in range(max(gpus, 1).bit_length())}
    most = job.prompts // job.updates  # a question for each data rank
    now, s = axes(job), job.shape
    neighbours = gpus if job.gpu.is_cpu else job.gpus_per_node
    for tensor in sorted((powers | {now["tensor"]}) & set(tensor_sizes(s))):
        for context in sorted((powers | {now["context"]}) & set(context_sizes(s, tensor))):
            if tensor * context > neighbours:
                continue
            for pipeline in sorted(size for size in powers | {now["pipeline"]} if s.layers % size == 0):
                filling = {
                    total // (tensor * context * pipeline)
                    for total in range(gpus, max(0, gpus - NODES_LEFT * neighbours), -neighbours)
                }
                for data in sorted((powers | filling | {now["data"]}) - {0}):
                    if data <= most and tensor * context * pipeline * data <= gpus:
                        yield {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}


def axes(job: PlannedJob) -> dict[str, int]:
    """The trainer's axes and their sizes."""
    p = job.parallel
    return {"tensor": p.tensor, "context": p.context, "pipeline": p.pipeline, "data": p.data}


def consistent(job: PlannedJob, cut: dict[str, int]) -> Overrides:
    """The settings that follow from a layout."""
    p, overrides = job.parallel, []
    if p.sequence != (cut["tensor"] > 1):
        overrides.append(f"parallel.sequence={'true' if cut['tensor'] > 1 else 'false'}")
    if cut["pipeline"] == 1 and p.virtual_pipeline:
        overrides.append("parallel.virtual_pipeline=null")
    return tuple(overrides)


def applied(job: PlannedJob, overrides: Overrides) -> PlannedJob | None:
    """The changed job, or None where the configuration refuses it or nothing changes."""
    try:
        config = changed_config(job.config, overrides)
    except ConfigError:
        return None
    return replace(job, config=config) if config != job.config else None
