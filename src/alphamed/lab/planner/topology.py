"""Which node and GPU holds which trainer rank and which engine, the groups they form, and what leaves a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from alphamed.cluster.hosts import deal
from alphamed.config.sections import ParallelConfig
from alphamed.planner import parameters
from alphamed.planner.batch import BatchPlan, batch_of
from alphamed.planner.job import PlannedJob


@dataclass(frozen=True, slots=True)
class Seat:
    """One GPU and what computes on it. `tensor`, `context`, `data`, `pipeline`, `layers`: of a trainer rank;
    `engine`, `worker`: of an engine's."""

    node: int
    gpu: int
    role: str  # "trainer" | "engine" | "idle"
    rank: int | None = None
    tensor: int | None = None
    context: int | None = None
    data: int | None = None
    pipeline: int | None = None
    layers: tuple[tuple[int, int], ...] = ()  # first and last of each model chunk
    engine: int | None = None
    worker: int | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Groups of one kind. `leaving`: bytes a step that leave a node, over all groups of the kind."""

    kind: str
    size: int
    number: int
    example: tuple[int, ...]  # ranks of the first group
    within_node: bool
    leaving: float


@dataclass(frozen=True, slots=True)
class Topology:
    seats: tuple[Seat, ...]
    groups: tuple[Group, ...]

    @property
    def nodes(self) -> int:
        return 1 + max(seat.node for seat in self.seats)

    @property
    def leaving(self) -> float:
        return sum(group.leaving for group in self.groups)


def place(job: PlannedJob) -> Topology:
    """Trainer ranks fill nodes first, in Megatron's order: tensor ranks are neighbours, stages farthest apart. Engines are
    placed as `cluster.hosts` does, or on the trainer's GPUs. The layout must be legal."""
    per_node, size = job.gpus_per_node, job.rollout.tensor_parallel
    mixed = job.config.cluster.ranks_per_host is not None and not job.gpu.is_cpu
    shares = deal(job.config, 0 if job.colocated else job.engines, per_node, mixed, job.shared and not job.colocated)
    seats, rank, worker = [], 0, 0
    for node, (ranks, workers) in enumerate(shares):
        seats += [_trainer_seat(job, rank + gpu, node, gpu) for gpu in range(ranks)]
        first = 0 if job.shared else ranks
        seats += [
            Seat(node, first + place, "engine", engine=(worker + place) // size, worker=(worker + place) % size)
            for place in range(workers)
        ]
        rank, worker = rank + ranks, worker + workers
    occupied = {(seat.node, seat.gpu) for seat in seats}
    seats += [
        Seat(node, gpu, "idle") for node in range(len(shares)) for gpu in range(per_node) if (node, gpu) not in occupied
    ]
    seats.sort(key=lambda seat: (seat.node, seat.gpu))
    # hosts that weights have to travel to
    reached = sum(workers > 0 for _, workers in shares) - (1 if shares[0][1] else 0)
    return Topology(tuple(seats), _groups(job, shares[0][0], reached))


class RankCoordinates(NamedTuple):
    """A trainer rank's position on each axis."""

    tensor: int
    context: int
    data: int
    pipeline: int


def coordinates(rank: int, p: ParallelConfig) -> RankCoordinates:
    """The position of a rank in Megatron's order `tp-cp-ep-dp-pp`."""
    return RankCoordinates(
        rank % p.tensor,
        rank // p.tensor % p.context,
        rank // (p.tensor * p.context) % p.data,
        rank // (p.tensor * p.replicas),
    )


def _trainer_seat(job: PlannedJob, rank: int, node: int, gpu: int) -> Seat:
    p = job.parallel
    at = coordinates(rank, p)
    chunks = [
        parameters.layers_of(at.pipeline, chunk, job.shape.layers, p.pipeline, job.virtual) for chunk in range(job.virtual)
    ]
    return Seat(node, gpu, "trainer", rank, *at, tuple((chunk.start, chunk.stop - 1) for chunk in chunks))


# --------------------------------------------------------------------------------------------------------------- groups
def axis_groups(p: ParallelConfig) -> dict[str, list[list[int]]]:
    """All groups of each axis. Gradients are summed over those of `data`, which hold the same parameters: data and context
    ranks."""

    def along(*axes: str) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in range(p.world):
            at = coordinates(rank, p)
            groups.setdefault(tuple(n for axis, n in at._asdict().items() if axis not in axes), []).append(rank)
        return list(groups.values())

    return {
        "tensor": along("tensor"),
        "context": along("context"),
        "data": along("context", "data"),
        "pipeline": along("pipeline"),
    }


def _groups(job: PlannedJob, per_node: int, reached: int) -> tuple[Group, ...]:
    p, s = job.parallel, job.shape
    batch = batch_of(job)
    rows = batch.updates * batch.rows
    row_bytes = batch.micro.tokens / p.context * s.hidden * job.trainer_bytes  # a rank's part of a row
    passes = 3 + job.logprob_passes  # forward, twice backward; forward passes of log-probs
    stages = parameters.stage_parameters(s, p.tensor, p.pipeline, job.virtual)
    count = max(parameters.count(stage) for stage in stages)
    # bytes over one edge of the ring or line of a group, per step
    edge = {
        "tensor": 2 * 2 * (p.tensor - 1) / p.tensor * row_bytes * (s.layers / p.pipeline) * rows * passes,
        "context": context_bytes(job, batch) * (p.context - 1) * (s.layers / p.pipeline) * rows * passes,
        "data": (p.replicas - 1)
        / p.replicas
        * batch.updates
        * (count * (4 + job.trainer_bytes) if p.distributed_optimizer else 2 * count * 4),
        "pipeline": row_bytes / (p.tensor if p.sequence else 1) * rows * job.virtual * (2 + job.logprob_passes),
    }
    summaries = []
    for kind, groups in axis_groups(p).items():
        if len(groups[0]) == 1:
            continue
        ring = kind != "pipeline" or job.virtual > 1
        crossings = sum(_crossings(group, per_node, ring) for group in groups)
        within = crossings == 0
        summaries.append(Group(kind, len(groups[0]), len(groups), tuple(groups[0]), within, crossings * edge[kind]))
    if job.engines:
        summaries.append(_sync_group(job, reached))
    return tuple(summaries)


def context_bytes(job: PlannedJob, batch: BatchPlan) -> float:
    """What a rank sends to each other context rank in one direction of one layer: queries, keys, values and outputs of its
    tokens, a part of the heads of each (megatron/context.py)."""
    p, s = job.parallel, job.shape
    kv_heads = max(s.kv_heads, p.tensor * p.context)  # fewer KV heads than ranks: each is sent to several
    widths = (2 * s.heads + 2 * kv_heads) * s.head_dim / p.tensor
    return batch.micro.tokens / p.context * widths / p.context * job.trainer_bytes


def _crossings(group: Sequence[int], per_node: int, ring: bool) -> int:
    pairs = list(zip(group, group[1:])) + ([(group[-1], group[0])] if ring and len(group) > 2 else [])
    return sum(a // per_node != b // per_node for a, b in pairs)


def _sync_group(job: PlannedJob, reached: int) -> Group:
    """A link per stage: its source and every worker. A broadcast reaches each of the `reached` hosts that have engines, but
    not the first rank, once over the network."""
    p, workers = job.parallel, job.engines * job.rollout.tensor_parallel
    sources = tuple(stage * p.tensor * p.replicas for stage in range(p.pipeline))
    return Group(
        "weight sync", 1 + workers, p.pipeline, sources, reached == 0, reached * job.shape.parameters * job.engine_bytes
    )
