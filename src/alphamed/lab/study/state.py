"""How far the runs of a study are, read from their directories: whoever ran them, here or under Slurm."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from alphamed.cluster import failure
from alphamed.errors import ConfigError
from alphamed.lab.study.grid import PlannedRun
from alphamed.rundir.directory import check_resume, is_finished
from alphamed.rundir.metrics import read_rows


class Stand(StrEnum):
    NEW = "new"
    BROKEN = "broken"  # begun, to be continued
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class State:
    stand: Stand
    steps: int
    """Done so far."""
    why: str = ""
    """What ended the last attempt, where that was a failure."""
    usable: bool = True
    """False where its directory is damaged, or holds a run with other settings."""


def state_of(run: PlannedRun) -> State:
    """Where a run stands. Raises ConfigError where its directory holds a run with other settings, or is damaged."""
    folder = run.config.run_dir
    try:
        check_resume(run.config)
        finished = is_finished(run.config)
        steps = max((int(row["step"]) for row in read_rows(folder / "metrics.jsonl")), default=0)
    except ConfigError as error:
        raise ConfigError(f"run {run.name}: {error}") from None
    if finished:
        return State(Stand.FINISHED, steps)
    recorded = failure.recorded(folder)
    return State(Stand.BROKEN if (folder / "config.yaml").exists() else Stand.NEW, steps, str(recorded) if recorded else "")


def found_state(run: PlannedRun) -> State:
    """Like `state_of`, of a run that has been tried: a directory that cannot be used is a broken run with that as its
    reason, so that the other runs go on."""
    try:
        return state_of(run)
    except ConfigError as error:
        return State(Stand.BROKEN, 0, str(error).removeprefix(f"run {run.name}: "), usable=False)
