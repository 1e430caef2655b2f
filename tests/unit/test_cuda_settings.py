"""What is decided for CUDA, without a GPU: which of Megatron's kernels are asked for, engine arguments, environments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alphamed.cluster import placement, transformer_engine
from alphamed.cluster.cluster_job import ClusterHost, ClusterJob
from alphamed.cluster.environment import run_environment
from alphamed.cluster.variables import Start
from alphamed.config.loading import build_config
from alphamed.config.schema import Config
from alphamed.launch.nodes import _Player
from alphamed.launch.single_host import single_node_environment
from alphamed.megatron import provider
from alphamed.model.shape import ModelShape
from alphamed.records import Layout
from alphamed.rollout.engine import _engine_args
from alphamed.rollout.spec import CUDA_BATCH_TOKENS, engine_environment, engine_specs

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


# --------------------------------------------------------------------------------------------------------------- engines
def engine_arguments(device: str, **rollout):
    settings = config(cluster={"device": device}, rollout=rollout)
    return _engine_args(engine_specs(settings, Path("folder"), replace(SHAPE, head_dim=32), (2,))[0])


@pytest.mark.parametrize("deterministic", [False, True])
def test_engines_on_cuda_read_prompts_in_chunks_of_what_the_planner_assumes(deterministic):
    made = engine_arguments("cuda", deterministic=deterministic)
    assert made.max_num_batched_tokens == CUDA_BATCH_TOKENS == 8192
    assert made.enable_chunked_prefill is not False  # vLLM's default, on
    assert made.enable_prefix_caching is not deterministic
    assert not made.enforce_eager and made.block_size is None


def test_a_batch_on_cuda_has_room_for_a_token_of_every_sequence():
    assert engine_arguments("cuda", max_concurrent_requests=10_000).max_num_batched_tokens == 10_000


def test_only_deterministic_engines_on_a_cpu_take_whole_prompts():
    made = engine_arguments("cpu", deterministic=True, max_concurrent_requests=256)
    # 256 prompts of prompt.max_tokens (1,024) at once
    assert (made.enable_chunked_prefill, made.max_num_batched_tokens) == (False, 262_144)
    other = engine_arguments("cpu")
    assert (other.enable_chunked_prefill, other.max_num_batched_tokens) == (None, None)


# ----------------------------------------------------------------------------------------------------------- environments
TRAINER_ALONE = {"OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"}


def on_gpus(**sections) -> Config:
    return config(cluster={"device": "cuda"}, **sections)


def test_trainer_ranks_on_gpus_have_segments_that_expand_unless_the_user_sets_the_allocator(tmp_path):
    def allocator(settings, **base):
        env = run_environment(settings, tmp_path, Start.ONE_HOST, base)
        return {name: value for name, value in env.items() if "ALLOC_CONF" in name}

    assert allocator(on_gpus()) == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        assert allocator(on_gpus(), **{name: "backend:cudaMallocAsync"}) == {name: "backend:cudaMallocAsync"}
    assert allocator(config(cluster={"device": "cpu"})) == {}


def test_ray_gets_no_setting_of_the_trainer_on_one_host_nor_on_several(tmp_path, monkeypatch):
    settings = on_gpus()
    monkeypatch.setattr(placement, "gpus_present", lambda: 8)
    one = single_node_environment(settings, tmp_path)
    place = ClusterHost("b", "10.0.0.2", "eth0", ranks=4, engine_slots=4)
    job = ClusterJob((ClusterHost("a", "10.0.0.1", "eth0", ranks=8, engine_slots=0), place), 20_000, 20_001)
    several = _Player(settings, SimpleNamespace(rank=1), job, place)._environment(tmp_path)
    for trainer in (one, several):
        assert TRAINER_ALONE <= trainer.keys() and trainer["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
        of_ray = placement.environment_of_ray(settings, trainer, [4, 5, 6, 7])
        assert not TRAINER_ALONE & of_ray.keys()
        assert of_ray["CUDA_VISIBLE_DEVICES"] == "4,5,6,7" and of_ray["RAY_health_check_failure_threshold"] == "20"


def test_fp32_on_cuda_is_no_tf32(tmp_path):
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"}

    def of_trainer(settings, base):
        env = run_environment(settings, tmp_path, Start.ONE_HOST, base)
        return {name: env[name] for name in exact if name in env}

    fp32 = on_gpus(model={"path": "m", "dtype": "fp32"})
    assert of_trainer(fp32, {}) == exact
    assert of_trainer(fp32, {"NVIDIA_TF32_OVERRIDE": "1"}) == exact | {"NVIDIA_TF32_OVERRIDE": "1"}  # as the user says
    assert of_trainer(on_gpus(), {}) == of_trainer(config(cluster={"device": "cpu"}, model=dict(fp32.model)), {}) == {}


@pytest.mark.parametrize(("device", "dtype"), [("cuda", "fp32"), ("cuda", "bf16"), ("cpu", "fp32")])
def test_engines_on_cuda_sample_without_flashinfer_and_in_fp32_without_tf32(device, dtype):
    settings = config(cluster={"device": device}, rollout={"dtype": dtype})
    env = engine_environment(engine_specs(settings, Path("folder"), replace(SHAPE, head_dim=32), (2,))[0])
    assert env.get("VLLM_USE_FLASHINFER_SAMPLER") == ("0" if device == "cuda" else None)
    assert env.get("NVIDIA_TF32_OVERRIDE") == ("0" if (device, dtype) == ("cuda", "fp32") else None)
