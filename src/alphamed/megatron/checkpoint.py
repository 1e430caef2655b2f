"""Checkpoints of the policy by Megatron's dist_checkpointing: weights, optimizer, progress, random state, the run's
state.

Tensors are stored by their place in the whole model, so a checkpoint loads under another tensor, pipeline or data
layout. Every rank calls `save` and `load`; what goes wrong on one rank is raised on all of them. Folders and files are
the business of checkpoint_folder.py.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from alphamed.files import transfer_deadline_s, within_deadline
from alphamed.megatron import checkpoint_digests, checkpoint_folder as folders
from alphamed.megatron.checkpoint_folder import CheckpointError
from alphamed.megatron.checkpoint_writer import InProcessSave
from alphamed.megatron.gpt import PolicyModel
from alphamed.megatron.policy import Policy, TrainingProgress
from alphamed.megatron.runtime import Runtime, storage_deadline
from alphamed.model.shape import ModelShape
from alphamed.records import Layout
from alphamed.rundir.profiling import stage

T = TypeVar("T")
ADAM_BYTES = 12  # of a parameter: FP32 copy and two FP32 moments
READ_ERRORS = (CheckpointException, CheckpointingException, Exception)  # torch's is a BaseException


# -------------------------------------------------------------------------------------------------------- save and load
@stage("checkpoint")
def save(directory: Path, policy: Policy, state: dict[str, Any], keep: int = 2) -> Path:
    """Write checkpoint `directory/step_<state["step"]>` and make it the latest; all but the newest `keep` are deleted
    after.

    `state` is the run's own, JSON-able. Returns the folder. Raises CheckpointError on all ranks; then the older
    checkpoints and `latest` are as they were.
    """
    runtime, step = policy.runtime, state["step"]
    written = folders.partial_of(directory, step)
    needed = _stored_bytes(policy)
    contents = {
        "state": state,
        "progress": asdict(policy.progress),
        "layout": _sizes(policy.layout),
        "model": _identity(policy.shape),
        "settings": _settings(policy),
    }
    try:
        work = f"making room for checkpoint {step}"
        _on_rank0(runtime, work, lambda: within_deadline(directory, work, lambda: folders.begin(directory, step, needed)))
        with storage_deadline(policy.config, needed):
            _write(written, policy)
            deadline_s = transfer_deadline_s(needed)
            digests, work = _digests(written, runtime, deadline_s), f"completing checkpoint {step}"
            _on_rank0(
                runtime,
                work,
                lambda: within_deadline(
                    directory, work, lambda: folders.publish(written, step, contents, keep, digests), deadline_s
                ),
            )
    except CheckpointError:
        if runtime.rank == 0:
            with contextlib.suppress(TimeoutError):  # a full disk must not stay full
                within_deadline(written, "deleting what was written", lambda: folders.discard(written))
        raise
    return folders.folder_of(directory, step)


def load_newest(candidates: Sequence[Path], policy: Policy) -> tuple[dict[str, Any] | None, list[str]]:
    """Bring the policy to the first of these checkpoints whose files are whole. Returns the run's state (None without any
    candidate) and a line for each damaged one that was passed over. Raises CheckpointError on all ranks, also where all are
    damaged: a run does not start again by itself."""
    damaged: list[tuple[Path, CheckpointError]] = []
    for folder in candidates:
        try:
            state = load(folder, policy)
        except CheckpointError as error:
            if error.damage is None:
                raise
            damaged.append((folder, error))
            continue
        return state, [
            f"checkpoint {broken.name} is damaged ({error.damage}): continuing from {folder.name}, what was trained after step "
            f"{state['step']} is lost and done again"
            for broken, error in damaged
        ]
    if len(damaged) > 1:
        each = ", ".join(f"{folder.name} ({error.damage})" for folder, error in damaged)
        raise CheckpointError(
            f"checkpoint {damaged[0][0]}: is damaged, and so is every other: {each}; restore one, or delete these folders "
            f"and the run starts again"
        )
    if damaged:
        raise damaged[0][1]
    return None, []


def load(folder: Path, policy: Policy) -> dict[str, Any]:
    """Bring the policy to where checkpoint `folder` was taken and return the run's state.

    Under another layout all but the random state is restored. Learning rate, betas and the like stay those of the
    policy's configuration. Raises CheckpointError on all ranks for a damaged checkpoint or one of another model.
    """
    runtime = policy.runtime
    manifest = _agree(runtime, f"loading {folder}", lambda: _manifest(folder, runtime, policy.shape, _settings(policy)))
    same_layout = manifest["layout"] == _sizes(policy.layout)
    _allocate_adam(policy)
    with storage_deadline(policy.config, _stored_bytes(policy)):
        loaded = _read(folder, runtime, _contents(policy, loading=True, random_state=same_layout))
    for name, chunk in _named(policy.model_chunks()):
        chunk.load_state_dict(loaded[name])
    settings = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in policy.optimizer.param_groups]
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for group, values in zip(policy.optimizer.param_groups, settings, strict=True):
        group.update(values)
    _allocate_adam(policy)  # a checkpoint from before the first update holds no step
    policy.progress = TrainingProgress(**manifest["progress"])
    if same_layout:
        _set_random_state(loaded["random"], runtime)
    return manifest["state"]


def load_weights(folder: Path, chunks: Sequence[PolicyModel], shape: ModelShape, runtime: Runtime) -> dict[str, Any]:
    """Fill unwrapped model chunks with a checkpoint's weights, without any optimizer; returns the run's state. Raises
    CheckpointError on all ranks."""
    manifest = _agree(runtime, f"loading {folder}", lambda: _manifest(folder, runtime, shape))
    loaded = _read(folder, runtime, _weights(chunks))
    for name, chunk in _named(chunks):
        chunk.load_state_dict(loaded[name])
    return manifest["state"]


def _manifest(folder: Path, runtime: Runtime, shape: ModelShape, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint of this model and, where they are given, of these settings. Each rank compares the digests of
    its share of the files; checkpoints of older versions have none."""
    manifest = folders.read_manifest(folder)
    for field, value in _identity(shape).items():
        if manifest["model"].get(field) != value:
            raise CheckpointError(
                f"checkpoint {folder}: is of a model with {field} {manifest['model'].get(field)!r}, "
                f"model.path has {value!r}; give the run another name or the model it began with"
            )
    for field, value in (settings or {}).items():
        if manifest["settings"][field] != value:
            raise CheckpointError(
                f"checkpoint {folder}: was made with {field}: {manifest['settings'][field]}, now it is {value}; set it back"
            )
    name = within_deadline(
        folder,
        "comparing digests",
        lambda: checkpoint_digests.first_difference(folder, manifest.get("digests", {}), runtime.rank, runtime.world),
        transfer_deadline_s(sum(manifest["files"].values())),
    )
    if name is not None:
        raise folders.broken(folder, f"{name} has another digest than when it was written")
    return manifest


