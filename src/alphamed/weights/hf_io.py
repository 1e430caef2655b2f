"""Hugging Face safetensors in and out of a Megatron model that is spread over tensor and pipeline ranks.

Loading reads every rank's slices straight from the memory-mapped files. Exporting walks the stage's parameters one at a
time and gathers each to the stage's source, the rank with tensor rank 0. Nothing ever holds a whole model.

Chunks are unwrapped GPTModels, told apart by their parameters' names only: no Megatron import here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from alphamed.errors import ConfigError
from alphamed.model.families import Entry, Kind, cut_dimension, entries, shard_shape
from alphamed.model.shape import ModelShape
from alphamed.model.weight_files import WeightFiles, check_tensor, not_finite
from alphamed.records import Layout
from alphamed.weights.cuts import held
from alphamed.weights.sync_plan import Slice
from alphamed.weights.tensors import all_finite, to_hf, to_shard

LAYER = "decoder.layers."


def stage_entries(chunks: Sequence[Module], shape: ModelShape) -> list[tuple[Entry, Parameter]]:
    """The table entries whose parameters these chunks hold, with the parameters, in the order of the forward pass.

    A tied embedding belongs to the first stage; the last stage's copy occurs with `entry.copy` set.
    """
    parameters = _by_global_name(chunks)
    present = []
    for entry in entries(shape):
        names = [name for name in entry.megatron if name in parameters]
        assert len(names) <= 1, f"one parameter under two names: {names}"
        if names:
            present.append((entry, parameters.pop(names[0])))
    assert not parameters, f"parameters that no {shape.family} table entry names: {sorted(parameters)}"
    return present


def _by_global_name(chunks: Sequence[Module]) -> dict[str, Parameter]:
    """Parameters by name, layers counted over the whole model (Megatron counts within a chunk)."""
    by_name = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith(LAYER):
                local, rest = name.removeprefix(LAYER).split(".", 1)
                number = chunk.get_submodule(LAYER + local).layer_number
                assert isinstance(number, int), f"{name}: its layer has no number"
                name = f"{LAYER}{number - 1}.{rest}"
            assert name not in by_name, f"two chunks of one rank hold {name}"
            by_name[name] = parameter
    return by_name


# ------------------------------------------------------------------------------------------------------------------- in
@torch.no_grad()
def load_hf(folder: Path, chunks: Sequence[Module], shape: ModelShape, layout: Layout) -> None:
    """Fill this rank's parameters from a Hugging Face folder, converting to each parameter's dtype.

    Every rank reads on its own; there is no communication. Load before the optimizer is built, or have it take its FP32
    copies from the parameters again afterwards. Raises ConfigError for missing, misshapen or corrupt tensors, for values
    that are not finite and for a tied model whose stored `lm_head.weight` differs from its embedding.
    """
    with WeightFiles(folder) as files:
        for entry, parameter in stage_entries(chunks, shape):
            expected = shard_shape(entry, layout.tensor)
            assert tuple(parameter.shape) == expected, (
                f"{entry.megatron[0]}: the model holds {tuple(parameter.shape)}, tensor rank {layout.tensor_rank} of "
                f"{layout.tensor} needs {expected}"
            )
            for name, size in zip(entry.hf, entry.shapes, strict=True):
                check_tensor(files, name, size)
            shard = to_shard(entry, [files.slice(name) for name in entry.hf], layout.tensor, layout.tensor_rank)
            if shape.tied and entry.hf == ("model.embed_tokens.weight",) and "lm_head.weight" in files.names():
                _check_tied(files, entry, shard, layout)
            parameter.data.copy_(shard)
            _check_finite(files, entry, shard, parameter)


def _check_finite(files: WeightFiles, entry: Entry, shard: Tensor, parameter: Parameter) -> None:
    """Refuse values that are not finite, as stored or in the parameter's dtype. Checked on the parameter's device, where it
    takes milliseconds, unless the parameter is of a type of its own (FP8)."""
    values = parameter.data if type(parameter.data) is Tensor else shard
    if not all_finite(values):
        stored = (name for name in entry.hf if not all_finite(files.slice(name)[:]))
        raise not_finite(files.folder, next(stored, " or ".join(entry.hf)))


def _check_tied(files: WeightFiles, entry: Entry, shard: Tensor, layout: Layout) -> None:
    check_tensor(files, "lm_head.weight", entry.shapes[0])
    if not torch.equal(to_shard(entry, [files.slice("lm_head.weight")], layout.tensor, layout.tensor_rank), shard):
        raise ConfigError(
            f"model.path: {files.folder}: lm_head.weight differs from model.embed_tokens.weight, but "
            f"config.json has tie_word_embeddings true; set it to false"
        )


# ------------------------------------------------------------------------------------------------------------------ out
def hf_manifest(chunks: Sequence[Module], shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what `hf_tensors` yields for this pipeline stage, in its order. No communication.

    The stages' manifests are disjoint and together hold every tensor of the model once.
    """
    return [
        item
        for entry, _ in stage_entries(chunks, shape)
        if not entry.copy
        for item in zip(entry.hf, entry.shapes, strict=True)
    ]


