"""vLLM's own configuration of an engine on CUDA: which model runner, CUDA graphs, batch. Tests on CPU run another runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_hf

SCRIPT = Path(__file__).with_name("cuda_engine_config.py")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    pytest.importorskip("vllm")
    folder = tiny_hf(tmp_path_factory.mktemp("model") / "m", "qwen3", heads=8, kv_heads=8, head_dim=32, vocab=512)
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("engine", ["cuda", "cuda_deterministic_tp8"])
def test_engines_on_cuda_run_the_second_model_runner_with_cuda_graphs(configs, engine):
    made = configs[engine]
    assert (made["device"], made["runner"], made["eager"]) == ("cuda", "V2", False)
    assert made["cuda_graphs"] == "FULL_AND_PIECEWISE"
    assert made["batch_tokens"] == 8192 and made["chunked_prefill"]
    assert made["prefix_cache"] is (engine == "cuda")


def test_engines_on_a_cpu_run_the_first_one_eagerly(configs):
    made = configs["cpu"]
    assert (made["device"], made["runner"], made["eager"], made["cuda_graphs"]) == ("cpu", "V1", True, "NONE")


def test_weights_are_loaded_in_vllms_own_configuration(configs):
    assert configs["loads_in_own_config"]
