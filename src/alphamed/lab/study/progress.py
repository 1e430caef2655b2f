"""How far each run of a study is, read from its directory, whether it runs here or under Slurm."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from alphamed.cluster import failure
from alphamed.errors import ConfigError
from alphamed.lab.study.grid import PlannedRun
from alphamed.rundir.directory import check_resume, is_finished
from alphamed.rundir.metrics import last_step, read_rows


class RunStatus(StrEnum):
    NEW = "new"
    INTERRUPTED = "interrupted"  # started, to be resumed
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class RunProgress:
    """`steps`: done so far. `error`: why the last attempt failed, if it did. `usable`: False for a directory that is damaged or
    holds a run with other settings."""

    status: RunStatus
    steps: int
    error: str = ""
    usable: bool = True


def read_progress(run: PlannedRun) -> RunProgress:
    """The progress of a run. Raises ConfigError where its directory is damaged or holds a run with other settings."""
    folder = run.config.run_dir
    try:
        check_resume(run.config)
        finished = is_finished(run.config)
        steps = last_step(read_rows(folder / "metrics.jsonl"))
    except ConfigError as error:
        raise ConfigError(f"run {run.name}: {error}") from None
    if finished:
        return RunProgress(RunStatus.FINISHED, steps)
    recorded = failure.recorded(folder)
    status = RunStatus.INTERRUPTED if (folder / "config.yaml").exists() else RunStatus.NEW
    return RunProgress(status, steps, str(recorded) if recorded else "")


def progress_or_error(run: PlannedRun) -> RunProgress:
    """Like `read_progress`, but a directory that cannot be used counts as an interrupted run with that error, so that the
    other runs go on."""
    try:
        return read_progress(run)
    except ConfigError as error:
        return RunProgress(RunStatus.INTERRUPTED, 0, str(error).removeprefix(f"run {run.name}: "), usable=False)
