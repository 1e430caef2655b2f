"""Environment variables that can redirect a run or change what it computes: which of them are honoured, which ignored, which
refused, and why. One table; what every process gets, what is printed, recorded and shown by `alphamed doctor` follows.

A variable that no row names is passed on and not spoken of.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from alphamed.errors import ConfigError
from alphamed.files import replace_json

ENVIRONMENT_FILE = "environment.json"
"""In the run directory: the variables that the last start found, for provenance.json."""
MAX_VALUE_CHARS = 200
SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSW|CREDENTIAL|COOKIE", re.IGNORECASE)
URL_USER = re.compile(r"//[^/@\s]*@")


class Start(StrEnum):
    """How a run's processes are started."""

    ONE_HOST = "alphamed train, alphamed eval"
    NODES = "alphamed launch --nodes"
    TORCHRUN = "torchrun on one host"
    TORCHRUN_HOSTS = "torchrun on several hosts"

    @property
    def by_torchrun(self) -> bool:
        return self in (Start.TORCHRUN, Start.TORCHRUN_HOSTS)


class Treatment(StrEnum):
    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


ALWAYS = frozenset(Start)
NEVER: frozenset[Start] = frozenset()
BY_TORCHRUN = frozenset(start for start in Start if start.by_torchrun)


@dataclass(frozen=True, slots=True)
class VariableRule:
    """`patterns`: names, `*` stands for any text. `honoured`: the starts that honour them, the others ignore them.
    `private`: values are places or addresses, which are printed but not recorded. `refused`: no start takes them."""

    patterns: str
    honoured: frozenset[Start]
    why: str
    private: bool = False
    refused: bool = False

    def matches(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns.split())


