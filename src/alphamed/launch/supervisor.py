"""Run a command to its end and leave nothing behind, however it ends.

The supervisor adopts every orphan of the run, passes on SIGINT, SIGTERM and SIGHUP, and at the end, whatever it was,
ends by id what remains and unlinks its shared memory. Its own violent death is the guard's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster import processes
from alphamed.cluster.ledger import CleanUp, Ledger
from alphamed.launch import guard

STOP_DEADLINE_S = 30.0
"""Time that torchrun has, after a signal, to end its workers (it gives them SHUTDOWN_TIMEOUT_S of cluster.launch)."""
POLL_S = 0.2
METER_PERIOD_S = 2.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Grace = Callable[[signal.Signals], float]


@dataclass(frozen=True, slots=True)
class SupervisedExit:
    """How the command ended. `status`: exit code, or minus the number of the signal that killed it. `stopped_by`: the
    signal that the supervisor itself was sent, if any. `cpu_s`: CPU seconds of this process and all below it meanwhile."""

    status: int
    stopped_by: signal.Signals | None
    clean_up: CleanUp
    cpu_s: float = 0.0


def supervise(
    command: Sequence[str], environment: Mapping[str, str], run_dir: Path, grace: Grace | None = None
) -> SupervisedExit:
    """Run `command` with `environment` (which must carry the run's tag) until it ends or a signal stops it.

    `grace`: asks the command, upon a signal, to end by itself, and returns the seconds that it gets for that."""
    processes.become_subreaper()
    meter = processes.CpuMeter()
    ledger = Ledger(run_dir, roots=(os.getpid(),))
    received: list[signal.Signals] = []
    with _handling(received, (*STOP_SIGNALS, signal.SIGUSR1) if grace else STOP_SIGNALS):
        watcher = guard.start(run_dir, os.getpid())
        child = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            status = _wait(child, received, ledger, grace, meter)
        finally:
            watcher.kill()  # from here on it is ours to clean up
            watcher.wait()
            done = ledger.clean_up()
            processes.reap()
    stopped_by = received[0] if received else None
    return SupervisedExit(status=status, stopped_by=stopped_by, clean_up=done, cpu_s=meter.total_s())


def _wait(
    child: subprocess.Popen, received: list[signal.Signals], ledger: Ledger, grace: Grace | None, meter: processes.CpuMeter
) -> int:
    """Wait for the child. The first signal is passed on when its grace is over, after a last scan of what the run shares now;
    a second one, or the deadline, ends it at once."""
    left_s = STOP_DEADLINE_S
    graced, grace_s, passed_on = 0, 0.0, False
    next_look = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_S)
        processes.reap(keep=child.pid)
        if time.monotonic() >= next_look:
            meter.look()
            next_look = time.monotonic() + METER_PERIOD_S
        if graced < len(received) and grace:
            grace_s = min(grace(number) for number in received)
            graced = len(received)
        grace_s -= POLL_S
        if received and not passed_on and grace_s <= 0:
            ledger.scan()
            child.send_signal(signal.SIGTERM)
            passed_on = True
        if passed_on:
            left_s -= POLL_S
            if left_s <= 0 or (len(received) > 1 and not grace):
                child.kill()


@contextlib.contextmanager
def _handling(received: list[signal.Signals], numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Collect the signals that mean stop, in place of dying of them."""
    before = {number: signal.signal(number, lambda number, _: received.append(signal.Signals(number))) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
