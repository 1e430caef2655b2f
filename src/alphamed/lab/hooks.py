"""Hooks that the core gets from the lab: refuse runs that cannot fit, forecast their steps, report on them at the end.

`cli.py` passes them to the core, which imports nothing from the lab.
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
    """`validate`, and print its notes on model and data."""
    validate(config).print_notes()


def refuse_unfit(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError for what cannot fit into memory or its deadlines, computed with the GPUs of this machine
    in place of those that the configuration names."""
    from alphamed.lab.planner.advice import fixes
    from alphamed.lab.planner.plan import job_here, make_plan

    if config.cluster.skip_memory_check:
        return
    plan = make_plan(job_here(config, shape))
    if plan.problems:
        near = next((f"; {' '.join(fix.overrides)} would fit" for fix in fixes(plan)), "")
        raise ConfigError(
            f"{plan.problems[0]}{near}; see `alphamed plan`, or set cluster.skip_memory_check=true to start anyway"
        )


def forecast(config: Config, model: Path) -> Forecast:
    """The plan's predictions for each step, which a run records next to its measurements."""
    from alphamed.lab.planner.forecast import PlanForecast

    return PlanForecast(config, model)


def report(config: Config) -> list[str]:
    """Write report.html and report.json of a run, where its configuration asks for them; returns a summary as
    lines for the console."""
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
