"""Make tensors that are asked for on "cuda" on the CPU.

Why: Megatron-Core writes the device as a literal (`torch.zeros(1, device="cuda")`), moves with `Tensor.cuda()` and checks
     `tensor.type() == "torch.cuda.FloatTensor"` in its optimizers. Five factory functions and two methods cover every use
     that dense models meet. A TorchFunctionMode would look neater, but it is off inside `Tensor.backward()` and in other
     threads.
Where: megatron/core/optimizer/{optimizer,distrib_optimizer,clip_grads}.py, pipeline_parallel/schedules.py,
     distributed/param_and_grad_buffer.py.
Versions: megatron-core 0.16.1; torch 2.13.
Remove when: Megatron-Core's optimizer and schedules take the device of their parameters.
"""

from __future__ import annotations

import functools

import torch
import torch.utils._device

FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like")


def _on_cpu(factory):
    @functools.wraps(factory)
    def made(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return made


def apply() -> None:
    # `with torch.device("meta")` knows the factories by identity, from a set made at first use. Made now, it holds the
    # originals, which the wrappers call; made later it would hold the wrappers, and such contexts would do nothing.
    torch.utils._device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    kind = torch.Tensor.type

    def type_(self, *args, **kwargs):
        return kind(self, *args, **kwargs) if args or kwargs else kind(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
