"""Attention of packed rows with shared prompts, without a copy of a prefix's keys for each continuation.

A token attends, causally, to the run that it stands in (a prefix, or one continuation), a continuation's token also to its
whole prefix, and a token after a prefix that the row's segments share (its first segment) also to all of that. So a row is
attended to in up to three rounds:

    own      every run to itself, causal: a partition of the row's tokens
    prefix   all continuations of a segment, as one sequence, to the segment's prefix
    shared   all that stands after the shared prefix, as one sequence, to the shared prefix

whose outputs are merged by their log-sum-exps. The backward pass needs no such merge: a flash kernel's backward computes
exp(score - log-sum-exp) and rowsum(grad * output) from what it is given, so given the merged output and log-sum-exp it yields
each round's share of the exact gradient.

The rounds are the same everywhere; kernels differ. `Varlen` (CUDA, bf16) makes one launch for a round, whatever the number of
segments; `Padded` makes one call for each part of a round, with torch's flash kernel on the CPU and plain matrix products
elsewhere (FP32 on CUDA). Compared with copying prefixes and masking, at prompt 300 and 8 answers of 60 (135M shape) on a CPU:
15% less time in attention, and the keys and values of a prefix exist once in place of 8 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alphamed.megatron.transfer import send
from alphamed.records import Segment

Where = slice | Tensor
"""Tokens of a row: a run of them, or their int64 indices."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM = 256  # at most, and a multiple of 8


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, kernel: Kernel | None = None
) -> Tensor:
    """q [T, heads, d], k and v [T, kv_heads, d], rotated -> [T, heads, d]. `segments` hold the T tokens in order. `kernel`: by
    default the fastest for the device and dtype of `q`."""
    return _PrefixAttention.apply(q, k, v, segments, scale, kernel or kernel_for(q))


# ------------------------------------------------------------------------------------------------------------------ rounds
class Block(NamedTuple):
    """A run of tokens seen as rows of a batch: sequences of these lengths, one after another from `start` on."""

    start: int
    lengths: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + sum(self.lengths)

    @property
    def run(self) -> slice:
        return slice(self.start, self.end)

    @property
    def even(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def take(self, x: Tensor) -> Tensor:
        """[T, heads, d] -> [rows, heads, longest, d], 0 where a row is shorter. A view where all rows are equally long."""
        if self.even:
            return x[self.run].unflatten(0, (len(self.lengths), -1)).transpose(1, 2)
        return pad_sequence(list(x[self.run].split(self.lengths)), batch_first=True).transpose(1, 2)

    def back(self, block: Tensor) -> Tensor:
        """[rows, heads, longest, d] -> [tokens of the run, heads, d]."""
        rows = block.transpose(1, 2)
        return rows.flatten(0, 1) if self.even else torch.cat([row[:n] for row, n in zip(rows, self.lengths)])


class Part(NamedTuple):
    """Sequences of queries, and for each the sequence of keys that it reads."""

    queries: Block
    keys: Block


class Round(NamedTuple):
    parts: tuple[Part, ...]
    causal: bool


@lru_cache(maxsize=64)
def rounds(segments: tuple[Segment, ...]) -> tuple[Round, ...]:
    """The rounds of a row. The first one has every token among its queries exactly once."""
    own, prefix, start = [], [], 0
    for segment in segments:
        first = start + segment.prefix
        if segment.prefix:
            block = Block(start, (segment.prefix,))
            own.append(Part(block, block))
            if segment.continuations:
                prefix.append(Part(Block(first, (sum(segment.continuations),)), block))
        if segment.continuations:
            block = Block(first, segment.continuations)
            own.append(Part(block, block))
        start += segment.tokens
    after = sum(segment.tokens for segment in segments if segment.attends_shared_prefix)  # follow it without a gap
    shared = segments[0].tokens
    to_shared = [Part(Block(shared, (after,)), Block(0, (shared,)))] if after else []
    return tuple(Round(tuple(parts), causal=parts is own) for parts in (own, prefix, to_shared) if parts)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, segments, scale, kernel):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(*q.shape[:2], 1, device=q.device)  # [T, heads, 1] float32
        for number, step in enumerate(rounds(segments)):
            for where, output, output_lse in kernel.forward(step, q, k, v, scale):
                if number:
                    output, output_lse = _merged(out[where], lse[where], output, output_lse)
                out[where], lse[where] = output.to(q.dtype), output_lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.segments, ctx.scale, ctx.kernel = segments, scale, kernel
        return out

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,), (q, k, v, out, lse) = grad_outputs, ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for step in rounds(ctx.segments):
            for places, shares in ctx.kernel.backward(step, grad, q, k, v, out, lse, ctx.scale):
                for where, share, total in zip(places, shares, grads, strict=True):
                    total[where] += share  # no index is there twice
        return *grads, None, None, None


