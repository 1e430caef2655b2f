"""Agreement between ranks: values and failures reach everybody, and whoever dies or falls silent is named.

Ranks are plain processes that join the links through a file: no torch, no torchrun, half a second each.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_S, until

from alphamed.cluster import failure
from alphamed.errors import RunFailed

RANK = """
import json, os, signal, sys, time
from pathlib import Path
from alphamed.cluster.control import Control
from alphamed.errors import RunFailed
from alphamed.cluster.control_links import accept, join, listen
from alphamed.errors import ConfigError

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
meeting = folder / "meeting"
if rank == 0:
    listener, key = listen("127.0.0.1")
    (folder / "draft").write_text(json.dumps([listener.address, key.hex()]))
    (folder / "draft").rename(meeting)
    peers = accept(listener, world, 900)
else:
    until = time.monotonic() + 900
    while not meeting.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    address, key = json.loads(meeting.read_text())
    peers = [join(tuple(address), bytes.fromhex(key), rank, 900)]
control = Control(None, rank, world, peers, folder, heartbeat_timeout_s=HEARTBEAT_S, abort_after_s=ABORT_S)

def say(**words):
    draft = folder / f"draft_{rank}"
    draft.write_text(json.dumps({"pid": os.getpid(), **words}))
    draft.rename(folder / f"said_{rank}")

def stay(seconds=3000):
    time.sleep(seconds)

try:
    with control:
        SCENE
except RunFailed as e:
    say(component=e.component, message=e.message, user=e.user_error)
    sys.exit(1)
"""


class Ranks:
    """Some processes that play a scene; all are gone when the test ends. The deadlines expire only where a test is about that."""

    def __init__(self, folder: Path, scene: str, world: int, heartbeat_s: float = 900.0, abort_s: float = 900.0):
        code = RANK.replace("SCENE", scene.strip().replace("\n", "\n        "))
        code = code.replace("HEARTBEAT_S", str(heartbeat_s)).replace("ABORT_S", str(abort_s))
        self.folder = folder
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank), str(world), str(folder)], stderr=open(folder / f"errors_{rank}", "w")
            )
            for rank in range(world)
        ]

    def said(self, rank: int) -> dict:
        self.wait(rank)
        path = self.folder / f"said_{rank}"
        assert path.exists(), (self.folder / f"errors_{rank}").read_text()
        return json.loads(path.read_text())

    def wait(self, rank: int) -> int:
        return self.processes[rank].wait(timeout=LIMIT_S)

    def until(self, rank: int, name: str) -> None:
        """Until the scene has made the file `name`."""

        def made() -> bool:
            assert self.processes[rank].poll() is None, (self.folder / f"errors_{rank}").read_text()
            return (self.folder / name).exists()

        until(made, name)

    def name(self, rank: int) -> str:
        return f"rank {rank} (pid {self.processes[rank].pid})"


@pytest.fixture
def play(tmp_path):
    started = []

    def start(scene: str, world: int = 3, **deadlines: float) -> Ranks:
        started.append(Ranks(tmp_path, scene, world, **deadlines))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in ranks.processes):
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.wait()


def test_every_rank_gets_the_value_of_rank_0_and_keeps_its_own(play):
    ranks = play("""
value = control.from_rank0("a value", lambda: {"made by": rank})
own = control.everywhere("own values", lambda: rank * 10)
again = control.from_rank0("another", lambda: [1.5, "text", None])
kept = control.on_rank0("what stays", lambda: f"made by {rank}")
assert kept == ("made by 0" if rank == 0 else None), kept
say(value=value, own=own, again=again)
""")
    for rank in range(3):
        said = ranks.said(rank)
        assert (said["value"], said["own"], said["again"]) == ({"made by": 0}, rank * 10, [1.5, "text", None])
        assert ranks.wait(rank) == 0
    assert failure.recorded(ranks.folder) is None


def test_a_failure_of_rank_0_reaches_all_with_its_component(play):
    ranks = play("""
def work():
    raise RunFailed("engine 1", "died of\\n  signal 9")
control.from_rank0("rollouts of step 1", work)
""")
    assert [ranks.said(rank)["component"] for rank in range(3)] == ["engine 1"] * 3
    assert [ranks.said(rank)["message"] for rank in range(3)] == ["died of signal 9"] * 3
    assert str(failure.recorded(ranks.folder)) == "engine 1: died of signal 9"


def test_a_failure_in_everywhere_names_the_rank_also_where_others_are_stuck_inside(play):
    """Rank 2 fails; rank 1 waits for it in what would be a collective and is ended by its watching thread."""
    ranks = play(
        """
def work():
    if rank == 2:
        raise KeyError("no such tensor")
    if rank == 1:
        stay()
control.everywhere("loading", work)
""",
        abort_s=5.0,
    )
    assert ranks.said(0)["component"] == ranks.said(2)["component"] == ranks.name(2)
    assert "KeyError" in ranks.said(0)["message"]
    assert ranks.wait(1) == 1
    words = (ranks.folder / "errors_1").read_text()
    assert ranks.name(2) in words and "stay" in words  # who, and where this rank was stuck


def test_a_mistake_in_the_input_stays_the_users(play):
    ranks = play(
        """
def work():
    raise ConfigError("data.train: gone; bring it back")
