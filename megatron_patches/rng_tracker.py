"""Let the tracker of random states swap the CPU generator's state.

Why: Megatron-Core forks the random state for tensor-parallel initialisation and for recomputation by private CUDA calls
     (`torch.cuda.default_generators`), which do not exist here. It also warns whenever the CPU generator has moved inside a
     fork: with this patch that is the point, so the warning is muted (it checks nothing else).
Where: megatron/core/tensor_parallel/random.py (_get_cuda_rng_state, _set_cuda_rng_state, CudaRNGStatesTracker.fork).
Versions: megatron-core 0.16.1.
Remove when: the tracker takes its generator from the device of the parameters.
"""

from __future__ import annotations

import logging

import torch


def apply() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
