"""Flat buckets: slices packed into one tensor, cut out of it again, joined to whole tensors, and digested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from alphamed.weights.sync_plan import Bucket, Slice

ROW_WORDS, BLOCK_ROWS = 1 << 12, {"cpu": 64, "cuda": 1 << 16}
"""A digest adds up rows of so many words, so many rows at a time: on CPU what stays in its cache, on CUDA enough to fill it."""


def empty_flat(bucket: Bucket, device: torch.device | str) -> Tensor:
    """[elements] in the bucket's dtype, its padding zeroed."""
    flat = torch.empty(bucket.elements, dtype=getattr(torch, bucket.dtype), device=device)
    flat[-1] = 0
    return flat


def pack(bucket: Bucket, parts: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """The bucket's slices, in its order, as one flat tensor in the wire's dtype."""
    flat, at = empty_flat(bucket, device), 0
    for piece, part in zip(bucket.slices, parts, strict=True):
        assert tuple(part.shape) == piece.shape, f"{piece.name}: planned as {piece.shape}, exported as {tuple(part.shape)}"
        flat[at : at + piece.elements].view(piece.shape).copy_(part)
        at += piece.elements
    return flat


def unpack(bucket: Bucket, flat: Tensor) -> Iterator[tuple[Slice, Tensor]]:
    """Each slice of a packed bucket, a view."""
    at = 0
    for piece in bucket.slices:
        yield piece, flat[at : at + piece.elements].view(piece.shape)
        at += piece.elements


def box_of(piece: Slice) -> tuple[slice, ...]:
    """The index that takes a slice out of its tensor."""
    return tuple(slice(start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))


class Assembly:
    """Joins tensors that come in parts. Holds those that are not complete yet."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[Tensor, int]] = {}

    def add(self, piece: Slice, part: Tensor) -> Tensor | None:
        """The whole tensor when its last part has come, else None. One that comes whole is passed on without a copy."""
        if piece.is_whole:
            return part
        whole, missing = self._open.pop(piece.name, None) or (part.new_empty(piece.whole), math.prod(piece.whole))
        whole[box_of(piece)] = part
        if missing > piece.elements:
            self._open[piece.name] = whole, missing - piece.elements
            return None
        return whole


def digest(flat: Tensor) -> Tensor:
    """[2] int64: the sum of the 32-bit words of `flat` and their sum weighted by position (1, 2, ...), modulo 2^64.

    Catches flipped bits, lost and exchanged words. Computed on the tensor's device; a cryptographic hash of 140 GB would take
    a minute.
    """
    words = flat.view(torch.int32)
    rows = words[: words.numel() // ROW_WORDS * ROW_WORDS].view(-1, ROW_WORDS)
    rest = words[rows.numel() :].to(torch.int64)
    by_column = torch.zeros(ROW_WORDS, dtype=torch.int64, device=flat.device)
    by_row = [rest.new_zeros(0)]
    for block in rows.split(BLOCK_ROWS[flat.device.type]):
        by_row.append(block.sum(1, dtype=torch.int64))
        by_column += block.sum(0, dtype=torch.int64)
    sums = torch.cat(by_row)
    # word j of row i has weight i x ROW_WORDS + j + 1
    weighted = (
        (_count(sums) * ROW_WORDS * sums).sum()
        + ((_count(by_column) + 1) * by_column).sum()
        + ((_count(rest) + rows.numel() + 1) * rest).sum()
    )
    return torch.stack([sums.sum() + rest.sum(), weighted])


def _count(like: Tensor) -> Tensor:
    return torch.arange(like.numel(), device=like.device)
