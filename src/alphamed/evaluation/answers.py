"""Answers of a model folder without training: Ray, engines and graders are started for it and taken down again.

Evaluation and `alphamed data difficulty` share this. Groups come one by one as they are done, so that whoever writes them
down loses to a kill only what the engines were at work on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from alphamed.answers.thinking import Thinking
from alphamed.cluster import placement, variables
from alphamed.cluster.environment import enter, run_environment
from alphamed.cluster.variables import Start
from alphamed.config.schema import Config
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import Tokenizer
from alphamed.launch import guard
from alphamed.launch.single_host import owned
from alphamed.model.shape import ModelShape, check_context, resolve
from alphamed.model_folder import check_model_folder
from alphamed.records import GenerationTask, Question, ScoredGroup
from alphamed.rollout.spec import engine_specs

if TYPE_CHECKING:
    from alphamed.rollout.coordinator import Arrivals

Answer = Callable[[Iterable[GenerationTask]], Iterator[ScoredGroup]]
"""Tasks -> their groups, in the order in which they are done."""

FEED = "evaluation"
WAITING_PER_PLACE = 2
"""Questions given to the engines at once, for each that they can work on: none of them ever idles, and a hundred thousand
prompts need not lie in the coordinator."""
ENGINES_FOLDER = "engines"
REPORT_EVERY_S = 10.0


class Feed(Protocol):
    """What `stream` needs of a coordinator."""

    def feed(self, key: str, tasks: tuple[GenerationTask, ...]) -> None: ...

    def deliver(self, key: str, left_s: float, wait: bool) -> Arrivals: ...


class Prompted:
    """A model folder that is known to be usable with a configuration, and its prompts. Starts nothing.

    Raises ConfigError for a mistake in configuration or model, DataError for a prompt that is too long."""

    def __init__(self, config: Config, questions: Iterable[Question]):
        variables.refuse(os.environ)  # before an earlier evaluation is replaced
        self.folder: Path = resolve(config.model.path, config.model.revision, config.model.cache)
        self.checked = check_model_folder(
            self.folder,
            config,
            lambda shape: (
                check_context(shape, config.max_model_tokens, config.longest_response),
                engine_specs(config, self.folder, shape, eos_ids=()),
            ),
        )
        self.shape: ModelShape = self.checked.shape
        self.tokenizer: Tokenizer = self.checked.tokenizer
        self.prompts: PromptBuilder = self.checked.prompts
        self.thinking = Thinking.of(config.reward.answer_after, self.tokenizer, self.prompts)
        self.prompts.require_lengths(questions)


def engine_tree(config: Config, place: Path, samples: int, max_tokens: int) -> Config:
    """The configuration of engines that answer `samples` times a question in at most `max_tokens`, with lock and ledger in
    `place`/engines. What only training has is left as it is, unless it would be refused."""
    from alphamed.config.loading import build_config

    tree = config.model_dump(mode="json")
    tree["run"] |= {"root": str(place), "name": ENGINES_FOLDER}
    tree["rollout"] |= {
        "samples_per_question": max(2, samples),
        "max_response_tokens": max_tokens,
        "replay": None,
        "max_staleness": 0,
    }
    tree["reward"] |= {
        "name": "correct",
        "signature": "alphamed",  # outcomes follow from letters, not from rewards
        "overlong_buffer_tokens": 0,
    }
    tree["evaluation"] |= {"before": False, "after": False, "every": 0, "max_response_tokens": None}
    tree["parallel"] |= {
        "micro_batch_tokens": max(
            config.parallel.micro_batch_tokens, config.prompt.max_tokens + max_tokens + config.token_multiple
        )
    }
    return build_config(tree)


@contextlib.contextmanager
def answering(config: Config, model: Prompted) -> Iterator[Answer]:
    """Start what answers and grades; end it on the way out. A guard cleans up where this process is killed. Raises
    RunFailed naming what failed."""
    from alphamed.reward import process
    from alphamed.rollout.coordinator import Coordinator
    from alphamed.rollout.pool import EnginePool

    model.checked.print_remarks()
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(owned(config.run_dir))
        variables.settle(config.run_dir, Start.ONE_HOST)
        enter(run_environment(config, ledger.make_temporary_folder(), Start.ONE_HOST))
        guard.start(config.run_dir, os.getpid())
        stack.callback(ledger.clean_up)
        placement.start_ray(config)
        stack.callback(placement.stop_ray)
        grader = process.start(config, model.thinking)
        pool = EnginePool.start(config, model.folder, model.shape, model.checked.stop_ids)
        stack.callback(pool.stop)
        coordinator = Coordinator.start(config, pool, grader)
        window = WAITING_PER_PLACE * config.rollout.max_concurrent_requests * config.rollout.engines
        yield lambda tasks: stream(coordinator, tasks, window, config.rollout.step_deadline_s)


def stream(coordinator: Feed, tasks: Iterable[GenerationTask], window: int, deadline_s: float) -> Iterator[ScoredGroup]:
    """The groups of `tasks` as they are done, with at most `window` of them given out at a time. Raises Overdue where none
    came for `deadline_s`, RunFailed where an engine or the grading failed."""
    waiting, out, last = iter(tasks), 0, time.monotonic()
    while True:
        more = tuple(itertools.islice(waiting, window - out))
        if more:
            coordinator.feed(FEED, more)
            out += len(more)
        if not out:
            return
        groups = coordinator.deliver(FEED, max(0.0, last + deadline_s - time.monotonic()), wait=True).groups
        out -= len(groups)
        yield from groups
        if groups:
            last = time.monotonic()  # what the caller does with them is not the engines' time


class ProgressReporter:
    """Reports on stderr how far a long job is, every few seconds and at its end."""

    def __init__(self, job: str, total: int, already: int = 0):
        self._job, self._total, self._already = job, total, already
        self._done, self._began, self._last = 0, time.monotonic(), 0.0

    def advance(self) -> None:
        """One more question is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._last < REPORT_EVERY_S and self._done + self._already < self._total:
            return
        self._last = now
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._already - self._done) / rate
        print(
            f"{self._job}: {self._already + self._done:,}/{self._total:,} questions, {rate:.2g} a second, "
            f"{left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