def hf_parts(chunks: Sequence[Module], shape: ModelShape, layout: Layout) -> Iterator[tuple[Slice, Tensor]]:
    """What this rank holds of the Hugging Face tensors: views into its parameters, in the order of the forward pass. No
    communication. Vocabulary padding and a tied model's second copy are left out."""
    return parts_of(stage_entries(chunks, shape), layout)


def parts_of(own: Iterable[tuple[Entry, Tensor]], layout: Layout) -> Iterator[tuple[Slice, Tensor]]:
    """`hf_parts` of these parameters."""
    for entry, parameter in own:
        if entry.copy:
            continue
        dimension, at = cut_dimension(entry), 0
        for source, box in held(entry, layout.tensor, layout.tensor_rank):
            length = box.shape[dimension]
            yield Slice(entry.hf[source], entry.shapes[source], *box), parameter.detach().narrow(dimension, at, length)
            at += length


def hf_tensors(
    chunks: Sequence[Module], shape: ModelShape, layout: Layout, tensor_group: dist.ProcessGroup | None
) -> Iterator[tuple[str, Tensor | None]]:
    """Yield (Hugging Face name, tensor) for every tensor of this pipeline stage, in the order of the forward pass.

    Tensor ranks must iterate together: each parameter is gathered to tensor rank 0, which gets the tensor, in the
    parameter's dtype and on its device; the others get None. At most one parameter is held in addition to the model. A
    replicated parameter is yielded as it is, so do not change it. `tensor_group` may be None without tensor
    parallelism.
    """
    return gathered(stage_entries(chunks, shape), layout, tensor_group)


def gathered(
    own: Iterable[tuple[Entry, Tensor]], layout: Layout, tensor_group: dist.ProcessGroup | None
) -> Iterator[tuple[str, Tensor | None]]:
    """`hf_tensors` of these parameters."""
    for entry, parameter in own:
        if entry.copy:
            continue
        whole = layout.tensor == 1 or entry.kind == Kind.REPLICATED
        shards = [parameter.detach()] if whole else _gather(parameter.detach(), layout, tensor_group)
        if layout.tensor_rank == 0:
            yield from zip(entry.hf, to_hf(entry, shards), strict=True)
        else:
            yield from ((name, None) for name in entry.hf)


def _gather(shard: Tensor, layout: Layout, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The shards of all tensor ranks, in rank order, on tensor rank 0; [] on the others."""
    assert group is not None and dist.get_world_size(group) == layout.tensor, "the tensor group does not fit the layout"
    shards = [torch.empty_like(shard) for _ in range(layout.tensor)] if layout.tensor_rank == 0 else None
    dist.gather(shard.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards or []
