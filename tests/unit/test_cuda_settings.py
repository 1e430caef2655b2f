"""What is decided for CUDA, without a GPU: which of Megatron's kernels are asked for, engine arguments, environments."""

from __future__ import annotations

import pytest
import torch

from alphamed.cluster import transformer_engine
from alphamed.config.loading import build_config
from alphamed.config.schema import Config
from alphamed.megatron import provider
from alphamed.model.shape import ModelShape
from alphamed.records import Layout

SHAPE = ModelShape(
    family="qwen3",
    layers=2,
    hidden=64,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=512,
    tied=True,
    qkv_bias=False,
    qk_norm=True,
    rope_scaling=None,
    norm_eps=1e-6,
    rope_theta=1e6,
    max_positions=4096,
)


def config(**sections) -> Config:
    return build_config({"model": {"path": "m"}, "data": {"train": ["x.jsonl"]}} | sections)


@pytest.fixture
def engine_installed(monkeypatch):
    """CUDA and Transformer Engine, as far as settings depend on them; no apex."""
    monkeypatch.setattr(provider, "pick_device", lambda config: "cuda")
    monkeypatch.setattr(transformer_engine, "usable", lambda: True)


# -------------------------------------------------------------------------------------------------------------- Megatron
def test_without_apex_transformer_engines_layers_add_weight_gradients_and_megatrons_do_not(engine_installed):
    assert not provider.transformer_config(config(), SHAPE, Layout()).gradient_accumulation_fusion
    linear, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    setattr(linear, provider.FUSES, False)  # as Transformer Engine's are made with Megatron's setting
    provider.add_weight_gradients([torch.nn.Sequential(torch.nn.Sequential(linear), other)])
    assert getattr(linear, provider.FUSES) is True
    assert not hasattr(other, provider.FUSES)


@pytest.mark.parametrize(
    ("parallel", "fused"), [({}, False), ({"share_prompts": False}, True), ({"share_prompts": False, "context": 2}, False)]
)
def test_rotary_positions_are_fused_where_attention_is_transformer_engines(engine_installed, parallel, fused):
    settings = config(parallel=parallel)
    assert provider.fused_attention_active(settings, Layout(context=settings.parallel.context)) is fused


def test_nothing_is_fused_by_transformer_engine_on_a_cpu(monkeypatch):
    monkeypatch.setattr(provider, "pick_device", lambda config: "cpu")
    assert not provider.fused_attention_active(config(parallel={"share_prompts": False}), Layout())
    assert not provider.transformer_config(config(parallel={"share_prompts": False}), SHAPE, Layout()).apply_rope_fusion
