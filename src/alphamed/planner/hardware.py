"""What a GPU offers: memory, arithmetic, bandwidths. Numbers of the vendors' data sheets, without sparsity."""

from __future__ import annotations

from dataclasses import dataclass, replace

from alphamed.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device. Bandwidths in bytes per second; those of links in one direction."""

    name: str
    memory_bytes: int  # as nvidia-smi reports it, which is a little less than the name says
    flops: float  # matrix products per second, BF16 (FP32 on a CPU)
    fp8_flops: float | None  # None: no FP8
    hbm: float  # its own memory
    nvlink: float  # to the GPUs of its node
    network: float  # its share of the node's network cards
    host: float  # to and from the host's memory

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


# NVIDIA data sheets: A100 80GB SXM (2020), H100 SXM5 (2023), H200 SXM (2024), HGX B200 (2025). Networks: DGX A100 has eight
# 200 Gb/s cards, DGX H100, H200 and B200 eight 400 Gb/s cards. Hosts: 16 lanes of PCIe 4 (A100) or 5.
_GPUS = (
    Gpu("a100-80g", 81920 << 20, 312e12, None, 2.039e12, 300e9, 25e9, 32e9),
    Gpu("h100-80g", 81559 << 20, 989.4e12, 1978.9e12, 3.35e12, 450e9, 50e9, 64e9),
    Gpu("h200-141g", 143771 << 20, 989.4e12, 1978.9e12, 4.8e12, 450e9, 50e9, 64e9),
    Gpu("b200-180g", 183359 << 20, 2250e12, 4500e12, 7.7e12, 900e9, 50e9, 64e9),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}

CORE_FLOPS = 60e9
"""Of one CPU core, FP32 with AVX2: 32 operations a cycle at 2 to 2.5 GHz, less what a shared core loses."""
CPU_MEMORY_BANDWIDTH = 12e9


def gpu(name: str, field: str = "cluster.gpu") -> Gpu:
    """The GPU of that name; `field`: where it was given. Raises ConfigError."""
    if name not in GPUS:
        raise ConfigError(f"{field}: {name!r} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def cpu(cores: int, memory_bytes: int, sharers: int) -> Gpu:
    """A machine as the device of one of `sharers` processes: the whole memory, a share of cores and bandwidth."""
    return Gpu(
        "cpu",
        memory_bytes,
        CORE_FLOPS * cores / sharers,
        None,
        CPU_MEMORY_BANDWIDTH / sharers,
        CPU_MEMORY_BANDWIDTH / 2,
        1e9,
        CPU_MEMORY_BANDWIDTH / 2,
    )


def with_memory(memory_bytes: int) -> Gpu:
    """The GPU of the table whose memory is nearest to what a driver reports, with that memory."""
    nearest = min(_GPUS, key=lambda device: abs(device.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes)
