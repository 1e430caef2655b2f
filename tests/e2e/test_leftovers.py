"""What a run leaves when it ends well and when it is interrupted: no process, no shared memory, no temporary file.

Two tensor ranks share memory by name: vLLM's message queues (psm_*) and its CPU collectives (*-cpushm_*), which vLLM itself
leaves behind. Ray's session, sockets of vLLM and scratch files go into the temporary folder, which must be empty in the end.
"""

import os
import signal
import subprocess
from collections.abc import Callable

import pytest
from tiny_run import DEADLINE_S, Workplace, clean_temporary, metrics
from waiting import until

from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
END_S = 600


class Watched:
    """A run started here, and the names of all shared memory that its processes were seen to hold."""

    def __init__(self, place: Workplace, environment: dict[str, str], *overrides: str):
        self.tag = run_id(place.run_dir("runs"))
        self.segments: set[str] = set()
        self.before = set(os.listdir(processes.SHARED_MEMORY))
        self.process = subprocess.Popen(
            place.command("train", "runs", *overrides),
            cwd=place.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def watch_until(self, done: Callable[[], bool]) -> None:
        def looked() -> bool:
            living = processes.everything()
            own = processes.descendants([self.process.pid], living) | processes.tagged(self.tag, living)
            self.segments |= {name for pid in own for name in processes.segments_of(pid)}
            return done()

        until(looked, "the run, which hangs", DEADLINE_S, pause_s=0.5)

    def check(self, status: int) -> None:
        """It ends with this status, and nothing of it is there any more."""
        said = self.process.communicate(timeout=END_S)[0]
        assert self.process.returncode == status, said
        assert any(name.startswith("psm_") for name in self.segments), self.segments
        assert any("cpushm" in name for name in self.segments), self.segments
        assert processes.unlink_segments(set(os.listdir(processes.SHARED_MEMORY)) - self.before) == []  # nobody uses it
        assert processes.tagged(self.tag, processes.everything()) == {}


def test_nothing_is_left(tmp_path):
    place = Workplace(
        tmp_path, rollout={"tensor_parallel": 2}, run={"name": "tiny", "steps": 100_000}, checkpoint={"every": 1}
    )
    recorded = place.run_dir("runs") / "metrics.jsonl"
    with clean_temporary() as environment:
        run = Watched(place, environment)
        run.watch_until(lambda: recorded.exists() or run.process.poll() is not None)
        run.process.send_signal(signal.SIGINT)
        run.check(130)
    with clean_temporary() as environment:
        run = Watched(place, environment, f"run.steps={max(metrics(recorded.parent)) + 1}")
        run.watch_until(lambda: run.process.poll() is not None)
        run.check(0)
