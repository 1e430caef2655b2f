"""Where tensor parallelism cuts a model: what a trainer rank holds and an engine's rank needs of each Hugging Face tensor.

Trainer ranks hold shards of Megatron parameters (`pieces`, `held`), an engine's ranks hold shards of vLLM's (`needed`).
The two cut alike where the sizes are alike, except for KV heads, which Megatron cuts further and vLLM repeats where there
are fewer of them than ranks, and for the vocabulary, which the two pad differently. Pure; imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from alphamed.model.families import Entry, Kind, cut_dimension, shard_shape

VLLM_VOCABULARY_MULTIPLE = 64
"""vLLM 0.32 pads the vocabulary to a multiple of this before it divides it over its tensor ranks."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows (columns where the cut is along dimension 1) start..stop of source tensor `source`."""

    source: int
    start: int
    stop: int


class Box(NamedTuple):
    """A rectangular part of a tensor: where it begins and how large it is, in every dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def meet(self, other: Box) -> Box | None:
        """What two boxes have in common, if anything."""
        start = tuple(map(max, self.start, other.start))
        shape = tuple(
            min(a + n, b + m) - at
            for a, n, b, m, at in zip(self.start, self.shape, other.start, other.shape, start, strict=True)
        )
        return Box(start, shape) if min(shape) > 0 else None


def pieces(entry: Entry, tp_size: int, tp_rank: int) -> list[Piece]:
    """The slices of the source tensors that make up the shard of `tp_rank`, in order. Vocabulary padding, which no
    source holds, is missing at the end of the last shards."""
    dimension = cut_dimension(entry)
    sizes = [size[dimension] for size in entry.shapes]
    if entry.kind == Kind.REPLICATED:
        return [Piece(0, 0, sizes[0])]
    if entry.kind == Kind.QKV:
        rows = [size // entry.groups for size in sizes]  # of q (all its heads), k and v in one KV group
        order = [Piece(i, g * rows[i], (g + 1) * rows[i]) for g in range(entry.groups) for i in range(3)]
    elif entry.kind == Kind.GATE_UP:
        rows = [size // tp_size for size in sizes]
        order = [Piece(i, r * rows[i], (r + 1) * rows[i]) for r in range(tp_size) for i in range(2)]
    else:
        order = [Piece(0, 0, sizes[0])]
    length = shard_shape(entry, tp_size)[dimension]
    return _window(order, tp_rank * length, (tp_rank + 1) * length)


def _window(order: list[Piece], start: int, stop: int) -> list[Piece]:
    """The part of the concatenation of `order` within start..stop."""
    window, at = [], 0
    for piece in order:
        low, high = max(start, at), min(stop, at + piece.stop - piece.start)
        if low < high:
            window.append(Piece(piece.source, piece.start + low - at, piece.start + high - at))
        at += piece.stop - piece.start
    return window


def held(entry: Entry, tp_size: int, tp_rank: int) -> list[tuple[int, Box]]:
    """(source, box) of each piece of the shard of a trainer's `tp_rank`, in the order in which the shard concatenates
    them along `cut_dimension`."""
    return [
        (piece.source, _along(cut_dimension(entry), piece.start, piece.stop, entry.shapes[piece.source]))
        for piece in pieces(entry, tp_size, tp_rank)
    ]


def needed(entry: Entry, source: int, tp_size: int, tp_rank: int) -> Box:
    """What of source tensor `source` the rank `tp_rank` of an engine holds (vLLM 0.32): one box, possibly empty (the
    vocabulary's last rank)."""
    whole, dimension = entry.shapes[source], cut_dimension(entry)
    size = whole[dimension]
    if entry.kind == Kind.REPLICATED:
        return _along(0, 0, size, whole)
    if entry.kind == Kind.QKV and source > 0 and tp_size > entry.groups:  # a KV head on several ranks
        head, sharers = size // entry.groups, tp_size // entry.groups
        return _along(0, tp_rank // sharers * head, (tp_rank // sharers + 1) * head, whole)
    if entry.kind == Kind.VOCAB:
        size = -(-size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE
    assert size % tp_size == 0, f"{entry.hf[source]}: {size} is not divided by an engine's {tp_size} tensor ranks"
    share = size // tp_size
    start, stop = (min(whole[dimension], rank * share) for rank in (tp_rank, tp_rank + 1))
    return _along(dimension, start, stop, whole)


def _along(dimension: int, start: int, stop: int, whole: tuple[int, ...]) -> Box:
    """start..stop of one dimension, all of the others."""
    return Box(
        tuple(start if d == dimension else 0 for d in range(len(whole))),
        tuple(stop - start if d == dimension else n for d, n in enumerate(whole)),
    )
