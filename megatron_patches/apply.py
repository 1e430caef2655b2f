"""Apply every patch that Megatron-Core needs on a machine without CUDA: explicitly, once, and never where CUDA is."""

from __future__ import annotations

import torch

from megatron_patches import adam_step, cuda_runtime, cuda_tensors, eager, rng_tracker, weight_gradient

# In this order: the first three touch torch only, so that Megatron's modules are imported on a patched torch.
PATCHES = (cuda_runtime, cuda_tensors, eager, rng_tracker, weight_gradient, adam_step)

_applied: list[str] = []


def apply() -> tuple[str, ...]:
    """Apply all patches (again: nothing happens). Returns their names. Raises RuntimeError where CUDA is available."""
    if torch.cuda.is_available():
        raise RuntimeError(
            "megatron_patches: this machine has CUDA, where Megatron-Core needs no patch; hide the devices "
            "with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    for patch in PATCHES[len(_applied) :]:
        patch.apply()
        _applied.append(patch.__name__.rpartition(".")[2])
    return tuple(_applied)
