"""Neighbouring configurations, really evaluated: which single change saves most time, and which makes a run fit.

No neighbour changes what is trained: batch, optimizer, algorithm and numbers stay. They differ in layout, recomputation,
packing budget and in how GPUs are dealt out, within the nodes that the job has.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from alphamed.config_choices import Recompute
from alphamed.config_sections import AUTO_CHUNK_TOKENS, RolloutConfig
from alphamed.model import tensor_sizes
from alphamed.planner.job import Job
from alphamed.planner.legality import least_cache_bytes
from alphamed.planner.memory import engine_cache, engine_use, trainer_use
from alphamed.planner.mending import FULL, Overrides, applied, axes, consistent, fits, layouts
from alphamed.planner.plan import Plan
from alphamed.planner.time import step_time

WORTH = 0.005
"""Changes that save less than this share of a step are not told."""


@dataclass(frozen=True, slots=True)
class Advice:
    """Overrides, the step they lead to, and the share of the present step that they save."""
    overrides: Overrides
    seconds: float
    saved: float


def faster(plan: Plan, most: int = 2) -> list[Advice]:
    """The changes that help most, best first; of several that touch the same settings the best one."""
    if plan.found is None or not plan.fits:
        return []
    now, gpus = plan.found.time.total, _gpus(plan)
    found = []
    for overrides in neighbours(plan.job, gpus):
        job = _applied(plan.job, overrides, gpus)
        if job is not None and fits(job):
            seconds = step_time(job).total
            found.append(Advice(overrides, seconds, 1 - seconds / now))
    chosen: list[Advice] = []
    for one in sorted(found, key=lambda advice: (advice.seconds, len(advice.overrides))):
        keys = {item.partition("=")[0] for item in one.overrides}
        if one.saved >= WORTH and not any(keys & {item.partition("=")[0] for item in two.overrides} for two in chosen):
            chosen.append(one)
    return chosen[:most]


def mends(plan: Plan) -> list[Advice]:
    """The nearest settings under which a run that is too large fits: one change, else two, else another layout, within the
    nodes that it may take, or up to four times as many as it takes; the fastest of them first, at most two."""
    if plan.found is None or plan.fits:
        return []
    gpus = _gpus(plan)
    for attempt in (_caches(plan.job, gpus), _single(plan.job, gpus), _double(plan.job, gpus),
                    *(_relaid(plan.job, times * gpus) for times in ((1,) if plan.job.nodes else (1, 2, 4)))):
        found: dict[Overrides, float] = {}
        for overrides, job in attempt:
            if not any(set(overrides) == set(other) for other in found) and fits(job):
                found[overrides] = step_time(job).total
        if found:
            best = sorted(found.items(), key=lambda item: (len(item[0]), item[1]))[:2]
            return [Advice(overrides, seconds, 1 - seconds / plan.found.time.total) for overrides, seconds in best]
    return []


def _caches(job: Job, gpus: int) -> Iterator[tuple[Overrides, Job]]:
    """Other sizes of the engines' KV cache, and shares of their GPUs: the default one and the least that suffices."""
    r, use = job.rollout, engine_use(job)
    if use is None:
        return
    choices = []
    if r.kv_cache_bytes:
        least = least_cache_bytes(job, engine_cache(job))
        choices = [(f"rollout.kv_cache_bytes={least}",), ("rollout.kv_cache_bytes=null",)]
    if not job.gpu.is_cpu:
        share = -(-20 * use.total // job.gpu.memory_bytes) / 20
        shares = {RolloutConfig.model_fields["gpu_memory_utilization"].default, share}
        if job.shared:                          # what the trainer leaves
            shares = {(trainer.limit - trainer.total) * 20 // job.gpu.memory_bytes / 20 for trainer in [trainer_use(job)]}
        choices += [(f"rollout.gpu_memory_utilization={share}",) for share in sorted(shares)
                    if (job.shared or r.gpu_memory_utilization < share) and 0 < share < 1]
    for overrides in choices:
        if (changed := _applied(job, overrides, gpus)) is not None:
            yield overrides, changed


def _single(job: Job, gpus: int) -> Iterator[tuple[Overrides, Job]]:
    for overrides in neighbours(job, gpus):
        changed = _applied(job, overrides, gpus)
        if changed is not None:
            yield overrides, changed


def _double(job: Job, gpus: int) -> Iterator[tuple[Overrides, Job]]:
    for first, middle in _single(job, gpus):
        for second, changed in _single(middle, gpus):
            keys = {item.partition("=")[0] for item in first}
            if not keys & {item.partition("=")[0] for item in second}:
                yield first + second, changed


def _applied(job: Job, overrides: Overrides, gpus: int) -> Job | None:
    """The changed job, or None where the configuration refuses it, it needs more GPUs, or nothing changes."""
    changed = applied(job, overrides)
    return changed if changed is not None and changed.gpus <= gpus else None


def _gpus(plan: Plan) -> int:
    assert plan.found is not None
    return (plan.job.nodes or plan.found.topology.nodes) * plan.job.gpus_per_node


# ------------------------------------------------------------------------------------------------------------ neighbours
def neighbours(job: Job, gpus: int) -> Iterator[Overrides]:
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
        yield (f"parallel.reference={'resident' if job.swapped_reference else 'swapped'}",)


def _layouts(job: Job) -> Iterator[Overrides]:
    """The same number of trainer ranks, cut otherwise."""
    p, sizes = job.parallel, axes(job)
    for larger in sizes:
        for smaller in sizes:
            if larger != smaller and sizes[smaller] % 2 == 0:
                cut = sizes | {larger: 2 * sizes[larger], smaller: sizes[smaller] // 2}
                beyond = not job.gpu.is_cpu and cut["tensor"] * cut["context"] > job.gpus_per_node
                if beyond or cut["tensor"] not in tensor_sizes(job.shape):      # they talk in every layer
                    continue
                yield tuple(f"parallel.{axis}={cut[axis]}" for axis in (larger, smaller)) + consistent(job, cut)
    if p.pipeline > 1:
        for virtual in (2, 4):
            if virtual != job.virtual:
                yield (f"parallel.virtual_pipeline={virtual}",)
        if p.virtual_pipeline:
            yield ("parallel.virtual_pipeline=null",)


def _shares(job: Job, gpus: int) -> Iterator[Overrides]:
    """GPUs dealt out otherwise between trainer and engines, and engines cut otherwise."""
    p, r = job.parallel, job.rollout
    if not job.engines:
        return
    for data in {2 * p.data, p.data // 2}:
        engines = _left(job, gpus, p.tensor * p.context * p.pipeline * data) // r.tensor_parallel
        if data and engines > 0:
            yield f"parallel.data={data}", f"rollout.engines={engines}"
    engines = _left(job, gpus, p.world) // r.tensor_parallel
    if engines > r.engines:
        yield (f"rollout.engines={engines}",)
    if r.tensor_parallel % 2 == 0:
        yield f"rollout.tensor_parallel={r.tensor_parallel // 2}", f"rollout.engines={2 * r.engines}"
    if r.engines % 2 == 0 and 2 * r.tensor_parallel in tensor_sizes(job.shape):
        yield f"rollout.tensor_parallel={2 * r.tensor_parallel}", f"rollout.engines={r.engines // 2}"


def _left(job: Job, gpus: int, taken: int) -> int:
    """GPUs for one side beside those that the other takes; all where they share them."""
    return gpus if job.shared else gpus - taken


def _relaid(job: Job, gpus: int) -> Iterator[tuple[Overrides, Job]]:
    """Every other layout beside the present engines, with full recomputation where it is not on."""
    left, now = _left(job, gpus, job.engines * job.rollout.tensor_parallel), axes(job)
    for cut in layouts(job, left):
        overrides = tuple(f"parallel.{axis}={size}" for axis, size in cut.items() if size != now[axis])
        overrides += consistent(job, cut)
        for more in ((), (FULL,)):
            changed = _applied(job, overrides + more, gpus)
            if changed is not None:
                yield overrides + more, changed
