"""`alphamed status`: what it says of a live run and of dead ones."""

import json
import subprocess
import sys
import time

import pytest

from alphamed.cluster import failure
from alphamed.cluster.cluster_job import ClusterHost, ClusterJob
from alphamed.cluster.ledger import Lock
from alphamed.cluster.pulse import Pulse
from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.rundir.status import is_running, main, status

ROW = {
    "time/step_s": 12.0,
    "throughput/generated_tokens_per_s": 850.0,
    "reward/mean": 0.25,
    "reward/correct": 0.25,
    "reward/boxed": 0.5,
}
PULSE = {
    "time": 1000.0,
    "host": "node1",
    "pid": 77,
    "slurm_job": "5",
    "activity": "step 4, generating, 2 of 8 questions",
    "heard": {"rank 0 (pid 77 on node1)": 1000.0, "engine 0": 940.0, "reward process": 999.0},
}


@pytest.fixture
def run_dir(tmp_path):
    config = build_config({"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "run": {"steps": 10}})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(ROW | {"step": step}) + "\n" for step in (1, 2, 3)))
    (tmp_path / "pulse.json").write_text(json.dumps(PULSE))
    (tmp_path / "job.json").write_text(
        ClusterJob(
            (ClusterHost("node1", "10.0.0.1", "eth0", 2, 0), ClusterHost("node2", "10.0.0.2", "eth0", 0, 1)), 1, 2
        ).to_json()
    )
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").touch()
    return tmp_path


def test_a_live_run(run_dir):
    lines = list(status(run_dir, 1004.0))
    assert lines == [
        f"{run_dir}: running (rank 0 is pid 77 on node1, Slurm job 5)",
        "step     3 of 10, 12.0 s a step, 850 tokens/s generated, 1 min left",
        "reward   0.250, correct 25%, boxed 50%",
        "now      step 4, generating, 2 of 8 questions",
        "host     node1 (10.0.0.1): 2 ranks",
        "host     node2 (10.0.0.2): 1 engine worker",
        "heard    rank 0 (pid 77 on node1): 4 s ago",
        "heard    engine 0: 1 min ago (late)",
        "heard    reward process: 5 s ago",
        f"logs     {run_dir / 'logs'}: rank_0.log",
    ]


@pytest.mark.parametrize(
    "end, words",
    [
        (lambda run_dir: failure.record_end(run_dir, "stopped by SIGTERM"), "ended    stopped by SIGTERM, "),
        (
            lambda run_dir: failure.record(run_dir, failure.RunFailed("host node2", "was lost")),
            "ended    failed: host node2: was lost",
        ),
        (lambda run_dir: (run_dir / "finished.json").write_text('{"step": 3}'), "ended    finished after step 3"),
        (
            lambda run_dir: None,
            "ended    without a record (killed, or its host was lost); its last sign of life came 17 min ago, at: step 4",
        ),
    ],
)
def test_a_dead_run_says_why(run_dir, end, words):
    end(run_dir)
    lines = list(status(run_dir, 2000.0))
    assert lines[0].endswith(": not running") and any(line.startswith(words) for line in lines), lines
    assert "heard    engine 0: 1 min ago (late), at the end" in lines


def test_a_failure_ends_a_run_whose_last_sign_of_life_came_a_moment_ago(run_dir):
    """Rank 0's host has died, and another host has written so."""
    assert is_running(run_dir, PULSE, 1004.0)
    failure.record(run_dir, failure.RunFailed("host node1", "was lost"))
    assert not is_running(run_dir, PULSE, 1004.0)


def test_the_lock_tells_where_no_pulse_does(run_dir):
    assert not is_running(run_dir, None, 2000.0)
    holder = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('on', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder, str(run_dir / ".start.lock")], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert is_running(run_dir, None, 2000.0)
        process.kill()


def test_asking_leaves_the_lock_as_it_is(run_dir):
    lock = Lock(run_dir)
    lock.take()
    before = (run_dir / ".start.lock").read_text()
    assert main(run_dir, watch=False) == 0 and (run_dir / ".start.lock").read_text() == before
    lock.release()


def test_watching_ends_with_the_run(run_dir, capsys):
    failure.record_end(run_dir, "ended")
    assert main(run_dir, watch=True) == 0 and capsys.readouterr().out.count("step     3 of 10") == 1


def test_a_pulse_is_written_while_it_beats(tmp_path):
    with Pulse(tmp_path, lambda: {"rank 0": 0.0, "rank 1": 3.0}, lambda: "step 2"):
        for _ in range(200):
            if (tmp_path / "pulse.json").exists():
                break
            time.sleep(0.05)
    pulse = json.loads((tmp_path / "pulse.json").read_text())
    assert pulse["activity"] == "step 2" and pulse["heard"]["rank 0"] - pulse["heard"]["rank 1"] == pytest.approx(3.0)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not there"):
        list(status(tmp_path / "x", 0.0))
    with pytest.raises(ConfigError, match="holds no config.yaml"):
        list(status(tmp_path, 0.0))
