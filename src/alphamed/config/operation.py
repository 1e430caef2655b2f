"""The sections of a configuration on what a run leaves behind, how it is observed and what it runs on."""

from __future__ import annotations

from alphamed.config.choices import Device, ProfileKind, WandbMode
from alphamed.config.sections import Count, NonNegative, Positive, PositiveFloat, Section


class CheckpointConfig(Section):
    every: NonNegative = 10
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2
    storage_bytes_per_s: PositiveFloat = 200e6
    """The least that the storage of models and checkpoints is expected to do, all ranks together. Reading or writing may take
    cluster.rank_timeout_s and what its bytes take at this speed; after that the run ends."""


class LoggingConfig(Section):
    wandb: WandbMode = WandbMode.OFFLINE
    wandb_project: str = "alphamed"
    rollout_files: bool = True
    report: bool = True
    export_hf: bool = True
    """Export the trained model as a Hugging Face folder when the run ends."""


class ProfileConfig(Section):
    """Traces of single steps (docs/training.md)."""

    steps: tuple[Positive, ...] = ()
    """Steps that are traced; none by default."""
    ranks: tuple[NonNegative, ...] = (0,)
    """Trainer ranks that are traced."""
    kind: ProfileKind = ProfileKind.TORCH
    """`torch`: a Chrome trace of each step and rank in the run directory. `nsys`: a range for Nsight Systems, which the run is
    started under."""


class ClusterConfig(Section):
    device: Device = Device.AUTO
    gpus_per_node: Count = 8
    ranks_per_host: Count | None = None
    """Trainer ranks per host, with several hosts. None: as many as a host has GPUs. Engines use the remaining GPUs. Required
    for hosts without GPUs, whose capacity is not known."""
    gpu: str = "h100-80g"
    """GPU that `alphamed plan` assumes: a100-80g, h100-80g, h200-141g, b200-180g."""
    nodes: Count | None = None
    """Maximum number of nodes for `alphamed plan`. None: as many as the run needs."""
    skip_memory_check: bool = False
    """Start even if the plan says that memory does not suffice."""
    share_gpus: bool = False
    """Run engines on the GPUs of the trainer's ranks. Both keep their memory all the time: for small models on few GPUs. An
    engine uses `rollout.gpu_memory_utilization` of a GPU. No effect on CPU, where all processes share the cores."""
    trainer_threads: Positive | None = None
    """CPU threads of a trainer rank. None: usable cores / local ranks, on CUDA at most 8."""
    engine_cores: str | None = None
    """CPU backend: cores to which an engine pins its threads (`0-1`; one list per tensor rank, `0|1`). None: all cores, with
    no more threads than the CPU limit of the control group allows."""
    rank_timeout_s: PositiveFloat = 600.0
    """Deadline of a collective between trainer ranks; longer while a checkpoint or the model is read or written
    (checkpoint.storage_bytes_per_s)."""
    heartbeat_timeout_s: PositiveFloat = 30.0
    """A rank or host without a heartbeat for this long is declared dead."""
    join_deadline_s: PositiveFloat = 180.0
    """Deadline for all hosts of a job to start, and again for all to join Ray."""
    stop_grace_s: PositiveFloat = 100.0
    """Time after Slurm's warning in which a multi-node run ends or abandons its step and writes a checkpoint."""
