"""Attention of packed rows with shared prompts on the CPU, without a copy of a prefix's keys for each continuation.

A continuation's token attends to the row's shared prefix, to its own prefix and to its own continuation. Each part runs through torch's
flash kernel, the part of the shared prefix for the whole row at once, that of a prefix for all its continuations, and they are merged by
their log-sum-exps. The backward pass needs no such merge: the
kernel's backward computes exp(score - log-sum-exp) and rowsum(grad * output) from its inputs, so with the merged
output and log-sum-exp it yields each part's share of the exact gradient.

Compared with copying prefixes and masking, at prompt 300 and 8 answers of 60 (135M shape): 15% less time in attention, and
the keys and values of a prefix exist once in place of 8 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alphamed.records import Segment

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float) -> Tensor:
    """q [T, heads, d], k and v [T, kv_heads, d], rotated -> [T, heads, d]. `segments` hold the T tokens in order."""
    return _PrefixAttention.apply(q, k, v, segments, scale)


class _Block(NamedTuple):
    """A run of tokens seen as rows of a batch: sequences of these lengths, one after another from `start` on."""

    start: int
    lengths: tuple[int, ...]

    @property
    def run(self) -> slice:
        return slice(self.start, self.start + sum(self.lengths))

    @property
    def even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def take(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [rows, heads, longest, d], 0 where a row is shorter. A view where all rows are equally long."""
        if self.even:
            return x[self.run].unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
        return pad_sequence([*x[self.run].split(self.lengths)], batch_first=True).transpose(1, 2)

    def back(self, block: Tensor) -> Tensor:
        """[rows, heads, longest, d] -> [tokens of the run, heads, d]."""
        rows = block.transpose(1, 2)
        return rows.flatten(0, 1) if self.even else torch.cat([row[:n] for row, n in zip(rows, self.lengths)])


class _Part(NamedTuple):
    """One call of the kernel. `merge`: these queries have an output already, from an earlier part."""

    queries: _Block
    keys: _Block
    causal: bool
    merge: bool = False


def _parts(segments: tuple[Segment, ...]) -> Iterator[_Part]:
    behind = sum(s.tokens for s in segments if s.attends_shared_prefix)  # they follow the shared prefix, without a gap
    shared = _Block(0, (segments[0].tokens,))
    start = 0
    for i, segment in enumerate(segments):
        if i == 1 and behind:  # one row of all that attends to the shared prefix: it reads the same keys
            yield _Part(_Block(start, (behind,)), shared, causal=False)
        prefix = _Block(start, (segment.prefix,))
        if segment.prefix:
            yield _Part(prefix, prefix, causal=True, merge=segment.attends_shared_prefix)
        if segment.continuations:
            first = start + segment.prefix
            if segment.prefix:  # one row of all continuations, likewise
                yield _Part(
                    _Block(first, (sum(segment.continuations),)), prefix, causal=False, merge=segment.attends_shared_prefix
                )
            own = _Block(first, segment.continuations)
            yield _Part(own, own, causal=True, merge=segment.prefix > 0 or segment.attends_shared_prefix)
        start += segment.tokens


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale):
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(*q.shape[:2], 1)  # lse [T, heads, 1] float32
        for queries, keys, causal, merge in _parts(segments):
            block, block_lse = _flash(queries.take(q), keys.take(k), keys.take(v), 0.0, causal, scale=scale)
            part, part_lse = queries.back(block), queries.back(block_lse[..., None])
            if merge:
                part, part_lse = _merged(out[queries.run], lse[queries.run], part, part_lse)
            out[queries.run], lse[queries.run] = part, part_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,), (q, k, v, out, lse) = grad_outputs, ctx.saved_tensors
        grads = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
        for queries, keys, causal, _ in _parts(ctx.segments):
            shares = _flash_backward(
                queries.take(grad),
                queries.take(q),
                keys.take(k),
                keys.take(v),
                queries.take(out),
                queries.take(lse)[..., 0],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for block, share, total in zip((queries, keys, keys), shares, grads, strict=True):
                total[block.run].add_(block.back(share))
        return *grads, None, None


def _merged(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each. [n, heads, d] and log-sum-exps [n, heads, 1]."""
    lse = torch.logaddexp(a_lse, b_lse)
    return a * (a_lse - lse).exp() + b * (b_lse - lse).exp(), lse
