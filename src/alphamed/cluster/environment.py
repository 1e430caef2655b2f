"""The environment of a run's processes: the one place, with placement.py, that says what goes into it."""
from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from alphamed.cluster.ledger import run_id
from alphamed.cluster.processes import TAG
from alphamed.config import Config
from alphamed.config_choices import WandbMode

TORCHRUN_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_")
SILENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",              # a hub model was fetched before anything was started
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_ERROR_REPORTING": "false",
}
"""Nothing leaves the machine unless the configuration says so."""
WANDB = {WandbMode.ONLINE: "online", WandbMode.OFFLINE: "offline", WandbMode.OFF: "disabled"}


def run_environment(config: Config, temporary: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every process of the run gets, over `base` (the caller's environment). torchrun's variables are kept: a rank
    needs its own. `temporary` takes sockets and scratch files."""
    env = dict(os.environ if base is None else base) | SILENT
    env |= {
        TAG: run_id(config.run_dir),
        "TMPDIR": str(temporary),
        "WANDB_MODE": WANDB[config.logging.wandb],
        "TOKENIZERS_PARALLELISM": "false",         # its threads fight the engine's for the cores
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",        # Megatron overlaps communication only in this order
        "SPT_NOENV": "1",                          # process titles must not overwrite the tag
        # tokens keep other users of the machine away from the run's Ray; a given cluster brings its own
        "RAY_AUTH_MODE": env.get("RAY_AUTH_MODE", "token"),
        "RAY_AUTH_TOKEN": env.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
        # user code (`reward.name: module:function`) is found from where the run was started
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(
            part for part in (env.get("PYTHONPATH", ""), os.getcwd()) if part)),
    }
    return env


def enter(environment: Mapping[str, str]) -> None:
    """Make the environment this process's own, for want of a supervisor that started it so: before Ray and vLLM read it."""
    os.environ.update(environment)
    tempfile.tempdir = None                     # Python keeps the temporary folder that it was first asked for


def without_torchrun(env: Mapping[str, str]) -> dict[str, str]:
    """The environment less everything that an outer torchrun, or an image made for one, has set."""
    return {name: value for name, value in env.items()
            if name not in TORCHRUN_VARIABLES and not name.startswith(TORCHRUN_PREFIXES)}
