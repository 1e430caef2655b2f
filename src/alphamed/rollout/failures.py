"""What can go wrong between rank 0 and the actors, each error naming the actor, its process and what happened."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from alphamed.cluster.failure import of_exception
from alphamed.errors import RunFailed

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")


class ActorDied(RunFailed):
    """The process of an actor is gone."""


class EngineDied(RunFailed):
    """A process of an engine's, other than its actor, is gone. The message names it."""


class StaleEngine(RunFailed):
    """An engine was asked to answer with weights that it does not hold."""


class Overdue(RunFailed):
    """Something did not end before its deadline. The component lists what is still awaited."""


@dataclass(frozen=True, slots=True)
class ActorProcess:
    """An actor as errors call it: `name` ("engine 0", "reward process") and the id of its process."""

    name: str
    pid: int | None = None

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


def explain(error: Exception, peer: ActorProcess, action: str) -> RunFailed:
    """The failure that caused an error of Ray's for a call of `peer`. `action`: what the call was for, in messages."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RayActorError):
        reason = str(error).strip().splitlines()[-1] if "creation task" in str(error) else "its process died"
        return ActorDied(str(peer), f"{action} failed: {reason}")
    failure = of_exception(error, str(peer))
    if failure is error or failure.user_error:
        return failure
    return RunFailed(failure.component, f"{action} failed: {failure.message}")


async def ask(reference: Awaitable[T], peer: ActorProcess, action: str) -> T:
    """Await the answer of an actor; failures name it."""
    from ray.exceptions import RayError

    try:
        return await reference
    except RayError as error:
        raise explain(error, peer, action) from None


def gather(references: Sequence[ObjectRef], peers: Sequence[ActorProcess], action: str, deadline_s: float) -> list[Any]:
    """The answers of several actors in order, within `deadline_s` seconds. The first failure ends the wait."""
    import ray
    from ray.exceptions import RayError

    end = time.monotonic() + deadline_s
    waiting = dict(zip(references, peers, strict=True))
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            raise Overdue(", ".join(map(str, waiting.values())), f"{action} was not done after {deadline_s:.0f} s")
        for reference in ready:
            peer = waiting.pop(reference)
            try:
                ray.get(reference)
            except RayError as error:
                raise explain(error, peer, action) from None
    return ray.get(list(references))