def _digests(folder: Path, runtime: Runtime, deadline_s: float) -> dict[str, str]:
    """The digests of all files in the folder, on every rank: each reads back its own."""
    work = "reading back a checkpoint"
    own = _agree(
        runtime,
        work,
        lambda: within_deadline(
            folder, work, lambda: checkpoint_digests.of_folder(folder, runtime.rank, runtime.world), deadline_s
        ),
    )
    everyone: list[dict[str, str]] = [{}] * runtime.world
    dist.all_gather_object(everyone, own, group=runtime.cpu_group)
    return {name: value for digests in everyone for name, value in digests.items()}


def _write(folder: Path, policy: Policy) -> None:
    """Store the policy in `folder`; an error of any rank is raised on all."""
    failure = None
    _allocate_adam(policy)
    contents = _contents(policy, loading=False, random_state=True)
    try:
        dist_checkpointing.save(contents, str(folder), InProcessSave())
    except (CheckpointException, OSError) as e:  # Megatron raises it on all ranks, the cause on rank 0
        failure = e
    _agree(policy.runtime, "writing a checkpoint", lambda: _raise_write_error(folder, failure))


def _read(folder: Path, runtime: Runtime, contents: dict[str, Any]) -> dict[str, Any]:
    """What `contents` names, read from the checkpoint; an error of any rank is raised on all."""
    loaded, failure = None, None
    try:
        loaded = dist_checkpointing.load(contents, str(folder))
    except READ_ERRORS as e:  # untrusted bytes: unpickling may raise anything
        failure = CheckpointError(
            str(folders.broken(folder, _reason(e)))
        )  # its files have their digests: no damage to pass over
    _agree(runtime, f"loading {folder}", lambda: _raise(failure))
    assert isinstance(loaded, dict), f"another version of Megatron-Core: load gave a {type(loaded)}"
    return loaded


# ------------------------------------------------------------------------------------------------------------- contents
def _contents(policy: Policy, loading: bool, random_state: bool) -> dict[str, Any]:
    """Megatron's sharded state dict: weights, optimizer and, for the same layout, random state."""
    weights = _weights(policy.model_chunks())
    contents = dict(weights)
    with _gathered_positions(policy):
        contents["optimizer"] = policy.optimizer.sharded_state_dict(
            weights,
            is_loading=loading,
            metadata={
                # The one format that loads under any layout. Gathered over gloo into host memory, one data rank writes.
                "distrib_optim_sharding_type": "fully_reshardable",
                "distrib_optim_fully_reshardable_mem_efficient": True,
                "chained_optim_avoid_prefix": True,
            },
        )
    if random_state:
        layout = policy.layout
        contents["random"] = ShardedObject(
            "random",
            None if loading else _random_state(policy.runtime),
            (layout.pipeline, layout.tensor, layout.data * layout.context),
            (layout.pipeline_rank, layout.tensor_rank, layout.replica),
            replica_id=0,
        )
    return contents


