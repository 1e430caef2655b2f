"""A file system that stops answering ends in an error that names it. Emulated by named pipes: opening one for writing blocks until
somebody reads, in the same way as a system call on a mount that hangs."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest
from test_run import STATS, Alone, config_of, rollouts_of

from alphamed import files
from alphamed.cluster import failure
from alphamed.cluster.ledger import Ledger
from alphamed.errors import RunFailed
from alphamed.files import transfer_deadline_s, within_deadline
from alphamed.run import Run

SOON_S = 0.3
"""A deadline that what hangs always misses."""
LONG_S = 900.0


@pytest.fixture
def stall():
    """A function that makes a path hang; what hangs goes on when the test ends."""
    pipes = []

    def make(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
        pipes.append(path)

    yield make
    for path in pipes:
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_values_and_errors_come_through(tmp_path):
    assert within_deadline(tmp_path, "adding", lambda: 2 + 3, LONG_S) == 5
    with pytest.raises(FileNotFoundError, match="none"):
        within_deadline(tmp_path, "reading", (tmp_path / "none").read_text, LONG_S)


def test_what_hangs_is_named(tmp_path):
    release = threading.Event()
    with pytest.raises(TimeoutError) as late:
        within_deadline(tmp_path / "x", "writing a thing", release.wait, SOON_S)
    release.set()
    assert late.value.errno == errno.ETIMEDOUT and late.value.filename == str(tmp_path / "x")
    named = failure.of_exception(late.value, "rank 0 (pid 7)")
    assert str(named) == (
        f"rank 0 (pid 7): {tmp_path / 'x'}: writing a thing: the file system gave no answer for 0 s; see whether it is still "
        f"mounted, then the same command continues from the last checkpoint"
    )
    assert not named.user_error


def test_large_files_have_longer(tmp_path):
    assert transfer_deadline_s(0) == 300 and transfer_deadline_s(2 * 10**9) == 400  # 20 MB/s


def test_a_step_whose_record_hangs_ends_the_run(tmp_path, stall, monkeypatch):
    run = Run.open(config_of(tmp_path), Alone())
    run.begin(None)
    stall(run.dir / "rollouts" / f".step_000001.parquet.{os.getpid()}.partial")
    monkeypatch.setattr(files, "ANSWER_DEADLINE_S", SOON_S)
    with pytest.raises(TimeoutError) as late:
        run.record(rollouts_of(1), STATS, version=1)
    assert str(run.dir) in str(late.value) and "recording step 1: the file system gave no answer" in str(late.value)
    assert not (run.dir / "metrics.jsonl").exists()  # no step is half recorded as if it were whole
    run.close()


def test_a_failure_does_not_wait_for_its_record(tmp_path, stall, monkeypatch):
    monkeypatch.setattr(failure, "ANSWER_DEADLINE_S", SOON_S)
    stall(tmp_path / f".failure.json.{os.getpid()}")
    failure.record(tmp_path, RunFailed("rank 0", "x"))
    stall(tmp_path / "failure.json")  # reading a pipe that nobody writes hangs too
    stall(tmp_path / "workers.json")
    stall(tmp_path / "ended.json")
    assert failure.recorded(tmp_path) is None and failure.read_workers(tmp_path) == []
    failure.record_end(tmp_path, "ended")
    failure.write_workers(tmp_path / "workers.json", [])


def test_a_clean_up_does_not_wait_for_the_list_of_processes(tmp_path, stall, monkeypatch):
    monkeypatch.setattr("alphamed.cluster.ledger.FILE_DEADLINE_S", SOON_S)
    ledger = Ledger(tmp_path)
    stall(ledger._file)
    assert ledger.clean_up().stuck == []


def test_a_worker_whose_log_hangs_prints_its_line_and_ends(tmp_path):
    """Its standard error is a full pipe, which takes no byte more: neither the traceback nor a last flush."""
    script = f"""
import os
from pathlib import Path
from alphamed.cluster import failure
from alphamed.launch import worker
failure.ANSWER_DEADLINE_S = {SOON_S}
with worker._captured_output(Path({str(tmp_path)!r}), 0) as console:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writer, True)
    os.dup2(writer, 2)
    worker._fail(Path({str(tmp_path)!r}), 0, TimeoutError(110, "recording step 3: no answer", "runs/x"), console, supervised=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LONG_S)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("run failed: rank 0 (pid ") and "): runs/x: recording step 3: no answer; see" in done.stderr
    )
