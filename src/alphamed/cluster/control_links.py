"""Small messages and signs of life between ranks, or between hosts: a star of TCP connections with number 0 at its centre.

A connection beside the process groups, because those cannot tell what failed: a collective that fails says that
some peer closed a socket, one that hangs says nothing. Here the end of a process shows at once as the end of its
connection, and one that is stuck (stopped, swapping, in a deadlock that holds the interpreter lock) as silence. One
daemon thread per rank sends a beat every few seconds, receives, and watches.

Every connection is authenticated with a key that rank 0 draws and the process group carries, so messages may be
pickled.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from alphamed.errors import RunFailed

BEAT_S = 5.0
JOIN_DEADLINE_S = 60.0
SEND_S = 1.0
LINGER_S = 1.0


class LinkPeer:
    """One end of a connection. `heard_s`: when it last gave a sign of life (monotonic clock)."""

    def __init__(self, rank: int, name: str, connection: Connection):
        """`name`: as errors call it. `log`: where its output is, below the run directory; "" where nobody knows."""
        self.rank, self.name, self.connection = rank, name, connection
        self.log = f"logs/rank_{rank}.log"
        self.heard_s = time.monotonic()
        self.left = False  # signed off
        self._sending = threading.Lock()

    def __str__(self) -> str:
        return self.name

    def send(self, message: Any) -> None:
        with self._sending:
            self._send(message)

    def try_send(self, message: Any, wait_s: float) -> None:
        """Send unless another thread is still sending after `wait_s`: to a stopped peer that can take for ever."""
        if self._sending.acquire(timeout=wait_s):
            try:
                self._send(message)
            finally:
                self._sending.release()

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            pass  # it has gone: the receiving side reports that, and names it


class Links:
    """The connections of one rank and what came over them.

    `on_failure` is called once, from the watching thread or from `fail`, with the first failure that this rank learns
    of: reported by a peer, the end or a heartbeat timeout of one, or its own. From then on every wait raises it.
    """

    def __init__(self, peers: list[LinkPeer], timeout_s: float, on_failure: Callable[[RunFailed], None]):
        self.peers = {peer.rank: peer for peer in peers}
        self.failure: RunFailed | None = None
        self._failing = False  # a failure is being made known
        self._timeout_s = timeout_s
        self._beat_s = min(BEAT_S, timeout_s / 6)
        self._on_failure = on_failure
        self._inbox: dict[Hashable, Any] = {}
        self._news = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="control", daemon=True)
        if peers:
            self._thread.start()

    def send(self, rank: int, key: Hashable, value: Any) -> None:
        self.peers[rank].send(("message", key, value))

    def receive(self, rank: int, key: Hashable, timeout_s: float) -> Any:
        """Wait for the message with this key from `rank`. Raises the failure of the run, TimeoutError after
        `timeout_s`, EOFError where that rank has signed off."""
        peer = self.peers[rank]
        with self._news:
            self._news.wait_for(lambda: self.failure or peer.left or key in self._inbox, timeout_s)
            if key in self._inbox:
                return self._inbox.pop(key)
            if self.failure:
                raise self.failure
            raise EOFError if peer.left else TimeoutError

    def fail(self, failure: RunFailed) -> RunFailed:
        """Make a failure known to all ranks, unless one is known already. Returns the one that counts. The others are
        informed before this rank's own waits end: once they do, it may leave."""
        with self._news:
            first, self._failing = not self._failing, True
            if not first:
                while self.failure is None:
                    self._news.wait()
                return self.failure
        self._on_failure(failure)
        for peer in self.peers.values():
            peer.try_send(("failure", failure.component, failure.message, failure.user_error), SEND_S)
        with self._news:
            self.failure = failure
            self._news.notify_all()
        return failure

    def settle(self, timeout_s: float) -> None:
        """Wait a little for a failure that may be on its way."""
        with self._news:
            self._news.wait_for(lambda: self.failure, timeout_s)

    def close(self) -> None:
        """Sign off and wait a little for the others': a connection that is closed with unread data in it is reset,
        and our last message, perhaps the reason of a failure, would be lost on its way."""
        with self._news:
            self._news.wait_for(lambda: self.failure or not self._failing)
        for peer in self.peers.values():
            peer.try_send(("bye",), SEND_S)
        with self._news:
            self._news.wait_for(lambda: all(peer.left for peer in self.peers.values()), LINGER_S)
        self._closed = True
        for peer in self.peers.values():
            peer.connection.close()

    # ---------------------------------------------------------------------------------------------- the watching thread
    def _watch(self) -> None:
        last_s = time.monotonic()
        next_beat_s = last_s
        while not self._closed:
            now_s = time.monotonic()
            if now_s - last_s > 2 * self._beat_s:  # it was us who slept: the others' silence means nothing
                for peer in self.peers.values():
                    peer.heard_s += now_s - last_s
            last_s = now_s
            if now_s >= next_beat_s:
                next_beat_s = now_s + self._beat_s
                for peer in self.peers.values():
                    peer.try_send(("beat",), 0.0)
            self._receive_all(max(0.0, next_beat_s - time.monotonic()))
            self._check_silence()

    def _receive_all(self, timeout_s: float) -> None:
        present = [peer for peer in self.peers.values() if not peer.left]
        if not present:
            time.sleep(timeout_s)
            return
        try:
            ready = wait([peer.connection for peer in present], timeout_s)
        except OSError:  # closed by `close` meanwhile
            return
        for peer in present:
            if peer.connection not in ready:
                continue
            try:
                self._take(peer, peer.connection.recv())
            except (EOFError, OSError):
                if not self._closed:
                    self.fail(RunFailed(str(peer), f"ended without a message{_see(peer)}"))
                self._leave(peer)

    def _take(self, peer: LinkPeer, message: tuple) -> None:
        peer.heard_s = time.monotonic()
        match message:
            case ("message", key, value):
                with self._news:
                    self._inbox[key] = value
                    self._news.notify_all()
            case ("failure", component, text, user_error):
                self.fail(RunFailed(component, text, user_error))
            case ("bye",):
                self._leave(peer)

    def _leave(self, peer: LinkPeer) -> None:
        with self._news:
            peer.left = True
            self._news.notify_all()

    def _check_silence(self) -> None:
        for peer in self.peers.values():
            silent_s = time.monotonic() - peer.heard_s
            if not peer.left and silent_s > self._timeout_s:
                self.fail(
                    RunFailed(
                        str(peer),
                        f"sent no heartbeat for {silent_s:.0f} s (stopped, swapping, stuck, or its network cut){_see(peer)}",
                    )
                )
                self._leave(peer)