def _merged(a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from the attention over each. [n, heads, d] and log-sum-exps [n, heads, 1]."""
    lse = torch.logaddexp(a_lse, b_lse)
    return a * (a_lse - lse).exp() + b * (b_lse - lse).exp(), lse


# ----------------------------------------------------------------------------------------------------------------- kernels
class Kernel(Protocol):
    """Tensors as `prefix_attention` has them, `lse` [T, heads, 1] float32."""

    def forward(self, step: Round, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[tuple[Where, Tensor, Tensor]]:
        """Outputs [n, heads, d] and log-sum-exps [n, heads, 1] of the round's queries, and which tokens these are."""
        ...

    def backward(
        self, step: Round, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Iterator[tuple[tuple[Where, Where, Where], tuple[Tensor, Tensor, Tensor]]]:
        """The round's shares of the gradients of q, k and v, and which tokens these are. `out` and `lse` are those of all
        rounds."""
        ...


def kernel_for(q: Tensor) -> Kernel:
    if q.device.type == "cpu":
        return CPU
    flash = q.dtype in FLASH_DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= FLASH_HEAD_DIM
    return CUDA if flash else PLAIN


@dataclass(frozen=True)
class Padded:
    """One call for each part, whose sequences are padded to the longest.

    `attend(q, k, v, 0.0, causal, scale=...)` takes [rows, heads, n, d] and gives outputs and log-sum-exps [rows, heads, n];
    `differentiate(grad, q, k, v, out, lse, 0.0, causal, scale=...)` gives the gradients of q, k and v."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def forward(self, step, q, k, v, scale):
        for queries, keys in step.parts:
            out, lse = self.attend(queries.take(q), keys.take(k), keys.take(v), 0.0, step.causal, scale=scale)
            yield queries.run, queries.back(out), queries.back(lse[..., None])

    def backward(self, step, grad, q, k, v, out, lse, scale):
        for queries, keys in step.parts:
            own = [queries.take(x) for x in (grad, q, out, lse)]
            shares = self.differentiate(
                own[0], own[1], keys.take(k), keys.take(v), own[2], own[3][..., 0], 0.0, step.causal, scale=scale
            )
            blocks = (queries, keys, keys)
            yield tuple(b.run for b in blocks), tuple(b.back(share) for b, share in zip(blocks, shares, strict=True))


@dataclass(frozen=True)
class Varlen:
    """One launch for each round, over sequences of any lengths. `attend` and `differentiate` have the signatures of
    torch.ops.aten._flash_attention_forward and _backward; grouped queries need no copy of keys there."""

    attend: Callable[..., tuple[Tensor, ...]]
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def forward(self, step, q, k, v, scale):
        launch = _launch(step, q.device)
        queries, keys, values = (x[where] for x, where in zip((q, k, v), launch.where))
        out, lse, *_ = self.attend(
            queries, keys, values, *launch.ends, *launch.longest, 0.0, step.causal, False, scale=scale
        )
        yield launch.where[0], out, lse.t()[..., None]

    def backward(self, step, grad, q, k, v, out, lse, scale):
        launch = _launch(step, q.device)
        grad, query, key, value, out, lse = (
            x[launch.where[i]].contiguous() for x, i in zip((grad, q, k, v, out, lse), _ROLES)
        )
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # the random state of dropout
        shares = self.differentiate(
            grad,
            query,
            key,
            value,
            out,
            lse[..., 0].t().contiguous(),
            *launch.ends,
            *launch.longest,
            0.0,
            step.causal,
            unused,
            unused,
            scale=scale,
        )
        yield launch.where, shares


_ROLES = (0, 0, 1, 2, 0, 0)  # which of queries, keys and values the backward's tensors go with


class _Launch(NamedTuple):
    """A round for a varlen kernel: tokens of queries, keys and values; cumulative lengths (int32, with a leading 0) of the
    sequences of queries and of keys; the longest of each."""

    where: tuple[Where, Where, Where]
    ends: tuple[Tensor, Tensor]
    longest: tuple[int, int]


@lru_cache(maxsize=64)
def _launch(step: Round, device: torch.device) -> _Launch:
    """Made once for a row: layers, recomputation and the backward pass ask again."""
    where, ends, longest = [], [], []
    for blocks in ([part.queries for part in step.parts], [part.keys for part in step.parts]):
        lengths = [length for block in blocks for length in block.lengths]
        where.append(_tokens_of(blocks, device))
        ends.append(send(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32), device))
        # with a longest of 1 and grouped queries torch swaps axes, and gives log-sum-exps in another shape
        longest.append(max(2, *lengths))
    return _Launch((where[0], where[1], where[1]), (ends[0], ends[1]), (longest[0], longest[1]))


def _tokens_of(blocks: list[Block], device: torch.device) -> Where:
    """A slice, and so no copy, where the blocks follow one another."""
    if all(block.end == following.start for block, following in pairwise(blocks)):
        return slice(blocks[0].start, blocks[-1].end)
    return send(torch.cat([torch.arange(block.start, block.end) for block in blocks]), device)


# --------------------------------------------------------------------------------------------------- plain matrix products
def _plain(q: Tensor, k: Tensor, v: Tensor, _dropout: float, causal: bool, *, scale: float) -> tuple[Tensor, Tensor]:
    """As torch's flash kernels compute it, in FP32, with all scores in memory."""
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ _for_heads(v, q), lse


def _plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _dropout: float, causal: bool, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad.float()
    weights = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    inner = weights * (grad @ _for_heads(v, q).mT - (grad * out).sum(-1, keepdim=True)) * scale
    return inner @ _for_heads(k, q), _of_groups(inner.mT @ q.float(), k), _of_groups(weights.mT @ grad, v)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q.float() @ _for_heads(k, q).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _for_heads(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values once for each head of the queries, FP32."""
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], 1)


def _of_groups(grad: Tensor, x: Tensor) -> Tensor:
    """The reverse: gradients of all query heads that read one head, added."""
    return grad.unflatten(1, (x.shape[1], -1)).sum(2).to(x.dtype)


_ATEN = torch.ops.aten
CPU = Padded(_ATEN._scaled_dot_product_flash_attention_for_cpu, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward)
CUDA = Varlen(_ATEN._flash_attention_forward, _ATEN._flash_attention_backward)
PLAIN = Padded(_plain, _plain_backward)
