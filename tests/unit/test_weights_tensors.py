"""Names and cuts of weights: shards worked out by hand, exact round trips for every family and tensor-parallel size."""

import dataclasses

import pytest
import torch
from tiny import tiny_hf

from alphamed.model.families import Entry, Kind, entries, hf_shapes, padded_vocab, shard_shape
from alphamed.model.shape import ModelShape, read_shape
from alphamed.weights.cuts import pieces
from alphamed.weights.tensors import to_hf, to_shard

SHAPE = ModelShape(
    family="llama",
    layers=2,
    hidden=6,
    ffn=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    vocab=5,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=32,
)


def entry_named(shape: ModelShape, megatron: str) -> Entry:
    return next(e for e in entries(shape) if megatron in e.megatron)


def numbered(rows: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + rows)[:, None] * torch.ones(1, 6, dtype=torch.int64)


def test_qkv_interleaves_by_kv_group():
    entry = entry_named(SHAPE, "decoder.layers.1.self_attention.linear_qkv.weight")
    assert entry.hf == tuple(f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv")
    q, k, v = numbered(8), numbered(4, 100), numbered(4, 200)  # 4 heads, 2 KV heads of 2 rows each
    whole = to_shard(entry, (q, k, v), 1, 0)[:, 0].tolist()
    assert whole == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]
    assert to_shard(entry, (q, k, v), 2, 1)[:, 0].tolist() == whole[8:]
    # four tensor ranks, two KV heads: megatron cuts inside a group and gathers in the forward pass
    assert to_shard(entry, (q, k, v), 4, 1)[:, 0].tolist() == [100, 101, 200, 201]


def test_qkv_bias_follows_the_weight():
    shape = dataclasses.replace(SHAPE, family="qwen2", qkv_bias=True)
    entry = entry_named(shape, "decoder.layers.0.self_attention.linear_qkv.bias")
    q, k, v = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    assert to_shard(entry, (q, k, v), 2, 1).tolist() == [4, 5, 6, 7, 102, 103, 202, 203]


def test_gate_up_interleaves_by_tensor_rank():
    entry = entry_named(SHAPE, "decoder.layers.0.mlp.linear_fc1.weight")
    gate, up = numbered(8), numbered(8, 100)
    assert to_shard(entry, (gate, up), 1, 0)[:, 0].tolist() == [*range(8), *range(100, 108)]
    assert to_shard(entry, (gate, up), 2, 1)[:, 0].tolist() == [4, 5, 6, 7, 104, 105, 106, 107]


def test_row_parallel_cuts_columns():
    entry = entry_named(SHAPE, "decoder.layers.0.mlp.linear_fc2.weight")
    down = torch.arange(48).view(6, 8)
    assert to_shard(entry, (down,), 2, 1)[:2].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]


def test_vocabulary_is_padded_with_zeros_to_a_multiple_of_tp_only():
    entry = entry_named(SHAPE, "output_layer.weight")
    rows = numbered(5, 1)
    assert to_shard(entry, (rows,), 1, 0).shape == (5, 6)
    assert to_shard(entry, (rows,), 2, 1)[:, 0].tolist() == [4, 5, 0]
    assert to_shard(entry, (rows,), 4, 3).tolist() == [[0] * 6] * 2  # a rank that holds padding only
    assert [padded_vocab(509, t) for t in (1, 2, 3, 4)] == [509, 510, 510, 512]


def test_replicated_is_whole_on_every_rank():
    entry = entry_named(SHAPE, "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
    assert entry.hf == ("model.layers.0.input_layernorm.weight",)
    weight = torch.arange(6)
    assert [to_shard(entry, (weight,), 2, r).tolist() for r in (0, 1)] == [list(range(6))] * 2


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_tables_name_every_tensor_of_transformers(tmp_path, family, tied):
    from safetensors.torch import load_file

    folder = tiny_hf(tmp_path, family, tied=tied)
    stored = {name: tuple(t.shape) for name, t in load_file(folder / "model.safetensors").items()}
    shape = read_shape(folder)
    assert hf_shapes(shape) == stored
    assert shape.parameters == sum(torch.Size(size).numel() for size in stored.values())


@pytest.mark.parametrize("tp", (1, 2, 4))
@pytest.mark.parametrize("family", ("llama", "qwen2", "qwen3"))
def test_round_trip_is_exact(tmp_path, family, tp):
    """Every tensor comes back bit for bit, and the shards hold each of its numbers once (plus zeros of padding)."""
    shape = read_shape(tiny_hf(tmp_path, family))
    for entry in entries(shape):
        sources = [torch.randn(size).bfloat16() for size in entry.shapes]
        shards = [to_shard(entry, sources, tp, rank) for rank in range(tp)]
        assert all(tuple(s.shape) == shard_shape(entry, tp) and s.dtype == torch.bfloat16 for s in shards)
        for source, back in zip(sources, to_hf(entry, shards), strict=True):
            assert torch.equal(source.view(torch.int16), back.view(torch.int16)), entry.megatron
        if entry.kind != Kind.REPLICATED:
            covered = sum(p.stop - p.start for rank in range(tp) for p in pieces(entry, tp, rank))
            assert covered == sum(size[1 if entry.kind == Kind.ROW else 0] for size in entry.shapes)
            total = sum(float(s.double().sum()) for s in sources)
            assert sum(float(s.double().sum()) for s in shards) == pytest.approx(total, abs=1e-9)


def test_tied_output_layer_is_a_copy():
    copies = [e for e in entries(dataclasses.replace(SHAPE, tied=True)) if e.copy]
    assert [(e.megatron, e.hf) for e in copies] == [(("output_layer.weight",), ("model.embed_tokens.weight",))]
    assert not any(e.copy for e in entries(SHAPE))
