"""Log-probs of given tokens and the entropy, from hidden states, over vocabulary shards; all logits at once or in chunks.

The output projection is part of it, so that logits exist only at the asked-for positions, in one buffer that turns into
the softmax and then into the gradient in place. Columns that pad the vocabulary to a multiple of the tensor ranks are left
out of the product: they have no probability, no entropy and no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Rows of logits that are turned into the softmax at a time. On a CPU 32 x 49152 FP32 logits, 6 MB, stay in the cache; on a
# GPU the copy that is made of them is bounded.
SOFTMAX_ROWS = {"cpu": 32, "cuda": 1024}


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which part of the vocabulary this rank holds."""

    group: dist.ProcessGroup | None  # the tensor ranks; None for a single one
    first: int  # id of the first local column
    valid: int  # local columns that are real tokens, the rest is padding

    @classmethod
    def of(cls, group: dist.ProcessGroup, columns: int, vocab: int) -> VocabShard:
        """The shard of this rank: `columns` local columns of a vocabulary of `vocab` tokens."""
        first = dist.get_rank(group) * columns
        valid = min(columns, vocab - first)
        assert valid > 0, f"vocabulary {vocab} leaves no token for the columns from {first} on"
        return cls(group if dist.get_world_size(group) > 1 else None, first, valid)


def label_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, temperature: float, chunk_tokens: int = 0
) -> tuple[Tensor, Tensor]:
    """Log-probs of `labels` under softmax(hidden @ weight.T / temperature), and the entropy of that distribution.

    hidden [n, H], weight [V, H] (this rank's rows), labels [n] int64 -> log-probs [n] float32, entropy [n] float32. The
    entropy carries no gradient. n may be 0. With `chunk_tokens` no more than that many rows of logits exist at a time and
    the backward pass computes them again (1.4 times the time, a fraction of the memory).
    """
    return _LabelLogprobs.apply(hidden, weight, labels, shard, temperature, chunk_tokens)


class _LabelLogprobs(torch.autograd.Function):
    """The backward pass overwrites what the forward pass saved, so it can run only once."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, shard, temperature, chunk_tokens):
        local = labels - shard.first
        here = (local >= 0) & (local < shard.valid)
        local = local.clamp(0, shard.valid - 1)
        stats = hidden.new_empty(4, len(hidden), dtype=torch.float32)  # maximum, log-sum-exp, mean logit, label's logit
        exponentials = None
        for rows in _chunks(len(hidden), chunk_tokens):
            exponentials = _logits(hidden[rows], weight, shard, temperature)
            for part in _chunks(len(exponentials), SOFTMAX_ROWS[hidden.device.type]):
                at = slice(rows.start + part.start, rows.start + part.stop)
                _softmax_rows(exponentials[part], local[at], stats[:, at])
        top, lse, mean, hit = stats
        lse, mean, hit = _combine(lse, mean, hit * here, shard.group)
        ctx.whole = not chunk_tokens
        saved = [exponentials] if ctx.whole and exponentials is not None else []
        ctx.save_for_backward(hidden, weight, local, here, lse, top, *saved)
        ctx.shard, ctx.temperature, ctx.chunk_tokens = shard, temperature, chunk_tokens
        entropy = lse - mean
        ctx.mark_non_differentiable(entropy)
        return hit - lse, entropy

    @staticmethod
    def backward(ctx, *grads):
        hidden, weight, local, here, lse, top, *exponentials = ctx.saved_tensors
        shard, grad = ctx.shard, grads[0].float() / ctx.temperature
        d_hidden, weight_gradient = torch.empty_like(hidden), _OutputLayerGradient(weight)
        for rows in _chunks(len(hidden), ctx.chunk_tokens):
            if ctx.whole:
                d_logits = exponentials[0].mul_((-grad * (top - lse).exp())[:, None])  # -grad * softmax
            else:
                d_logits = _logits(hidden[rows], weight, shard, ctx.temperature)
                d_logits.sub_(lse[rows, None]).exp_().mul_(-grad[rows, None])
            d_logits.scatter_add_(1, local[rows, None], (grad[rows] * here[rows])[:, None])
            d_logits = d_logits.to(weight.dtype)
            torch.mm(d_logits, weight[: shard.valid], out=d_hidden[rows])
            weight_gradient.add(d_logits, hidden[rows])
        if shard.group is not None:
            dist.all_reduce(d_hidden, group=shard.group)
        return d_hidden, weight_gradient.result(), None, None, None, None


class _OutputLayerGradient:
    """The output layer's gradient, added straight to Megatron's FP32 gradient buffer where the weight has one."""

    def __init__(self, weight: Any) -> None:
        self.weight = weight  # a tensor, with Megatron's attributes where Megatron trains it
        self.buffered = hasattr(weight, "main_grad")
        self.total: Tensor = weight.main_grad if self.buffered else torch.zeros_like(weight)

    def add(self, d_logits: Tensor, hidden: Tensor) -> None:
        """Add d_logits.T @ hidden to the rows of real tokens."""
        rows = self.total[: d_logits.shape[1]]
        if rows.dtype == hidden.dtype:
            rows.addmm_(d_logits.t(), hidden)
        else:
            rows.add_(d_logits.t() @ hidden)

    def result(self) -> Tensor | None:
        """The gradient for autograd. Megatron's hook needs one of the right shape to know that the weight is done, and
        does not read it. A weight that is the embedding as well gets its gradient, and so the hook, from there."""
        if not self.buffered:
            return self.total
        self.weight.grad_added_to_main_grad = True
        return None if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like(self.weight)


def _chunks(n: int, size: int) -> list[slice]:
    """0..n in slices of `size` rows; one slice for size 0, none for n 0."""
    return [slice(i, min(i + (size or n), n)) for i in range(0, n, size or n or 1)]


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard, temperature: float) -> Tensor:
    logits = torch.mm(hidden, weight[: shard.valid].t()).float()
    return logits if temperature == 1 else logits.div_(temperature)


def _softmax_rows(logits: Tensor, local: Tensor, stats: Tensor) -> None:
    """Turn rows of logits into exp(logit - maximum) in place; write maximum, log-sum-exp, mean logit, label's logit."""
    top = logits.amax(-1)
    stats[3] = logits.gather(1, local[:, None])[:, 0]
    shifted = logits - top[:, None]
    torch.exp(shifted, out=logits)
    total = logits.sum(-1)
    stats[0], stats[1] = top, top + total.log()
    stats[2] = top + torch.linalg.vecdot(logits, shifted) / total


def _combine(lse: Tensor, mean: Tensor, hit: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, mean logit and label's logit over all shards, from those of each. [n] float32 each."""
    if group is None:
        return lse, mean, hit
    top = lse.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    share = (lse - top).exp()
    sums = torch.stack([share, share * mean, hit])
    dist.all_reduce(sums, group=group)
    return top + sums[0].log(), sums[1] / sums[0], sums[2]
