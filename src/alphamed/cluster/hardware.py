"""What this machine has, found without importing torch: GPUs, cores, memory."""
from __future__ import annotations

import os
import re
import secrets
import subprocess
from pathlib import Path

from alphamed.config import Config
from alphamed.config_choices import Device

DRIVER_DEADLINE_S = 20


def gpus_present() -> int:
    """NVIDIA GPUs that this process may use: the device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))


def gpu_memory_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU here; None where the driver's tool does not say."""
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True,
                              text=True, timeout=DRIVER_DEADLINE_S)
        return min(int(line) for line in told.stdout.split()) << 20
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def wants_cuda(config: Config) -> bool:
    """Whether the run will use CUDA: as the configuration says, or as the machine allows."""
    return config.cluster.device == Device.CUDA or (config.cluster.device == Device.AUTO and gpus_present() > 0)


def this_machine() -> str:
    """Equal for processes that can share memory: of one user, on one kernel, in one network namespace, to which names of Unix
    sockets belong. Where the system does not tell, equal to nothing."""
    try:
        kernel, namespace = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")
    except OSError:
        return secrets.token_hex(16)
    return f"{kernel} {namespace} {os.getuid()}"


def cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory of the machine, or of the control group where that is smaller."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (FileNotFoundError, ValueError):     # no such group, or "max"
        return total, free
    return min(total, limit), min(free, limit)
