"""How a run fails: one error that names the failed component, the record of the first one, and the choice of the one to print.

A dying run fails in many places at once (a killed rank breaks its peers' connections). Every rank that learns of a
failure tries to record it; the first record stays. What torchrun saw of its workers outranks it where a worker died of
a signal: nobody else can have caused that. A start reserves the space for its record, so that a full disk can be
recorded on that disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alphamed.errors import RunFailed
from alphamed.files import within_deadline

FAILURE_FILE = "failure.json"
RESERVE_FILE = ".failure"
"""Blanks, as long as the run lives; where the disk has no room for another file the failure is written over them."""
RESERVED_BYTES = 4096
ANSWER_DEADLINE_S = 10.0
"""For a file of these: who is about to end does not wait for a file system that has stopped answering."""
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
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename if error.filename is not None else "a file system"
        return RunFailed(
            component, f"{place}: {error.strerror}; make room, and the same command continues from the last checkpoint"
        )
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT and error.filename is not None:  # files.within_deadline
        return RunFailed(
            component,
            f"{error.filename}: {error.strerror}; see whether it is still mounted, then the same command continues from the last "
            f"checkpoint",
        )
    return RunFailed(component, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def reserve(run_dir: Path) -> None:
    """Take the space that `record` falls back to. Raises OSError where there is none."""
    (run_dir / RESERVE_FILE).write_bytes(b" " * RESERVED_BYTES)


def release(run_dir: Path) -> None:
    """Give the space back, unless a failure stands there."""
    path = run_dir / RESERVE_FILE
    if not _read(path):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def record(run_dir: Path, failure: RunFailed) -> None:
    """Keep this failure in the run directory unless another one came first. Safe among processes, and never raises nor waits for
    long: who records a failure is about to end and to tell others."""
    with contextlib.suppress(TimeoutError):
        within_deadline(run_dir, "recording a failure", lambda: _record(run_dir, failure), ANSWER_DEADLINE_S)


def _record(run_dir: Path, failure: RunFailed) -> None:
    text = json.dumps({"component": failure.component, "message": failure.message, "user_error": failure.user_error})
    path = run_dir / FAILURE_FILE
    draft = path.with_name(f".{FAILURE_FILE}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.link(draft, path)  # fails where the name exists, and is never half written
    except FileExistsError:
        pass
    except OSError:
        with contextlib.suppress(OSError):
            _record_in_reserve(run_dir / RESERVE_FILE, text.encode())
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _record_in_reserve(path: Path, text: bytes) -> None:
    """One write of as many bytes as the file has, which takes no space. Two at the same moment: the later one stays."""
    with open(path, "r+b", buffering=0) as file:
        if not file.read().strip() and len(text) <= RESERVED_BYTES:
            os.pwrite(file.fileno(), text.ljust(RESERVED_BYTES), 0)
            os.fsync(file.fileno())


def recorded(run_dir: Path) -> RunFailed | None:
    """The failure that was recorded first, if any; None where the file system does not answer."""
    tree = _read_in_time(run_dir / FAILURE_FILE) or _read_in_time(run_dir / RESERVE_FILE)
    return RunFailed(tree["component"], tree["message"], tree["user_error"]) if tree else None


def forget(run_dir: Path) -> None:
    """Remove the records of a start."""
    for name in (FAILURE_FILE, RESERVE_FILE, WORKERS_FILE, STOP_FILE, ENDED_FILE):
        (run_dir / name).unlink(missing_ok=True)
    for path in run_dir.glob(f"{HOSTS_FOLDER}/*/{WORKERS_FILE}"):
        path.unlink(missing_ok=True)


def record_end(run_dir: Path, how: str) -> None:
    """Note how this start has ended, for `alphamed status`. Neither a full disk nor one that hangs keeps anybody from ending."""
    _write_in_time(run_dir / ENDED_FILE, json.dumps({"time": time.time(), "how": how}))


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
    """Where the disk is full the ranks' own record, for which space is reserved, has to do."""
    _write_in_time(path, json.dumps([asdict(worker) for worker in workers]))


def read_workers(run_dir: Path) -> list[DeadWorker]:
    """Of all hosts."""

    def read() -> list[DeadWorker]:
        files = (run_dir / WORKERS_FILE, *run_dir.glob(f"{HOSTS_FOLDER}/*/{WORKERS_FILE}"))
        return [DeadWorker(**tree) for file in files for tree in _read(file) or []]

    try:
        return within_deadline(run_dir, "reading how ranks ended", read, ANSWER_DEADLINE_S)
    except TimeoutError:
        return []


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
    try:
        within_deadline(run_dir, "reading why the run failed", (run_dir / FAILURE_FILE).exists, ANSWER_DEADLINE_S)
    except TimeoutError as error:
        return of_exception(error, "run directory")
    except OSError:
        pass  # an answer, and what was recorded is asked for below
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
    """The JSON of a file; None where it is absent, blank, or cut short by a full disk."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _read_in_time(path: Path) -> Any:
    with contextlib.suppress(TimeoutError):
        return within_deadline(path, "reading a failure", lambda: _read(path), ANSWER_DEADLINE_S)
    return None


def _write_in_time(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # TimeoutError is one
        within_deadline(path, "recording an end", lambda: path.write_text(text, encoding="utf-8"), ANSWER_DEADLINE_S)
