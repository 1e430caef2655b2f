"""Which parameters each rank of a layout holds, by Megatron's names and shapes (pure; from the families' tables)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from alphamed.model.families import Entry, Kind, entries, shard_shape
from alphamed.model.shape import ModelShape

ALIGN_PARAMETER, ALIGN_BUCKET = 64, 128
"""Elements to which Megatron's distributed optimizer rounds the start of a parameter and the end of a bucket in its flat
buffer (core/distributed/param_and_grad_buffer.py)."""


@dataclass(frozen=True, slots=True)
class LocalParameter:
    """A parameter as one rank holds it. `names` has more than one where Transformer Engine uses another name."""

    names: tuple[str, ...]
    hf: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Kind
    copy: bool  # a second copy of a tied embedding

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_linear(self) -> bool:
        """A matrix of a layer, which FP8 applies to: no embedding, no output layer, no norm, no bias."""
        return len(self.shape) == 2 and self.kind != Kind.VOCAB


Chunks = tuple[tuple[LocalParameter, ...], ...]
"""What one rank holds, by model chunk."""


@lru_cache(maxsize=256)
def stage_parameters(shape: ModelShape, tensor: int, pipeline: int, virtual: int) -> tuple[Chunks, ...]:
    """[pipeline stage][model chunk] -> parameters, in the order of the forward pass, with layers numbered from 0 within the
    whole model. Every tensor and data rank of a stage holds the same shapes. The layers must divide."""
    stages: list[list[list[LocalParameter]]] = [[[] for _ in range(virtual)] for _ in range(pipeline)]
    per_chunk = shape.layers // (pipeline * virtual)
    for entry in entries(shape):
        if entry.copy and pipeline == 1:
            continue  # a tied model on one stage has one embedding
        stage, chunk = _place(entry, per_chunk, pipeline, virtual)
        stages[stage][chunk].append(
            LocalParameter(entry.megatron, entry.hf, shard_shape(entry, tensor), entry.kind, entry.copy)
        )
    return tuple(tuple(tuple(chunk) for chunk in chunks) for chunks in stages)


def count(chunks: Chunks) -> int:
    """Parameters of a rank, padding columns of the vocabulary included, as Megatron allocates them."""
    return sum(parameter.elements for chunk in chunks for parameter in chunk)


def buffer_elements(chunks: Chunks, data: int, distributed_optimizer: bool) -> int:
    """Elements of the flat gradient buffers, one per chunk, with their padding. Megatron with overlapped reduction cuts the
    first stage's into more buckets, each padded: less than 1,000 elements more."""
    total = 0
    for chunk in chunks:
        offset = 0
        for parameter in reversed(chunk):
            if distributed_optimizer:
                offset = _round_up(offset, ALIGN_PARAMETER)
            offset += parameter.elements
        total += _round_up(offset, math.lcm(data, ALIGN_BUCKET)) if distributed_optimizer else offset
    return total


@dataclass(frozen=True, slots=True)
class StageSize:
    """Elements that a rank of one stage holds: all, in the layers' matrices, in its largest parameter."""

    parameters: int
    linear: int
    largest: int


@lru_cache(maxsize=4096)
def stage_size(shape: ModelShape, tensor: int, pipeline: int, virtual: int, stage: int) -> StageSize:
    """The sums over `stage_parameters`, which a search over layouts asks for again and again."""
    chunks = stage_parameters(shape, tensor, pipeline, virtual)[stage]
    return StageSize(
        count(chunks), linear_elements(chunks), max(parameter.elements for chunk in chunks for parameter in chunk)
    )


@lru_cache(maxsize=4096)
def stage_buffer(
    shape: ModelShape, tensor: int, pipeline: int, virtual: int, stage: int, data: int, distributed_optimizer: bool
) -> int:
    """`buffer_elements` of one stage."""
    return buffer_elements(stage_parameters(shape, tensor, pipeline, virtual)[stage], data, distributed_optimizer)


def layers_of(stage: int, chunk: int, layers: int, pipeline: int, virtual: int) -> range:
    """The layers of one model chunk: chunk 0 of every stage comes before chunk 1 of the first."""
    per_chunk = layers // (pipeline * virtual)
    first = (chunk * pipeline + stage) * per_chunk
    return range(first, first + per_chunk)


def _place(entry: Entry, per_chunk: int, pipeline: int, virtual: int) -> tuple[int, int]:
    name = entry.megatron[0]
    if name.startswith("decoder.layers."):
        position = int(name.split(".")[2]) // per_chunk
        return position % pipeline, position // pipeline
    first = name.startswith("embedding.")
    return (0, 0) if first else (pipeline - 1, virtual - 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def linear_elements(chunks: Chunks) -> int:
    """Of the layers' matrices."""
    return sum(parameter.elements for chunk in chunks for parameter in chunk if parameter.is_linear)
