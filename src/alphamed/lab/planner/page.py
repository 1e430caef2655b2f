"""A plan as one HTML page without scripts or external requests, in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alphamed.config.loading import dump_config
from alphamed.lab.planner import pictures, text_report
from alphamed.lab.planner.advice import Advice
from alphamed.lab.planner.plan import Plan, bottleneck, hours, mfu, steps_text, tokens_rate
from alphamed.lab.reports import plots
from alphamed.planner.job import PlannedJob


def page(plan: Plan, advice: Sequence[Advice]) -> str:
    """The page's HTML."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"size": text_report.size}
    assessment = plan.assessment
    return environment.get_template("plan.html.j2").render(
        plan=plan,
        job=plan.job,
        shape=plan.job.shape,
        assessment=assessment,
        verdict=text_report.verdict(plan, advice),
        tiles=_tiles(plan),
        advice=[line.split(maxsplit=1)[1] for line in text_report.advice_lines(plan, advice)],
        pictures=assessment
        and {
            "cluster": pictures.cluster(plan.job, assessment.topology),
            "memory": pictures.memory(assessment.uses),
            "step": pictures.step(assessment.time),
        },
        bottleneck=assessment and text_report.PART_NAMES[bottleneck(plan)],
        config_text=dump_config(plan.job.config),
        style=plots.PAGE_STYLE.read_text(encoding="utf-8"),
        chart_style=plots.STYLE + pictures.STYLE,
    )


def _tiles(plan: Plan) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the headline numbers."""
    if plan.assessment is None:
        return []
    time, gpus = plan.assessment.time, plan.job.gpus
    return [
        ("A step", f"{time.total:.0f} s", f"{tokens_rate(plan):,.0f} tokens/s/GPU"),
        ("The run", f"{hours(plan):.1f} h", f"{steps_text(plan)}, {hours(plan) * gpus:,.0f} GPU-hours"),
        ("Update", f"{100 * mfu(plan):.0f}% MFU", "of the trainer's BF16 peak"),
        ("GPUs", f"{gpus}", _uses_of_gpus(plan.job)),
    ]


def _uses_of_gpus(job: PlannedJob) -> str:
    world, engines = job.parallel.world, job.engines * job.rollout.tensor_parallel
    return f"{world} train, {engines} generate" + (", shared" if job.shared else "")
