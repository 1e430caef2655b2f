"""Keeps engines and grading busy: a Ray actor that hands tasks to engines and finished groups to the reward process.

It is a process of its own so that its event loop does not compete with training for rank 0's interpreter. Rank 0 holds a
`Coordinator`, the handle that starts it, submits work and collects results.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from alphamed.cluster.placement import beside_rank0
from alphamed.config.schema import Config
from alphamed.errors import RunFailed
from alphamed.records import GenerationTask, ScoredGroup
from alphamed.rollout.failures import ActorProcess, Overdue, ask, gather
from alphamed.rollout.pool import Engine, EnginePool

if TYPE_CHECKING:
    from ray.actor import ActorHandle

GRADER = "reward process"
QUEUED = "waiting for an engine"
START_DEADLINE_S = 60.0
POLL_S = 1.0
GRADER_DEADLINE_S = 20.0
ANSWER_DEADLINE_S = 60.0
"""The coordinator answers a poll within POLL_S, or GRADER_DEADLINE_S; one that has not answered for this long hangs."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is. `groups` is there when it is done, in the order of its tasks."""

    done: int
    total: int
    generated: int  # groups that left their engine, graded or not
    response_tokens: int
    generate_s: float  # from the submission to the last group that left its engine
    reward_s: float  # from there to the last group graded: what grading adds to the step
    groups: tuple[ScoredGroup, ...] | None = None

    @property
    def all_groups(self) -> tuple[ScoredGroup, ...]:
        """The groups of a job that is done."""
        assert self.groups is not None, f"{self.done} of {self.total} groups are done"
        return self.groups


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a feed has brought since it was asked last, in the order in which it came."""

    groups: tuple[ScoredGroup, ...]
    response_tokens: int  # of groups that left their engine meanwhile, graded or not


class Priority(IntEnum):
    """Which jobs go first."""

    HELD = 0  # in the background, until another job has begun
    BACKGROUND = 1  # after all others
    FOREGROUND = 2


@dataclass
class RolloutJob:
    """The tasks of one step, or of one evaluation; or a feed, which gets more of them as it goes."""

    key: str
    tasks: dict[int, GenerationTask]
    version: int
    feed: bool = False
    priority: Priority = Priority.FOREGROUND
    awaited: float | None = None  # since when its end is waited for
    began: float = field(default_factory=time.monotonic)
    generated_at: float = 0.0
    response_tokens: int = 0
    places: dict[int, str] = field(default_factory=dict)  # task -> where it is now
    scored: dict[int, ScoredGroup] = field(default_factory=dict)
    failure: RunFailed | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Event = field(default_factory=asyncio.Event)  # something to collect, or the end
    added: int = 0  # tasks so far, those handed out included
    queued: int = 0  # of them, those that wait for an engine
    work: set[asyncio.Task] = field(default_factory=set)

    def progress(self) -> Progress:
        finished = len(self.scored) == len(self.tasks)
        now = time.monotonic()
        generated = len(self.tasks) - sum(not place.startswith(GRADER) for place in self.places.values())
        end_of_generation = self.generated_at if generated == len(self.tasks) else now
        return Progress(
            done=len(self.scored),
            total=len(self.tasks),
            generated=generated,
            response_tokens=self.response_tokens,
            generate_s=end_of_generation - self.began,
            reward_s=now - end_of_generation,
            groups=tuple(self.scored[i] for i in range(len(self.tasks))) if finished else None,
        )

    def add(self, tasks: Sequence[GenerationTask]) -> range:
        """Take tasks in; returns their numbers."""
        numbers = range(self.added, self.added + len(tasks))
        self.added += len(tasks)
        self.queued += len(tasks)
        self.tasks |= zip(numbers, tasks)
        self.places |= dict.fromkeys(numbers, QUEUED)
        return numbers

    def drain(self) -> Arrivals:
        """What is finished; it is forgotten here."""
        scored, tokens = self.scored, self.response_tokens
        self.scored, self.response_tokens = {}, 0
        for number in scored:
            del self.tasks[number]
        self.news.clear()
        return Arrivals(tuple(scored.values()), tokens)

    def left_s(self, deadline_s: float) -> float:
        """Until the job is overdue, from when its end is waited for: one in the background may not have run before."""
        assert self.awaited is not None, f"{self.key}: nobody waits for it"
        return max(0.0, self.awaited + deadline_s - time.monotonic())

    def overdue(self, deadline_s: float) -> Overdue:
        missing = [f"{self.tasks[i].group_id} ({place})" for i, place in sorted(self.places.items())]
        return Overdue(
            ", ".join(sorted(set(self.places.values()))),
            f"{self.key}: {len(missing)} of {len(self.tasks)} groups were not done after {deadline_s:.0f} s: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}",
        )


class RolloutCoordinator:
    """The actor. At most `concurrent` responses are sampled by an engine at once (always at least one group); the least
    loaded engine is served first. A job in the background waits until another has begun, then gets at most half of that, and
    only while no other task waits. When its end is waited for, it and all of the background are jobs like the others."""

    def __init__(self, engines: Sequence[Engine], grader: ActorHandle, grader_pid: int, concurrent: int, deadline_s: float):
        self._engines = tuple(engines)
        self._grader, self._grading = grader, ActorProcess(GRADER, grader_pid)
        self._concurrent, self._deadline_s = concurrent, deadline_s
        self._load = {engine.index: 0 for engine in self._engines}
        self._jobs: dict[str, RolloutJob] = {}

    async def start(self) -> int:
        """Returns the id of this process."""
        self._freed = asyncio.Event()
        return os.getpid()

    async def submit(self, key: str, tasks: Sequence[GenerationTask], version: int, background: bool = False) -> None:
        """Begin a job. `key` ("step 3") names it in `collect` and in errors."""
        assert key not in self._jobs, f"{key} was submitted before"
        job = self._jobs[key] = RolloutJob(key, {}, version, priority=Priority.HELD if background else Priority.FOREGROUND)
        if not tasks:
            job.over.set()
        self._begin(job, tasks)

    async def feed(self, key: str, tasks: Sequence[GenerationTask], version: int) -> None:
        """Add tasks to the feed `key`, to be answered with weights of `version` or newer ones. A feed has no end but a
        failure; `deliver` hands its groups out as they come."""
        job = self._jobs.setdefault(key, RolloutJob(key, {}, version, feed=True))
        job.version = version
        self._begin(job, tasks)

    def _begin(self, job: RolloutJob, tasks: Sequence[GenerationTask]) -> None:
        numbers = job.add(tasks)
        if job.priority == Priority.FOREGROUND:
            self._promote(Priority.BACKGROUND)
            for number in numbers:
                self._spawn(job, self._serve(job, number))
            return
        left = iter(numbers)  # thousands that wait would all wake up whenever a place is free
        for _ in range(min(len(numbers), len(self._engines) * self._concurrent)):
            self._spawn(job, self._serve_each(job, left))

    async def _serve_each(self, job: RolloutJob, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._serve(job, number)

    def _promote(self, priority: Priority) -> None:
        """Raise jobs of a lower priority to this."""
        for job in self._jobs.values():
            job.priority = max(job.priority, priority)
        self._freed.set()

    async def deliver(self, key: str, timeout_s: float, left_s: float) -> Arrivals:
        """The groups of a feed that are done, after at most `timeout_s` of waiting for one. Raises RunFailed as `collect`
        does, Overdue where none came in the `left_s` that the caller still gives it."""
        job = self._jobs[key]
        await self._check_grader(job)
        try:
            await asyncio.wait_for(job.news.wait(), min(timeout_s, left_s))
        except TimeoutError:
            if left_s <= timeout_s and not job.news.is_set():
                self._end(job, job.overdue(self._deadline_s))
        if job.failure:
            raise job.failure
        return job.drain()

    async def collect(self, key: str, timeout_s: float) -> Progress:
        """Wait at most `timeout_s` for the job's end and return how far it is. Raises RunFailed where an engine or the reward
        process failed, Overdue past the deadline."""
        job = self._jobs[key]
        await self._check_grader(job)
        if job.awaited is None:
            job.awaited = time.monotonic()
        if job.priority < Priority.FOREGROUND:  # who waits for one set of an evaluation waits for all
            self._promote(Priority.FOREGROUND)
        left = job.left_s(self._deadline_s)
        try:
            await asyncio.wait_for(job.over.wait(), min(timeout_s, left))
        except TimeoutError:
            if left <= timeout_s:
                self._end(job, job.overdue(self._deadline_s))
        progress = job.progress()
        if job.over.is_set():
            del self._jobs[key]
        if job.failure:
            raise job.failure
        return progress

    async def _check_grader(self, job: RolloutJob) -> None:
        """Notice a reward process that died with nothing to grade."""
        try:
            async with asyncio.timeout(GRADER_DEADLINE_S):
                await ask(self._grader.check.remote(), self._grading, "a check")
        except TimeoutError:
            self._end(job, Overdue(str(self._grading), f"gave no sign of life for {GRADER_DEADLINE_S:.0f} s"))
        except RunFailed as failure:
            self._end(job, failure)

    # ---------------------------------------------------------------------------------------------------------- the work
    async def _serve(self, job: RolloutJob, index: int) -> None:
        """One task's way: wait for an engine (first come, first served), be answered, be graded."""
        task = job.tasks[index]
        engine = await self._reserve(job, task.sampling.n)
        try:
            job.places[index] = str(engine.peer)
            group = await ask(engine.actor.generate.remote(task, job.version), engine.peer, f"sampling {task.group_id}")
        finally:
            self._load[engine.index] -= task.sampling.n
            self._freed.set()
        job.places[index] = str(self._grading)
        job.generated_at = time.monotonic()
        job.response_tokens += sum(len(rollout.response_token_ids) for rollout in group.rollouts)
        job.scored[index] = await ask(
            self._grader.grade.remote(group, task.evaluation), self._grading, f"grading {task.group_id}"
        )
        del job.places[index]
        job.news.set()
        if not job.places and not job.feed:
            self._end(job)

    async def _reserve(self, job: RolloutJob, samples: int) -> Engine:
        """The least loaded engine, as soon as it can take `samples` more."""
        while True:
            engine = min(self._engines, key=lambda engine: self._load[engine.index])
            load, first = self._load[engine.index], job.priority == Priority.FOREGROUND
            most = self._concurrent if first else self._concurrent // 2
            if (first or self._may_begin(job)) and (not load or load + samples <= most):
                self._load[engine.index] += samples
                job.queued -= 1
                if not job.queued:
                    self._freed.set()  # those in the background have waited for this
                return engine
            self._freed.clear()
            await self._freed.wait()

    def _may_begin(self, job: RolloutJob) -> bool:
        """Whether a job in the background may take what is free: no task of another waits for it."""
        return job.priority == Priority.BACKGROUND and not any(
            other.queued and not other.over.is_set()
            for other in self._jobs.values()
            if other.priority == Priority.FOREGROUND
        )

    def _spawn(self, job: RolloutJob, coroutine) -> None:
        """Run a part of a job; the first failure ends the job."""
        task = asyncio.create_task(coroutine)
        job.work.add(task)
        task.add_done_callback(lambda done: self._part_ended(job, done))

    def _part_ended(self, job: RolloutJob, task: asyncio.Task) -> None:
        job.work.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._end(
                job,
                error
                if isinstance(error, RunFailed)
                else RunFailed(f"rollout coordinator (pid {os.getpid()})", f"{job.key}: {type(error).__name__}: {error}"),
            )

    def _end(self, job: RolloutJob, failure: RunFailed | None = None) -> None:
        if not job.over.is_set():
            job.failure = failure
            job.over.set()
            job.news.set()
            self._freed.set()
            for task in tuple(job.work):
                if failure:
                    task.cancel()


