"""The name table of each model family: which Megatron parameter is made of which Hugging Face tensors.

One table serves both directions, loading and exporting. A new dense family is one more table (and a round-trip test).
How the tensors are cut and interleaved is said by the row's `Kind` (`shard_shape`) and done in tensors.py. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from alphamed.model.shape import ModelShape


class Kind(StrEnum):
    """How a Megatron parameter is laid out over the tensor-parallel ranks (TP)."""

    REPLICATED = "replicated"  # every rank holds the whole tensor
    VOCAB = "vocab"  # rows cut over TP, padded with zeros to a multiple of TP
    ROW = "row"  # columns (the input dimension) cut over TP
    QKV = "qkv"  # rows, per KV group [q .. q, k, v], cut over TP
    GATE_UP = "gate_up"  # rows, per TP rank [gate, up]


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """One line of a table. `megatron` lists the names under which the parameter occurs: in layers of the local
    implementation and, where it differs, in Transformer Engine layers, which fuse a norm into the linear layer after
    it. `hf` gives each source tensor's name and its dimensions, by the names of `_sizes`."""

    kind: Kind
    megatron: tuple[str, ...]
    hf: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row applied to a model: full names, global layer numbers and sizes. `hf[i]` has the shape `shapes[i]`. `groups`
    is the number of KV groups (only QKV needs it). A `copy` is loaded but never exported: the output layer of a tied
    model, which the last pipeline stage holds as a second copy of the embedding."""

    kind: Kind
    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    groups: int
    copy: bool = False


_EMBEDDING = ParameterRow(
    Kind.VOCAB, ("embedding.word_embeddings.weight",), (("model.embed_tokens.weight", ("vocab", "hidden")),)
)
_FINAL_NORM = ParameterRow(Kind.REPLICATED, ("decoder.final_layernorm.weight",), (("model.norm.weight", ("hidden",)),))
_OUTPUT = ParameterRow(Kind.VOCAB, ("output_layer.weight",), (("lm_head.weight", ("vocab", "hidden")),))

_LLAMA = (
    ParameterRow(
        Kind.REPLICATED,
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        (("input_layernorm.weight", ("hidden",)),),
    ),
    ParameterRow(
        Kind.QKV,
        ("self_attention.linear_qkv.weight",),
        (
            ("self_attn.q_proj.weight", ("q", "hidden")),
            ("self_attn.k_proj.weight", ("kv", "hidden")),
            ("self_attn.v_proj.weight", ("kv", "hidden")),
        ),
    ),
    ParameterRow(Kind.ROW, ("self_attention.linear_proj.weight",), (("self_attn.o_proj.weight", ("hidden", "q")),)),
    ParameterRow(
        Kind.REPLICATED,
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        (("post_attention_layernorm.weight", ("hidden",)),),
    ),
    ParameterRow(
        Kind.GATE_UP,
        ("mlp.linear_fc1.weight",),
        (("mlp.gate_proj.weight", ("ffn", "hidden")), ("mlp.up_proj.weight", ("ffn", "hidden"))),
    ),
    ParameterRow(Kind.ROW, ("mlp.linear_fc2.weight",), (("mlp.down_proj.weight", ("hidden", "ffn")),)),
)
_QWEN2 = (
    *_LLAMA,
    ParameterRow(
        Kind.QKV,
        ("self_attention.linear_qkv.bias",),
        (("self_attn.q_proj.bias", ("q",)), ("self_attn.k_proj.bias", ("kv",)), ("self_attn.v_proj.bias", ("kv",))),
    ),
)
_QWEN3 = (
    *_LLAMA,
    ParameterRow(Kind.REPLICATED, ("self_attention.q_layernorm.weight",), (("self_attn.q_norm.weight", ("head_dim",)),)),
    ParameterRow(Kind.REPLICATED, ("self_attention.k_layernorm.weight",), (("self_attn.k_norm.weight", ("head_dim",)),)),
)
FAMILIES: dict[str, tuple[ParameterRow, ...]] = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}


def entries(shape: ModelShape) -> list[Entry]:
    """Every parameter of the model, in the order of the forward pass, with 0-based global layer numbers.

    All Hugging Face names of the model occur; a name occurs twice only in the `copy` of a tied embedding.
    """
    rows = [_entry(_EMBEDDING, shape)]
    for layer in range(shape.layers):
        rows += [_entry(row, shape, f"decoder.layers.{layer}.", f"model.layers.{layer}.") for row in FAMILIES[shape.family]]
    rows.append(_entry(_FINAL_NORM, shape))
    if shape.tied:
        rows.append(_entry(ParameterRow(Kind.VOCAB, _OUTPUT.megatron, _EMBEDDING.hf), shape, copy=True))
    else:
        rows.append(_entry(_OUTPUT, shape))
    return rows


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model's Hugging Face folder."""
    return {name: size for entry in entries(shape) for name, size in zip(entry.hf, entry.shapes, strict=True)}


def cut_dimension(entry: Entry) -> int:
    """The dimension along which the parameter is cut and its sources are concatenated."""
    return 1 if entry.kind == Kind.ROW else 0


def padded_vocab(vocab: int, tp_size: int) -> int:
    """Rows of the embedding over all tensor ranks: the next multiple of `tp_size`, not of 128 as Megatron's default."""
    return -(-vocab // tp_size) * tp_size


def shard_shape(entry: Entry, tp_size: int) -> tuple[int, ...]:
    """Shape of one tensor rank's shard, vocabulary padding included."""
    dimension = cut_dimension(entry)
    total = sum(size[dimension] for size in entry.shapes)
    if entry.kind == Kind.VOCAB:
        total = padded_vocab(total, tp_size)
    parts = 1 if entry.kind == Kind.REPLICATED else tp_size
    assert total % parts == 0, f"{entry.megatron[0]}: {total} is not divided by {parts} tensor ranks"
    size = list(entry.shapes[0])
    size[dimension] = total // parts
    return tuple(size)


def _entry(
    row: ParameterRow, shape: ModelShape, megatron_prefix: str = "", hf_prefix: str = "", copy: bool = False
) -> Entry:
    sizes = _sizes(shape)
    return Entry(
        kind=row.kind,
        megatron=tuple(megatron_prefix + name for name in row.megatron),
        hf=tuple(hf_prefix + name for name, _ in row.hf),
        shapes=tuple(tuple(sizes[d] for d in dimensions) for _, dimensions in row.hf),
        groups=shape.kv_heads,
        copy=copy,
    )


def _sizes(shape: ModelShape) -> dict[str, int]:
    return {
        "vocab": shape.vocab,
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "head_dim": shape.head_dim,
        "q": shape.heads * shape.head_dim,
        "kv": shape.kv_heads * shape.head_dim,
    }
