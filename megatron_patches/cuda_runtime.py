"""Answer `torch.cuda.current_device()`, streams, events and random state with the CPU.

Why: Megatron-Core asks the CUDA runtime directly: every parameter is made on `torch.cuda.current_device()`, pipeline
     communication and gradient buckets use streams and events. CPU operations run in order, so a stand-in stream has
     nothing to wait for.
Where: megatron/core/tensor_parallel/layers.py (ColumnParallelLinear.__init__), pipeline_parallel/p2p_communication.py,
     distributed/param_and_grad_buffer.py, tensor_parallel/random.py.
Versions: megatron-core 0.16.1; torch 2.13.
Remove when: Megatron-Core takes its device from `torch.accelerator` or from its configuration.
"""

from __future__ import annotations

import contextlib

import torch


class Nothing:
    """A stream or an event of a device whose operations run in order."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self


def apply() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args: None
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
