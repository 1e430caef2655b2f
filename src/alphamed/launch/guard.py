"""The guard of a run: writes down what the run owns while a watched process lives, cleans up once it is gone.

Watched is the supervisor of `alphamed train`, or torchrun's agent where somebody called torchrun himself. The guard is
a process of its own, outside the run's sessions and without heavy imports, so that nothing that kills the run kills it,
and looking costs the trainer's interpreter nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from alphamed.cluster.ledger import Ledger, run_id
from alphamed.cluster.processes import TAG

INTERVAL_MS = 2000


def start(run_dir: Path, watched: int) -> subprocess.Popen:
    """Start a guard that watches the process with pid `watched`. It carries the run's tag, so that the next start ends
    a guard that is still at work on the last one."""
    command = [sys.executable, "-m", "alphamed.launch.guard", "--run-dir", str(run_dir), "--watch", str(watched)]
    return subprocess.Popen(
        command,
        env=os.environ | {TAG: run_id(run_dir)},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def watch(run_dir: Path, watched: int) -> None:
    ledger = Ledger(run_dir, roots=(watched,))
    try:
        handle = os.pidfd_open(watched)
    except ProcessLookupError:  # has ended already
        ledger.clean_up()
        return
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    while True:
        with contextlib.suppress(OSError):  # a full disk: what was recorded is known, and must still be cleaned up
            ledger.record()
        if poller.poll(INTERVAL_MS):  # readable: the watched process has ended
            break
    ledger.clean_up()


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes down what a run owns while it lives, and cleans up after it.")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--watch", type=int, required=True)
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends the run by the terminal must not end its guard
    watch(options.run_dir, options.watch)


if __name__ == "__main__":
    main()
