"""How the ranks of a run agree on small things, and how all of them fail when one of them does.

Lines of the loop that can fail, or that wait for rank 0 (generation takes minutes), must end on all ranks alike. They
go through here and not through a collective: rank 0 sends `Ok(value)` or the failure over `links`, and while a rank
waits the links watch over the others. Whatever goes wrong first, anywhere, is what every rank raises:
`RunFailed(component, message)`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from alphamed.cluster import failure
from alphamed.cluster.addresses import LOOPBACK
from alphamed.cluster.job import ADDRESS_VARIABLE, on_host
from alphamed.cluster.links import Links, Peer, accept, join, listen
from alphamed.errors import RunFailed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")
DEADLINE_S = 3600.0
"""For work that has no deadline of its own. Work that can be stuck has one, shorter, and names what it waits for."""
SETTLE_S = 2.0
"""A broken connection is noticed by everybody; this long the rank that fails of it waits for the news of who broke
it."""


def rank_name(rank: int) -> str:
    """This process as errors call it; where the run is on several hosts, with its host."""
    return f"rank {rank} (pid {os.getpid()}{on_host()})"


@dataclass(frozen=True, slots=True)
class Ok:
    value: Any


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. All ranks make the same calls in the same order, so numbers match; `what` tells if they do not."""

    number: int
    what: str


