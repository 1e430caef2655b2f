"""Builds every rank of a layout with Megatron on a machine without its GPUs: `alphamed plan --build`.

Megatron's own model, gradient buffers and optimizer of each rank, in one process, one after another: a fake process group
determines the rank, and tensors are on the meta device, where they have a shape but no memory. A rank of a 70B model takes a
second or two. The result is compared with the planner's arithmetic and with the Hugging Face model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist

from alphamed.config.loading import changed_config
from alphamed.config.schema import Config
from alphamed.model.families import hf_shapes, shard_shape
from alphamed.model.shape import ModelShape
from alphamed.planner import parameters
from alphamed.records import Layout
from alphamed.weights.hf_io import hf_manifest, stage_entries

LOCAL = ("cluster.device=cpu", "model.fp8=false", "sync.transport=auto")
"""Without CUDA Megatron's local layers stand in for Transformer Engine's, which hold the same parameters, some with other
names. FP8 adds copies, no parameters."""


@dataclass(frozen=True, slots=True)
class BuiltRank:
    """The contents of one rank. `elements`: of all parameters; `gradients`: of the flat buffers; `owned`: parameters whose
    optimizer state is here. `problems`: differences from the Hugging Face model."""

    layout: Layout
    rank: int
    elements: int
    gradients: int
    owned: int
    manifest: tuple[tuple[str, tuple[int, ...]], ...]
    problems: tuple[str, ...]


def build_ranks(
    config: Config, shape: ModelShape, ranks: Sequence[int] | None = None, optimizer: bool = True
) -> Iterator[BuiltRank]:
    """Build the given ranks (all of them by default), one at a time. Needs a process without a process group and without
    CUDA."""
    from megatron_patches.apply import apply

    apply()
    config = changed_config(config, LOCAL)
    for rank in range(config.parallel.world) if ranks is None else ranks:
        with _as_rank(config, rank) as layout:
            yield _build(config, shape, layout, rank, optimizer)


def check_topology(
    config: Config,
    shape: ModelShape,
    ranks: Sequence[int] | None = None,
    optimizer: bool = True,
    progress: Callable[[BuiltRank], None] = lambda built: None,
) -> list[str]:
    """Problems of the whole topology, [] where there are none: every rank's shards, sizes against the planner's, and the
    names that the stages would send against the Hugging Face model's."""
    p, problems, sent = config.parallel, [], {}
    stages = parameters.stage_parameters(shape, p.tensor, p.pipeline, p.virtual_pipeline or 1)
    for built in build_ranks(config, shape, ranks, optimizer):
        progress(built)
        chunks = stages[built.layout.pipeline_rank]
        planned = (parameters.count(chunks), parameters.buffer_elements(chunks, p.replicas, p.distributed_optimizer))
        problems += [f"rank {built.rank}: {text}" for text in built.problems]
        if planned[0] != built.elements:
            problems.append(f"rank {built.rank}: holds {built.elements:,} parameters, planned were {planned[0]:,}")
        if abs(planned[1] - built.gradients) > 1e-5 * built.gradients:
            problems.append(f"rank {built.rank}: holds {built.gradients:,} gradients, planned were {planned[1]:,}")
        sent[built.layout.pipeline_rank] = built.manifest
    if ranks is None:
        problems += _sync_problems(shape, sent)
    return problems


def _sync_problems(shape: ModelShape, sent: dict[int, tuple[tuple[str, tuple[int, ...]], ...]]) -> list[str]:
    """What the stages send together must be the Hugging Face model, each tensor once."""
    shapes, seen, problems = hf_shapes(shape), {}, []
    for stage, manifest in sorted(sent.items()):
        for name, size in manifest:
            if name in seen:
                problems.append(f"{name}: sent by stages {seen[name]} and {stage}")
            elif shapes.get(name) != size:
                problems.append(f"{name}: stage {stage} sends {size}, the model has {shapes.get(name)}")
            seen[name] = stage
    return problems + [f"{name}: sent by no stage" for name in shapes if name not in seen]


# ------------------------------------------------------------------------------------------------------------- one rank
@contextlib.contextmanager
def _as_rank(config: Config, rank: int) -> Iterator[Layout]:
    """This process as `rank` of the layout: a fake default group, Megatron's groups over it."""
    from megatron.core import parallel_state as groups, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "building ranks needs a fresh process: a process group exists already"
    p = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=p.world)
    try:
        # Megatron also makes gloo groups; over a fake store these would wait for peers
        with mock.patch.object(dist, "new_group", _fake_group(dist.new_group)):
            groups.initialize_model_parallel(p.tensor, p.pipeline, p.virtual_pipeline, context_parallel_size=p.context)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        yield Layout(
            p.tensor,
            p.pipeline,
            p.data,
            p.virtual_pipeline,
            p.sequence,
            groups.get_tensor_model_parallel_rank(),
            groups.get_pipeline_model_parallel_rank(),
            groups.get_data_parallel_rank(),
            p.context,
            groups.get_context_parallel_rank(),
        )
    finally:
        groups.destroy_model_parallel()
        dist.destroy_process_group()


def _fake_group(make):
    @functools.wraps(make)
    def made(*args, **kwargs):
        return make(*args, **kwargs | {"backend": "fake"})

    return made


def _without_meta(kind):
    """Megatron's optimizer looks for `torch.cuda.BFloat16Tensor` and the like in `tensor.type()`."""

    def type_(self, *args, **kwargs):
        return kind(self, *args, **kwargs) if args or kwargs else kind(self).replace(".meta.", ".")

    return type_


def _build(config: Config, shape: ModelShape, layout: Layout, rank: int, optimizer: bool) -> BuiltRank:
    from alphamed.megatron import provider
    from alphamed.megatron.runtime import Runtime

    meta, group = torch.device("meta"), dist.group.WORLD
    assert group is not None, "a rank is built within _as_rank"
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: meta),
        mock.patch.object(torch.Tensor, "type", _without_meta(torch.Tensor.type)),
    ):
        chunks = provider.build_model(config, shape, Runtime(layout, meta, rank, layout.world, group))
        wrapped = provider.wrap_gradients(config, chunks)
        owned = _owned(provider.build_optimizer(config, wrapped)) if optimizer else 0
    elements = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    problems = [
        f"{entry.megatron[0]}: {tuple(parameter.shape)}, the Hugging Face model cut into {layout.tensor} gives "
        f"{shard_shape(entry, layout.tensor)}"
        for entry, parameter in stage_entries(chunks, shape)
        if tuple(parameter.shape) != shard_shape(entry, layout.tensor)
    ]
    return BuiltRank(
        layout,
        rank,
        elements,
        sum(buffer.numel for part in wrapped for buffer in _buffers(part)),
        owned,
        tuple(hf_manifest(chunks, shape)),
        tuple(problems),
    )


def _buffers(wrapped: torch.nn.Module) -> list:
    """Megatron's gradient buffers; their attribute hides `Module.buffers()`."""
    return vars(wrapped)["buffers"]


def _owned(optimizer) -> int:
    """Elements of the parameters that this rank's optimizer steps."""
    return sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
