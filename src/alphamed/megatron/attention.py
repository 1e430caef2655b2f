"""Core attention over packed rows with shared prompts, rotary positions included, put into Megatron's layers by ModuleSpec.

Megatron's own DotProductAttention refuses packed rows, and Transformer Engine's cannot let several continuations read one
prefix. Rotary positions are applied here and not by Megatron, because continuations of one prefix repeat its positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from alphamed.megatron.context import heads_for_rows, rows_for_heads
from alphamed.megatron.prefix_attention import prefix_attention
from alphamed.megatron.transfer import send
from alphamed.model.shape import ModelShape
from alphamed.records import MicroBatch, Segment


@dataclass
class PackedRow(PackedSeqParams):
    """What the layers need to know of a packed row: its segments in token order, and cosine and sine of the rotary angles
    ([T / context ranks, 1, head_dim / 2]) of the tokens that this rank holds."""

    segments: tuple[Segment, ...] = field(kw_only=True)
    cosine: Tensor = field(kw_only=True)
    sine: Tensor = field(kw_only=True)

    @classmethod
    def of(cls, micro: MicroBatch, part: slice, frequencies: Tensor, dtype: torch.dtype) -> PackedRow:
        """part: the tokens that this rank holds. frequencies: [head_dim / 2] radians per position."""
        angles = micro.positions[part, None, None].float() * frequencies
        return cls(
            qkv_format="segments", segments=micro.segments, cosine=angles.cos().to(dtype), sine=angles.sin().to(dtype)
        )


def packed_sequences(micro: MicroBatch) -> PackedSeqParams:
    """The same for Transformer Engine's fused attention. Prompts must not be shared: every segment is one sequence."""
    lengths = [s.prefix for s in micro.segments]
    assert not any(s.continuations for s in micro.segments), "Transformer Engine's attention cannot share prompts"
    ends = send(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), micro.tokens.device)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )


class SegmentAttention(torch.nn.Module):
    """Megatron core attention: within each segment the prefix is causal, every continuation reads the prefix and, causally,
    itself, and segments behind a shared prefix read that as well. Queries and keys come without rotary positions. Needs a PackedRow.

    Context ranks hold a part of the row each and exchange it for the whole row of a part of the heads (context.py)."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert config.attention_dropout == 0, f"attention dropout of {config.attention_dropout} is not supported"
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "context parallelism needs its process group"
            self.context_group = pg_collection.cp
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """query [T', 1, heads, d], key and value [T', 1, kv_heads, d] -> [T', 1, heads * d], T' = T / context ranks."""
        row, group = packed_seq_params, self.context_group
        assert row is not None, "segments are read from a PackedRow, and none was passed"
        q, k = (rotate(x.squeeze(1), row.cosine, row.sine) for x in (query, key))
        v = value.squeeze(1)
        if group is not None:
            q, k, v = rows_for_heads(q, k, v, group)
        tokens = sum(s.tokens for s in row.segments)
        assert tokens == len(q), f"segments hold {tokens} tokens, the row {len(q)}"
        out = prefix_attention(q, k, v, row.segments, self.scale)
        if group is not None:
            out = heads_for_rows(out, group)
        return out.flatten(1).unsqueeze(1)


# ------------------------------------------------------------------------------------------------------- rotary positions
def rotary_frequencies(shape: ModelShape) -> Tensor:
    """[head_dim / 2] float32: radians per position, with Llama 3's scaling where the model has one.

    Megatron's GPTModel takes only the factor of that scaling and assumes 1, 4 and 8192 for the rest (Llama 3.1).
    """
    inverse = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return inverse
    turns = scaling.original_max_positions * inverse / (2 * math.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)  # 1: keep the frequency, 0: divide it
    return (1 - blend) * inverse / scaling.factor + blend * inverse


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of every head. x [T, heads, d], cosine and sine [T, 1, d/2] -> contiguous [T, heads, d]."""
    return _Rotate.apply(x, cosine, sine)


class _Rotate(torch.autograd.Function):
    """In two passes over memory each way, where negate, concatenate and multiply take five."""

    @staticmethod
    def forward(ctx, x, cosine, sine):
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (cosine, sine) = grads, ctx.saved_tensors
        return _rotated(grad, cosine, -sine), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for mine, other, sign in ((slice(0, half), slice(half, None), -1), (slice(half, None), slice(0, half), 1)):
        torch.mul(x[..., mine], cosine, out=out[..., mine])
        out[..., mine].addcmul_(x[..., other], sine, value=sign)
    return out
