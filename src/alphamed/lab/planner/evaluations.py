"""What evaluations cost a run: the number of questions of each set, and the time of all sets (evaluation.before, every,
after)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alphamed.config.schema import Config
from alphamed.data.tables import rows
from alphamed.errors import DataError
from alphamed.lab.planner.time import StepTime, batch_seconds, efficiency_of
from alphamed.planner.job import PlannedJob


@dataclass(frozen=True, slots=True)
class Evaluations:
    """`seconds`: of one evaluation of all sets; `added_seconds`: the time that one of `evaluation.every` adds to the step
    with which it runs in parallel (all of `seconds` where it ends before the next step begins). `between`: evaluations
    between steps; `ends`: those before the first step and after the last."""

    questions: int
    seconds: float
    added_seconds: float
    between: int
    ends: int

    @property
    def total(self) -> float:
        return self.ends * self.seconds + self.between * self.added_seconds


def count_questions(config: Config) -> tuple[int, ...] | None:
    """Questions of each evaluation file that are asked; None where a file is missing and `evaluation.questions` sets no
    limit. Decisions are not applied."""
    limit, counts = config.evaluation.questions, []
    for file in config.evaluation.all_files:
        count = _rows(file)
        if count is None and limit is None:
            return None
        counts.append(min(value for value in (count, limit) if value is not None))
    return tuple(counts)


def _rows(file: Path) -> int | None:
    try:
        return sum(1 for _ in rows(file))
    except DataError:
        return None


def evaluations(job: PlannedJob, time: StepTime) -> Evaluations | None:
    """None where nothing is evaluated, or the number of questions is not known."""
    settings, last = job.config.evaluation, job.config.run.last_step
    between = (last - 1) // settings.every if settings.every and last else 0  # the last step's is not `between`
    after = settings.after or bool(settings.every and last and last % settings.every == 0)
    if not job.engines or not job.evaluation_questions or not (settings.before or after or between):
        return None
    seconds = sum(set_seconds(job))
    idle = max(0.0, time.training - time.generate) if time.overlapped else time.training  # of the engines, in a step
    added = max(0.0, seconds - idle) if _in_background(job) else seconds
    return Evaluations(sum(job.evaluation_questions), seconds, added, between, int(settings.before) + int(after))


def set_seconds(job: PlannedJob) -> list[float]:
    """Of each set, one after another: one greedy answer a question, of the mean length that training's responses have."""
    longest = job.config.evaluation.max_response_tokens or job.rollout.max_response_tokens
    return [batch_seconds(job, efficiency_of(job), questions, 1, longest) for questions in job.evaluation_questions or ()]


def _in_background(job: PlannedJob) -> bool:
    """As Run.evaluate decides."""
    setting = job.config.evaluation.background
    own_devices = not job.shared and not job.gpu.is_cpu
    return (own_devices if setting is None else setting) and not job.rollout.deterministic
