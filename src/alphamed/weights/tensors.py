"""Cutting Hugging Face tensors into tensor-parallel shards of Megatron parameters, and joining them again.

Both directions follow one description: a shard is the concatenation, along one dimension, of slices of the source
tensors (`cuts.pieces`). Loading reads those slices, exporting writes them back, so the two cannot disagree. Pure; torch
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alphamed.model.families import Entry, Kind, cut_dimension, shard_shape
from alphamed.weights.cuts import pieces

FINITE_PART = 1 << 24
"""Values that are checked at a time."""


def to_shard(entry: Entry, sources: Sequence[Any], tp_size: int, tp_rank: int) -> Tensor:
    """The shard of `tp_rank`, [shard_shape], in the sources' dtype. `sources` are the Hugging Face tensors of
    `entry.hf`, or slices of a safetensors file, of which only the rows needed are read."""
    dimension = cut_dimension(entry)
    parts = [
        sources[p.source][:, p.start : p.stop] if dimension else sources[p.source][p.start : p.stop]
        for p in pieces(entry, tp_size, tp_rank)
    ]
    size = shard_shape(entry, tp_size)
    missing = size[dimension] - sum(part.shape[dimension] for part in parts)
    if missing:  # padding of the vocabulary; a rank may hold nothing else
        dtype = parts[0].dtype if parts else sources[0][:1].dtype
        parts.append(torch.zeros(missing, *size[1:], dtype=dtype))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dimension)


def to_hf(entry: Entry, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of `entry.hf` from the shards of all tensor ranks, in rank order. Bit for bit the
    inverse of `to_shard`; padding is dropped. A replicated parameter comes from the first shard, without a copy."""
    if entry.kind == Kind.REPLICATED:
        return (shards[0],)
    dimension = cut_dimension(entry)
    whole = tuple(shards[0].new_empty(size) for size in entry.shapes)
    for rank, shard in enumerate(shards):
        at = 0
        for p in pieces(entry, len(shards), rank):
            length = p.stop - p.start
            whole[p.source].narrow(dimension, p.start, length).copy_(shard.narrow(dimension, at, length))
            at += length
    return whole


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. In parts: at once it would take twice the tensor's memory, which an engine's GPU
    may not have."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.detach().reshape(-1).split(FINITE_PART))
