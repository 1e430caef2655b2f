"""Frozen weights that are in host memory and are on the device only while they are used.

The host's copy is pinned where the device is a GPU, so that they travel at the speed of the bus. Weights that
nobody trains never travel back: leaving the device frees its memory and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module


class OffloadedWeights:
    """The parameters of some modules. Inside a `with` block they hold their values, outside they are empty ([0]).

    Parameters that are one and the same tensor under several names stay so. Buffers stay where they are.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        """Take the values that the parameters have now, and empty them."""
        unique = {id(parameter): parameter for module in modules for parameter in module.parameters()}
        self._homes = [(parameter, _host_copy(parameter.data)) for parameter in unique.values()]
        self._leave()

    @property
    def bytes(self) -> int:
        """In host memory, and on the device within the block."""
        return sum(home.nbytes for _, home in self._homes)

    def __enter__(self) -> None:
        # on the stream that computes, which therefore waits for them
        for parameter, home in self._homes:
            parameter.data = home.to(parameter.device, non_blocking=True, copy=True)

    def __exit__(self, *_) -> None:
        self._leave()

    def _leave(self) -> None:
        for parameter, _ in self._homes:
            parameter.data = parameter.data.new_empty(0)


def _host_copy(values: Tensor) -> Tensor:
    home = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return home.copy_(values)
