"""Links between trainer and engines, joined over a TCP store: shared memory on one machine, stand-alone process groups (gloo
or NCCL) between several, apart from torch.distributed's global state, which belongs to the trainer on one end and to vLLM on
the other.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from alphamed.cluster import addresses, narrow_store
from alphamed.cluster.narrow_store import PrefixStore, Store, TCPStore
from alphamed.weights.shared_memory import SharedMemoryReceiver, SharedMemorySource
from alphamed.weights.sync_plan import Link


def host_store(address: str, deadline_s: float) -> tuple[TCPStore, int]:
    """A store at `address` alone on a free port, and the port. Lives as long as the object."""
    store = narrow_store.store(address, 0, None, True, timedelta(seconds=deadline_s), wait_for_workers=False)
    return store, store.port


def reach_store(address: str, port: int, deadline_s: float) -> TCPStore:
    return TCPStore(address, port, None, is_master=False, timeout=timedelta(seconds=deadline_s))


class Transfer(Protocol):
    """A bucket under way."""

    def wait(self, timeout: timedelta) -> Any:
        """Until a receiver has it, or the source may reuse its tensor. Raises RuntimeError for a lost or late peer."""


class Channel(Protocol):
    """This process's end of a link. Closed by dropping it."""

    def broadcast(self, flat: Tensor, timeout: timedelta) -> Transfer:
        """Start sending (member 0) or receiving (all others) `flat`, whole and contiguous. `timeout`: of what a sender may have
        to wait for before. Raises RuntimeError."""
        ...


def open_channel(link: Link, member: int, store: Store, address: str, device: torch.device, deadline_s: float) -> Channel:
    """Join a link as its member 0, the source, or as a receiver, 1 or later. Returns when all have joined (NCCL: at once, it
    joins at first use). Tensors are on `device` (gloo: in host memory).

    `address` is the store's: on this machine alone gloo talks over the loopback interface, which needs no route.
    """
    prefixed = PrefixStore(link.name, store)
    if link.transport == "ipc":
        if member:
            return SharedMemoryReceiver(prefixed, link.name, member, device, deadline_s)
        largest = max(bucket.bytes for bucket in link.buckets())
        return SharedMemorySource(prefixed, link.name, len(link.receivers), largest, device, deadline_s)
    timeout = timedelta(seconds=deadline_s)
    if link.transport == "nccl":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return GroupChannel(dist.ProcessGroupNCCL(prefixed, member, link.size, nccl))
    assert link.transport == "gloo", f"unknown transport {link.transport!r}"
    gloo = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue] - the stubs leave it out
    gloo._timeout = timeout
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=addresses.toward(address))]
    return GroupChannel(dist.ProcessGroupGloo(prefixed, member, link.size, gloo))


class GroupChannel:
    """A process group as a channel. `group`: gloo's or NCCL's, whose type stubs have no collectives."""

    def __init__(self, group: Any):
        self._group = group

    def broadcast(self, flat: Tensor, timeout: timedelta) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        return self._group.broadcast([flat], options)
