"""How the launchers of a job's hosts find one another, agree on the job, and notice when a host is lost.

    with Meeting.join(names, rank, port, token, deadline_s) as meeting:
        facts = meeting.gather("facts", own)            # on the first host: everybody's; None elsewhere
        job = meeting.share("job", make_job)            # the first host makes it, all get it
        meeting.watch(on_lost)                          # from here on the loss of a host calls this

The first host listens at its own address for a port that all were given; every connection is authenticated with the job's
token. What fails on one host fails on all of them, and is printed by the first host that knows.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from typing import Any, Self, TypeVar

from alphamed.cluster import addresses
from alphamed.cluster.control_links import LinkPeer, Links, accept, join, listen
from alphamed.cluster.failure import of_exception
from alphamed.errors import RunFailed

T = TypeVar("T")
RETRY_S = 0.3
ANSWER_DEADLINE_S = 900.0
"""For what the first host does meanwhile: checking everything, perhaps fetching a model."""


def host_name(name: str) -> str:
    return f"host {name}"


class Meeting:
    """This host's end. A context manager: an exception that leaves it is made known to all."""

    def __init__(self, names: Sequence[str], rank: int, peers: list[LinkPeer], heartbeat_timeout_s: float):
        self.names, self.rank = tuple(names), rank
        self._on_lost: Callable[[RunFailed], None] | None = None
        self._links = Links(peers, heartbeat_timeout_s, self._failed)

    @classmethod
    def join(
        cls, names: Sequence[str], rank: int, port: int, token: str, deadline_s: float, heartbeat_timeout_s: float
    ) -> Self:
        """Meet the launchers of all hosts. Raises RunFailed naming who did not come, ConfigError for a name without an
        address."""
        own = host_name(names[rank])
        key = hashlib.sha256(f"hosts {token}".encode()).digest()
        if len(names) == 1:
            peers = []
        elif rank:
            peers = [_reach(names[0], port, key, rank, own, names[rank], deadline_s)]
        else:
            peers = _await(names, port, key, own, deadline_s)
        for peer in peers:
            peer.log = ""
        return cls(names, rank, peers, heartbeat_timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        if isinstance(error, Exception):
            self.fail(of_exception(error, host_name(self.names[self.rank])))
        self._on_lost = None
        self._links.close()

    @property
    def failure(self) -> RunFailed | None:
        return self._links.failure

    def fail(self, failure: RunFailed) -> RunFailed:
        """Make a failure known to all hosts, unless there is one already; returns the one that counts."""
        return self._links.fail(failure)

    def gather(self, subject: str, value: T, deadline_s: float = ANSWER_DEADLINE_S) -> list[T] | None:
        """Every host's value in the order of hosts, on the first host. Raises RunFailed naming a host that is late."""
        if self.rank:
            self._links.send(0, (subject, self.rank), value)
            return None
        values = [value]
        for rank in range(1, len(self.names)):
            values.append(self._receive(rank, (subject, rank), subject, deadline_s))
        return values

    def share(self, subject: str, make: Callable[[], T], deadline_s: float = ANSWER_DEADLINE_S) -> T:
        """What the first host makes, on all hosts."""
        if self.rank:
            return self._receive(0, subject, subject, deadline_s)
        value = make()
        for rank in self._links.peers:
            self._links.send(rank, subject, value)
        return value

    def has_left(self, rank: int) -> bool:
        """Whether that host has signed off."""
        peer = self._links.peers.get(rank)
        return peer is None or peer.left

    def watch(self, on_lost: Callable[[RunFailed], None]) -> None:
        """Call `on_lost` once, from a thread, when a host is lost or fails; at once where that has happened."""
        self._on_lost = on_lost
        if self.failure:
            on_lost(self.failure)

    def _receive(self, rank: int, key: Any, subject: str, deadline_s: float) -> Any:
        try:
            return self._links.receive(rank, key, deadline_s)
        except TimeoutError:
            raise self.fail(
                RunFailed(host_name(self.names[rank]), f"{subject}: no answer within {deadline_s:.0f} s")
            ) from None
        except EOFError:
            raise self.fail(RunFailed(host_name(self.names[rank]), f"has ended before {subject}")) from None

    def _failed(self, failure: RunFailed) -> None:
        if self._on_lost:
            self._on_lost(failure)


def _await(names: Sequence[str], port: int, key: bytes, own: str, deadline_s: float) -> list[LinkPeer]:
    address = addresses.toward(names[1])
    try:
        listener, _ = listen(address, port, key)
    except OSError as error:
        raise RunFailed(
            own, f"port {port} of {address} cannot be used ({error.strerror}); start again, or give another"
        ) from None
    with listener:
        return accept(listener, len(names), deadline_s, own, [host_name(name) for name in names])


def _reach(first: str, port: int, key: bytes, rank: int, own: str, own_name: str, deadline_s: float) -> LinkPeer:
    """The first host may start later than this one."""
    until = time.monotonic() + deadline_s
    address = addresses.resolve(first)
    while True:
        try:
            with socket.create_connection((address, port), timeout=5):
                pass
            return join((address, port), key, rank, max(1.0, until - time.monotonic()), own)
        except AuthenticationError:
            raise RunFailed(host_name(first), f"refuses {own_name}: it has another token (RAY_AUTH_TOKEN)") from None
        except (OSError, RunFailed) as error:
            if time.monotonic() > until:
                raise RunFailed(
                    host_name(first),
                    f"cannot be reached from {own_name} at {address}:{port} within {deadline_s:.0f} s ({error})",
                ) from None
            time.sleep(RETRY_S)
