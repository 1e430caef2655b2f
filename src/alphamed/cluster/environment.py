"""The environment of a run's processes: the one place, with placement.py, that determines what goes into it.

What the caller has set is kept or left out as cluster.variables defines."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from alphamed.cluster.hardware import wants_cuda
from alphamed.cluster.ledger import run_id
from alphamed.cluster.processes import TAG
from alphamed.cluster.variables import LAUNCHER, Start, honoured_only
from alphamed.config.choices import Dtype, WandbMode
from alphamed.config.schema import Config

SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # a hub model was fetched before anything was started
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_ERROR_REPORTING": "false",
}
"""Nothing leaves the machine unless the configuration allows it."""
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Settings of torch's allocator on GPUs, by its older and its newer name; others than torch read the older one."""
TRAINER_ONLY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", *ALLOCATOR)
"""Settings of a trainer rank that its actors must not inherit. Engines keep their memory in pools of their own, which vLLM
registers for transfers and puts to sleep: segments that expand are not for them."""
WANDB = {WandbMode.ONLINE: "online", WandbMode.OFFLINE: "offline", WandbMode.OFF: "disabled"}


def run_environment(config: Config, temporary: Path, start: Start, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every process of the run gets, over what `start` honours of `base` (the caller's environment). `temporary` takes
    sockets and scratch files."""
    env = honoured_only(os.environ if base is None else base, start) | SILENT
    env |= {
        TAG: run_id(config.run_dir),
        "TMPDIR": str(temporary),
        "WANDB_MODE": WANDB[config.logging.wandb],
        "TOKENIZERS_PARALLELISM": "false",  # its threads fight the engine's for the cores
        # idle threads sleep: spinning, the trainer's and the engine's took three times the CPU time on two shared cores
        "OMP_WAIT_POLICY": env.get("OMP_WAIT_POLICY", "passive"),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron overlaps communication only in this order
        "SPT_NOENV": "1",  # process titles must not overwrite the tag
        # c10d warns of every connection from an address without a name, on a host without DNS of its own ones, too
        "TORCH_CPP_LOG_LEVEL": env.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # tokens keep other users of the machine away from the run's Ray; where a start honours a given one, it is that
        "RAY_AUTH_MODE": env.get("RAY_AUTH_MODE", "token"),
        "RAY_AUTH_TOKEN": env.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        # user code (`reward.name: module:function`) is found from where the run was started
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(part for part in (env.get("PYTHONPATH", ""), os.getcwd()) if part)),
    }
    if wants_cuda(config):
        env = exact_fp32(config.model.dtype) | env
        if not any(name in env for name in ALLOCATOR):
            env[ALLOCATOR[0]] = "expandable_segments:True"  # packed rows differ in length: fewer holes between blocks
    return env


def exact_fp32(dtype: Dtype) -> dict[str, str]:
    """What has CUDA compute in FP32 where that is configured: products of FP32 matrices are TF32, with 10 bits of mantissa,
    by default in Transformer Engine (always) and in Triton's kernels, in which vLLM's attention is written. The first variable
    overrules every call of cuBLAS and cuDNN of a process."""
    return {"NVIDIA_TF32_OVERRIDE": "0", "TRITON_F32_DEFAULT": "ieee"} if dtype == Dtype.FP32 else {}


def environment_of_actors(before: Mapping[str, str]) -> dict[str, str]:
    """What Ray's processes and actors get of a trainer rank's environment, on every host, whoever starts them: nothing of
    torchrun's, and none of the settings that are for the trainer alone."""
    return {name: value for name, value in without_torchrun(before).items() if name not in TRAINER_ONLY} | SILENT


def enter(environment: Mapping[str, str]) -> None:
    """Make this the whole environment of the process, for want of a supervisor that started it so: before Ray and vLLM read
    it."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    tempfile.tempdir = None  # Python keeps the first temporary folder that it determined


def without_torchrun(env: Mapping[str, str]) -> dict[str, str]:
    """The environment less everything that an outer torchrun, or an image made for one, has set."""
    return {name: value for name, value in env.items() if not LAUNCHER.matches(name)}
