"""A link within one machine: buckets are in memory that the source and its receivers map, and none travels through a network.

A Unix socket joins the source with each receiver. It carries the memory's file descriptor, then the number of every bucket
that has been written and, back, of every one that has been taken. The memory has no name (memfd), so nothing stays behind
however a run ends, and a container's limit on /dev/shm does not count; the end of a peer closes its socket, which is noticed at
once (unless it has forked a child that lives on). With CUDA the memory is registered with the driver, so
that GPUs copy at the speed of their bus.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
import struct
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait

import torch
from torch import Tensor

from alphamed.cluster.narrow_store import Store

log = logging.getLogger(__name__)

SLOTS = 2
"""Buckets in the memory at a time: one is written while the one before is taken."""
PAGE = mmap.PAGESIZE
BACKLOG = 64
"""Connections of other processes that may be queued before our own; a full queue refuses connections."""
NUMBER, CREDENTIALS = struct.Struct("<Q"), struct.Struct("3i")  # the latter: pid, uid, gid


class PeerTimeout(RuntimeError):
    """Members of a link that did not do their part in time."""

    def __init__(self, link: str, members: Sequence[int], task: str):
        super().__init__(f"link {link}: member {_listed(members)} did not {task} in time")
        self.link, self.members = link, tuple(members)


class Memory:
    """`SLOTS` times `slot_bytes` of shared memory, mapped from a file descriptor, which may be closed then."""

    def __init__(self, descriptor: int, slot_bytes: int, device: torch.device):
        self._slot_bytes = slot_bytes
        with _errors(f"{SLOTS * slot_bytes} bytes of shared memory"):
            self._bytes = torch.frombuffer(mmap.mmap(descriptor, SLOTS * slot_bytes), dtype=torch.uint8)
        if device.type == "cuda":
            _register(self, self._bytes)

    def slot(self, number: int, like: Tensor) -> Tensor:
        """The place of the bucket of this number, in shape and dtype of `like`."""
        at, size = number % SLOTS * self._slot_bytes, like.numel() * like.element_size()
        assert size <= self._slot_bytes, f"a bucket of {size} bytes in slots of {self._slot_bytes}"
        return self._bytes[at : at + size].view(like.dtype).view(like.shape)


class SharedMemorySource:
    """Member 0's end. Waits until all receivers have joined; `slot_bytes`: of the largest bucket."""

    def __init__(self, store: Store, name: str, receivers: int, slot_bytes: int, device: torch.device, deadline_s: float):
        self._name = name
        self._written = 0  # buckets so far
        slot_bytes = -(-slot_bytes // PAGE) * PAGE
        with _errors(f"link {name}: {SLOTS * slot_bytes} bytes of shared memory"):
            descriptor = os.memfd_create(f"alphamed {name}")
        try:
            with _errors(f"link {name}: {SLOTS * slot_bytes} bytes of shared memory"):
                os.ftruncate(descriptor, SLOTS * slot_bytes)
            self._memory = Memory(descriptor, slot_bytes, device)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                address = f"alphamed-{secrets.token_hex(16)}"
                listener.bind("\0" + address)  # abstract: no file
                listener.listen(BACKLOG + receivers)
                store.set("address", address)
                self._receivers = self._accept(listener, receivers, descriptor, slot_bytes, time.monotonic() + deadline_s)
        finally:
            os.close(descriptor)
        self._taken = [0] * receivers  # buckets so far

    def _accept(
        self, listener: socket.socket, receivers: int, descriptor: int, slot_bytes: int, end: float
    ) -> tuple[socket.socket, ...]:
        """The sockets of members 1, 2, ... Other users of this machine can find the address too: only our own is accepted."""
        joined: dict[int, socket.socket] = {}
        unnamed: list[socket.socket] = []  # have connected, have not sent their number
        while missing := [member for member in range(1, 1 + receivers) if member not in joined]:
            ready = _readable([listener, *unnamed], end)
            if not ready:
                raise PeerTimeout(self._name, missing, "join")
            for peer in ready:
                if peer is listener:
                    with _errors(f"link {self._name}: member {_listed(missing)} could not join"):
                        peer, _ = listener.accept()
                    if _user_of(peer) == os.getuid():
                        unnamed.append(peer)
                    else:
                        log.warning("link %s: a process of user %d was refused", self._name, _user_of(peer))
                        peer.close()
                    continue
                unnamed.remove(peer)
                with _errors(f"link {self._name}: member {_listed(missing)} could not join"):
                    member = _receive(peer, end)
                    if member in missing:
                        joined[member] = peer
                        socket.send_fds(peer, [NUMBER.pack(slot_bytes)], [descriptor])
                    else:
                        peer.close()
        return tuple(joined[member] for member in sorted(joined))

    def broadcast(self, flat: Tensor, timeout: timedelta) -> Taking:
        """Write a bucket into the slot of the one `SLOTS` before it, when all have taken that. `flat` may be reused at once."""
        number, end = self._written, time.monotonic() + timeout.total_seconds()
        self.await_taken(number - SLOTS + 1, end)
        self._memory.slot(number, flat).copy_(flat)  # from a GPU: waits until it is there
        for member, peer in enumerate(self._receivers, 1):
            with _errors(f"link {self._name}: member {member} is gone"):
                peer.settimeout(_left(end))
                peer.send(NUMBER.pack(number))
        self._written += 1
        return Taking(self, self._written)

    def await_taken(self, count: int, end: float) -> None:
        """Wait until every receiver has taken the first `count` buckets."""
        while behind := [index for index, taken in enumerate(self._taken) if taken < count]:
            ready = _readable([self._receivers[index] for index in behind], end)
            if not ready:
                raise PeerTimeout(self._name, [1 + index for index in behind], f"take bucket {count - 1}")
            for index in behind:
                if self._receivers[index] in ready:
                    with _errors(f"link {self._name}: member {1 + index} did not take bucket {self._taken[index]}"):
                        number = _receive(self._receivers[index], end)
                    assert number == self._taken[index], f"bucket {number} taken, {self._taken[index]} is due"
                    self._taken[index] += 1


class Taking:
    """A bucket that has been written."""

    def __init__(self, source: SharedMemorySource, count: int):
        self._source, self._count = source, count

    def wait(self, timeout: timedelta) -> None:
        """Until every receiver has taken it. Raises RuntimeError."""
        self._source.await_taken(self._count, time.monotonic() + timeout.total_seconds())


class SharedMemoryReceiver:
    """The end of member `rank`, 1 or later."""

    def __init__(self, store: Store, name: str, rank: int, device: torch.device, deadline_s: float):
        self._name, self._taken = name, 0
        end = time.monotonic() + deadline_s
        store.wait(["address"], timedelta(seconds=deadline_s))
        address = store.get("address").decode()
        self._source = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with _errors(f"link {name}: member {rank} could not join"):
            self._source.settimeout(_left(end))
            self._source.connect("\0" + address)
            self._source.send(NUMBER.pack(rank))
            message, descriptors, _, _ = socket.recv_fds(self._source, NUMBER.size, 1)
            if not descriptors:
                raise EOFError("no room for another file descriptor" if message else "its source has left")
        try:
            self._memory = Memory(descriptors[0], NUMBER.unpack(message)[0], device)
        finally:
            os.close(descriptors[0])

    def broadcast(self, flat: Tensor, timeout: timedelta) -> Arrival:
        return Arrival(self, flat)

    def take(self, flat: Tensor, end: float) -> None:
        """Copy the next bucket into `flat`: what loads it may keep it, while its slot is written again."""
        with _errors(f"link {self._name}: bucket {self._taken} did not come"):
            number = _receive(self._source, end)
            assert number == self._taken, f"bucket {number} came, {self._taken} is due"
            flat.copy_(self._memory.slot(number, flat))
            self._source.send(NUMBER.pack(number))
        self._taken += 1


class Arrival:
    """A bucket that is due."""

    def __init__(self, receiver: SharedMemoryReceiver, flat: Tensor):
        self._receiver, self._flat = receiver, flat

    def wait(self, timeout: timedelta) -> None:
        """Until it is in the tensor of `broadcast`. Raises RuntimeError. Arrivals of a link are waited for in turn."""
        self._receiver.take(self._flat, time.monotonic() + timeout.total_seconds())


def _left(end: float) -> float:
    return max(0.001, end - time.monotonic())  # 0 would mean: do not wait, and raise another error


def _readable(sockets: Sequence[socket.socket], end: float) -> list[socket.socket]:
    """Those with something to read, as soon as any has; none at the deadline."""
    ready = wait(sockets, _left(end))
    return [candidate for candidate in sockets if candidate in ready]


def _receive(peer: socket.socket, end: float) -> int:
    peer.settimeout(_left(end))
    message = peer.recv(NUMBER.size)
    if not message:
        raise EOFError("the other end has been closed")
    return NUMBER.unpack(message)[0]


def _user_of(peer: socket.socket) -> int:
    return CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))[1]


def _listed(members: Sequence[int]) -> str:
    return ", ".join(map(str, members))


@contextmanager
def _errors(task: str) -> Iterator[None]:
    """A lost or late peer raises RuntimeError, as with torch.distributed."""
    try:
        yield
    except (OSError, EOFError) as error:
        late = isinstance(error, TimeoutError)
        raise RuntimeError(f"{task} in time" if late else f"{task}: {getattr(error, 'strerror', None) or error}") from error


def _register(memory: Memory, pages: Tensor) -> None:
    """Let CUDA copy from and to these pages directly."""
    runtime = torch.cuda.cudart()
    assert runtime is not None, "a CUDA device without the CUDA runtime"
    status = runtime.cudaHostRegister(pages.data_ptr(), pages.numel(), 0)
    if int(status):  # and CUDA would report it again, at some later kernel
        raise RuntimeError(
            f"{pages.numel() >> 20} MiB of shared memory could not be registered with CUDA ({status}); set "
            f"sync.transport to gloo"
        )
    weakref.finalize(memory, lambda registered: runtime.cudaHostUnregister(registered.data_ptr()), pages)
