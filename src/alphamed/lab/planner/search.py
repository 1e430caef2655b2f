"""The least change of settings under which a run fits, found by a search in which the planner judges every candidate.

A candidate joins settings of the trainer (layout, recomputation, row length, switches that save memory) with settings of the
engines (their number, tensor ranks and cache, whether they share the trainer's GPUs). Pairs are visited in the order of
how much they change: the number of settings first, then by what factors. What follows from a pair is computed, not searched:
sequence parallelism and virtual stages from the layout, rollout.gpu_memory_utilization from what the engine needs and what
is available. Nothing that affects the trained result changes, unless a limit of the model requires it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2
from typing import Any

from alphamed.config.choices import SyncMode
from alphamed.config.sections import RolloutConfig
from alphamed.lab.planner.candidates import Settings, SideChange, measured, overrides_of, trainer_parts, with_settings
from alphamed.lab.planner.deadline import deadline_problems
from alphamed.lab.planner.suggest import Overrides, applied, axes
from alphamed.lab.planner.time import step_time
from alphamed.model.shape import tensor_sizes
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import Problem, layout_problems, least_cache_bytes, memory_problems
from alphamed.planner.memory import engine_cache, engine_causes, engine_use, free_for_engine, stage_use, trainer_use

ELSEWHERE = (
    "rollout.max_response_tokens",
    "evaluation.max_response_tokens",
    "prompt.max_tokens",
    "model.fp8",
    "sync.transport",
    "rollout.step_deadline_s",
)
"""Settings that are not searched: only the fix that a problem names helps."""
ENGINE_COUNTS = 32
"""Numbers of engines that are tried, at most, besides powers of two."""
CONCURRENT = RolloutConfig.model_fields["max_concurrent_requests"].default
USUAL_SHARE = RolloutConfig.model_fields["gpu_memory_utilization"].default
AT_ONCE = 16
"""The fastest is chosen among at most so many candidates that are as near as the first."""
FURTHER = 40
"""Candidates that are tried for a second answer, once there is a first."""


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """Overrides under which the whole plan is without a problem, the job they lead to, and how much they change."""

    overrides: Overrides
    job: PlannedJob
    cost: tuple[int, float]


def problems(job: PlannedJob) -> list[Problem]:
    """Everything that keeps a job from running: an illegal layout, or what does not fit memory or deadlines."""
    if illegal := layout_problems(job):
        return illegal
    for stage in range(job.parallel.pipeline):  # most candidates end at their first stage
        if not (use := stage_use(job, stage)).fits:
            return memory_problems(job, [use], None)
    uses = [use for use in (trainer_use(job), engine_use(job)) if use]
    return memory_problems(job, uses, engine_cache(job) if job.engines else None) or deadline_problems(job)


def fits(job: PlannedJob) -> bool:
    return not problems(job)


def fixed(illegal: list[Problem], job: PlannedJob) -> list[Problem]:
    """The problems of an illegal layout, the first with one fix for all of them, after which the plan is without a problem; or
    with a note that none was found."""
    first, *others = (replace(problem, fix=()) for problem in illegal)
    nodes = nodes_of(job)
    own = (_completed(job, problem.fix, (1, 1.0), nodes) for problem in illegal if problem.fix)  # is one of them enough?
    if change := next(filter(None, own), None) or next(iter(nearest_changes(job, nodes, most=1)), None):
        return [replace(first, fix=change.overrides), *others]
    within = (
        "on this machine"
        if job.gpu.is_cpu
        else f"within {nodes} node{'s' if nodes > 1 else ''}"
        if job.nodes
        else "with as many GPUs"
    )
    return [replace(first, text=f"{first.text}; no settings that fit were found {within}"), *others]


def nodes_of(job: PlannedJob) -> int:
    """Nodes that the run may take, or as many as it takes."""
    engines, per_node = job.engines * job.rollout.tensor_parallel, job.gpus_per_node
    if job.nodes:
        return job.nodes
    if job.shared or job.gpu.is_cpu:
        return -(-max(job.parallel.world, engines) // per_node)
    return -(-job.parallel.world // per_node) + -(-engines // per_node)


def nearest_changes(job: PlannedJob, nodes: int, most: int = 2) -> list[SettingsChange]:
    """The nearest changes that fit, within so many nodes; of several that are as near the fastest first. [] where there are
    none."""
    if job.colocated:
        return []
    changes: list[SettingsChange] = []
    seen: set[Overrides] = set()
    tries = 0
    for cost, settings in _pairs(job, nodes):
        full = len(changes) >= (most if cost > changes[0].cost else AT_ONCE) if changes else False
        if full or tries > FURTHER or (changes and cost[0] > changes[0].cost[0] + 1):
            break
        overrides = overrides_of(settings)
        if overrides in seen or any(_holds(overrides, change) for change in changes):
            continue
        seen.add(overrides)
        tries += bool(changes)
        change = _completed(job, overrides, cost, nodes)
        if change and not any(_holds(change.overrides, other) for other in changes):
            changes.append(change)
    changes.sort(key=lambda change: (change.cost, step_time(change.job).total))
    return changes[:most]


def _holds(overrides: Overrides, change: SettingsChange) -> bool:
    """Whether overrides include all of a change, and so are no other change. Values of ELSEWHERE follow from the rest."""
    keys = {override.partition("=")[0] for override in overrides}
    return all(
        override in overrides or (key := override.partition("=")[0]) in ELSEWHERE and key in keys
        for override in change.overrides
    )


def _completed(job: PlannedJob, overrides: Overrides, cost: tuple[int, float], nodes: int) -> SettingsChange | None:
    """The change, with the settings of ELSEWHERE that its problems name; None where other problems remain."""
    budget = job if job.gpu.is_cpu else replace(job, nodes=nodes)
    for _ in range(len(ELSEWHERE)):
        changed = applied(budget, overrides) if overrides else budget
        if changed is None:
            return None
        remaining = problems(changed)
        if not remaining:
            return SettingsChange(overrides, replace(changed, nodes=job.nodes), cost) if overrides else None
        extra = tuple(
            override for problem in remaining for override in problem.fix if override.partition("=")[0] in ELSEWHERE
        )
        if not extra or not all(problem.fix for problem in remaining):
            return None
        overrides = (
            tuple(
                override for override in overrides if not override.startswith(tuple(key.partition("=")[0] for key in extra))
            )
            + extra
        )
        cost = cost[0] + len(extra), cost[1] + len(extra)
    return None


# ----------------------------------------------------------------------------------------------------------------- pairs
def _pairs(job: PlannedJob, nodes: int) -> Iterator[tuple[tuple[int, float], dict[str, Any]]]:
    """Settings of both sides that fit alone and together, the least change first."""
    rows = sorted(trainer_parts(job, nodes), key=lambda part: (part.count, part.distance))
    sides = sorted(_engine_parts(job), key=lambda part: (part.count, part.distance))
    if not sides:
        return

    @lru_cache(None)
    def partners_of(world: int) -> tuple[SideChange, ...]:
        return tuple(side for side in sides if _room(job, nodes, world, dict(side.settings)))

    heap: list[tuple[tuple[int, float], int, int, dict[str, Any] | None]] = []
    joined: list[tuple[SideChange, tuple[SideChange, ...]]] = []
    at = 0
    while at < len(rows) or heap:
        while at < len(rows) and (not heap or (rows[at].count, rows[at].distance) <= heap[0][0]):
            row, at = measured(job, rows[at]), at + 1
            if row and (partners := partners_of(_world(job, dict(row.settings)))):
                joined.append((row, partners))
                heapq.heappush(heap, (_cost(row, partners[0]), len(joined) - 1, 0, None))
        if not heap:
            return
        cost, number, place, complete = heapq.heappop(heap)
        if complete is not None:
            yield cost, complete
            continue
        row, partners = joined[number]
        if place + 1 < len(partners):
            heapq.heappush(heap, (_cost(row, partners[place + 1]), number, place + 1, None))
        together = _together(job, row, partners[place])
        if together is None:
            continue
        more = len(together) - len(row.settings) - len(partners[place].settings)
        if more:  # a computed setting counts as a change too
            heapq.heappush(heap, ((cost[0] + more, round(cost[1] + more, 6)), number, place, together))
        else:
            yield cost, together


def _cost(row: SideChange, side: SideChange) -> tuple[int, float]:
    return row.count + side.count, round(row.distance + side.distance, 6)


def _together(job: PlannedJob, row: SideChange, side: SideChange) -> dict[str, Any] | None:
    """Both sides' settings, and the engine's share of its GPU where the present one does not suffice; None where none
    does."""
    settings = dict(row.settings) | dict(side.settings)
    if not job.engines:
        return settings
    changed = with_settings(job, settings)
    if changed.config.sync.mode == SyncMode.DIRECT:
        trainer, engine = changed.parallel.tensor, changed.rollout.tensor_parallel
        if trainer % engine and engine % trainer:
            return None
    workers = changed.engines * changed.rollout.tensor_parallel
    if job.gpu.is_cpu:
        return settings if row.bytes * changed.parallel.world + side.bytes * workers <= job.gpu.memory_bytes else None
    need, most = sum(engine_causes(changed).values()) + _cache_bytes(changed), free_for_engine(changed)
    if changed.shared:
        trainer = trainer_use(changed)
        most = min(most, trainer.limit - trainer.total)
    share = best_share(changed, need, most)
    if share is None:
        return None
    return (
        settings if share == changed.rollout.gpu_memory_utilization else settings | {"rollout.gpu_memory_utilization": share}
    )


def best_share(job: PlannedJob, need: int, most: int) -> float | None:
    """rollout.gpu_memory_utilization between `need` and `most` bytes of a GPU: the present one, else the usual one, else as much
    as there is, in twentieths or hundredths, for the cache takes what is left."""
    memory = job.gpu.memory_bytes

    def suffices(share: float) -> bool:
        return need <= int(memory * share) <= most

    choices = [
        job.rollout.gpu_memory_utilization,
        USUAL_SHARE,
        *(k / 20 for k in range(19, 0, -1)),
        *(k / 100 for k in range(99, 0, -1)),
    ]
    return next(filter(suffices, choices), None)


def _cache_bytes(job: PlannedJob) -> int:
    """The KV cache that an engine needs at least, per GPU: the configured one, or a prompt with the longest response."""
    tensor = job.rollout.tensor_parallel
    least = least_cache_bytes(job, engine_cache(job)) // tensor
    return max(job.rollout.kv_cache_bytes // tensor, least) if job.rollout.kv_cache_bytes else least


def _room(job: PlannedJob, nodes: int, world: int, side: Settings) -> bool:
    """Whether the nodes have room for both, as legality.py counts."""
    r, per_node = job.rollout, job.gpus_per_node
    workers = side.get("rollout.engines", job.engines) * side.get("rollout.tensor_parallel", r.tensor_parallel)
    if not job.engines:
        workers = 0
    if job.gpu.is_cpu:
        return world + workers <= job.gpus
    if side.get("cluster.share_gpus", job.config.cluster.share_gpus):
        return max(world, workers) <= per_node
    if world + workers <= per_node:
        return True
    return (world <= per_node or world % per_node == 0) and -(-world // per_node) + -(-workers // per_node) <= nodes


def _world(job: PlannedJob, settings: Settings) -> int:
    p = job.parallel
    tensor, context, pipeline, data = (settings.get(f"parallel.{axis}", getattr(p, axis)) for axis in axes(job))
    return tensor * context * pipeline * data


# --------------------------------------------------------------------------------------------------------------- engines
def _engine_parts(job: PlannedJob) -> Iterator[SideChange]:
    """Tensor ranks x number x cache x requests at once x shared GPUs. Each has room for one whole sequence in a GPU's memory."""
    r, cpu = job.rollout, job.gpu.is_cpu
    share = job.config.cluster.share_gpus
    if not job.engines:
        yield SideChange(0, 0.0, ())
        return
    for shared in (share,) if cpu else (share, not share):
        flip = {} if shared == share else {"cluster.share_gpus": shared}
        for tensor in tensor_sizes(job.shape):
            if not cpu and job.gpus_per_node % tensor:
                continue
            for engines in _engine_counts(job, tensor):
                cut = {"rollout.tensor_parallel": tensor, "rollout.engines": engines}
                moved = {key: value for key, value in cut.items() if value != getattr(r, key.partition(".")[2])}
                far = abs(log2(tensor / r.tensor_parallel)) + abs(log2(engines / r.engines))
                for more in _cache_settings(with_settings(job, moved)):
                    settings = flip | moved | more
                    changed = with_settings(job, settings)
                    need = sum(engine_causes(changed).values()) + _cache_bytes(changed)
                    if need <= (job.gpu.memory_bytes if cpu else free_for_engine(changed)):
                        yield SideChange(len(settings), round(far + len(flip) + len(more), 6), tuple(settings.items()), need)


def _engine_counts(job: PlannedJob, tensor: int) -> list[int]:
    """Fewer than now or up to four times as many; as many GPUs as now with engines of another size."""
    now = job.engines
    alike = max(1, now * job.rollout.tensor_parallel // tensor)
    most = max(4 * now, alike)
    counts = {now, alike, *range(now, 0, -max(1, now // ENGINE_COUNTS)), *(times * now for times in (2, 3, 4))}
    return sorted(counts | {2**power for power in range(most.bit_length()) if 2**power <= most})


def _cache_settings(job: PlannedJob) -> list[dict[str, Any]]:
    """Settings of an engine's memory: the present ones; without a fixed cache size, or with the least; with fewer requests
    at once."""
    r = job.rollout
    caches: list[dict[str, Any]] = [{}]
    if r.kv_cache_bytes:
        least = least_cache_bytes(job, engine_cache(job))
        caches += [{"rollout.kv_cache_bytes": None}] + (
            [{"rollout.kv_cache_bytes": least}] if least != r.kv_cache_bytes else []
        )
    fewer = [{}] + ([{"rollout.max_concurrent_requests": CONCURRENT}] if r.max_concurrent_requests > CONCURRENT else [])
    return [cache | requests for cache in caches for requests in fewer]
