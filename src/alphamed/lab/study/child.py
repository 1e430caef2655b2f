"""One run of a study as a child process: its log, its deadline, its end, and the reason where that was not good."""

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
"""A run that is told to end has this long; its own supervisor needs up to 30 s and cleans up."""
POLL_S = 0.5
START_MARK = "=== started"
REASONS = ("error: ", "run failed: ")


@dataclass(frozen=True, slots=True)
class Ended:
    """`status`: exit code, or minus a signal's number. `why`: one line, empty where all is well. `stopped_by`: the
    signal that told this process to end, which it passed on."""

    status: int
    seconds: float
    why: str
    stopped_by: int | None = None


def run_child(command: Sequence[str], log: Path, deadline_s: float) -> Ended:
    """Run `command` with its output at the end of `log`. SIGINT and SIGTERM are passed on as SIGTERM, and so is the
    deadline; a child that stays is killed after STOP_S. It ends with this process, however that ends."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
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
        told_at = None
        late = False
        while child.poll() is None:
            now = time.monotonic()
            late = late or now - began > deadline_s
            if told_at is None and (late or received):
                child.send_signal(signal.SIGTERM)
                told_at = now
            if told_at is not None and (now - told_at > STOP_S or len(received) > 1):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_S)
    seconds = time.monotonic() - began
    if received:
        return Ended(child.returncode, seconds, "stopped", stopped_by=received[0])
    if late:
        return Ended(child.returncode, seconds, f"took longer than deadline_s ({deadline_s:g} s)")
    return Ended(child.returncode, seconds, "" if child.returncode == 0 else reason(log, child.returncode))


def reason(log: Path, status: int) -> str:
    """Why the last attempt in a log failed: the line that says so, or its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(START_MARK)[2]
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    for line in reversed(lines):
        for mark in REASONS:
            if line.startswith(mark):
                return line.removeprefix(mark)
    last = f"; its last line: {lines[-1][:200]}" if lines else ""
    how = f"exit code {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return f"ended with {how}{last}"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that mean stop, in place of dying of them."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: received.append(got))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def alphamed(*arguments: str) -> list[str]:
    """The command line of a verb, run by this interpreter."""
    return [sys.executable, "-m", "alphamed.cli", *arguments]
