"""Runs one command of a study as a child process with a log and a deadline, and finds the reason for a failure."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster.environment import without_torchrun
from alphamed.cluster.processes import die_with_parent

STOP_S = 60.0
"""Time for a run to end after SIGTERM, before it is killed; its own supervisor needs up to 30 s to clean up."""
POLL_S = 0.5
START_MARK = "=== started"
ERROR_PREFIXES = ("error: ", "run failed: ")


@dataclass(frozen=True, slots=True)
class ChildExit:
    """`status`: exit code, or minus the number of the signal that ended it. `error`: one line, empty on success.
    `stopped_by`: the signal to this process that stopped the child."""

    status: int
    seconds: float
    error: str
    stopped_by: int | None = None


def run_child(command: Sequence[str], log: Path, deadline_s: float) -> ChildExit:
    """Run `command`, its output appended to `log`. At the deadline, and when this process receives SIGINT, SIGTERM or SIGHUP,
    the child receives SIGTERM, and SIGKILL after STOP_S. It is killed when this process ends for any reason."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as output, _signals() as received:
        output.write(f"{START_MARK} {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        output.flush()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
            env=without_torchrun(os.environ) | {"PYTHONUNBUFFERED": "1"},
        )
        terminated_at = None
        overdue = False
        while child.poll() is None:
            now = time.monotonic()
            overdue = overdue or now - started > deadline_s
            if terminated_at is None and (overdue or received):
                child.send_signal(signal.SIGTERM)
                terminated_at = now
            if terminated_at is not None and (now - terminated_at > STOP_S or len(received) > 1):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
    seconds = time.monotonic() - started
    if received:
        return ChildExit(child.returncode, seconds, "stopped", stopped_by=received[0])
    if overdue:
        return ChildExit(child.returncode, seconds, f"took longer than deadline_s ({deadline_s:g} s)")
    return ChildExit(child.returncode, seconds, "" if child.returncode == 0 else reason(log, child.returncode))


def reason(log: Path, status: int) -> str:
    """Why the last attempt in a log failed: its error message, or its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(START_MARK)[2]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    for line in reversed(lines):
        for prefix in ERROR_PREFIXES:
            if line.startswith(prefix):
                return line.removeprefix(prefix)
    tail = f"; its last line: {lines[-1][:200]}" if lines else ""
    status_text = f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return f"ended with {status_text}{tail}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that stop a process instead of being ended by them."""
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda caught, _: received.append(caught))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def alphamed(*arguments: str) -> list[str]:
    """The command line of an `alphamed` command, run by this interpreter."""
    return [sys.executable, "-m", "alphamed.cli", *arguments]
