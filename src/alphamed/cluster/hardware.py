"""What this machine has, found without importing torch: GPUs, cores, memory."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from pathlib import Path

from alphamed.cluster.cgroup import limits
from alphamed.config.choices import Device
from alphamed.config.schema import Config

DRIVER_DEADLINE_S = 20
CUDA_TRAINER_THREADS = 8  # of a rank that computes on a GPU: enough for its data and its collectives on CPU tensors


def gpus_present() -> int:
    """NVIDIA GPUs that this process may use: the device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU here; None where the driver's tool does not report it."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=DRIVER_DEADLINE_S,
        )
        return min(int(line) for line in answer.stdout.split()) << 20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def wants_cuda(config: Config) -> bool:
    """Whether the run will use CUDA: as configured, or as the machine allows."""
    return config.cluster.device == Device.CUDA or (config.cluster.device == Device.AUTO and gpus_present() > 0)


def this_machine() -> str:
    """Equal for processes that can share memory: of one user, on one kernel, in one network namespace, to which names of Unix
    sockets belong. Where the system does not report it, equal to nothing."""
    try:
        kernel, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")
    except OSError:
        return secrets.token_hex(16)
    return f"{kernel} {namespace} {os.getuid()}"


def cores() -> int:
    """CPU cores' worth of time that this process may use, at least 1: those it may run on (taskset, cpusets), or fewer where
    a control group limits its time. Of a fraction half a core and more counts as one: below that one thread more would wait
    most of the time, and its team with it."""
    allowed, quota = len(os.sched_getaffinity(0)), limits().cores
    return allowed if quota is None else max(1, min(allowed, int(quota + 0.5)))


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory that this process may use: the machine's, or its control groups' where those are smaller."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    groups = limits()
    return (
        min(total, groups.memory_bytes or total),
        free if groups.memory_left_bytes is None else min(free, groups.memory_left_bytes),
    )


def trainer_threads(config: Config, local_ranks: int, on_cuda: bool) -> int:
    """CPU threads of one of a node's `local_ranks` trainer ranks."""
    if config.cluster.trainer_threads:
        return config.cluster.trainer_threads
    share = max(1, cores() // local_ranks)
    return min(share, CUDA_TRAINER_THREADS) if on_cuda else share
