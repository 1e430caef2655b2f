"""What the core lets the lab do: refuse what cannot fit before a run starts, forecast its steps, report on it when it ends.

`cli.py` hands these over; the core imports nothing of the lab.
"""

from __future__ import annotations

from pathlib import Path

from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.model.shape import ModelShape
from alphamed.preflight import Checked
from alphamed.run import Forecast, Hooks


def validate(config: Config) -> Checked:
    """Check a run before it starts, the plan included. Raises ConfigError and DataError."""
    from alphamed import preflight

    return preflight.validate(config, refuse_unfit)


def check(config: Config) -> None:
    """`validate`, with what there is to say about model and data printed."""
    validate(config).print_notes()


def refuse_unfit(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError for what cannot fit into memory or its deadlines, with the GPUs that are here in place of those that
    the configuration names."""
    from alphamed.lab.planner.advice import fixes
    from alphamed.lab.planner.plan import job_here, make_plan

    if config.cluster.skip_memory_check:
        return
    plan = make_plan(job_here(config, shape))
    if plan.problems:
        near = next((f"; {' '.join(fix.overrides)} would fit" for fix in fixes(plan)), "")
        raise ConfigError(
            f"{plan.problems[0]}{near}; see `alphamed plan`, or set cluster.skip_memory_check=true to start all the same"
        )


def forecast(config: Config, model: Path) -> Forecast:
    """What the plan predicts of each step, beside what is measured."""
    from alphamed.lab.planner.forecast import PlanForecast

    return PlanForecast(config, model)


def report(config: Config) -> list[str]:
    """Write report.html and report.json of a run, where it wants them; returns what it learnt, in lines for the console."""
    from alphamed.lab.reports.report import write_report
    from alphamed.lab.reports.summary import summary

    if config.logging.report:
        write_report(config.run_dir)
    return summary(config.run_dir)


def model_card(run_dir: Path, config: Config, folder: Path, step: int | None = None) -> None:
    """Write the card of a model that was exported from `run_dir` into its folder; `step`: of an earlier checkpoint."""
    from alphamed.lab.reports.model_card import write_card

    write_card(run_dir, config, folder, step)


HOOKS = Hooks(forecast, report, model_card)
