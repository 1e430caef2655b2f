"""The plan's prediction for a step that has just been measured, from the actual lengths of its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from alphamed.config.schema import Config
from alphamed.lab.planner.plan import job_here
from alphamed.lab.planner.time import step_time
from alphamed.model.shape import read_shape
from alphamed.planner.memory import trainer_use
from alphamed.records import TokenGroup


class PlanForecast:
    """Predictions that a run records next to its measurements. `model`: the folder that the run started from."""

    def __init__(self, config: Config, model: Path) -> None:
        self._job = job_here(config, read_shape(model))

    def metrics(self, groups: Sequence[TokenGroup]) -> dict[str, float]:
        """The metrics `plan/...` of a step of these groups."""
        responses = [len(response) for group in groups for response in group.responses]
        job = replace(
            self._job,
            prompt_tokens=sum(len(group.prompt) for group in groups) / len(groups),
            response_tokens=sum(responses) / len(responses),
            responses_per_prompt=len(responses) / len(groups),
        )
        time = step_time(job)
        return {
            "plan/step_s": time.total,
            "plan/generate_s": time.waited,
            "plan/logprobs_s": time.logprobs,
            "plan/update_s": time.update,
            "plan/sync_s": time.sync,
            "plan/memory_bytes": float(trainer_use(job).total),
        }
