"""Where rank 0 takes a step's groups from: `SyncRollouts` asks and waits, `AsyncRollouts` has them made while the policy trains.

Both choose questions, drop and replace groups that carry no signal, and know what a checkpoint must keep to go on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alphamed.config.choices import Stragglers
from alphamed.config.schema import Config
from alphamed.data.prompts import PromptBuilder
from alphamed.records import GenerationTask, Question, ScoredGroup, StepQuestions
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.failures import Overdue
from alphamed.rollout.refill import BatchSlots, GroupCounts, has_reward_variance, must_wait, step_questions
from alphamed.rollout.tasks import training_tasks
from alphamed.rundir.rollout_files import question_from_json, question_json

if TYPE_CHECKING:
    from alphamed.rollout.coordinator import Arrivals, Coordinator, Progress
    from alphamed.rollout.pace import Pace

FEED = "rollouts"
MOST_NAMED = 4
"""Groups that an error names."""


@dataclass(frozen=True, slots=True)
class Gathered:
    groups: tuple[ScoredGroup, ...]
    metrics: Mapping[str, float]
    questions: StepQuestions | None = None


class SyncRollouts:
    """Rounds of questions, each answered and graded before the next: the same questions give the same step."""

    def __init__(
        self,
        config: Config,
        sampler: QuestionSampler,
        prompts: PromptBuilder,
        coordinator: Coordinator,
        on_progress: Callable[[Progress], None] | None,
        pace: Pace | None = None,
    ):
        self._config, self._sampler, self._prompts = config, sampler, prompts
        self._coordinator, self._on_progress, self._pace = coordinator, on_progress, pace

    def gather(self, step: int) -> Gathered:
        """The groups of a step. Raises RunFailed naming what kept them from coming.

        Without dynamic sampling and curriculum there is one round, of all questions of the step, and the sampler gives those
        that come next in the stream."""
        c = self._config
        questions = self._pace.questions(step) if self._pace else c.rollout.questions_per_step
        slots = BatchSlots(questions, c.dynamic_sampling.refills)
        skipped, rounds, asked = self._sampler.skipped, [], []
        for missing in slots.rounds():
            first = slots.counts.asked - missing
            tasks = training_tasks(c, step, self._sampler.take(missing, step), self._prompts, first)
            asked += tasks
            key = f"step {step}" if not rounds else f"step {step}, refill {len(rounds)}"
            rounds.append(self._coordinator.run(key, tasks, self._on_progress))
            groups = rounds[-1].all_groups
            slots.fill(groups)
            self._sampler.observe(groups, step)
        metrics = _metrics(rounds) | self._sampler.level_metrics()
        if c.dynamic_sampling.active:
            metrics |= slots.counts.metrics(self._sampler.skipped - skipped)
        if self._pace:
            metrics["sampling/questions"] = float(questions)
        trained = {scored.group.group_id for scored in slots.groups}
        graded = [scored for done in rounds for scored in done.all_groups]
        replaced = [scored for scored in graded if scored.group.group_id not in trained]
        return Gathered(
            slots.groups, metrics, step_questions(asked, slots.groups, replaced, (), self._sampler.drain_skipped())
        )

    def state(self) -> dict[str, Any]:
        return self._sampler.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sampler.load_state(state)


def _metrics(rounds: Sequence[Progress]) -> dict[str, float]:
    seconds = sum(done.generate_s for done in rounds)
    return {
        "time/generate_s": seconds,
        "time/reward_s": sum(done.reward_s for done in rounds),
        "throughput/generated_tokens_per_s": sum(done.response_tokens for done in rounds) / max(seconds, 1e-9),
    }


class AsyncRollouts:
    """Groups made up to `max_staleness` steps before they are trained on.

    When a step begins, groups for it and the `max_staleness` steps after it are ready or asked for, counted by how many had a
    signal recently. The step takes those asked first that are ready. With `rollout.stragglers: wait` it waits as long as
    a group would become too old in the steps after it (`refill.must_wait`); with `drop` it does not while others are ready, and
    a group whose weights are more than `max_staleness` pushes old is dropped and counted. What was asked but not trained on
    is part of the state, and is asked first after a resume.
    """

    def __init__(
        self,
        config: Config,
        sampler: QuestionSampler,
        prompts: PromptBuilder,
        coordinator: Coordinator,
        on_progress: Callable[[Progress], None] | None,
    ):
        self._config, self._sampler, self._prompts = config, sampler, prompts
        self._coordinator, self._on_progress = coordinator, on_progress
        self._asked: dict[str, Question] = {}  # by group id, in the order asked: not graded yet
        self._ready: dict[str, ScoredGroup] = {}  # graded, not trained on
        self._spare: dict[str, ScoredGroup] = {}  # of this step, without a signal
        self._order: dict[str, tuple[int, int]] = {}  # of all of these: the step it was asked in, a running number
        self._again: list[Question] = []  # to be asked first, after a resume
        self._numbers = 0
        self._tasks: list[GenerationTask] = []  # asked in this step
        self._share = 1.0  # of the groups that have a signal, recently
        self._began = time.monotonic()  # of the last step's gathering

    # ------------------------------------------------------------------------------------------------------------- a step
    def gather(self, step: int) -> Gathered:
        """The groups of a step; the engines go on with those of the next. Raises RunFailed naming what kept them from
        coming."""
        began, skipped = time.monotonic(), self._sampler.skipped
        counts, tokens, self._tasks = GroupCounts(), 0, []
        self._drop_stale(counts)
        if self._asked:
            tokens += self._receive(step, counts, left_s=self._config.rollout.step_deadline_s, wait=False)
        self._ask(step, counts)
        while not self._enough(step, counts):
            left_s = began + self._config.rollout.step_deadline_s - time.monotonic()
            try:
                tokens += self._receive(step, counts, left_s, wait=True)
            except Overdue as error:  # or the reward process hangs, which no setting helps
                late = time.monotonic() - began >= self._config.rollout.step_deadline_s
                raise self._named(step, error) if late else error from None
            self._ask(step, counts)
        groups, replaced = self._take(counts)
        elapsed, self._began = time.monotonic() - self._began, time.monotonic()
        if counts.graded:
            self._share += (counts.usable / counts.graded - self._share) / 2
        return Gathered(
            groups,
            self._metrics(
                groups, counts, time.monotonic() - began, tokens / max(elapsed, 1e-9), self._sampler.skipped - skipped
            ),
            step_questions(self._tasks, groups, replaced, counts.stale_groups, self._sampler.drain_skipped()),
        )

    def _ask(self, step: int, counts: GroupCounts) -> None:
        """Ask for as many groups as this step and those after it may still lack."""
        c = self._config
        steps = 1 + min(c.rollout.max_staleness, c.run.last_step - step)
        wanted = c.rollout.questions_per_step * steps - len(self._ready)
        lacking = math.ceil(wanted / self._teaching_share() - len(self._asked))
        if lacking <= 0:
            return
        questions, self._again = self._again[:lacking], self._again[lacking:]
        if len(questions) < lacking:
            questions += self._sampler.take(lacking - len(questions), step)
        tasks = training_tasks(c, step, questions, self._prompts, counts.asked)
        counts.asked += len(tasks)
        self._tasks += tasks
        for task in tasks:
            self._asked[task.group_id] = task.question
            self._order[task.group_id] = step, self._numbers
            self._numbers += 1
        self._coordinator.feed(FEED, tasks)

    def _receive(self, step: int, counts: GroupCounts, left_s: float, wait: bool) -> int:
        """Sort what has come; returns the tokens that were generated."""
        arrivals: Arrivals = self._coordinator.deliver(FEED, max(left_s, 0.0), wait)
        self._sampler.observe(arrivals.groups, step)
        for scored in arrivals.groups:
            name = scored.group.group_id
            del self._asked[name]
            usable = not self._config.dynamic_sampling.refills or has_reward_variance(scored)
            stale = self._staleness(scored) > self._config.rollout.max_staleness
            counts.count(scored, usable=usable, stale=stale)
            if stale:
                del self._order[name]
            else:
                (self._ready if usable else self._spare)[name] = scored
        if self._on_progress:
            self._on_progress(self._progress())
        return arrivals.response_tokens

    def _drop_stale(self, counts: GroupCounts) -> None:
        """Forget ready groups that a push has made too old."""
        limit = self._config.rollout.max_staleness
        for name in [name for name, scored in self._ready.items() if self._staleness(scored) > limit]:
            counts.drop_stale(self._ready.pop(name))
            del self._order[name]

    def _staleness(self, scored: ScoredGroup) -> int:
        return self._coordinator.version - min(rollout.policy_version for rollout in scored.group.rollouts)

    def _teaching_share(self) -> float:
        """Of the groups under way, the share expected to have a signal."""
        return max(self._share, 1 / (1 + self._config.dynamic_sampling.refills))

    def _enough(self, step: int, counts: GroupCounts) -> bool:
        r = self._config.rollout
        bound = self._config.dynamic_sampling.refills * r.questions_per_step
        refill_limit_reached = 0 < bound <= counts.dropped and len(self._ready) + len(self._spare) >= r.questions_per_step
        if len(self._ready) < r.questions_per_step and not refill_limit_reached:
            return False
        return r.stragglers == Stragglers.DROP or not must_wait(
            step,
            r.max_staleness,
            r.questions_per_step,
            self._teaching_share(),
            sorted(self._order[name][0] for name in self._ready),
            [self._order[name][0] for name in self._asked],
        )

    def _named(self, step: int, error: Overdue) -> Overdue:
        """The error of a step whose groups are overdue, with those that it waits for, the oldest first, and what helps."""
        awaited = [f"{name} (asked in step {self._order[name][0]})" for name in list(self._asked)[:MOST_NAMED]]
        more = f" and {len(self._asked) - MOST_NAMED} more" if len(self._asked) > MOST_NAMED else ""
        return Overdue(
            error.component,
            f"{error.message}; step {step} waits for {', '.join(awaited)}{more}; raise "
            f"rollout.step_deadline_s or set rollout.stragglers=drop",
        )

    def _take(self, counts: GroupCounts) -> tuple[tuple[ScoredGroup, ...], list[ScoredGroup]]:
        """The groups asked first, of those with a signal; where the limit on refills was reached others take the places left.
        Those without a signal that are not taken come second."""
        wanted = self._config.rollout.questions_per_step
        ready = sorted(self._ready, key=self._order.__getitem__)[:wanted]
        spare = sorted(self._spare, key=self._order.__getitem__)[: wanted - len(ready)]
        counts.refill_limit_reached = bool(spare)
        groups = self._ready | self._spare
        taken = tuple(groups[name] for name in sorted(ready + spare, key=self._order.__getitem__))
        replaced = [scored for name, scored in self._spare.items() if name not in spare]
        for name in [*ready, *self._spare]:
            del self._order[name]
        self._ready = {name: scored for name, scored in self._ready.items() if name in self._order}
        self._spare = {}
        return taken, replaced

    def _progress(self) -> Progress:
        from alphamed.rollout.coordinator import Progress

        total = self._config.rollout.questions_per_step
        done = min(len(self._ready), total)
        return Progress(done, total, done, 0, time.monotonic() - self._began, 0.0)

    def _metrics(
        self, groups: Sequence[ScoredGroup], counts: GroupCounts, waited_s: float, tokens_per_s: float, skipped: int
    ) -> dict[str, float]:
        ages = [self._staleness(scored) for scored in groups]
        metrics = {
            "time/generate_s": waited_s,
            "throughput/generated_tokens_per_s": tokens_per_s,
            "staleness/mean": sum(ages) / len(ages),
            "staleness/max": float(max(ages)),
            **counts.stale_metrics(groups),
        } | self._sampler.level_metrics()
        return metrics | counts.metrics(skipped) if self._config.dynamic_sampling.active else metrics

    # -------------------------------------------------------------------------------------------------------------- resume
    def state(self) -> dict[str, Any]:
        """The sampler's, and the questions under way as they were asked, some 500 bytes each."""
        waiting = self._asked | {name: scored.group.question for name, scored in self._ready.items()}
        questions = [waiting[name] for name in sorted(waiting, key=self._order.__getitem__)] + self._again
        return self._sampler.state() | {
            "under_way": [question_json(question) for question in questions],
            "share": self._share,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._sampler.load_state(state)
        self._again = [question_from_json(text) for text in state.get("under_way", ())]
        self._share = state.get("share", 1.0)
