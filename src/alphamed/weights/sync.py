"""The trainer's side of a push: the policy's weights to every engine, confirmed, as the next policy version.

Every rank calls `push`, and it ends on all of them alike. Rank 0 alone talks to the engines; it also hosts the TCP store
over which links are joined, workers learn the plan and other senders hand it their digests.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from alphamed.cluster.hardware import wants_cuda
from alphamed.config.choices import Dtype, Transport
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed
from alphamed.rundir.profiling import stage
from alphamed.weights import links
from alphamed.weights.probe import Probe, ProbeDifference
from alphamed.weights.routes import WIRE_DTYPE
from alphamed.weights.sender import Digests, Sender, late_workers, take_part
from alphamed.weights.source import WeightSource
from alphamed.weights.sync_plan import SyncPlan, Wire

if TYPE_CHECKING:
    from alphamed.cluster.control import Control
    from alphamed.rollout.pool import EnginePool

JOIN_DEADLINE_S = 120.0
COMMIT_DEADLINE_S = 60.0
GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class PushOrder:
    """What rank 0 announces to all ranks before a push."""

    version: int
    epoch: int  # changes when an engine comes or goes: the links are built again
    address: str  # of the store
    port: int
    engines: tuple[int, ...]  # tensor-parallel size of each
    transport: str


@dataclass(frozen=True, slots=True)
class JoinedLinks:
    """What a rank has of an epoch's links."""

    epoch: int
    plan: SyncPlan
    sender: Sender | None  # on ranks with links of their own


def choose_transport(config: Config, one_machine: bool) -> str:
    """How weights travel between trainer and engines. `one_machine`: whether all of them are on this one. Raises
    ConfigError."""
    configured = config.sync.transport
    if configured == Transport.IPC and not one_machine:
        raise ConfigError(
            "sync.transport: ipc needs trainer and engines on one machine (and in one network namespace); set it to auto"
        )
    if configured != Transport.AUTO:
        return configured.value
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
        self._config, self._source, self._control = config, source, control
        self._engines = EngineSide(config, pool) if pool else None
        self._probe = probe.cut(config.max_model_tokens - 1) if probe and config.sync.probe else None
        self._version = version
        self._joined: JoinedLinks | None = None
        self.seconds = 0.0  # of the last push, without the probe

    @property
    def version(self) -> int:
        return self._version

    @stage("push")
    def push(self) -> int:
        """Bring the policy's weights to every engine. Returns their version, which the engines hold from now on.

        Raises RunFailed on every rank, naming the failed engine or rank.
        """
        began = time.monotonic()
        order = self._control.from_rank0("announcing the weights", self._announce)
        joined = self._joined
        if joined is None or joined.epoch != order.epoch:
            self._joined = None  # an older epoch's links close here
            joined = self._joined = self._control.everywhere("connecting trainer and engines", lambda: self._connect(order))
        self._control.everywhere("the weight push", lambda: self._transfer(order, joined))
        self._version = order.version
        self.seconds = time.monotonic() - began
        if probe := self._probe:
            self._control.everywhere("the log-prob probe", lambda: self._compare(probe, joined))
            self._probe = None
        return self._version

    def _announce(self) -> PushOrder:
        assert self._engines is not None, "rank 0 needs the engine pool"
        return self._engines.announce(self._version + 1)

    # --------------------------------------------------------------------------------------------------------- connecting
    def _connect(self, order: PushOrder) -> JoinedLinks:
        """Make the plan and join the links of a new epoch."""
        sync = self._config.sync
        wire = Wire(sync.mode.value, order.transport, WIRE_DTYPE[self._config.rollout.dtype], sync.bucket_bytes)
        plan = self._source.plan(order.engines, wire)
        calls = self._engines.begin_join(order, plan) if self._engines else []
        sender, failure = None, None
        if self._source.rank in plan.sources:
            try:
                sender = self._open_sender(order, plan)
            except RuntimeError as error:
                failure = error
        if self._engines:  # where an engine knows why the links do not come, that is raised
            self._engines.end(calls, "joining the weight links", COMMIT_DEADLINE_S if failure else JOIN_DEADLINE_S)
        if failure:
            raise failure
        return JoinedLinks(order.epoch, plan, sender)

    def _open_sender(self, order: PushOrder, plan: SyncPlan) -> Sender:
        store = self._engines.store if self._engines else links.reach_store(order.address, order.port, JOIN_DEADLINE_S)
        on_gpu = wants_cuda(self._config) and order.transport != "gloo"
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        return Sender(plan, self._source, store, order.address, device, JOIN_DEADLINE_S)

    # ------------------------------------------------------------------------------------------------------- transferring
    def _transfer(self, order: PushOrder, joined: JoinedLinks) -> None:
        plan, sender, rank = joined.plan, joined.sender, self._source.rank
        calls = self._engines.begin_receive(order, plan) if self._engines else []
        sent: Digests = {}
        failure: Exception | None = None
        if sender:
            sent, failure = sender.send()
            if not self._engines:
                sender.publish(_digests_key(order, rank), None if failure else sent)
            if late := late_workers(plan, rank, failure):
                raise RunFailed(
                    ", ".join(map(str, late)), f"the push of version {order.version} was not done in time: {failure}"
                )
        elif self._source.exports:
            take_part(self._source, plan.mode)
        if self._engines:
            # a broken link is a consequence: where an engine knows the cause, that is raised
            received = self._engines.end(
                calls,
                f"receiving weights of version {order.version}",
                COMMIT_DEADLINE_S if failure else plan.deadline_s + 2 * GRACE_S,
            )
            if not failure:
                self._engines.confirm(order, plan, {rank: sent}, received)
        if failure:  # no RunFailed: control waits a moment for the cause
            raise RuntimeError(f"a weight link of trainer rank {rank} broke: {failure}")

    # ------------------------------------------------------------------------------------------------------------ probing
    def _compare(self, probe: Probe, joined: JoinedLinks) -> None:
        """Compare the engines' log-probs of a fixed text with the policy's."""
        logprobs = probe.logprobs(probe.tokens)
        if self._source.scores:
            assert logprobs is not None and joined.sender, "the last stage's sender must know the probe's log-probs"
            joined.sender.publish("probe", [float(value) for value in logprobs])
        if self._engines:
            self._engines.compare(probe.tokens, self._version)


