"""How a run fails: one error that names the failed component, the record of the first one, and the choice of the one to print.

A dying run fails in many places at once (a killed rank breaks its peers' connections). Every rank that learns of a
failure tries to record it; the first record stays. What torchrun saw of its workers outranks it where a worker died of
a signal: nobody else can have caused that.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphamed.errors import RunFailed

FAILURE_FILE = "failure.json"
WORKERS_FILE = "workers.json"
"""How torchrun's workers ended, written by its agent (`launch.agent`) when one of them failed."""
HOSTS_FOLDER = "nodes"
"""Below it a folder for each further host's own records."""
STOP_FILE = "stop"
"""Exists while the run has a request to write a checkpoint and end."""
ENDED_FILE = "ended.json"
"""How the last start ended; not there while the run lives, nor after a violent death."""


class StopRequested(Exception):
    """The run was asked to write a checkpoint and end, while it waited for something optional."""


def of_exception(error: BaseException, component: str) -> RunFailed:
    """The failure that an exception on `component` stands for. A ValueError of the configuration or the data is the
    user's."""
    from alphamed.errors import ConfigError, DataError

    if isinstance(error, RunFailed):
        return error
    if isinstance(error, ConfigError | DataError) or getattr(error, "user_error", False):
        return RunFailed("", str(error), user_error=True)
    return RunFailed(component, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def record(run_dir: Path, failure: RunFailed) -> None:
    """Keep this failure in the run directory unless another one came first. Safe among processes."""
    path = run_dir / FAILURE_FILE
    draft = path.with_name(f".{FAILURE_FILE}.{os.getpid()}")
    draft.write_text(
        json.dumps({"component": failure.component, "message": failure.message, "user_error": failure.user_error}),
        encoding="utf-8",
    )
    try:
        os.link(draft, path)  # fails where the name exists, and is never half written
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def recorded(run_dir: Path) -> RunFailed | None:
    """The failure that was recorded first, if any."""
    tree = _read(run_dir / FAILURE_FILE)
    return RunFailed(tree["component"], tree["message"], tree["user_error"]) if tree else None


def forget(run_dir: Path) -> None:
    """Remove the records of an earlier start."""
    for name in (FAILURE_FILE, WORKERS_FILE, STOP_FILE, ENDED_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for path in run_dir.glob(f"{HOSTS_FOLDER}/*/{WORKERS_FILE}"):
        path.unlink(missing_ok=True)


def record_end(run_dir: Path, how: str) -> None:
    """Note how this start has ended, for `alphamed status`. A full disk keeps nobody from ending."""
    with contextlib.suppress(OSError):
        (run_dir / ENDED_FILE).write_text(json.dumps({"time": time.time(), "how": how}), encoding="utf-8")


def request_stop(run_dir: Path) -> None:
    """Ask the run to write a checkpoint and end."""
    (run_dir / STOP_FILE).touch()


def stop_requested(run_dir: Path) -> bool:
    return (run_dir / STOP_FILE).exists()


# ---------------------------------------------------------------------------------------------------- what torchrun saw
@dataclass(frozen=True, slots=True)
class DeadWorker:
    """`status` as subprocess gives it: an exit code, or minus the number of the signal. `time_s`: seconds since
    epoch."""

    rank: int
    pid: int
    status: int
    time_s: float
    host: str = ""  # where ranks are on several

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}{f' on {self.host}' if self.host else ''})"


def write_workers(path: Path, workers: list[DeadWorker]) -> None:
    path.write_text(json.dumps([asdict(worker) for worker in workers]), encoding="utf-8")


def read_workers(run_dir: Path) -> list[DeadWorker]:
    """Of all hosts."""
    files = (run_dir / WORKERS_FILE, *run_dir.glob(f"{HOSTS_FOLDER}/*/{WORKERS_FILE}"))
    return [DeadWorker(**tree) for file in files for tree in _read(file) or []]


def first_dead(workers: list[DeadWorker]) -> DeadWorker | None:
    """The worker whose end brought the others down. The agent ends the rest with SIGTERM, later SIGKILL; times have a
    resolution of one second, and within one a death by signal is cause rather than effect."""
    if not workers:
        return None
    first = min(worker.time_s for worker in workers)
    early = [worker for worker in workers if worker.time_s <= first + 1]
    return min(early, key=lambda worker: (worker.status == -signal.SIGTERM, worker.status > 0, worker.rank))


def verdict(run_dir: Path, agent_status: int) -> RunFailed:
    """Why the run failed, from all that was recorded and how torchrun's agent ended (as subprocess gives it)."""
    dead, first = first_dead(read_workers(run_dir)), recorded(run_dir)
    if dead and dead.status < 0 and dead.status != -signal.SIGTERM:
        return RunFailed(str(dead), f"was killed by {signal_name(-dead.status)}")
    if first:
        return first
    if dead:
        how = f"was ended by {signal_name(-dead.status)}" if dead.status < 0 else f"ended with exit code {dead.status}"
        return RunFailed(str(dead), how)
    if agent_status < 0:
        return RunFailed("torchrun's agent", f"was killed by {signal_name(-agent_status)}")
    return RunFailed("torchrun's agent", f"ended with exit code {agent_status} without a message; see the logs")


def signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
    return f"signal {number} ({name}{hint})"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
