"""Process groups, device, threads and seeds of a trainer rank; the only place of the trainer that picks a backend."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from alphamed.cluster.hardware import trainer_threads
from alphamed.cluster.narrow_store import HashStore
from alphamed.config.choices import Device, Dtype
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.records import Layout

SHARED_DEVICES = "NCCL_MULTI_RANK_GPU_ENABLE"
"""Where this is 1, NCCL (2.30 or newer) lets several ranks use one GPU: layouts can be tried with fewer GPUs than ranks."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """This rank's place in the run. `cpu_group` is a gloo group over all ranks, for CPU tensors and small messages."""

    layout: Layout
    device: torch.device
    rank: int
    world: int
    cpu_group: dist.ProcessGroup


def start(config: Config) -> Runtime:
    """Join the ranks that torchrun started (or be the only one without torchrun) and build Megatron's process groups.

    Default process group: made here unless the caller has made it. Raises ConfigError when the number of ranks does
    not fit the layout or the device is not there.
    """
    device = _device(config)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world != config.parallel.world:
        p = config.parallel
        raise ConfigError(
            f"parallel: {p.axes()} needs {p.world} ranks, {world} are present; change the layout or the number of ranks"
        )
    torch.set_num_threads(trainer_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), device.type == "cuda"))
    if config.model.dtype == Dtype.FP32:
        torch.set_float32_matmul_precision("highest")  # as the environment has it for other libraries (exact_fp32)
        torch.backends.cudnn.allow_tf32 = False
    if device.type == "cpu":
        from megatron_patches.apply import apply

        apply()
    if not dist.is_initialized():
        _join(config, device, rank, world)
    cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.cluster.rank_timeout_s))
    layout = _model_parallel(config)
    return Runtime(layout, device, rank, world, own_group(cpu_group))


def stop(runtime: Runtime) -> None:
    """Leave all process groups. Every rank calls it."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def collective_deadline(seconds: float, afterwards_s: float) -> Iterator[None]:
    """Collectives of this process that begin inside, in any group, have `seconds` to end: their peers may be waiting for
    storage, in Megatron's barriers too. Those that begin after it have `afterwards_s`. Every rank calls it."""
    groups = list(distributed_c10d._world.pg_map)
    try:
        for group in groups:
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        yield
    finally:
        for group in groups:
            distributed_c10d._set_pg_timeout(timedelta(seconds=afterwards_s), group)


def storage_deadline(config: Config, size: int) -> contextlib.AbstractContextManager[None]:
    """Collectives may take what reading or writing `size` bytes may (checkpoint.storage_bytes_per_s)."""
    return collective_deadline(config.storage_deadline_s(size), config.cluster.rank_timeout_s)


def own_group(group: object) -> dist.ProcessGroup:
    """A process group that this rank belongs to, as its type: torch and Megatron hand out a number or None to others."""
    assert isinstance(group, dist.ProcessGroup), f"this rank is in no such group ({group!r})"
    return group


def memory_metrics(runtime: Runtime) -> dict[str, float]:
    """`memory/gpu_peak_bytes`: the most that torch has held on this rank's GPU; {} without one."""
    if runtime.device.type == "cpu":
        return {}
    return {"memory/gpu_peak_bytes": float(torch.cuda.max_memory_allocated(runtime.device))}


def pick_device(config: Config) -> str:
    """`cuda` or `cpu`, as configured; `auto` takes CUDA where it is. Raises ConfigError."""
    configured, present = config.cluster.device, torch.cuda.is_available()
    if configured == Device.CUDA and not present:
        raise ConfigError("cluster.device: cuda, but torch finds no CUDA device; set it to auto or cpu")
    if configured == Device.CPU and present:
        raise ConfigError(
            "cluster.device: cpu, but this machine has CUDA, where Megatron-Core's CPU patches must not be "
            "applied; set it to auto or start with CUDA_VISIBLE_DEVICES="
        )
    return "cuda" if present else "cpu"


def _device(config: Config) -> torch.device:
    if pick_device(config) == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if os.environ.get(SHARED_DEVICES) == "1":
        local %= torch.cuda.device_count()
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"cluster.gpus_per_node: local rank {local} has no GPU ({torch.cuda.device_count()} present); "
            f"start fewer ranks on this node"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(config: Config, device: torch.device, rank: int, world: int) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    deadline = timedelta(seconds=config.cluster.rank_timeout_s)
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=deadline)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=deadline)


def _model_parallel(config: Config) -> Layout:
    from megatron.core import parallel_state as groups, tensor_parallel

    p = config.parallel
    groups.initialize_model_parallel(
        p.tensor,
        p.pipeline,
        p.virtual_pipeline,
        context_parallel_size=p.context,
        distributed_timeout_minutes=max(1, round(config.cluster.rank_timeout_s / 60)),
    )
    layout = Layout(
        p.tensor,
        p.pipeline,
        p.data,
        p.virtual_pipeline,
        p.sequence,
        tensor_rank=groups.get_tensor_model_parallel_rank(),
        pipeline_rank=groups.get_pipeline_model_parallel_rank(),
        data_rank=groups.get_data_parallel_rank(),
        context=p.context,
        context_rank=groups.get_context_parallel_rank(),
        part_multiple=config.part_multiple,
    )
    # Another stream of random numbers per pipeline stage, the same on data and context ranks, which must start from equal
    # weights.
    seed = config.run.seed + 100 * layout.pipeline_rank
    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return layout
