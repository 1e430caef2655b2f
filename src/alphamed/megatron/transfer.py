"""Copies from host memory to the device that the host does not wait for.

A copy from pageable memory waits until the device has done everything before it, and so does an index that is made on the
device (`x[mask]`, `nonzero`), because the host has to know its length. Either, once for every row, keeps the host from queueing work ahead.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from alphamed.records import MicroBatch


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The CPU tensor on `device`, through pinned memory where that is CUDA; itself where it is there already."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # which torch's allocator keeps until the copy is done
    return tensor.to(device, non_blocking=True)


def to_device(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on `device`, but for `mask`, which stays in host memory: it is only ever read as an
    index (`response_rows`)."""
    moved = {
        name: send(value, device)
        for name in MicroBatch.__slots__
        if name != "mask" and isinstance(value := getattr(micro, name), Tensor)
    }
    return replace(micro, **moved)


def response_rows(mask: Tensor, device: torch.device) -> Tensor:
    """[n] int64 on `device`: where `mask` [T], in host memory, is True."""
    return send(mask.nonzero()[:, 0], device)
