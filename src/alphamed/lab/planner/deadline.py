"""Whether generation ends before its deadline (rollout.step_deadline_s), by the plan's own estimate."""

from __future__ import annotations

import math

from alphamed.lab.planner.evaluations import set_seconds
from alphamed.lab.planner.time import wait_seconds
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import Problem

CPU_SLACK = 2.0
"""On a CPU the plan's times are accurate to a factor of two."""
MARGIN = 1.5
"""A suggested deadline over the planned time."""


def deadline_problems(job: PlannedJob) -> list[Problem]:
    """What would be stopped at its deadline, each with a deadline that suffices. The layout must be legal."""
    if not job.engines:
        return []
    r, slack = job.rollout, CPU_SLACK if job.gpu.is_cpu else 1.0
    waits = []
    if not job.supervised:
        generating = (
            wait_seconds(job),
            f"generating a step ({r.questions_per_step:,} questions x {r.samples_per_question}, responses "
            f"of {job.mean_response:,.0f} tokens on average and {r.max_response_tokens:,} at most)",
            "more engines or a lower rollout.max_response_tokens, questions_per_step or samples_per_question help too",
        )
        waits.append(generating)
    waits += [
        (seconds, f"evaluating {questions:,} questions", "more engines or evaluation.questions help too")
        for seconds, questions in zip(set_seconds(job), job.evaluation_questions or ())
    ]
    longest = max((seconds for seconds, _, _ in waits), default=0.0)
    enough = math.ceil(MARGIN * longest / 600) * 600
    return [
        Problem(
            f"rollout.step_deadline_s: {activity} takes {seconds:,.0f} s by this plan, the run ends after "
            f"{r.step_deadline_s:g} s of it; {helps}",
            (f"rollout.step_deadline_s={enough}",),
        )
        for seconds, activity, helps in waits
        if seconds > slack * r.step_deadline_s
    ][:1]