LAUNCHER = VariableRule(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME "
    "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_* PET_*",
    BY_TORCHRUN,
    "alphamed starts a torchrun of its own, which sets them",
    private=True,
)
RULES = (
    LAUNCHER,
    VariableRule("ALPHAMED_JOB ALPHAMED_HOST", NEVER, "`alphamed launch --nodes` sets it", private=True),
    VariableRule("ALPHAMED_ADDRESS", frozenset({Start.TORCHRUN_HOSTS}), "a start over several hosts sets it", private=True),
    VariableRule(
        "RAY_ADDRESS",
        frozenset({Start.TORCHRUN_HOSTS}),
        "a run on one host starts a Ray of its own, `alphamed launch --nodes` one on its nodes",
        private=True,
    ),
    VariableRule(
        "RAY_AUTH_* RAY_USE_TLS RAY_TLS_*",
        frozenset({Start.NODES, Start.TORCHRUN_HOSTS}),
        "the Ray of a run on one host has a token of its own",
        private=True,
    ),
    VariableRule("RAY_USAGE_STATS_ENABLED RAY_worker_niceness RAY_health_check_*", NEVER, "the run sets it"),
    VariableRule("RAY_[a-z]* RAY_BACKEND_LOG_LEVEL RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", ALWAYS, "settings of Ray"),
    VariableRule("RAY_*", frozenset({Start.NODES, Start.TORCHRUN_HOSTS}), "it belongs to another Ray", private=True),
    VariableRule("OMP_NUM_THREADS MKL_NUM_THREADS", NEVER, "cluster.trainer_threads and cluster.engine_cores decide"),
    VariableRule("OMP_* MKL_* KMP_* GOMP_*", ALWAYS, "threads of all processes"),
    VariableRule("CUDA_DEVICE_MAX_CONNECTIONS", NEVER, "the trainer needs 1"),
    VariableRule("CUDA_* NVIDIA_TF32_OVERRIDE TRITON_F32_DEFAULT", ALWAYS, "which GPUs, and how they compute"),
    VariableRule("GLOO_SOCKET_IFNAME", ALWAYS - {Start.ONE_HOST}, "processes of one host talk over its loopback interface"),
    VariableRule("NCCL_* GLOO_* UCX_*", ALWAYS, "links between processes"),
    VariableRule("PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF", ALWAYS, "memory of trainer ranks on GPUs"),
    VariableRule(
        "PYTORCH_* TORCH_* TORCHINDUCTOR_* TORCHDYNAMO_* NVTE_*", ALWAYS, "settings of PyTorch and Transformer Engine"
    ),
    VariableRule(
        "VLLM_HOST_IP VLLM_WORKER_MULTIPROC_METHOD VLLM_LOGGING_LEVEL VLLM_CPU_OMP_THREADS_BIND VLLM_NO_USAGE_STATS "
        "VLLM_DO_NOT_TRACK VLLM_USE_FLASHINFER_SAMPLER",
        NEVER,
        "the run sets it",
    ),
    VariableRule("VLLM_CPU_KVCACHE_SPACE", NEVER, "rollout.kv_cache_bytes decides"),
    VariableRule("VLLM_USE_MODELSCOPE", NEVER, "model.path decides"),
    VariableRule("VLLM_PORT VLLM_DP_* VLLM_ENABLE_V1_MULTIPROCESSING", NEVER, "it is for a server of vLLM's own"),
    VariableRule("VLLM_*", ALWAYS, "settings of the engines", private=True),
    VariableRule(
        "HF_* HUGGINGFACE_* TRANSFORMERS_*", ALWAYS, "how a model is fetched; after that a run is offline", private=True
    ),
    VariableRule("WANDB_MODE WANDB_DISABLED", NEVER, "logging.wandb decides"),
    VariableRule("WANDB_PROJECT", NEVER, "logging.wandb_project decides"),
    VariableRule("WANDB_NAME WANDB_RUN_ID WANDB_RESUME WANDB_DIR", NEVER, "run.name and the run directory decide"),
    VariableRule("WANDB_SERVICE WANDB_ERROR_REPORTING", NEVER, "the run starts a service of its own"),
    VariableRule("WANDB_*", ALWAYS, "where logs go, if logging.wandb is online", private=True),
    VariableRule(
        "HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy",
        ALWAYS,
        "how a model is fetched",
        private=True,
    ),
    VariableRule("LD_PRELOAD LD_LIBRARY_PATH", ALWAYS, "libraries of all processes", private=True),
    VariableRule("PYTHONPATH PYTHONHOME", ALWAYS, "code of all processes", private=True),
    VariableRule("PYTHONOPTIMIZE", NEVER, "Python would leave out the checks on which the results rely", refused=True),
)


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable that is set. `value` is fit to print: secrets are withheld, long ones cut."""

    name: str
    value: str
    treatment: Treatment
    rule: VariableRule


def rule_of(name: str) -> VariableRule | None:
    """The first rule that names the variable. Versions, which images are full of, redirect nothing."""
    return None if name.endswith("_VERSION") else next((rule for rule in RULES if rule.matches(name)), None)


def examine(environment: Mapping[str, str], start: Start) -> list[Variable]:
    """The variables of the table that are set, by name; without those that the start itself has set."""
    variables = []
    for name in sorted(environment):
        rule = rule_of(name)
        if rule is None or _set_by_start(name, environment[name], rule, start):
            continue
        if rule.refused and environment[name] in ("", "0"):  # unset, to Python
            continue
        treatment = Treatment.HONOURED if start in rule.honoured else Treatment.IGNORED
        variables.append(
            Variable(name, printable(name, environment[name]), Treatment.REFUSED if rule.refused else treatment, rule)
        )
    return variables


def _set_by_start(name: str, value: str, rule: VariableRule, start: Start) -> bool:
    """What torchrun gives its ranks, and the token that a job of several hosts needs, which its launchers have drawn."""
    if start.by_torchrun:
        return rule is LAUNCHER or (name, value) == ("OMP_NUM_THREADS", "1")
    return start == Start.NODES and (name == "RAY_AUTH_TOKEN" or (name, value) == ("RAY_AUTH_MODE", "token"))


def honoured_only(environment: Mapping[str, str], start: Start) -> dict[str, str]:
    """The environment without the variables that this start ignores."""
    return {name: value for name, value in environment.items() if (rule := rule_of(name)) is None or start in rule.honoured}


def printable(name: str, value: str) -> str:
    """The value, but not a secret, nor the user and password of an address."""
    if SECRET.search(name) and value:
        return "(a secret)"
    text = URL_USER.sub("//(a secret)@", " ".join(value.split()))
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."


def lines(variables: list[Variable]) -> list[str]:
    """What a start prints: one line for all that are honoured, one for each that is ignored."""
    honoured = [f"{variable.name}={variable.value}" for variable in variables if variable.treatment == Treatment.HONOURED]
    return ([f"environment: honoured are {' '.join(honoured)}"] if honoured else []) + [
        f"environment: {variable.name}={variable.value} is ignored: {variable.rule.why}"
        for variable in variables
        if variable.treatment == Treatment.IGNORED
    ]


def refuse(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable that no run can be started with."""
    for variable in examine(environment, Start.ONE_HOST):
        if variable.treatment == Treatment.REFUSED:
            raise ConfigError(f"environment: {variable.name}={variable.value} is refused: {variable.rule.why}; unset it")


def write(run_dir: Path, variables: list[Variable]) -> None:
    """Note the variables for provenance.json, without values that are secrets, places or addresses."""
    replace_json(
        run_dir / ENVIRONMENT_FILE,
        [
            {"name": variable.name, "treatment": str(variable.treatment)}
            | ({} if variable.rule.private or SECRET.search(variable.name) else {"value": variable.value})
            for variable in variables
        ],
    )


def settle(run_dir: Path, start: Start, quiet: bool = False, environment: Mapping[str, str] = os.environ) -> None:
    """What a start does with its environment before anything reads it: refuse, note and (unless `quiet`) print. `environment`: the
    caller's environment, where the start has added to it since."""
    refuse(environment)
    variables = examine(environment, start)
    write(run_dir, variables)
    if not quiet:
        for line in lines(variables):
            print(line, file=sys.stderr)


def noted(run_dir: Path) -> list[dict[str, str]]:
    """What the last start has noted; [] where none has (a test, a program of one's own)."""
    try:
        return json.loads((run_dir / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return []
