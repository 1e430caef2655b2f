"""Context parallelism: the ranks of a context group hold one part of each packed row each, and in attention all of the row
for a part of the heads (DeepSpeed-Ulysses, arXiv 2309.14509).

One exchange before and one after attention. In between a rank sees the whole row, so segments, shared prompts and shared prefixes mean
what they mean on a single rank, and every rank has the same work whatever the row is made of.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor


def own_part(tokens: int, group: dist.ProcessGroup) -> slice:
    """Which tokens of a row this rank holds. `tokens` is a multiple of the group's size (Layout.token_multiple)."""
    size, rank = group.size(), group.rank()
    assert tokens % size == 0, f"{tokens} tokens do not divide into {size} parts"
    return slice(rank * tokens // size, (rank + 1) * tokens // size)


def rows_for_heads(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens of all heads -> all tokens of this rank's heads, in one exchange.

    q [T/C, heads, d], k and v [T/C, kv_heads, d] -> q [T, heads/C, d], k and v [T, max(1, kv_heads/C), d] for C ranks. With
    fewer KV heads than ranks each of them goes to several; autograd sums their gradients.
    """
    size = group.size()
    if k.shape[1] < size:
        k, v = (x.repeat_interleave(size // k.shape[1], 1) for x in (k, v))
    parts = [x.unflatten(1, (size, -1)) for x in (q, k, v)]  # [T/C, C, heads/C, d]
    sent = torch.cat(parts, 2).transpose(0, 1)  # first by receiver
    q, k, v = _exchange(sent, group).flatten(0, 1).split([x.shape[2] for x in parts], 1)
    return q, k, v


def heads_for_rows(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: [T, heads/C, d] of this rank's heads -> [T/C, heads, d] of its tokens."""
    sent = out.unflatten(0, (group.size(), -1))  # [C, T/C, heads/C, d], first by receiver
    return _exchange(sent, group).transpose(0, 1).flatten(1, 2)


def gather_tokens(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows in the order of the ranks. own [counts[this rank], ...] -> [sum(counts), ...].

    What follows is computed alike on all ranks, so the gradient of the result is complete on each: a rank takes its own rows
    of it and nothing is summed.
    """
    return _GatherTokens.apply(own, counts, group)


def _exchange(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    return all_to_all(group, sent.contiguous())


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, counts, group):
        rank = group.rank()
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        padded = own.new_zeros(max(counts), *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        return grad[ctx.rows].contiguous(), None, None
