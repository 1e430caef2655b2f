"""What each rank of the trainer holds of the Hugging Face tensors, by its place in the layout: the truth for sync plans."""

import itertools

from alphamed.config.sections import ParallelConfig
from alphamed.model.families import Entry, entries
from alphamed.model.shape import ModelShape
from alphamed.weights.cuts import held
from alphamed.weights.routes import trainer_rank
from alphamed.weights.sync_plan import Slice


def holders(shape: ModelShape, parallel: ParallelConfig) -> dict[int, list[Slice]]:
    """Slices by rank, in the order of the forward pass. A tied model's output layer, a copy of its embedding, is not among
    them."""
    slices_of: dict[int, list[Slice]] = {rank: [] for rank in range(parallel.world)}
    for entry in entries(shape):
        if entry.copy:
            continue
        axes = itertools.product(range(parallel.tensor), range(parallel.data), range(parallel.context))
        for tensor_rank, data_rank, context_rank in axes:
            slices_of[trainer_rank(parallel, stage_of(entry, shape, parallel), data_rank, tensor_rank, context_rank)] += [
                Slice(entry.hf[source], entry.shapes[source], *box)
                for source, box in held(entry, parallel.tensor, tensor_rank)
            ]
    return slices_of


def stage_of(entry: Entry, shape: ModelShape, parallel: ParallelConfig) -> int:
    """The layers are dealt to the stages in equal chunks, as often as there are virtual stages."""
    name = entry.megatron[0]
    if name.startswith("embedding."):
        return 0
    if not name.startswith("decoder.layers."):
        return parallel.pipeline - 1
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    per_chunk = shape.layers // chunks
    owner = [chunk % parallel.pipeline for chunk in range(chunks) for _ in range(per_chunk)]
    return owner[int(name.split(".")[2])]
