"""A disk that fills while a run lives: the failure is still recorded on it, reported to all ranks, and everything is cleaned up."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from alphamed.cluster import failure, ledger
from alphamed.cluster.failure import DeadWorker
from alphamed.errors import RunFailed

FULL = RunFailed("rank 0 (pid 5 on node1)", "/runs/x/rollouts/step_000004.parquet: No space left on device; make room")


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> None:
    with pytest.raises(OSError) as told, (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert told.value.errno == errno.ENOSPC


def test_a_failure_is_recorded_on_a_full_disk_and_the_first_one_stays(disk):
    failure.reserve(disk)
    fill(disk)
    failure.record(disk, FULL)
    failure.record(disk, RunFailed("rank 1", "Connection closed by peer"))
    first = failure.recorded(disk)
    assert first is not None and (first.component, first.message) == (FULL.component, FULL.message)
    failure.write_workers(disk / failure.WORKERS_FILE, [DeadWorker(0, 5, 1, 0.0)])  # cut short: counts for nothing
    assert str(failure.verdict(disk, 1)) == str(FULL)
    failure.release(disk)
    assert failure.recorded(disk) is not None  # a failure keeps its place ...
    failure.forget(disk)
    assert failure.recorded(disk) is None and not (disk / failure.RESERVE_FILE).exists()  # ... until the next start


def test_the_reserved_space_is_given_back_where_nothing_failed(disk):
    failure.reserve(disk)
    assert failure.recorded(disk) is None
    failure.release(disk)
    assert list(disk.iterdir()) == []


def test_recording_a_failure_never_raises(tmp_path):
    failure.record(tmp_path / "is not there", FULL)


def test_a_full_disk_is_named_with_its_file_and_the_fix():
    said = failure.of_exception(OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl"), "rank 0 (pid 5)")
    assert not said.user_error and said.component == "rank 0 (pid 5)"
    assert said.message == (
        "runs/x/metrics.jsonl: No space left on device; make room, and the same command continues from the last checkpoint"
    )


def test_actor_logs_that_find_no_room_keep_nothing_from_being_cleaned_up(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "temporary_folder", lambda run_dir: tmp_path / "temporary")
    run = ledger.Ledger(disk)
    logs = run.make_temporary_folder() / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker-1.out").write_bytes(bytes(65536))
    fill(disk)
    run.clean_up()
    assert not (tmp_path / "temporary").exists()


def test_a_rank_whose_log_is_full_goes_on(disk):
    """The real streams of a rank, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from alphamed.launch.worker import _captured_output\n"
        "disk = Path(sys.argv[1])\n"
        "with _captured_output(disk, 0) as console:\n"
        "    try:\n"
        "        with (disk / 'filler').open('wb', buffering=0) as file:\n"
        "            while True: file.write(bytes(4096))\n"
        "    except OSError: pass\n"
        "    print('x' * 100_000, file=sys.stderr, flush=True)\n"
        "    print('progress', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(disk)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "progress\n", "")