def _see(peer: LinkPeer) -> str:
    return f"; its log is {peer.log}" if peer.log else ""


# -------------------------------------------------------------------------------------------------------------- joining
def listen(host: str, port: int = 0, key: bytes = b"") -> tuple[Listener, bytes]:
    """Rank 0's side before anybody has joined, and the key that others need (a new one unless it is given)."""
    key = key or os.urandom(32)
    return Listener((host, port), family="AF_INET", backlog=1024, authkey=key), key


def accept(
    listener: Listener, world: int, timeout_s: float = JOIN_DEADLINE_S, own_name: str = "", names: Sequence[str] = ()
) -> list[LinkPeer]:
    """Wait for all others, which send rank and name; `own_name` is what they will call this one. Raises RunFailed naming those
    that did not come, by `names` where they have better ones than their ranks."""
    peers: list[LinkPeer] = []

    def take() -> None:
        while len(peers) < world - 1:
            try:
                connection = listener.accept()
                assert isinstance(connection, Connection)
                rank, name = connection.recv()
                peers.append(LinkPeer(rank, name, connection))
            except (AuthenticationError, EOFError, ConnectionError):  # a stranger, or one with another key
                continue
            except OSError:  # closed: it is too late
                return

    thread = threading.Thread(target=take, name="control-accept", daemon=True)
    thread.start()
    thread.join(timeout_s)
    missing = sorted(set(range(1, world)) - {peer.rank for peer in peers})
    if missing:
        called = [names[rank] if names else f"rank {rank}" for rank in missing]
        raise RunFailed(called[0], f"did not join the control links within {timeout_s:.0f} s (missing: {', '.join(called)})")
    for peer in peers:
        peer.connection.send(own_name or f"rank 0 (pid {os.getpid()})")
    return peers


def join(
    address: tuple[str, int], key: bytes, rank: int, timeout_s: float = JOIN_DEADLINE_S, own_name: str = ""
) -> LinkPeer:
    """Another rank's connection to rank 0. Raises RunFailed."""
    try:
        connection = Client(address, family="AF_INET", authkey=key)
        assert isinstance(connection, Connection)
        connection.send((rank, own_name or f"rank {rank} (pid {os.getpid()})"))
        if not connection.poll(timeout_s):
            raise TimeoutError(f"no answer within {timeout_s:.0f} s")
        return LinkPeer(0, connection.recv(), connection)
    except (OSError, EOFError) as error:
        raise RunFailed("rank 0", f"cannot be reached at {address[0]}:{address[1]} ({error})") from None