control.from_rank0("questions", work)
""",
        world=2,
    )
    for rank in range(2):
        assert ranks.said(rank)["user"] is True
        assert ranks.said(rank)["message"] == "data.train: gone; bring it back"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_those_who_wait_for_rank_0(play, victim):
    ranks = play("""
control.from_rank0("a start", lambda: (folder / "started").touch())
control.from_rank0("rollouts of step 1", stay)
""")
    ranks.until(0, "started")
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    assert ranks.said(2)["component"] == ranks.name(victim)
    assert "ended without a message" in ranks.said(2)["message"]


def test_a_rank_killed_in_everywhere_is_named_by_all(play):
    ranks = play("""
def work():
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
control.everywhere("saving", work)
""")
    assert ranks.said(0)["component"] == ranks.said(2)["component"] == ranks.name(1)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_after_the_heartbeat_timeout(play, victim):
    ranks = play(
        """
control.everywhere("a start", lambda: (folder / f"started_{rank}").touch())
control.from_rank0("rollouts of step 1", stay)
""",
        heartbeat_s=8.0,
        abort_s=5.0,
    )
    ranks.until(victim, f"started_{victim}")
    os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
    assert ranks.said(1)["component"] == ranks.name(victim)
    assert "sent no heartbeat" in ranks.said(1)["message"]


def test_an_exception_outside_of_agreements_fails_every_rank(play):
    ranks = play("""
control.from_rank0("a start", lambda: None)
if rank == 1:
    raise ZeroDivisionError("in the update")
control.from_rank0("the next step", stay)
""")
    assert ranks.said(2)["component"] == ranks.name(1)
    assert ranks.said(2)["message"] == "ZeroDivisionError: in the update"
    assert failure.recorded(ranks.folder).component == ranks.name(1)


def test_a_broken_connection_is_blamed_on_who_broke_it(play):
    """Rank 1 dies; rank 0 fails of the echo, as a collective would. The first cause is what is recorded."""
    ranks = play("""
control.everywhere("a start", lambda: None)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
raise ConnectionError("closed by peer")
""")
    assert ranks.said(0)["component"] == ranks.name(1)
    assert failure.recorded(ranks.folder).component == ranks.name(1)


def test_work_past_its_deadline_and_ranks_out_of_step_are_named(play):
    late = play(
        """
if rank == 0:
    control.everywhere("saving", lambda: None, deadline_s=0.5)
else:
    stay()
""",
        world=2,
    )
    assert late.said(0)["component"] == late.name(1)
    assert late.said(0)["message"] == "saving: not done within 0 s"


def test_ranks_at_different_calls_are_out_of_step(play):
    ranks = play(
        """
control.from_rank0("rollouts of step 1" if rank == 0 else "rollouts of step 2", lambda: 1)
control.from_rank0("the rest", stay)
""",
        world=2,
    )
    assert "out of step: at 'rollouts of step 1'" in ranks.said(1)["message"]


def test_a_rank_that_left_is_not_waited_for(play):
    ranks = play(
        """
if rank == 1:
    control.from_rank0("one more step", stay)
""",
        world=2,
    )
    assert ranks.said(1)["component"] == ranks.name(0)
    assert "has ended its part" in ranks.said(1)["message"]


@pytest.mark.parametrize(
    "dead, first",
    [
        # (rank, status) of workers that ended in the same second
        ([(0, -15), (1, -9)], 1),  # the agent's SIGTERM is an answer
        ([(0, 1), (1, -9), (2, 1)], 1),  # exit code 1 is what a peer's death does to others
        ([(0, -15), (2, 1)], 2),
        ([(3, -11)], 3),
    ],
)
def test_the_first_dead_worker_is_the_one_that_was_not_ended_by_others(dead, first):
    workers = [failure.DeadWorker(rank, 100 + rank, status, 50.0) for rank, status in dead]
    assert failure.first_dead(workers).rank == first


def test_a_worker_killed_later_by_the_agent_is_not_the_first():
    workers = [failure.DeadWorker(0, 100, -9, 60.0), failure.DeadWorker(1, 101, 1, 50.0)]
    assert failure.first_dead(workers).rank == 1


def test_a_death_by_signal_outranks_what_others_recorded(tmp_path):
    failure.record(tmp_path, RunFailed("rank 0 (pid 5)", "Connection closed by peer"))
    failure.record(tmp_path, RunFailed("rank 2 (pid 7)", "came second"))
    assert str(failure.verdict(tmp_path, 1)) == "rank 0 (pid 5): Connection closed by peer"
    failure.write_workers(
        tmp_path / failure.WORKERS_FILE, [failure.DeadWorker(1, 6, -9, 50.0), failure.DeadWorker(0, 5, 1, 50.0)]
    )
    assert str(failure.verdict(tmp_path, 1)).startswith("rank 1 (pid 6): was killed by signal 9 (SIGKILL")


def test_an_agent_that_died_alone_is_named_with_what_ended_it(tmp_path):
    assert str(failure.verdict(tmp_path, -9)).startswith("torchrun's agent: was killed by signal 9 (SIGKILL")
    assert "exit code 3" in str(failure.verdict(tmp_path, 3))


def test_mistakes_in_configuration_and_data_are_the_users():
    from alphamed.errors import ConfigError, DataError

    for error in (ConfigError("run.seed: 3 ..."), DataError("train.jsonl: ...")):
        assert failure.of_exception(error, "rank 0").user_error
    assert not failure.of_exception(ValueError("a bug"), "rank 0").user_error