class Coordinator:
    """Rank 0's handle."""

    def __init__(self, actor: ActorHandle, peer: ActorProcess, pool: EnginePool):
        self._actor, self.peer, self._pool = actor, peer, pool

    @classmethod
    def start(cls, config: Config, pool: EnginePool, grader: ActorHandle) -> Coordinator:
        """Start the actor. `grader`: the reward process (`reward.process.start`). Raises RunFailed, the user's where the
        reward function cannot be loaded."""
        import ray

        (grader_pid,) = gather([grader.ready.remote()], [ActorProcess(GRADER)], "starting", START_DEADLINE_S)
        remote: Any = ray.remote(RolloutCoordinator)  # Ray's types do not have the methods of a handle
        actor = remote.options(num_cpus=0, max_restarts=0, max_concurrency=1_000, scheduling_strategy=beside_rank0()).remote(
            pool.engines, grader, grader_pid, config.rollout.max_concurrent_requests, config.rollout.step_deadline_s
        )
        (pid,) = gather([actor.start.remote()], [ActorProcess("rollout coordinator")], "starting", START_DEADLINE_S)
        return cls(actor, ActorProcess("rollout coordinator", pid), pool)

    def run(
        self, key: str, tasks: Sequence[GenerationTask], on_progress: Callable[[Progress], None] | None = None
    ) -> Progress:
        """Have the engines answer `tasks` with the weights that they hold, and the answers graded. Blocks; `on_progress` is
        called about once a second. Raises RunFailed naming the engine, the reward process or the coordinator."""
        self.begin(key, tasks)
        return self.finish(key, on_progress)

    def begin(self, key: str, tasks: Sequence[GenerationTask], background: bool = False) -> None:
        """The first half of `run`. `background`: after whatever else the engines have to do."""
        self._ask(self._actor.submit.remote(key, tuple(tasks), self._pool.version, background), f"submitting {key}")

    def finish(self, key: str, on_progress: Callable[[Progress], None] | None = None) -> Progress:
        """The second half of `run`."""
        while True:
            progress = self._ask(self._actor.collect.remote(key, POLL_S), f"collecting {key}")
            if on_progress:
                on_progress(progress)
            if progress.groups is not None:
                return progress

    @property
    def version(self) -> int:
        """Of the weights that the engines hold."""
        return self._pool.version

    def feed(self, key: str, tasks: Sequence[GenerationTask]) -> None:
        """Have the engines answer `tasks` in the background, with the weights that they hold then; see `deliver`."""
        self._ask(self._actor.feed.remote(key, tuple(tasks), self._pool.version), f"feeding {key}")

    def deliver(self, key: str, left_s: float, wait: bool) -> Arrivals:
        """Groups of a feed that are done, perhaps none: with `wait` it waits for one about a second. Raises RunFailed as
        `run` does, and Overdue where none came within `left_s`."""
        return self._ask(self._actor.deliver.remote(key, POLL_S if wait else 0.0, left_s), f"collecting {key}")

    def _ask(self, reference, action: str):
        return gather([reference], [self.peer], action, ANSWER_DEADLINE_S)[0]
