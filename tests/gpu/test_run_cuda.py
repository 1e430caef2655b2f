"""Whole runs on GPUs: trainer, vLLM engine, reward process and weight push, on one GPU that they share.

Over gloo in any case, and over NCCL where it lets two members use one GPU (2.30 and newer).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from test_layouts_cuda import nccl_shares_gpus
from tiny_run import Workplace, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="no vLLM"),
]

STEPS = 4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    return Workplace(
        tmp_path_factory.mktemp("cuda-run"),
        model={"dtype": "bf16"},
        rollout={"dtype": "bf16", "kv_cache_bytes": 1 << 30, "gpu_memory_utilization": 0.3},
        cluster={"device": "cuda", "share_gpus": True, "gpus_per_node": 1},
        run={"steps": STEPS},
    )


@pytest.mark.parametrize("transport", ["ipc", "gloo", "nccl"])
@pytest.mark.parametrize("mode", ["gather", "direct"])
def test_a_run_on_a_shared_gpu(workplace, transport, mode, monkeypatch):
    if transport == "nccl":
        if not nccl_shares_gpus():
            pytest.skip("this NCCL refuses two members on one GPU")
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    run_dir = workplace.train(f"{transport}-{mode}", f"sync.transport={transport}", f"sync.mode={mode}")
    found = metrics(run_dir)
    assert list(found) == list(range(1, STEPS + 1))
    assert [row["policy_version"] for row in found.values()] == list(range(1, STEPS + 1))
    assert all(row["policy/logprob_diff_mean"] < 0.08 for row in found.values()), "engine and trainer disagree"
    assert all(row["policy/grad_norm"] > 0 for row in found.values())
    assert all(row["memory/gpu_peak_bytes"] > 0 for row in found.values())


def test_a_run_on_a_shared_gpu_goes_on_from_its_checkpoint(workplace):
    workplace.train("resumed", "checkpoint.every=2", "run.stop_after=2")
    found = metrics(workplace.train("resumed", "checkpoint.every=2"))
    assert list(found) == list(range(1, STEPS + 1))
    assert all(row["policy/logprob_diff_mean"] < 0.08 for row in found.values())
