"""The reward process: a Ray actor that grades groups as they finish and computes their advantages.

Protocol, for the coordinator:

    process = start(config)                        # returns at once
    pid = await process.ready.remote()             # for error messages; raises what keeps it from working
    scored = await process.grade.remote(group)     # any number at a time; raises GradingFailed or GraderDied
    await process.check.remote()                   # now and then: raises what has stopped grading, were it while idle

Both errors are RunFailed (component and message) and stay: after the first one every call raises it again. Samples whose
grader crashed or ran out of time are counted over the latest `questions_per_step x samples_per_question` samples, a
step's worth, and GradingFailed is raised as soon as their share exceeds `reward.max_failure_share`. Below that such a
sample has reward 0 and advantage 0, and the advantages of its group are those of the other samples: it carries no signal.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from alphamed.answers.thinking import Thinking
from alphamed.cluster.placement import beside_rank0
from alphamed.config.schema import Config
from alphamed.config.sections import PromptConfig, RewardConfig
from alphamed.errors import RunFailed
from alphamed.imports import quick_imports
from alphamed.records import Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.reward.grader import GraderPool
from alphamed.reward.rules import Graded, Rule, correct, grade_rollout, resolve_rule
from alphamed.reward.shaping import NO_PENALTY, Overlong

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_log = logging.getLogger(__name__)


class GradingFailed(RunFailed):
    """The reward function failed too often. The message ends with the first traceback, on lines of its own."""

    def __init__(self, component: str, message: str, user_error: bool = False):
        super().__init__(component, message, user_error)
        self.message = message  # RunFailed would fold the traceback into one line


def start(config: Config, thinking: Thinking = Thinking()) -> ActorHandle:
    """Create the actor on this node and return its handle; the actor ends with its last handle or with the driver.
    `thinking` is what `reward.answer_after` means for the model.

    It needs no CPU reserved: built-in rewards take microseconds, a user's function runs in `reward.workers` processes.
    """
    import ray

    # Ray's types do not have the methods of a handle
    actor: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=beside_rank0())(RewardProcess)
    step_samples = config.rollout.questions_per_step * config.rollout.samples_per_question
    return actor.remote(
        config.reward,
        str(config.algorithm.advantage),
        step_samples,
        [os.getcwd(), *sys.path],
        Overlong.of(config),
        config.run.seed,
        config.prompt,
        thinking,
    )


class RewardProcess:
    """Grades in threads of its own, so that the event loop is always free for the next group."""

    def __init__(
        self,
        reward: RewardConfig,
        advantage: str,
        step_samples: int,
        search_path: Sequence[str] = (),
        overlong: Overlong = NO_PENALTY,
        seed: int = 0,
        prompt: PromptConfig = PromptConfig(),
        thinking: Thinking = Thinking(),
    ):
        self._reward, self._advantage, self._search_path, self._overlong = reward, advantage, search_path, overlong
        self._seed, self._prompt, self._thinking = seed, prompt, thinking
        self._step_samples = step_samples
        self._recent: deque[Outcome] = deque(maxlen=step_samples)
        self._first_problem: str | None = None
        self._failure: RunFailed | None = None
        self._rule: Rule | None = None
        self._opening: asyncio.Future[None] | None = None
        self._threads = ThreadPoolExecutor(reward.workers, thread_name_prefix="grading")

    async def ready(self) -> int:
        """Load what grading needs (torch, the user's module) and return the process id. Raises ConfigError."""
        if self._opening is None:
            self._opening = asyncio.ensure_future(asyncio.to_thread(self._open))
        await self._opening
        return os.getpid()

    async def grade(self, group: RolloutGroup, evaluation: bool = False) -> ScoredGroup:
        """Outcomes, rewards and advantages of a finished group. `grading_s` is the time from here to the answer, the
        wait for a free grader included. An `evaluation` asks whether answers are right, by the reward `correct`: a user's
        function has no part in it, nor do its failures."""
        started = time.monotonic()
        await self.ready()
        await self.check()
        loop = asyncio.get_running_loop()
        rule = correct if evaluation else self._rule
        assert rule is not None, "`ready` has not loaded the reward"
        jobs = [
            loop.run_in_executor(self._threads, self._grade_one, group.question, rollout, rule) for rollout in group.rollouts
        ]
        try:
            graded = await asyncio.gather(*jobs)
        except RunFailed as failure:
            self._failure = self._failure or failure
            raise
        if not evaluation:
            self._count(graded)
            await self.check()
        overlong = NO_PENALTY if evaluation else self._overlong
        return scored_group(group, graded, self._advantage, overlong, time.monotonic() - started)

    async def check(self) -> None:
        """Raise what has stopped grading, also where a grader was killed while it had nothing to do."""
        if self._failure is None and self._pool is not None:
            try:
                self._pool.check_alive()
            except RunFailed as failure:
                self._failure = failure
        if self._failure is not None:
            raise self._failure

    async def grader_pids(self) -> list[int]:
        """Process ids of the graders that run now."""
        return self._pool.pids if self._pool else []

    def _open(self) -> None:
        with quick_imports():
            import torch

        torch.set_num_threads(1)  # its tensors hold one number per sample
        self._rule = resolve_rule(
            self._reward.name,
            seed=self._seed,
            timeout_s=self._reward.timeout_s,
            workers=self._reward.workers,
            search_path=self._search_path,
            signature=str(self._reward.signature),
            prompt=self._prompt,
        )

    @property
    def _pool(self) -> GraderPool | None:
        return self._rule if isinstance(self._rule, GraderPool) else None

    def _grade_one(self, question: Question, rollout: Rollout, rule: Rule) -> Graded:
        return grade_rollout(question, rollout, rule, self._reward.truncated, self._thinking)

    def _count(self, graded: Sequence[Graded]) -> None:
        for sample in graded:
            self._recent.append(sample.outcome)
            if sample.outcome.failed and self._first_problem is None:
                self._first_problem = sample.problem
                _log.warning("reward function %s failed for the first time:\n%s", self._reward.name, sample.problem)
        timeouts, crashes = (self._recent.count(outcome) for outcome in (Outcome.TIMEOUT, Outcome.CRASH))
        if self._failure is None and (timeouts + crashes) / self._step_samples > self._reward.max_failure_share:
            self._failure = GradingFailed(
                f"reward function {self._reward.name}",
                f"failed for {timeouts + crashes} of the last {len(self._recent)} samples ({crashes} crashes, "
                f"{timeouts} time-outs; reward.max_failure_share allows {self._reward.max_failure_share:.1%} of a "
                f"step's {self._step_samples}). The first failure:\n{self._first_problem}",
            )


def scored_group(
    group: RolloutGroup, graded: Sequence[Graded], advantage: str, overlong: Overlong = NO_PENALTY, grading_s: float = 0.0
) -> ScoredGroup:
    """A group with its grading and the advantages that follow from it."""
    scored = ScoredGroup(
        group,
        outcomes=tuple(sample.outcome for sample in graded),
        rewards=tuple(sample.reward for sample in graded),
        advantages=(0.0,) * len(graded),
        letters=tuple(sample.letter for sample in graded),
        grading_s=grading_s,
    )
    return with_advantages(scored, advantage, overlong)


def with_advantages(scored: ScoredGroup, kind: str, overlong: Overlong) -> ScoredGroup:
    """The group with advantages computed from its rewards and the penalty on the lengths of its responses. Samples that could
    not be graded get 0 and do not count for the others."""
    import torch

    from alphamed.algorithms.advantage import group_advantages

    graded = [i for i, outcome in enumerate(scored.outcomes) if not outcome.failed]
    lengths = [len(rollout.response_token_ids) for rollout in scored.group.rollouts]
    shaped = [scored.rewards[i] + overlong.penalty(lengths[i]) for i in graded]
    values = group_advantages(torch.tensor(shaped, dtype=torch.float64), [0] * len(shaped), kind).tolist()
    advantages = dict(zip(graded, values, strict=True))
    return replace(scored, advantages=tuple(advantages.get(i, 0.0) for i in range(len(scored.outcomes))))
