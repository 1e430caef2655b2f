"""Candidates of the search for a plan that fits: the type of a change of settings, and the changes of the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import log2
from typing import Any

from alphamed.config.choices import Recompute, ReferencePlace
from alphamed.config.sections import AUTO_CHUNK_TOKENS
from alphamed.lab.planner.suggest import Overrides, axes, layouts
from alphamed.model.shape import divisors
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import nearest
from alphamed.planner.memory import stage_use

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SideChange:
    """Settings of one side (trainer or engines) that differ from the job's: how many, how far, and the bytes that this side
    then needs on a GPU."""

    count: int
    distance: float
    settings: tuple[tuple[str, Any], ...]
    bytes: int = 0


def with_settings(job: PlannedJob, settings: Settings) -> PlannedJob:
    """The job with other settings, without validation: only for arithmetic."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    config = job.config.model_copy(
        update={section: getattr(job.config, section).model_copy(update=values) for section, values in sections.items()}
    )
    return replace(job, config=config)


def overrides_of(settings: Settings) -> Overrides:
    return tuple(f"{key}={_written(value)}" for key, value in settings.items())


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.value if isinstance(value, StrEnum) else str(value)


# --------------------------------------------------------------------------------------------------------------- trainer
def trainer_parts(job: PlannedJob, nodes: int) -> Iterator[SideChange]:
    """Layouts x recomputation x row lengths x switches that save memory; `measured` computes the bytes they need."""
    now, p = axes(job), job.parallel
    levels = list(Recompute)
    for cut in layouts(job, job.gpus if job.gpu.is_cpu else nodes * job.gpus_per_node):
        moved = {f"parallel.{axis}": size for axis, size in cut.items() if size != now[axis]}
        distance = sum(abs(log2(size / now[axis])) for axis, size in cut.items())
        followers = _followers(job, cut)
        for switches in _switches(job, cut):
            base = moved | followers | switches
            for tokens in _row_lengths(with_settings(job, base)):
                row = {} if tokens == p.micro_batch_tokens else {"parallel.micro_batch_tokens": tokens}
                for level in levels:
                    again = {} if level == p.recompute else {"parallel.recompute": level}
                    far = (
                        distance
                        + abs(log2(tokens / p.micro_batch_tokens))
                        + len(switches)
                        + abs(levels.index(level) - levels.index(p.recompute))
                    )
                    yield SideChange(
                        len(moved) + len(switches) + len(row) + len(again),
                        round(far, 6),
                        tuple((base | row | again).items()),
                    )


def _followers(job: PlannedJob, cut: Mapping[str, int]) -> dict[str, Any]:
    """Settings that follow from a layout; they do not count as changes."""
    p, settings = job.parallel, {}
    if p.sequence and cut["tensor"] == 1:
        settings["parallel.sequence"] = False
    if not p.sequence and cut["tensor"] > 1 and p.tensor == 1:
        settings["parallel.sequence"] = True
    if p.virtual_pipeline and (cut["pipeline"] == 1 or job.shape.layers // cut["pipeline"] % p.virtual_pipeline):
        near = nearest(p.virtual_pipeline, divisors(job.shape.layers // cut["pipeline"]))
        settings["parallel.virtual_pipeline"] = near if near > 1 and cut["pipeline"] > 1 else None
    return settings


def _switches(job: PlannedJob, cut: Mapping[str, int]) -> list[dict[str, Any]]:
    """None of the switches that save memory, each of them, and all."""
    p, switches = job.parallel, {}
    if p.logprob_chunk_tokens == 0:
        switches["parallel.logprob_chunk_tokens"] = AUTO_CHUNK_TOKENS
    if not p.distributed_optimizer:
        switches["parallel.distributed_optimizer"] = True
    if job.reference and p.reference == ReferencePlace.RESIDENT and not job.config.model.fp8 and not job.gpu.is_cpu:
        switches["parallel.reference"] = ReferencePlace.OFFLOADED
    if p.virtual_pipeline and cut["pipeline"] > 1 and "parallel.virtual_pipeline" not in _followers(job, cut):
        switches["parallel.virtual_pipeline"] = None
    if cut["tensor"] > 1 and p.tensor > 1 and not p.sequence:
        switches["parallel.sequence"] = True
    return [{}, *({key: value} for key, value in switches.items()), *([switches] if len(switches) > 1 else [])]


def _row_lengths(job: PlannedJob) -> list[int]:
    """Tokens of a micro-batch: the present number, halves of it, and the least that holds one sequence."""
    now, c = job.parallel.micro_batch_tokens, job.config
    least = c.prompt.max_tokens + c.rollout.max_response_tokens + c.token_multiple - 1
    halves = (now >> power for power in range(now.bit_length()))
    return sorted({least, *(tokens for tokens in halves if tokens >= least)}, reverse=True)


def measured(job: PlannedJob, row: SideChange) -> SideChange | None:
    """The change with the bytes that its fullest stage needs; None where it does not fit. Engines of one GPU are assumed,
    for which a sender needs least."""
    changed = with_settings(job, dict(row.settings) | {"rollout.tensor_parallel": 1})
    p = changed.parallel
    if p.recompute == Recompute.SELECTIVE and not p.share_prompts and p.context == 1 and not job.gpu.is_cpu:
        return None
    fullest = 0
    for stage in range(p.pipeline):
        use = stage_use(changed, stage)
        if not use.fits:
            return None
        fullest = max(fullest, use.total)
    return replace(row, bytes=fullest)