def _weights(chunks: Sequence[PolicyModel]) -> dict[str, Any]:
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks)}


def _named(chunks: Sequence[PolicyModel]) -> list[tuple[str, PolicyModel]]:
    """Chunks by the names that Megatron's optimizers know them under."""
    return [("model", chunks[0])] if len(chunks) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


@contextlib.contextmanager
def _gathered_positions(policy: Policy) -> Iterator[None]:
    """Make the distributed optimizer store the right numbers where its buffer has more than one bucket.

    megatron-core 0.16.1 gathers the buckets without the padding at their ends, but cuts the result at positions that
    count the padding, so every parameter behind a padded bucket is stored shifted. A tied embedding on the last stage
    has a bucket of its own, overlapped gradient reduction makes many. Remove when
    `sharded_param_state_fully_reshardable` counts alike.
    """
    buffers = [buffer for part in policy.optimizer.chained_optimizers for buffer in getattr(part, "buffers", ())]
    originals = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
        buffer.param_index_map = {
            parameter: (start - sum(padding[:bucket]), end - sum(padding[:bucket]), bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, original in zip(buffers, originals, strict=True):
            buffer.param_index_map = original


def _allocate_adam(policy: Policy) -> None:
    """Give torch's Adam the state it would only make in its first update: Megatron reads and writes it as if it were
    there. (Transformer Engine's Adam is initialised by Megatron itself.)"""
    for part in policy.optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.Adam):
            continue
        for group in inner.param_groups:
            device_step = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                state = inner.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), device=parameter.device if device_step else "cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter)


def _random_state(runtime: Runtime) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if runtime.device.type == "cuda" else None,
        "megatron": _megatron_random().get_states(),
    }


def _set_random_state(state: dict[str, Any], runtime: Runtime) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
    _megatron_random().set_states(state["megatron"])


def _megatron_random() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None, "Megatron's random state has not been seeded"
    return tracker


def _sizes(layout: Layout) -> dict[str, int]:
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "data": layout.data,
        "context": layout.context,
        "virtual_pipeline": layout.virtual_pipeline or 1,
    }


def _identity(shape: ModelShape) -> dict[str, Any]:
    fields = ("family", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "tied")
    return {field: getattr(shape, field) for field in fields}


def _settings(policy: Policy) -> dict[str, Any]:
    """What the stored optimizer state depends on."""
    return {
        "model.dtype": str(policy.config.model.dtype),
        "parallel.distributed_optimizer": policy.config.parallel.distributed_optimizer,
    }


def _stored_bytes(policy: Policy) -> int:
    """About how much a checkpoint takes: every model rank's parameters with their Adam state, counted once over the
    ranks that hold the same."""
    parameters = [p for chunk in policy.model_chunks() for p in chunk.parameters()]
    own = sum(p.numel() * (p.element_size() + ADAM_BYTES) for p in parameters)
    total = torch.tensor([own if policy.layout.first_replica else 0])
    dist.all_reduce(total, group=policy.runtime.cpu_group)
    return int(total)


# -------------------------------------------------------------------------------------------------- errors, all or none
def _agree(runtime: Runtime, work: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails anywhere, raise CheckpointError everywhere, naming the first such rank.
    No rank may leave on its own: the others would wait for it in the next collective."""
    result = _attempt(runtime, work, action)
    failures: list[CheckpointError | None] = [None] * runtime.world
    failure = result if isinstance(result, CheckpointError) else None
    dist.all_gather_object(failures, failure, group=runtime.cpu_group)
    for failure in failures:
        if failure is not None:
            raise failure
    assert not isinstance(result, CheckpointError)
    return result


def _attempt(runtime: Runtime, work: str, action: Callable[[], T]) -> T | CheckpointError:
    """What `action` returns, or why it failed on this rank."""
    try:
        return action()
    except CheckpointError as e:
        return e
    except Exception as e:
        return CheckpointError(f"{work} failed on rank {runtime.rank} ({_reason(e)}); fix the cause and start again")


def _on_rank0(runtime: Runtime, work: str, action: Callable[[], Any]) -> None:
    """Run `action` on rank 0; its error is raised on all ranks."""
    _agree(runtime, work, action if runtime.rank == 0 else lambda: None)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _raise_write_error(folder: Path, failure: BaseException | None) -> None:
    """The cause of a failed write. CheckpointException names it on rank 0 only and is empty on the others."""
    if failure is not None and not (isinstance(failure, CheckpointException) and not failure.failures):
        raise CheckpointError(f"checkpoint {folder}: cannot be written ({_reason(failure)}); make room and start again")


def _reason(error: BaseException) -> str:
    """One line of an error; for torch's collection of errors that of its first rank."""
    if isinstance(error, CheckpointException):
        for rank, (cause, _) in sorted(error.failures.items()):
            return f"rank {rank}: {_reason(cause)}"
        return "another rank failed"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
