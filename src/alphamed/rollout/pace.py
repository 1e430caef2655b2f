"""How many questions a slow or busy machine has time for in a step (run.min_steps). The rule is pure."""

from __future__ import annotations

import time
from collections.abc import Callable

from alphamed.config.schema import Config

LEAST_QUESTIONS = 2
"""Of a step."""


def step_questions(wanted: int, unit: int, question_s: float, left_s: float, steps: int) -> int:
    """How many questions a step asks so that `steps` of them end within `left_s` seconds, where each question takes `question_s`:
    a multiple of `unit`, at most `wanted`."""
    fitting = left_s / max(steps, 1) / max(question_s, 1e-9)
    least = -(-LEAST_QUESTIONS // unit) * unit
    return int(min(wanted, max(least, fitting // unit * unit)))


class Pace:
    """Sizes the steps of a run that has a time limit and wants run.min_steps steps at least: by how much of the evaluation
    before the first step there was time for, then by the time that the step before took. `deadline`: after which no step
    begins; `note` reports what is left out, and why."""

    def __init__(
        self,
        config: Config,
        deadline: float | None,
        note: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        assert config.run.min_steps is not None and deadline is not None, "run.min_steps or run.time_limit_s is not set"
        self._wanted, self._steps = config.rollout.questions_per_step, min(config.run.min_steps, config.run.last_step)
        self._unit = config.algorithm.mini_batches * config.parallel.data
        self._deadline, self._note, self._clock = deadline, note, clock
        self._size = self._wanted
        self._began: float | None = None

    def evaluated(self, asked: int, wanted: int) -> None:
        """The evaluation before the first step had time for `asked` of `wanted` questions: so much less does the first step
        ask."""
        if self._began is None and asked < wanted:
            self._resize(int(self._wanted * asked / wanted), f"an evaluation had time for {asked} of {wanted} questions")

    def questions(self, step: int) -> int:
        """Of a step that begins now."""
        now = self._clock()
        if self._began is not None:
            took = now - self._began
            left, steps = max(0.0, self._deadline - now), max(1, self._steps - step + 1)  # past min_steps: one more
            fitting = step_questions(self._wanted, self._unit, took / self._size, left, steps)
            self._resize(
                fitting,
                f"step {step - 1} took {took:.0f} s with {self._size} questions, {left:.0f} s are left for "
                f"{steps} more step{'s' * (steps > 1)}",
            )
        self._began = now
        return self._size

    def _resize(self, questions: int, why: str) -> None:
        least = -(-LEAST_QUESTIONS // self._unit) * self._unit
        size = min(self._wanted, max(least, questions // self._unit * self._unit))
        if size != self._size:
            self._size = size
            self._note(f"run.min_steps: {why}; a step now asks {size} questions of {self._wanted}")