class Control:
    """This rank's end of the agreement. A context manager: an exception that leaves it fails the run on every rank."""

    @classmethod
    def open(
        cls,
        group: ProcessGroup,
        run_dir: Path,
        heartbeat_timeout_s: float = 30.0,
        abort_after_s: float = 15.0,
        longest_s: float = 0.0,
    ) -> Self:
        """Connect the ranks of `group`, a CPU (gloo) group of all of them. The first failure is recorded in `run_dir`.

        longest_s: what work with a deadline of its own may take on rank 0; the others wait longer, so that it is rank 0 who
        says what was late.

        A rank whose main thread does not come by within `abort_after_s` of a failure, because it is inside a collective
        that will never end, is ended by its watching thread.
        """
        import torch.distributed as dist

        rank, world = dist.get_rank(group), dist.get_world_size(group)
        name = rank_name(rank)
        if world == 1:
            return cls(group, 0, 1, [], run_dir, heartbeat_timeout_s, abort_after_s, DEADLINE_S + longest_s)
        listener, key = listen(os.environ.get(ADDRESS_VARIABLE, LOOPBACK)) if rank == 0 else (None, b"")
        invitation = [(listener.address, key) if listener else None]
        dist.broadcast_object_list(invitation, src=0, group=group)
        if listener:
            with listener:
                peers = accept(listener, world, own_name=name)
        else:
            peers = [join(*invitation[0], rank, own_name=name)]
        return cls(group, rank, world, peers, run_dir, heartbeat_timeout_s, abort_after_s, DEADLINE_S + longest_s)

    def __init__(
        self,
        group: ProcessGroup,
        rank: int,
        world: int,
        peers: list[Peer],
        run_dir: Path,
        heartbeat_timeout_s: float,
        abort_after_s: float,
        deadline_s: float = DEADLINE_S,
    ):
        self.rank, self.world = rank, world
        self._deadline_s = deadline_s
        self._group = group
        self._run_dir = run_dir
        self._abort_after_s = abort_after_s
        self._turns = 0
        self._delivered = threading.Event()  # the main thread knows of the failure, or has left
        self._links = Links(peers, heartbeat_timeout_s, self._on_failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: Any, error: BaseException | None, _traceback: Any) -> None:
        if error is not None and not isinstance(error, RunFailed):
            if self._links.peers and isinstance(error, Exception):
                self._links.settle(SETTLE_S)
            first = self._links.fail(failure.of_exception(error, self.name))
            self._close()
            if first.component != self.name and isinstance(error, Exception):
                raise first from error  # ours was but the echo of somebody else's
            return
        if error is not None:
            self._links.fail(error)
        self._close()

    @property
    def name(self) -> str:
        return rank_name(self.rank)

    # ------------------------------------------------------------------------------------------------------- agreements
    def from_rank0(self, what: str, function: Callable[[], T], deadline_s: float | None = None) -> T:
        """Rank 0 calls `function`; every rank gets its (pickled, small) value. Raises RunFailed on all ranks if it
        fails.

        `what` names the work in messages ("rollouts of step 3"). Other ranks wait at most `deadline_s` (by default longer
        than any work with a deadline of its own), outside of any collective, and give up early when rank 0 dies or falls
        silent.
        """
        turn = self._next(what)
        if self.rank == 0:
            value = self._run(function)
            for rank in self._links.peers:
                self._links.send(rank, turn.number, (what, Ok(value)))
            return value
        return self._expect(0, turn, turn.number, self._deadline_s if deadline_s is None else deadline_s).value

    def on_rank0(self, what: str, function: Callable[[], T], deadline_s: float | None = None) -> T | None:
        """Like `from_rank0`, for values that stay on rank 0: the other ranks get None once it has succeeded."""
        values: list[T] = []
        self.from_rank0(what, lambda: values.append(function()), deadline_s)
        return values[0] if values else None

    def everywhere(self, what: str, function: Callable[[], T], deadline_s: float | None = None) -> T:
        """Every rank calls `function` and gets its own value once all have succeeded. Raises RunFailed on all ranks,
        naming the first one that failed."""
        turn = self._next(what)
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        value = self._run(function)
        if self.rank == 0:
            for rank in self._links.peers:
                self._expect(rank, turn, (turn.number, rank), deadline_s)
            for rank in self._links.peers:
                self._links.send(rank, turn.number, (what, Ok(None)))
        else:
            self._links.send(0, (turn.number, self.rank), (what, Ok(None)))
            self._expect(0, turn, turn.number, deadline_s)
        return value

    def share_tensors(self, tensors: list[Tensor] | None) -> list[Tensor]:
        """Rank 0's CPU tensors on every rank (other ranks pass None): shapes through the links, data in one
        broadcast."""
        import torch
        import torch.distributed as dist

        if self.world == 1:
            return tensors
        described = self.from_rank0("shapes of shared tensors", lambda: [(t.shape, t.dtype) for t in tensors])
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in described]
        if self.rank == 0:
            flat = torch.cat(
                [torch.empty(0, dtype=torch.uint8), *(t.contiguous().reshape(-1).view(torch.uint8) for t in tensors)]
            )
        else:
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
        if sum(sizes):
            dist.broadcast(flat, src=0, group=self._group)
        if self.rank == 0:
            return tensors
        # a copy for each: views of bytes at odd offsets cannot become int64
        return (
            [
                part.clone().view(dtype).reshape(shape)
                for part, (shape, dtype) in zip(flat.split(sizes), described, strict=True)
            ]
            if sizes
            else []
        )

    def heard_s(self) -> dict[str, float]:
        """Seconds since this rank last heard of each rank that it is connected to, by name; 0 for itself."""
        now = time.monotonic()
        return {self.name: 0.0} | {str(peer): now - peer.heard_s for _, peer in sorted(self._links.peers.items())}

    def failed(self, component: str, message: str) -> RunFailed:
        """Make a failure known to all ranks, unless there is one already; returns the one to raise."""
        first = self._links.fail(RunFailed(component, message))
        self._delivered.set()
        return first

    # ----------------------------------------------------------------------------------------------------------- inside
    def _next(self, what: str) -> Turn:
        if self._links.failure:
            self._delivered.set()
            raise self._links.failure
        self._turns += 1
        return Turn(self._turns, what)

    def _run(self, function: Callable[[], T]) -> T:
        """Run this rank's share. Its failure is made known at once: others may be waiting inside it, in a
        collective."""
        try:
            return function()
        except Exception as error:
            found = failure.of_exception(error, self.name)
            if found is not error and not found.user_error and self._links.peers:
                self._links.settle(SETTLE_S)
            first = self._links.fail(found)
            self._delivered.set()
            raise first from error

    def _expect(self, rank: int, turn: Turn, key: Any, deadline_s: float) -> Ok:
        peer = self._links.peers[rank]
        try:
            what, answer = self._links.receive(rank, key, deadline_s)
        except RunFailed:
            self._delivered.set()
            raise
        except TimeoutError:
            raise self.failed(str(peer), f"{turn.what}: not done within {deadline_s:.0f} s") from None
        except EOFError:
            raise self.failed(str(peer), f"has ended its part where {self.name} waits for {turn.what}") from None
        if what != turn.what:
            raise self.failed(str(peer), f"is out of step: at {what!r} where {self.name} is at {turn.what!r}")
        return answer

    def _on_failure(self, found: RunFailed) -> None:
        """Called once, when this rank first learns of a failure."""
        failure.record(self._run_dir, found)
        threading.Thread(target=self._abort_unless_delivered, args=(found,), name="control-abort", daemon=True).start()

    def _abort_unless_delivered(self, found: RunFailed) -> None:
        if self._delivered.wait(self._abort_after_s):
            return
        print(f"{self.name} is ended, stuck below, after the run failed: {found}", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(1)

    def _close(self) -> None:
        self._delivered.set()
        self._links.close()
