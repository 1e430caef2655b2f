"""One trainer rank's part in a transfer: take the slices of its buckets from the source, pack, digest and broadcast them."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from alphamed.weights import links
from alphamed.weights.buckets import box_of, digest, pack
from alphamed.weights.cuts import Box
from alphamed.weights.shared_memory import PeerTimeout
from alphamed.weights.source import WeightSource
from alphamed.weights.sync_plan import Member, Slice, SyncPlan, in_turns

Digests = dict[str, list[list[int]]]
"""By link, of each of its buckets."""


class Sender:
    """Joins the links that begin at this rank; `send` fills them. Closed by dropping it."""

    def __init__(
        self,
        plan: SyncPlan,
        source: WeightSource,
        store: links.TCPStore,
        address: str,
        device: torch.device,
        join_deadline_s: float,
    ):
        self._plan, self._source, self._store, self._device = plan, source, store, device
        self.channels = {
            link.name: links.open_channel(link, 0, store, address, device, join_deadline_s)
            for link in plan.links_from(source.rank)
        }

    def send(self) -> tuple[Digests, Exception | None]:
        """Send the buckets of all own links, in turns. Returns their digests, and the error that stopped the sending, if
        any: gathering is a collective and is carried to its end all the same."""
        part = _CollectiveExport(self._source.tensors()) if self._plan.mode == "gather" else held_parts(self._source.parts())
        try:
            return self._broadcast(part), None
        except RuntimeError as error:  # a lost or late peer
            return {}, error
        finally:
            if isinstance(part, _CollectiveExport):
                part.drain()

    def publish(self, key: str, value: Any) -> None:
        """Hand a value (JSON) to rank 0, through the store of the links."""
        self._store.set(key, json.dumps(value))

    def _broadcast(self, part: Callable[[Slice], Tensor]) -> Digests:
        end = time.monotonic() + self._plan.deadline_s
        digests: dict[str, list[Tensor]] = {name: [] for name in self.channels}
        under_way: deque[tuple[links.Transfer, Tensor]] = deque()

        def left() -> timedelta:
            return timedelta(seconds=max(1.0, end - time.monotonic()))

        def finish_oldest() -> None:
            transfer, _ = under_way.popleft()
            transfer.wait(left())

        for bucket in in_turns(self._plan.links_from(self._source.rank)):
            flat = pack(bucket, map(part, bucket.slices), self._device)
            under_way.append((self.channels[bucket.link].broadcast(flat, left()), flat))
            digests[bucket.link].append(digest(flat))
            if len(under_way) > len(self.channels):  # one travels on every link while the next is packed
                finish_oldest()
        while under_way:
            finish_oldest()
        return {name: [pair.tolist() for pair in pairs] for name, pairs in digests.items()}


def late_workers(plan: SyncPlan, source: int, failure: Exception | None) -> list[Member]:
    """The workers that a failed `Sender.send` of rank `source` waited for in vain, where the transport knows them. None where
    one also takes from other ranks: it may itself wait for those."""
    if not isinstance(failure, PeerTimeout):
        return []
    (link,) = (link for link in plan.links if link.name == failure.link)
    numbers = [link.receivers[member - 1] for member in failure.members]
    if any(other.source != source for number in numbers for other in plan.links_to(number)):
        return []
    return [plan.members[number] for number in numbers]


def take_part(source: WeightSource, mode: str) -> None:
    """What an exporting rank without links of its own does in a transfer: its part of the gathering."""
    if mode == "gather":
        _CollectiveExport(source.tensors()).drain()


class _CollectiveExport:
    """Slices of the tensors of a collective export, which must be taken in its order."""

    def __init__(self, tensors: Iterator[tuple[str, Tensor | None]]):
        self._tensors = tensors
        self._name: str = ""
        self._tensor: Tensor | None = None

    def __call__(self, piece: Slice) -> Tensor:
        if piece.name != self._name:
            self._name, self._tensor = next(self._tensors)
            assert self._name == piece.name, f"the export gave {self._name} where the plan has {piece.name}"
        tensor = self._tensor
        assert tensor is not None, f"{piece.name}: was gathered to another rank than the one that sends it"
        assert tuple(tensor.shape) == piece.whole, (
            f"{piece.name}: planned as {piece.whole}, exported as {tuple(tensor.shape)}"
        )
        return tensor[box_of(piece)]

    def drain(self) -> None:
        for _ in self._tensors:
            pass


def held_parts(parts: Iterator[tuple[Slice, Tensor]]) -> Callable[[Slice], Tensor]:
    """Slices of what this rank holds, in any order."""
    by_name: dict[str, list[tuple[Slice, Tensor]]] = {}
    for piece, tensor in parts:
        by_name.setdefault(piece.name, []).append((piece, tensor))

    def part(needed: Slice) -> Tensor:
        for piece, tensor in by_name.get(needed.name, ()):
            if Box(piece.start, piece.shape).meet(Box(needed.start, needed.shape)) == (needed.start, needed.shape):
                return tensor[
                    tuple(
                        slice(start - own, start - own + size)
                        for start, own, size in zip(needed.start, piece.start, needed.shape, strict=True)
                    )
                ]
        raise AssertionError(f"this rank does not hold {needed}")

    return part