class EngineSide:
    """What rank 0 alone does in a push: it calls the engines and hosts the store of each epoch."""

    def __init__(self, config: Config, pool: EnginePool):
        self._config, self._pool = config, pool
        self._hosted: tuple[int, links.TCPStore, int] | None = None  # epoch, store and port

    @property
    def store(self) -> links.TCPStore:
        """The store of the epoch that was announced last."""
        assert self._hosted is not None, "no push has been announced"
        return self._hosted[1]

    def announce(self, version: int) -> PushOrder:
        pool = self._pool
        if self._config.rollout.max_staleness:  # here, where the other ranks wait outside of any transfer
            pool.call("pause", [{} for _ in pool.engines], "pausing for new weights", self._config.rollout.step_deadline_s)
        if self._hosted is None or self._hosted[0] != pool.epoch:
            self._hosted = pool.epoch, *links.host_store(pool.address, JOIN_DEADLINE_S)
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE") and pool.on_this_machine
        return PushOrder(
            version,
            pool.epoch,
            pool.address,
            self._hosted[2],
            pool.tensor_parallel,
            choose_transport(self._config, one_machine),
        )

    def begin_join(self, order: PushOrder, plan: SyncPlan) -> list[Any]:
        self.store.set("plan", plan.to_json())
        arguments = [
            dict(
                address=order.address, port=order.port, first_member=sum(order.engines[:engine]), deadline_s=JOIN_DEADLINE_S
            )
            for engine in range(len(order.engines))
        ]
        return self._pool.begin("join", arguments)

    def begin_receive(self, order: PushOrder, plan: SyncPlan) -> list[Any]:
        deadline_s = plan.deadline_s + GRACE_S  # later than the senders' own, which know who is late
        return self._pool.begin("receive", [dict(version=order.version, deadline_s=deadline_s) for _ in order.engines])

    def end(self, calls: list[Any], work: str, deadline_s: float) -> list[Any]:
        return self._pool.end(calls, work, deadline_s)

    def confirm(self, order: PushOrder, plan: SyncPlan, sent: dict[int, Digests], received: list[list[Digests]]) -> None:
        """Compare every worker's digests with the senders', then have the engines serve the new version. `sent`: this
        rank's digests; those of the other senders come through the store."""
        for rank in sorted(set(plan.sources) - sent.keys()):
            digests = json.loads(self.store.get(_digests_key(order, rank)))
            if digests is None:
                raise RuntimeError(f"a weight link of trainer rank {rank} broke")
            sent = sent | {rank: digests}
        by_link = {link: digests for of_rank in sent.values() for link, digests in of_rank.items()}
        damaged = plan.corrupted(by_link, [digests for engine in received for digests in engine])
        if damaged:
            raise RunFailed(damaged[0].rpartition(" at ")[2], f"received other weights than were sent: {'; '.join(damaged)}")
        self._pool.call(
            "commit",
            [dict(version=order.version) for _ in order.engines],
            f"switching to version {order.version}",
            COMMIT_DEADLINE_S,
        )
        self._pool.version = order.version

    def compare(self, tokens: tuple[int, ...], version: int) -> None:
        policy = json.loads(self.store.get("probe"))
        scores = self._pool.call(
            "score",
            [dict(tokens=tokens, version=version) for _ in self._pool.engines],
            "the log-prob probe",
            COMMIT_DEADLINE_S,
        )
        exact = self._config.model.dtype == self._config.rollout.dtype == Dtype.FP32
        for engine, score in zip(self._pool.engines, scores, strict=True):
            if problem := ProbeDifference.between(policy, score).problem(exact, self._config.model.fp8):
                raise RunFailed(str(engine.peer), problem)


def _digests_key(order: PushOrder, rank: int) -> str:
    return f"digests/{order.version}/{rank}"
