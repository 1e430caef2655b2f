"""The plan of a push for any model, trainer layout and engines: who sends what to whom (pure).

gather: the source of a stage (tensor, context and data rank 0) gathers every parameter from its tensor ranks and broadcasts
whole tensors to all workers: one link per stage. direct: every tensor rank sends what it holds itself. One link joins it with the
same tensor rank of all engines and carries what the one holds and the other needs, so nothing is gathered and nothing
arrives that is not needed. What every trainer rank holds (norms) comes from one of them.

Imports nothing heavy. Sizes are those of model/shape.py; the ranks' order is that of records.Layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from alphamed.config.choices import Dtype
from alphamed.config.schema import Config
from alphamed.config.sections import ParallelConfig
from alphamed.errors import ConfigError
from alphamed.model.families import Entry, Kind, entries
from alphamed.model.shape import ModelShape
from alphamed.weights.cuts import held, needed
from alphamed.weights.sync_plan import ELEMENT_BYTES, Link, Slice, SyncPlan, Wire, members

WIRE_DTYPE = {Dtype.FP32: "float32", Dtype.BF16: "bfloat16"}


class _Route(NamedTuple):
    """A box of source tensor `source` of an entry, from a tensor rank of the trainer to one of every engine."""

    tensor_rank: int
    worker: int
    source: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


def make_plan(shape: ModelShape, parallel: ParallelConfig, engines: Sequence[int], wire: Wire) -> SyncPlan:
    """`engines`: the tensor-parallel size of each. The same on every rank that asks."""
    make = {"gather": _gathering, "direct": _direct}[wire.mode]
    return SyncPlan(wire.mode, make(shape, parallel, tuple(engines), wire), members(engines))


def trainer_rank(parallel: ParallelConfig, stage: int, data_rank: int, tensor_rank: int, context_rank: int = 0) -> int:
    """Global rank in Megatron's order `tp-cp-ep-dp-pp`."""
    return tensor_rank + parallel.tensor * (context_rank + parallel.context * (data_rank + parallel.data * stage))


def _stage_of(entry: Entry, shape: ModelShape, pipeline: int, chunks: int) -> int:
    """The pipeline stage that holds a parameter. Chunks of layers are dealt out to the stages in turn, once for each virtual
    stage; the embedding belongs to the first stage, final norm and output layer to the last."""
    name = entry.megatron[0]
    if not name.startswith("decoder.layers."):
        return 0 if name.startswith("embedding.") else pipeline - 1
    layers_per_chunk = shape.layers // (pipeline * chunks)
    return int(name.split(".")[2]) // layers_per_chunk % pipeline


def check_sync(config: Config, shape: ModelShape) -> None:
    """Refuse buckets that cannot hold one row of the model's largest tensors. Raises ConfigError."""
    widest = max(size[-1] for entry in _entries(shape) for size in entry.shapes if len(size) > 1)
    row_bytes = widest * ELEMENT_BYTES[WIRE_DTYPE[config.rollout.dtype]]
    if config.sync.bucket_bytes < row_bytes:
        raise ConfigError(
            f"sync.bucket_bytes: {config.sync.bucket_bytes} cannot hold one row of the model's widest tensor "
            f"({row_bytes} bytes); raise it to at least that"
        )


# ------------------------------------------------------------------------------------------------------------------ links
def _gathering(shape: ModelShape, parallel: ParallelConfig, engines: tuple[int, ...], wire: Wire) -> tuple[Link, ...]:
    everyone = tuple(range(sum(engines)))
    return tuple(
        Link(
            f"stage {stage}",
            stage,
            trainer_rank(parallel, stage, 0, 0),
            everyone,
            wire.transport,
            wire.dtype,
            wire.bucket_bytes,
            tuple(Slice.all_of(name, size) for entry in own for name, size in zip(entry.hf, entry.shapes, strict=True)),
        )
        for stage, own in enumerate(_stages(shape, parallel))
    )


def _direct(shape: ModelShape, parallel: ParallelConfig, engines: tuple[int, ...], wire: Wire) -> tuple[Link, ...]:
    alike: dict[tuple[int, int], list[int]] = {}  # workers that are cut alike, by tensor-parallel size and rank
    for number, member in enumerate(members(engines)):
        alike.setdefault((engines[member.engine], member.worker), []).append(number)
    links = []
    for stage, own in enumerate(_stages(shape, parallel)):
        carried: dict[tuple[int, int, int], list[Slice]] = {}
        for entry in own:
            for size in dict.fromkeys(engines):
                for route in _routes(entry.kind, entry.shapes, entry.groups, parallel.tensor, size):
                    carried.setdefault((route.tensor_rank, size, route.worker), []).append(
                        Slice(entry.hf[route.source], entry.shapes[route.source], route.start, route.shape)
                    )
        links += [
            Link(
                f"stage {stage} from tensor rank {rank} to worker {worker} of {size}",
                stage,
                trainer_rank(parallel, stage, 0, rank),
                tuple(alike[size, worker]),
                wire.transport,
                wire.dtype,
                wire.bucket_bytes,
                tuple(slices),
            )
            for (rank, size, worker), slices in sorted(carried.items())
        ]
    return tuple(links)


@lru_cache(maxsize=4096)
def _routes(kind: Kind, shapes: tuple[tuple[int, ...], ...], groups: int, tensor: int, engine: int) -> tuple[_Route, ...]:
    """How any parameter of this kind and size gets from `tensor` trainer ranks to the `engine` ranks of an engine."""
    entry = Entry(kind, ("",), ("",) * len(shapes), shapes, groups)
    routes = []
    for worker in range(engine):
        ranks = (worker * tensor // engine,) if kind == Kind.REPLICATED else range(tensor)
        for rank in ranks:
            for source, box in held(entry, tensor, rank):
                if common := box.meet(needed(entry, source, engine, worker)):
                    routes.append(_Route(rank, worker, source, *common))
    return tuple(routes)


# ----------------------------------------------------------------------------------------------------------------- stages
@lru_cache(maxsize=8)
def _entries(shape: ModelShape) -> tuple[Entry, ...]:
    return tuple(entry for entry in entries(shape) if not entry.copy)


def _stages(shape: ModelShape, parallel: ParallelConfig) -> tuple[tuple[Entry, ...], ...]:
    """The parameters that each pipeline stage exports, in the order of the forward pass."""
    return _cut_stages(shape, parallel.pipeline, parallel.virtual_pipeline or 1)


@lru_cache(maxsize=64)
def _cut_stages(shape: ModelShape, pipeline: int, chunks: int) -> tuple[tuple[Entry, ...], ...]:
    stages: tuple[list[Entry], ...] = tuple([] for _ in range(pipeline))
    for entry in _entries(shape):
        stages[_stage_of(entry, shape, pipeline, chunks)].append(entry)
    return tuple(map(tuple, stages))
