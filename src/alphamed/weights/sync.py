"""The trainer's side of a push: the policy's weights to every engine, confirmed, as the next policy version.

Every rank calls `push`, and it ends on all of them alike. Rank 0 alone talks to the engines; it also hosts the TCP store
over which links are joined, workers learn the plan and other senders hand it their digests.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from alphamed.cluster.hardware import wants_cuda
from alphamed.config.choices import Dtype, Transport
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed
from alphamed.weights import links
from alphamed.weights.plan import SyncPlan, Wire
from alphamed.weights.probe import Difference, Probe
from alphamed.weights.routes import WIRE_DTYPE
from alphamed.weights.sender import Digests, Sender, take_part
from alphamed.weights.source import WeightSource

if TYPE_CHECKING:
    from alphamed.cluster.control import Control
    from alphamed.rollout.pool import EnginePool

JOIN_DEADLINE_S = 120.0
COMMIT_DEADLINE_S = 60.0
GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Order:
    """What rank 0 tells all ranks before a push."""

    version: int
    epoch: int  # changes when an engine comes or goes: the links are built again
    address: str  # of the store
    port: int
    engines: tuple[int, ...]  # tensor-parallel size of each
    transport: str


def choose_transport(config: Config, one_machine: bool) -> str:
    """How weights travel between trainer and engines. `one_machine`: whether all of them are on this one. Raises
    ConfigError."""
    asked = config.sync.transport
    if asked == Transport.IPC and not one_machine:
        raise ConfigError(
            "sync.transport: ipc needs trainer and engines on one machine (and in one network namespace); set it to auto"
        )
    if asked != Transport.AUTO:
        return asked.value
    if wants_cuda(config) and not config.cluster.share_gpus:  # NCCL wants a GPU for each member
        return "nccl"
    return "ipc" if one_machine else "gloo"


class WeightSync:
    """`source`: this rank's weights. `pool`: the engines on rank 0, None elsewhere. `version`: that of the last push before
    a resume."""

    def __init__(
        self,
        config: Config,
        source: WeightSource,
        pool: EnginePool | None,
        control: Control,
        probe: Probe | None = None,
        version: int = 0,
    ):
        self._config, self._source, self._pool, self._control = config, source, pool, control
        self._probe = probe.cut(config.max_model_tokens - 1) if probe and config.sync.probe else None
        self._version = version
        self._epoch: int | None = None
        self._store: dist.TCPStore | None = None  # on rank 0 and on senders
        self._plan: SyncPlan | None = None
        self._sender: Sender | None = None  # on ranks with links of their own
        self.seconds = 0.0  # of the last push, without the probe

    @property
    def version(self) -> int:
        return self._version

    def push(self) -> int:
        """Bring the policy's weights to every engine. Returns their version, which the engines hold from now on.

        Raises RunFailed on every rank, naming the engine or rank to blame.
        """
        began = time.monotonic()
        order = self._control.from_rank0("announcing the weights", self._announce)
        self._source.make_current()
        if order.epoch != self._epoch:
            self._control.everywhere("connecting trainer and engines", lambda: self._connect(order))
        self._control.everywhere("the weight push", lambda: self._transfer(order))
        self._version = order.version
        self.seconds = time.monotonic() - began
        if self._probe:
            self._control.everywhere("the log-prob probe", self._compare)
            self._probe = None
        return self._version

    def _announce(self) -> Order:
        pool = self._pool
        assert pool is not None, "rank 0 needs the engine pool"
        if self._config.rollout.max_staleness:  # here, where the other ranks wait outside of any transfer
            pool.call("pause", [{} for _ in pool.engines], "pausing for new weights", self._config.rollout.step_deadline_s)
        if pool.epoch != self._epoch:
            self._sender = None
            self._store, self._port = links.host_store(pool.address, JOIN_DEADLINE_S)
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") and pool.on_this_machine
        return Order(
            self._version + 1,
            pool.epoch,
            pool.address,
            self._port,
            pool.tensor_parallel,
            choose_transport(self._config, one_machine),
        )

    # --------------------------------------------------------------------------------------------------------- connecting
    def _connect(self, order: Order) -> None:
        """Make the plan and join the links of a new epoch."""
        sync = self._config.sync
        wire = Wire(sync.mode.value, order.transport, WIRE_DTYPE[self._config.rollout.dtype], sync.bucket_bytes)
        self._plan, self._sender = self._source.plan(order.engines, wire), None
        calls = []
        if self._pool:
            self._store.set("plan", self._plan.to_json())
            calls = self._pool.begin(
                "join",
                [
                    dict(
                        address=order.address,
                        port=order.port,
                        first_member=sum(order.engines[:engine]),
                        deadline_s=JOIN_DEADLINE_S,
                    )
                    for engine in range(len(order.engines))
                ],
            )
        failure = self._open_sender(order) if self._source.rank in self._plan.sources else None
        if self._pool:  # where an engine knows why the links do not come, that is raised
            self._pool.end(calls, "joining the weight links", COMMIT_DEADLINE_S if failure else JOIN_DEADLINE_S)
        if failure:
            raise failure
        self._epoch = order.epoch

    def _open_sender(self, order: Order) -> RuntimeError | None:
        if not self._pool:
            self._store = links.reach_store(order.address, order.port, JOIN_DEADLINE_S)
        on_gpu = wants_cuda(self._config) and order.transport != "gloo"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        try:
            self._sender = Sender(self._plan, self._source, self._store, order.address, device, JOIN_DEADLINE_S)
        except RuntimeError as error:
            return error
        return None

    # ------------------------------------------------------------------------------------------------------- transferring
    def _transfer(self, order: Order) -> None:
        calls, failure, sent = [], None, {}
        if self._pool:
            # later than the senders' own deadline, which know who is late
            calls = self._pool.begin(
                "receive", [dict(version=order.version, deadline_s=self._plan.deadline_s + GRACE_S) for _ in order.engines]
            )
        if self._sender:
            sent, failure = self._sender.send()
            if not self._pool:
                self._store.set(f"digests/{order.version}/{self._source.rank}", json.dumps(None if failure else sent))
            if late := self._sender.late(failure):
                raise RunFailed(
                    ", ".join(map(str, late)), f"the push of version {order.version} was not done in time: {failure}"
                )
        elif self._source.exports:
            take_part(self._source, self._plan.mode)
        if self._pool:
            # a broken link is a consequence: where an engine knows the cause, that is raised
            received = self._pool.end(
                calls,
                f"receiving weights of version {order.version}",
                COMMIT_DEADLINE_S if failure else self._plan.deadline_s + 2 * GRACE_S,
            )
            if not failure:
                self._confirm(order, sent, received)
        if failure:  # no RunFailed: control waits a moment for the cause
            raise RuntimeError(f"a weight link of trainer rank {self._source.rank} broke: {failure}")

    def _confirm(self, order: Order, sent: Digests, received: list[list[Digests]]) -> None:
        """Compare every worker's digests with the senders', then have the engines serve the new version."""
        for rank in self._plan.sources:
            if rank != self._source.rank:
                other = json.loads(self._store.get(f"digests/{order.version}/{rank}"))
                if other is None:
                    raise RuntimeError(f"a weight link of trainer rank {rank} broke")
                sent |= other
        damaged = self._plan.corrupted(sent, [digests for engine in received for digests in engine])
        if damaged:
            raise RunFailed(damaged[0].rpartition(" at ")[2], f"received other weights than were sent: {'; '.join(damaged)}")
        self._pool.call(
            "commit",
            [dict(version=order.version) for _ in order.engines],
            f"switching to version {order.version}",
            COMMIT_DEADLINE_S,
        )
        self._pool.version = order.version

    # ------------------------------------------------------------------------------------------------------------ probing
    def _compare(self) -> None:
        """Compare the engines' log-probs of a fixed text with the policy's."""
        mine = self._probe.logprobs(self._probe.tokens)
        if self._source.scores:
            assert mine is not None, "the last stage's sender must know the probe's log-probs"
            self._store.set("probe", json.dumps([float(value) for value in mine]))
        if not self._pool:
            return
        policy = json.loads(self._store.get("probe"))
        scores = self._pool.call(
            "score",
            [dict(tokens=self._probe.tokens, version=self._version) for _ in self._pool.engines],
            "the log-prob probe",
            COMMIT_DEADLINE_S,
        )
        exact = self._config.model.dtype == self._config.rollout.dtype == Dtype.FP32
        for engine, score in zip(self._pool.engines, scores, strict=True):
            if problem := Difference.between(policy, score).problem(exact, self._config.model.fp8):
                raise RunFailed(str(engine.peer), problem)
