"""Neighbouring configurations, each of them planned: which change saves most time, and which makes a run fit.

No neighbour changes what is trained: batch, optimizer, algorithm and numbers stay. They differ in layout, recomputation,
packing budget and the distribution of GPUs, within the nodes of the job.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from alphamed.config.choices import Recompute
from alphamed.config.sections import AUTO_CHUNK_TOKENS
from alphamed.lab.planner.plan import Plan
from alphamed.lab.planner.search import fits, nearest_changes, nodes_of
from alphamed.lab.planner.suggest import Overrides, applied, axes, consistent
from alphamed.lab.planner.time import step_time
from alphamed.model.shape import tensor_sizes
from alphamed.planner.job import PlannedJob

WORTH = 0.005
"""Changes that save less than this share of a step are not reported."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Overrides, the step they lead to, and the share of the present step that they save."""

    overrides: Overrides
    seconds: float
    saved: float


def faster(plan: Plan, most: int = 2) -> list[Advice]:
    """The changes that help most, best first; of several that touch the same settings the best one."""
    if plan.assessment is None or not plan.fits:
        return []
    now, gpus = plan.assessment.time.total, _gpus(plan)
    candidates = []
    for overrides in neighbours(plan.job, gpus):
        job = _applied(plan.job, overrides, gpus)
        if job is not None and fits(job):
            seconds = step_time(job).total
            candidates.append(Advice(overrides, seconds, 1 - seconds / now))
    chosen: list[Advice] = []
    for candidate in sorted(candidates, key=lambda advice: (advice.seconds, len(advice.overrides))):
        keys = {item.partition("=")[0] for item in candidate.overrides}
        if candidate.saved >= WORTH and not any(
            keys & {item.partition("=")[0] for item in other.overrides} for other in chosen
        ):
            chosen.append(candidate)
    return chosen[:most]


def fixes(plan: Plan) -> list[Advice]:
    """The nearest settings under which a run that does not fit does (search.py), within the nodes that it may take, or up to
    four times as many as it takes; at most two."""
    if plan.assessment is None or plan.fits:
        return []
    for times in (1,) if plan.job.nodes or plan.job.gpu.is_cpu else (1, 2, 4):
        if changes := nearest_changes(plan.job, times * nodes_of(plan.job)):
            return [
                Advice(change.overrides, seconds, 1 - seconds / plan.assessment.time.total)
                for change in changes
                for seconds in [step_time(change.job).total]
            ]
    return []


def _applied(job: PlannedJob, overrides: Overrides, gpus: int) -> PlannedJob | None:
    """The changed job, or None where the configuration refuses it, it needs more GPUs, or nothing changes."""
    changed = applied(job, overrides)
    return changed if changed is not None and changed.gpus <= gpus else None


def _gpus(plan: Plan) -> int:
    assert plan.assessment is not None
    return (plan.job.nodes or plan.assessment.topology.nodes) * plan.job.gpus_per_node


# ------------------------------------------------------------------------------------------------------------ neighbours
def neighbours(job: PlannedJob, gpus: int) -> Iterator[Overrides]:
    """Overrides one move away. Some may be illegal."""
    yield from _layouts(job)
    yield from _shares(job, gpus)
    p, r = job.parallel, job.rollout
    for recompute in Recompute:
        if recompute != p.recompute:
            yield (f"parallel.recompute={recompute.value}",)
    for tokens in (2 * p.micro_batch_tokens, p.micro_batch_tokens // 2):
        yield (f"parallel.micro_batch_tokens={tokens}",)
    yield (f"parallel.logprob_chunk_tokens={0 if p.logprob_chunk(job.shape.vocab) else AUTO_CHUNK_TOKENS}",)
    yield (f"rollout.max_concurrent_requests={2 * r.max_concurrent_requests}",)
    yield (f"rollout.max_concurrent_requests={max(1, r.max_concurrent_requests // 2)}",)
    for field in ("distributed_optimizer", "overlap_grad_reduce", "share_prompts"):
        if not getattr(p, field):
            yield (f"parallel.{field}=true",)
    if p.tensor > 1 and not p.sequence:
        yield ("parallel.sequence=true",)
    if job.reference:
        yield (f"parallel.reference={'resident' if job.offloaded_reference else 'offloaded'}",)


def _layouts(job: PlannedJob) -> Iterator[Overrides]:
    """Other layouts of the same number of trainer ranks."""
    p, sizes = job.parallel, axes(job)
    for larger in sizes:
        for smaller in sizes:
            if larger != smaller and sizes[smaller] % 2 == 0:
                cut = sizes | {larger: 2 * sizes[larger], smaller: sizes[smaller] // 2}
                beyond = not job.gpu.is_cpu and cut["tensor"] * cut["context"] > job.gpus_per_node
                if beyond or cut["tensor"] not in tensor_sizes(
                    job.shape
                ):  # tensor and context ranks communicate in every layer
                    continue
                yield tuple(f"parallel.{axis}={cut[axis]}" for axis in (larger, smaller)) + consistent(job, cut)
    if p.pipeline > 1:
        for virtual in (2, 4):
            if virtual != job.virtual:
                yield (f"parallel.virtual_pipeline={virtual}",)
        if p.virtual_pipeline:
            yield ("parallel.virtual_pipeline=null",)


def _shares(job: PlannedJob, gpus: int) -> Iterator[Overrides]:
    """Other distributions of GPUs over trainer and engines, and other sizes of engines."""
    p, r = job.parallel, job.rollout
    if not job.engines:
        return
    for data in {2 * p.data, p.data // 2}:
        engines = _engine_gpus(job, gpus, p.tensor * p.context * p.pipeline * data) // r.tensor_parallel
        if data and engines > 0:
            yield f"parallel.data={data}", f"rollout.engines={engines}"
    engines = _engine_gpus(job, gpus, p.world) // r.tensor_parallel
    if engines > r.engines:
        yield (f"rollout.engines={engines}",)
    if r.tensor_parallel % 2 == 0:
        yield f"rollout.tensor_parallel={r.tensor_parallel // 2}", f"rollout.engines={2 * r.engines}"
    if r.engines % 2 == 0 and 2 * r.tensor_parallel in tensor_sizes(job.shape):
        yield f"rollout.tensor_parallel={2 * r.tensor_parallel}", f"rollout.engines={r.engines // 2}"


def _engine_gpus(job: PlannedJob, gpus: int, trainer: int) -> int:
    """GPUs for the engines besides the `trainer` ranks; all of them where GPUs are shared."""
    return gpus if job.shared else gpus - trainer
