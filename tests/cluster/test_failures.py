"""What befalls a job of several hosts: a host that dies, a cut network, a full disk, Slurm that takes the hosts away. Each ends in
recovery, or in one line that names the host; nothing is left behind."""

import contextlib
import shutil
import time

import pytest
from places import DEADLINE_S, Place, place, require_nothing_left
from tiny_run import metrics

from alphamed.rundir.rollout_files import read_rollouts, recorded_steps, rollout_path
from alphamed.rundir.status import status

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
END_S = 60
LONG = ("parallel.data=2", "run.steps=100000")


@pytest.fixture
def here():
    with place(checkpoint={"every": 1}) as made:
        yield made


def wait_for_step(hosts, here: Place, job: str, step: int) -> None:
    def reached() -> bool:
        assert not hosts.state(job).startswith(("FAILED", "CANCELLED", "NODE_FAIL")), here.log(job)
        file = here.run_dir("runs") / "metrics.jsonl"
        return file.exists() and max(metrics(here.run_dir("runs")), default=0) >= step

    hosts.wait_until(reached, f"step {step}: {here.log(job)}", DEADLINE_S)


def start(hosts, here: Place, *overrides: str, options: tuple[str, ...] = (), step: int = 2, count: int = 3) -> str:
    job = here.submit(hosts, count, *overrides, options=options)
    wait_for_step(hosts, here, job, step)
    return job


def said(hosts, here: Place, job: str, words: str, deadline_s: float = END_S) -> None:
    hosts.wait_until(lambda: words in here.log(job), f"{words!r} in {here.log(job)}", deadline_s)


def asked(run_dir) -> list[str]:
    """The questions of a run in the order of its steps."""
    return [
        group.group.question.id for step in recorded_steps(run_dir) for group in read_rollouts(rollout_path(run_dir, step))
    ]


def test_a_dead_host_is_named_and_the_requeued_job_continues_when_it_is_back(hosts, here):
    job = start(hosts, here, *LONG, "cluster.heartbeat_timeout_s=15")
    hosts.kill("node2")
    said(hosts, here, job, "host node2: ")
    said(hosts, here, job, "run failed: host node2: ", 2 * END_S)  # when all that ran is ended
    # by the batch script, or by Slurm itself where it has missed the host first
    hosts.wait_until(lambda: hosts.state(job) in ("PENDING", "REQUEUED"), f"requeued: {here.log(job)}", END_S)
    require_nothing_left(hosts, but=("node2",))
    before = max(metrics(here.run_dir("runs")))
    hosts.start("node2")
    wait_for_step(hosts, here, job, before + 2)
    assert sorted(metrics(here.run_dir("runs"))) == list(range(1, max(metrics(here.run_dir("runs"))) + 1))
    hosts.scancel(job)
    assert hosts.wait_for_end(job, END_S) == "CANCELLED"
    require_nothing_left(hosts)


def test_a_host_whose_network_is_cut_is_named_and_ends_its_own_part(hosts, here):
    job = start(hosts, here, *LONG, "cluster.heartbeat_timeout_s=15")
    hosts.cut("node3")
    said(hosts, here, job, "run failed: host node3: sent no heartbeat")
    hosts.wait_until(lambda: not hosts.processes("node3"), f"node3 is quiet: {hosts.processes('node3')}", END_S)
    require_nothing_left(hosts, but=("node3",))


def test_the_first_hosts_death_ends_the_others_and_status_names_it(hosts, here):
    start(hosts, here, *LONG, "cluster.heartbeat_timeout_s=15")
    hosts.kill("node1")
    require_nothing_left(hosts, but=("node1",))
    lines = list(status(here.run_dir("runs"), time.time()))
    assert any(line.startswith("ended    failed: host node1") for line in lines), lines


def test_a_cancelled_job_leaves_nothing_and_stays_cancelled(hosts, here):
    job = start(hosts, here, *LONG)
    lines = list(status(here.run_dir("runs"), time.time()))
    assert f"Slurm job {job}" in lines[0] and any("engine 0" in line for line in lines), lines
    hosts.scancel(job)
    assert hosts.wait_for_end(job, END_S) == "CANCELLED"
    require_nothing_left(hosts)
    time.sleep(3)
    assert hosts.state(job) == "CANCELLED"


