"""What engines are told: cores, sizes, environment, seeds."""

import os
import subprocess
import sys

import pytest

from alphamed.cluster.cgroup import Limits
from alphamed.config.loading import build_config
from alphamed.errors import ConfigError
from alphamed.hashing import stable_hash
from alphamed.model.shape import ModelShape
from alphamed.rollout.spec import engine_cores, engine_environment, engine_specs

SHAPE = ModelShape(
    family="llama",
    layers=4,
    hidden=64,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=509,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_positions=2048,
)


def config(cluster=None, **rollout):
    return build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["d.jsonl"]},
            "prompt": {"max_tokens": 100},
            "cluster": {"device": "cpu", **(cluster or {})},
            "rollout": {"max_response_tokens": 28, "max_concurrent_requests": 6, "dtype": "fp32"} | rollout,
        }
    )


def specs(config):
    return engine_specs(config, "folder", SHAPE, (2, 7))


def test_only_where_samples_may_be_stale_does_a_push_meet_requests():
    assert [(one.asynchronous, one.on_push) for one in specs(config(on_push="abort"))] == [(False, "wait")]
    assert [(one.asynchronous, one.on_push) for one in specs(config(max_staleness=1))] == [(True, "keep")]
    assert [(one.asynchronous, one.on_push) for one in specs(config(max_staleness=2, on_push="abort"))] == [(True, "abort")]


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})


def test_cores_are_all_by_default_and_dealt_out_to_tensor_ranks(four_cores):
    assert engine_cores(config()) == ((0, 1, 2, 3),)
    assert engine_cores(config(tensor_parallel=2)) == ((0, 2), (1, 3))


@pytest.mark.parametrize(
    "given, ranks, cores",
    [("0-1", 1, ((0, 1),)), ("0,2-3", 1, ((0, 2, 3),)), ("0|1", 2, ((0,), (1,))), ("2-3|0,1", 2, ((2, 3), (0, 1)))],
)
def test_cores_as_configured(four_cores, given, ranks, cores):
    assert engine_cores(config({"engine_cores": given}, tensor_parallel=ranks)) == cores


@pytest.mark.parametrize(
    "given, ranks, message",
    [
        ("0-1", 2, "'0-1' holds 1 lists, rollout.tensor_parallel is 2"),
        ("0-9", 1, "names core 4"),
        ("x", 1, "no list of cores"),
        ("3-1", 1, "no list of cores"),
        ("0,,1", 1, "no list of cores"),
    ],
)
def test_wrong_cores_are_the_users_mistake(four_cores, given, ranks, message):
    with pytest.raises(ConfigError, match=message):
        engine_cores(config({"engine_cores": given}, tensor_parallel=ranks))


def test_more_tensor_ranks_than_cores_are_refused(four_cores):
    with pytest.raises(ConfigError, match="rollout.tensor_parallel: 8 needs as many cores, 4 present"):
        engine_cores(config(tensor_parallel=8))


def test_sizes_follow_from_the_configuration():
    one, two = specs(config(engines=2, samples_per_question=8))
    assert (one.max_model_tokens, one.max_prompt_tokens, one.max_sequences) == (128, 100, 8)  # a group is never split
    assert (one.dtype, one.eos_ids, one.index, two.index) == ("float32", (2, 7), 0, 1)
    assert one.seed != two.seed


def test_cache_on_cpu_holds_every_sequence_at_full_length():
    # a token: keys and values x 4 layers x 2 heads x 32 x 4 bytes = 2048; 8 sequences of 128 tokens, and 64 MiB on top
    assert specs(config())[0].kv_cache_bytes == 2048 * 128 * 8 + 2**26
    assert specs(config(kv_cache_bytes=2**30))[0].kv_cache_bytes == 2**30


def test_cache_is_shared_among_tensor_ranks(four_cores):
    assert specs(config(kv_cache_bytes=2**30, tensor_parallel=2))[0].kv_cache_bytes == 2**29


def test_head_sizes_that_vllm_has_no_cpu_kernel_for_are_refused():
    from dataclasses import replace

    with pytest.raises(ConfigError, match="model.path: heads of 16"):
        engine_specs(config(), "folder", replace(SHAPE, head_dim=16), (2,))


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ConfigError, match="2049 tokens together, the model has 2048"):
        specs(config(max_response_tokens=1949))
    assert specs(config(max_response_tokens=1948))


def test_environment_is_silent_local_and_binds_threads(four_cores):
    found = engine_environment(specs(config(tensor_parallel=2))[0])
    assert found["VLLM_CPU_OMP_THREADS_BIND"] == "0,2|1,3" and found["OMP_NUM_THREADS"] == "2"
    assert found["VLLM_NO_USAGE_STATS"] == found["DO_NOT_TRACK"] == found["HF_HUB_OFFLINE"] == "1"
    assert found["VLLM_HOST_IP"] == "127.0.0.1"


@pytest.mark.parametrize(
    "ranks, quota, threads, bind",
    [(1, 2, "2", "nobind"), (2, 3, "1", "nobind"), (2, 1, None, None), (1, 4, "4", "0,1,2,3"), (1, 9, "4", "0,1,2,3")],
)
def test_limited_cpu_time_means_fewer_threads_that_move_freely(four_cores, monkeypatch, ranks, quota, threads, bind):
    monkeypatch.setattr("alphamed.cluster.hardware.limits", lambda: Limits(float(quota)))
    if threads is None:
        with pytest.raises(ConfigError, match="rollout.tensor_parallel: 2 needs as many cores, 1 present"):
            specs(config(tensor_parallel=ranks))
        return
    found = engine_environment(specs(config(tensor_parallel=ranks))[0])
    assert (found["OMP_NUM_THREADS"], found["VLLM_CPU_OMP_THREADS_BIND"]) == (threads, bind)
    named = engine_environment(specs(config({"engine_cores": "0-2"}))[0])
    assert (named["OMP_NUM_THREADS"], named["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "0,1,2")  # as configured


def test_the_hash_is_the_same_in_every_process():
    code = "from alphamed.hashing import stable_hash; print(stable_hash('run', 'q1', 0, 3))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            text=True,
            capture_output=True,
            timeout=600,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    # python3 -c "import hashlib; print(int(hashlib.sha256(b'run\x1fq1\x1f0\x1f3').hexdigest()[:16], 16) // 4)"
    assert runs == {"2360187895052308946"}
    assert stable_hash("a", "bc") != stable_hash("ab", "c")
