"""Writes slices of Hugging Face tensors into an engine's parameters, where a tensor rank of vLLM keeps them.

vLLM fuses q, k, v and gate, up, in this order along the rows (the model's `packed_modules_mapping`). Where a parameter's
values live only in the packed form of its kernel (CPU), it is filled again and packed when its layer is complete. Needs torch
alone: what depends on vLLM is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from alphamed.weights.sync_plan import Slice


class _Place(NamedTuple):
    """Where a tensor's part goes: to row `row` of a module's parameter `leaf`. `start`: where the part begins in the
    tensor."""

    module: str
    leaf: str  # "weight" | "bias"
    row: int
    start: tuple[int, ...]
    shape: tuple[int, ...]  # of the parameter, without padding


class EngineModel(Protocol):
    """vLLM's model, a torch module."""

    packed_modules_mapping: dict[str, list[str]]

    def get_submodule(self, target: str, /) -> Module: ...


class ParameterWriter:
    """`slices`: all that this worker gets in a push; together they are its whole share of every tensor. `repack` is called
    with each layer when its last slice was written."""

    def __init__(self, model: EngineModel, slices: Iterable[Slice], repack: Callable[[Module], None]):
        self._model, self._repack = model, repack
        self._places = _places(slices, model.packed_modules_mapping)
        self._missing: dict[str, int] = {}
        for module, sizes in _sizes(self._places).items():
            self._missing[module] = sum(map(math.prod, sizes.values()))

    def write(self, piece: Slice, part: Tensor) -> None:
        """Copy one slice into its place. Raises AttributeError where the engine has no such layer."""
        place = self._places[piece.name]
        module = self._model.get_submodule(place.module)
        parameter = getattr(module, place.leaf)
        if parameter.numel() == 0:  # packed: the kernel holds the values
            parameter = Parameter(parameter.new_empty(place.shape), requires_grad=False)
            setattr(module, place.leaf, parameter)
        start = [at - own for at, own in zip(piece.start, place.start, strict=True)]
        start[0] += place.row
        target = parameter.data[tuple(slice(at, at + size) for at, size in zip(start, piece.shape, strict=True))]
        assert target.shape == part.shape, f"{piece} does not fit {place.module}.{place.leaf} of {tuple(parameter.shape)}"
        target.copy_(part)
        self._missing[place.module] -= piece.elements
        if not self._missing[place.module]:
            self._repack(module)

    def check_complete(self) -> None:
        missing = [module for module, elements in self._missing.items() if elements]
        assert not missing, f"not every slice came of {', '.join(missing)}"


def _places(slices: Iterable[Slice], packed: dict[str, list[str]]) -> dict[str, _Place]:
    """The place of every tensor, from the slices of it that come here."""
    bounds: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for piece in slices:
        stop = tuple(map(sum, zip(piece.start, piece.shape, strict=True)))
        low, high = bounds.get(piece.name, (piece.start, stop))
        bounds[piece.name] = tuple(map(min, low, piece.start)), tuple(map(max, high, stop))
    fused = {part: (whole, parts) for whole, parts in packed.items() for part in parts}
    places = {}
    for name, (low, _) in bounds.items():
        module, _, leaf = name.rpartition(".")
        parent, _, own = module.rpartition(".")
        whole, parts = fused.get(own, (own, [own]))
        prefix = f"{parent}." if parent else ""
        shares = [_extent(bounds[f"{prefix}{part}.{leaf}"]) for part in parts]
        row = sum(share[0] for share in shares[: parts.index(own)])
        places[name] = _Place(prefix + whole, leaf, row, low, (sum(share[0] for share in shares), *shares[0][1:]))
    return places


def _extent(bound: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(high - low for low, high in zip(*bound, strict=True))


def _sizes(places: dict[str, _Place]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shape of every parameter that is written, by module and leaf."""
    sizes: dict[str, dict[str, tuple[int, ...]]] = {}
    for place in places.values():
        sizes.setdefault(place.module, {})[place.leaf] = place.shape
    return sizes
