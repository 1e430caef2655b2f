"""The engines of a run, as rank 0 holds them: placed and started by Ray, called together, stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.cluster.hardware import this_machine
from alphamed.cluster.placement import ENGINE_SLOT
from alphamed.config.schema import Config
from alphamed.errors import RunFailed
from alphamed.model.shape import ModelShape
from alphamed.model.weight_files import weight_bytes
from alphamed.rollout.engine import RolloutEngine
from alphamed.rollout.failures import ActorProcess, gather
from alphamed.rollout.spec import EngineSpec, engine_environment, engine_specs

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

STOP_DEADLINE_S = 20.0


@dataclass(frozen=True)
class Engine:
    """A started engine. `machine`: what `this_machine` returns there. `processes`: ids by name, its actor's included."""

    index: int
    actor: ActorHandle
    tensor_parallel: int
    machine: str
    processes: Mapping[str, int]

    @property
    def peer(self) -> ActorProcess:
        return ActorProcess(f"engine {self.index}", self.processes["actor"])


class EnginePool:
    """All engines. `epoch` changes when one comes or goes; `version` is the policy version that they hold."""

    def __init__(self, engines: Sequence[Engine], address: str):
        self.engines = tuple(engines)
        self.address = address
        """Where this process is reached from the engines."""
        self.epoch = 1
        self.version = 0

    @classmethod
    def start(cls, config: Config, folder: Path, shape: ModelShape, eos_ids: tuple[int, ...]) -> EnginePool:
        """Start the engines on the model in `folder`; Ray must be up. They then hold its weights, as version 0.

        `eos_ids` end a response. Raises RunFailed naming the engine that did not start, or not within its deadline
        (`Config.start_deadline_s`).
        """
        return cls.begin_start(config, folder, shape, eos_ids).finish()

    @classmethod
    def begin_start(cls, config: Config, folder: Path, shape: ModelShape, eos_ids: tuple[int, ...]) -> StartingPool:
        """The first half of `start`, which does not wait."""
        return StartingPool(engine_specs(config, folder, shape, eos_ids), config.start_deadline_s(weight_bytes(folder)))

    @classmethod
    def of_specs(cls, specs: Sequence[EngineSpec], deadline_s: float) -> EnginePool:
        return StartingPool(specs, deadline_s).finish()

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        return tuple(engine.tensor_parallel for engine in self.engines)

    @property
    def on_this_machine(self) -> bool:
        return all(engine.machine == this_machine() for engine in self.engines)

    def processes(self) -> dict[int, str]:
        """Ids of all processes of the engines, with the names that errors use."""
        return {pid: f"engine {engine.index}: {name}" for engine in self.engines for name, pid in engine.processes.items()}

    def begin(self, method: str, arguments: Sequence[Mapping[str, Any]]) -> list[ObjectRef]:
        """Call a method of every engine, with its own arguments, without waiting."""
        return [getattr(engine.actor, method).remote(**own) for engine, own in zip(self.engines, arguments, strict=True)]

    def end(self, calls: Sequence[ObjectRef], action: str, deadline_s: float) -> list[Any]:
        """The answers to `begin`, in the order of the engines. Raises RunFailed naming the engine that failed or is late."""
        return gather(calls, [engine.peer for engine in self.engines], action, deadline_s)

    def call(self, method: str, arguments: Sequence[Mapping[str, Any]], action: str, deadline_s: float) -> list[Any]:
        return self.end(self.begin(method, arguments), action, deadline_s)

    def stop(self) -> None:
        """End the engines cleanly; what does not go is killed."""
        import ray

        calls: list[Any] = [engine.actor.stop.remote() for engine in self.engines]
        ray.wait(calls, num_returns=len(calls), timeout=STOP_DEADLINE_S)
        for engine in self.engines:
            ray.kill(engine.actor)


class StartingPool:
    """Engines that load the model."""

    def __init__(self, specs: Sequence[EngineSpec], deadline_s: float):
        self._specs, self._deadline_s = tuple(specs), deadline_s
        self._actors = [_place(spec) for spec in specs]
        self._calls = [actor.start.remote() for actor in self._actors]

    def finish(self) -> EnginePool:
        """Wait for them. Raises RunFailed naming the engine that did not start, or not within the deadline from here on."""
        import ray

        try:
            started = gather(
                self._calls,
                [ActorProcess(spec.name) for spec in self._specs],
                "starting vLLM (rollout.start_deadline_s)",
                self._deadline_s,
            )
        except RunFailed:
            self.kill()
            raise
        engines = [
            Engine(spec.index, actor, spec.tensor_parallel, *answer)
            for spec, actor, answer in zip(self._specs, self._actors, started, strict=True)
        ]
        return EnginePool(engines, ray.util.get_node_ip_address())

    def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


def _place(spec: EngineSpec) -> ActorHandle:
    """Create the actor where its GPUs are. Engines on CPU share the node's cores by their specs, so Ray counts none of
    these: they take the slots that their host has for them."""
    import ray

    remote: Any = ray.remote(RolloutEngine)  # Ray's types do not have the methods of a handle
    actor = remote.options(
        num_cpus=0,
        num_gpus=spec.tensor_parallel if spec.cuda else 0,
        resources=None if spec.cuda else {ENGINE_SLOT: spec.tensor_parallel},
        max_restarts=0,
        max_concurrency=10_000,
        runtime_env={"env_vars": engine_environment(spec)},
    )
    return actor.remote(spec)