@pytest.mark.parametrize("how", ["preemption", "warning before the time limit"])
def test_a_job_that_slurm_stops_continues_from_a_checkpoint_of_that_moment(hosts, how):
    """No other checkpoint is written. Every question is asked once in each epoch, over both starts."""
    with place(checkpoint={"every": 0}) as here:
        job = start(hosts, here, "parallel.data=2", "run.steps=100", step=3)
        if how == "preemption":
            hosts.sbatch("-N", "3", "--exclusive", "-p", "urgent", "--wrap", "sleep 3", "-o", "urgent.log", cwd=here.folder)
        else:
            hosts.scancel(job, "--batch", "--signal=TERM")
        hosts.wait_until(lambda: hosts.state(job) in ("PENDING", "REQUEUED"), f"requeued: {here.log(job)}", END_S)
        done = max(metrics(here.run_dir("runs")))
        assert 3 <= done < 100
        assert hosts.wait_for_end(job, DEADLINE_S) == "COMPLETED", here.log(job)
        assert "run stopped by Slurm's warning; " in here.log(job)
        assert "are dropped" not in here.log(job) and sorted(metrics(here.run_dir("runs"))) == list(range(1, 101))
        questions = asked(here.run_dir("runs"))
        assert len(questions) == 400
        for first in range(0, 396, 6):
            assert len(set(questions[first : first + 6])) == 6, first
        require_nothing_left(hosts)


def test_a_run_directory_of_one_host_alone_is_noticed_before_anything_starts(hosts, here):
    (here.folder / "runs").mkdir()
    hosts.on("node2", "mount", "-t", "tmpfs", "none", str(here.folder / "runs"))
    try:
        job = here.submit(hosts, 3, *LONG)
        assert hosts.wait_for_end(job, END_S) == "FAILED"
    finally:
        hosts.on("node2", "umount", str(here.folder / "runs"))
    lines = [line for line in here.log(job).splitlines() if line.startswith(("error", "run failed"))]
    assert len(lines) == 1 and lines[0].startswith("error: run.root: ") and "on host node2 is not the folder" in lines[0], (
        here.log(job)
    )
    assert list((here.folder / "runs").iterdir()) == []
    require_nothing_left(hosts)


def test_a_checkpoint_that_the_disk_has_no_room_for_ends_the_run(hosts, here):
    """Before it is begun."""
    run_dir = hosts.small / "runs"
    job = here.submit(hosts, 3, *LONG, f"run.root={run_dir}")
    try:
        assert hosts.wait_for_end(job, 120) == "FAILED", here.log(job)
    finally:
        shutil.rmtree(run_dir)
    failures = [line for line in here.log(job).splitlines() if line.startswith(("run failed", "error"))]
    assert len(failures) == 1 and failures[0].startswith("error: checkpoint ") and "make room" in failures[0], here.log(job)
    assert " on node1; " in failures[0], failures
    require_nothing_left(hosts)


def test_a_disk_that_fills_while_the_run_lives_ends_it_with_one_line(hosts, here):
    """Rollouts, metrics, logs and records all find it full."""
    root = hosts.small / "runs"
    job = here.submit(hosts, 3, *LONG, "checkpoint.every=0", f"run.root={root}")
    run_dir = root / "tiny"
    try:
        hosts.wait_until(lambda: len(recorded_steps(run_dir)) >= 2, f"step 2: {here.log(job)}", DEADLINE_S)
        with contextlib.suppress(OSError), (hosts.small / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert hosts.wait_for_end(job, END_S) == "FAILED", here.log(job)
        failures = [line for line in here.log(job).splitlines() if line.startswith(("run failed", "error"))]
        assert len(failures) == 1 and failures[0].startswith("run failed: rank 0 (pid "), here.log(job)
        assert " on node1): " in failures[0] and "No space left on device; make room" in failures[0], failures
        assert "Traceback" not in here.log(job).partition("--- the last lines")[0], here.log(job)
        assert any("No space left on device" in line for line in status(run_dir, time.time()))
        require_nothing_left(hosts)
    finally:
        (hosts.small / "filler").unlink(missing_ok=True)
        shutil.rmtree(root, ignore_errors=True)


def test_two_jobs_on_the_same_hosts_do_not_meet(hosts):
    with place() as first, place() as second:
        jobs = [
            (here, here.submit(hosts, 2, "run.steps=3", options=("-p", "shared", "--oversubscribe")))
            for here in (first, second)
        ]
        assert [(hosts.wait_for_end(job, DEADLINE_S), here.log(job)) for here, job in jobs] == [
            ("COMPLETED", here.log(job)) for here, job in jobs
        ]
        assert all(sorted(metrics(here.run_dir("runs"))) == [1, 2, 3] for here, _ in jobs)
        require_nothing_left(hosts)
