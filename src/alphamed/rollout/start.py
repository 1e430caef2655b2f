"""Ray, the engines and the reward process of a run, started early: before the trainer imports its libraries and builds its
model, which takes as long.

    with started_early(config) as engines:
        ...                                     # meanwhile; what fails is raised by `finish`
        pool, grader = engines.finish()         # on rank 0
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from alphamed.answers.thinking import Thinking
from alphamed.cluster import placement
from alphamed.cluster.cluster_job import ClusterJob
from alphamed.cluster.hardware import wants_cuda
from alphamed.config.schema import Config
from alphamed.data.prompts import PromptBuilder
from alphamed.data.tokenizer import load_tokenizer
from alphamed.model.shape import read_shape, resolve
from alphamed.reward import process
from alphamed.rollout.pool import EnginePool, StartingPool

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@contextlib.contextmanager
def started_early(config: Config) -> Iterator[EngineStart]:
    """Begin on rank 0, where the engines need not wait for the trainer; whatever was started has ended when the block ends."""
    start = EngineStart(config)
    try:
        if os.environ.get("RANK", "0") == "0" and start.may_be_early:
            start.begin()
        yield start
    finally:
        start.stop()


class EngineStart:
    """On rank 0 of a run that generates."""

    def __init__(self, config: Config):
        self._config = config
        self._begun = False
        self._failure: Exception | None = None
        self._starting: StartingPool | None = None
        self._grader: ActorHandle | None = None
        self._pool: EnginePool | None = None

    @property
    def may_be_early(self) -> bool:
        """Whether engines take nothing that the trainer must have first: memory of its GPUs, or the time in which the other
        hosts of a run join it."""
        shares_gpus = wants_cuda(self._config) and self._config.cluster.share_gpus
        alone = ClusterJob.of_environment() is None and not os.environ.get("RAY_ADDRESS")
        return self._config.generates and alone and not shares_gpus

    def begin(self) -> None:
        """Start Ray and have it start the others. Does nothing the second time."""
        if self._begun:
            return
        self._begun = True
        try:
            self._begin(self._config)
        except Exception as error:
            self._failure = error

    def _begin(self, config: Config) -> None:
        placement.start_ray(config)
        folder = resolve(config.model.path, config.model.revision, config.model.cache)
        tokenizer = load_tokenizer(folder)
        thinking = Thinking.of(config.reward.answer_after, tokenizer, PromptBuilder(tokenizer, config.prompt))
        self._starting = EnginePool.begin_start(config, folder, read_shape(folder), tokenizer.stop_ids(config.rollout.stop))
        self._grader = process.start(config, thinking)

    def finish(self) -> tuple[EnginePool, ActorHandle]:
        """The engines, once they have loaded the model, and the reward process. Raises RunFailed naming what did not start."""
        self.begin()
        if self._failure:
            raise self._failure
        assert self._starting is not None and self._grader is not None, "begun, but nothing was started"
        self._pool = self._starting.finish()
        return self._pool, self._grader

    def stop(self) -> None:
        """End the engines and leave Ray. Does nothing the second time."""
        if not self._begun:
            return
        self._begun = False
        if self._pool:
            self._pool.stop()
        elif self._starting:
            self._starting.kill()
        placement.stop_ray()
