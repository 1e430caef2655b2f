"""What a run owns on this machine: its lock, its processes, its shared memory, its temporary folder.

The ledger file in the run directory (`processes-HOST.json`) is rewritten every few seconds while the run lives, so that
whoever comes after a violent death (the guard, the next start) can end by id what remains and unlink what was shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from alphamed.cluster import processes
from alphamed.cluster.processes import Process
from alphamed.errors import ConfigError
from alphamed.files import within_deadline

LOCK_FILE = ".start.lock"  # held by whoever starts the run; the run directory itself has one more, the writer's
POLL_S = 0.05
FILE_DEADLINE_S = 30.0
"""For the run directory to answer in a clean-up, which ends processes whether it does or not."""
MAX_TEMPORARY_CHARS = 20
"""Unix sockets may have paths of 107 bytes; Ray and ZeroMQ put up to 85 below the temporary folder."""
ACTOR_LOGS = ("worker-*.out", "worker-*.err", "raylet.err", "gcs_server.err")


def run_id(run_dir: Path) -> str:
    """Value of the tag that marks this run's processes. It follows from the directory alone, so that every rank, and
    every later start, knows it without communication."""
    return hashlib.sha256(f"{os.getuid()}:{run_dir.resolve()}".encode()).hexdigest()[:16]


def temporary_folder(run_dir: Path) -> Path:
    """Where the run's sockets, Ray session and other temporary files live; removed with the run."""
    base = tempfile.gettempdir()
    return Path(base if len(base) <= MAX_TEMPORARY_CHARS else "/tmp") / f"alphamed-{run_id(run_dir)}"


@dataclass
class CleanUp:
    """What a clean-up found and did."""

    ended: list[Process] = field(default_factory=list)
    stuck: list[Process] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = []
        if self.ended:
            parts.append(f"{len(self.ended)} processes")
        if self.segments:
            parts.append(f"{len(self.segments)} shared-memory segments")
        text = f"cleaned up {' and '.join(parts)}" if parts else "nothing was left"
        if self.stuck:
            text += f"; could not end {', '.join(f'pid {p.pid} ({p.command[:40]})' for p in self.stuck)}"
        return text


class Lock:
    """Only one start of a run at a time. The kernel lets go of it when the holder dies, however it dies. `owner` and `fix`
    name in errors the setting that gives the folder, and what to change."""

    def __init__(self, run_dir: Path, owner: str = "run", fix: str = "give another run.name"):
        self._path = run_dir / LOCK_FILE
        self._owner, self._fix = owner, fix
        self._file = None

    def take(self, wait_s: float = 0.0) -> None:
        """Raises ConfigError where another start holds it, and does not let go of it within `wait_s`."""
        handle = open(self._path, "a+", encoding="utf-8")
        deadline = time.monotonic() + wait_s
        while not _locked(handle):
            if time.monotonic() >= deadline:
                handle.seek(0)
                holder = handle.read().strip() or "an unknown process"
                handle.close()
                raise ConfigError(
                    f"{self._owner} {self._path.parent}: already running ({holder}); wait for its end, end it, or {self._fix}"
                )
            time.sleep(POLL_S)
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        self._file = handle

    def release(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def _locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Ledger:
    """The processes and segments of one run on this host. `roots`: pids whose descendants belong to the run."""

    def __init__(self, run_dir: Path, roots: tuple[int, ...] = ()):
        self._file = run_dir / f"processes-{socket.gethostname()}.json"
        self._id = run_id(run_dir)
        self._roots = roots
        self._temporary = temporary_folder(run_dir)
        self._processes: dict[int, Process] = {}
        self._segments: set[str] = set()
        self._written = ""

    def scan(self) -> None:
        """Determine what the run owns now; what was recorded before and still lives stays."""
        living = processes.everything()
        mine = processes.tagged(self._id, living)
        mine |= processes.descendants((*self._roots, *mine), living)
        for pid, process in self._processes.items():  # recorded earlier, orphaned or renamed since
            now = living.get(pid)
            if now and now.start == process.start:
                mine[pid] = now
        self._processes = mine
        names = processes.segment_names()
        for pid in mine:
            self._segments |= processes.segments_of(pid, names)

    def record(self) -> None:
        """Scan once and write down what the run owns now. Segments stay on the list until they are cleaned up: their
        last user may be gone before the next scan."""
        self.scan()
        text = json.dumps(
            {
                "boot": _boot_id(),
                "segments": sorted(self._segments),
                "processes": [asdict(process) for process in self._processes.values()],
            },
            indent=1,
        )
        if text != self._written:
            draft = self._file.with_suffix(".tmp")
            draft.write_text(text, encoding="utf-8")
            draft.replace(self._file)
            self._written = text

    def clean_up(self, spare: tuple[int, ...] = ()) -> CleanUp:
        """End every process of the run but the caller, its ancestors, `spare` and the resource trackers of these; unlink what
        they shared; forget."""
        with contextlib.suppress(TimeoutError):  # then the processes that are tagged, or descend from the roots
            within_deadline(self._file, "reading what a start owned", self._read, FILE_DEADLINE_S)
        self.scan()
        staying = {os.getpid(), *_ancestors(os.getpid()), *spare}
        others = [process for process in self._processes.values() if process.pid not in staying]
        targets = [process for process in others if not self._serves(process, staying)]
        done = CleanUp(ended=targets, stuck=processes.end(targets))
        done.segments = processes.unlink_segments(self._segments)
        with contextlib.suppress(TimeoutError):
            within_deadline(self._file, "keeping the logs of actors", self._keep_actor_logs, FILE_DEADLINE_S)
        shutil.rmtree(self._temporary, ignore_errors=True)
        with contextlib.suppress(TimeoutError):
            within_deadline(self._file, "removing the list of processes", self._forget_file, FILE_DEADLINE_S)
        self._processes, self._segments, self._written = {}, set(), ""
        return done

    def _forget_file(self) -> None:
        for path in (self._file, self._file.with_suffix(".tmp")):
            path.unlink(missing_ok=True)

    def _serves(self, process: Process, staying: set[int]) -> bool:
        """Whether this is the resource tracker of a process that stays. One that was the run's, and has passed to the
        subreaper, carries the tag."""
        return (
            processes.RESOURCE_TRACKER in process.command
            and process.parent in staying
            and not processes.tagged(self._id, {process.pid: process})
        )

    def _keep_actor_logs(self) -> None:
        """Move what engines and reward process have printed, which Ray keeps in its session, to `logs/ray`: where they
        died, it shows why."""
        printed = [
            path
            for pattern in ACTOR_LOGS
            for path in self._temporary.glob(f"session_latest/logs/{pattern}")
            if path.stat().st_size
        ]
        folder = self._file.parent / "logs" / "ray"
        shutil.rmtree(folder, ignore_errors=True)
        for path in printed:
            with contextlib.suppress(OSError):  # a full disk: the rest of the clean-up matters more
                folder.mkdir(parents=True, exist_ok=True)
                shutil.move(path, folder / path.name)

    def make_temporary_folder(self) -> Path:
        """Raises ConfigError where somebody else's file is in the way."""
        self._temporary.mkdir(mode=0o700, exist_ok=True)
        if self._temporary.is_symlink() or self._temporary.stat().st_uid != os.getuid():
            raise ConfigError(f"temporary folder {self._temporary}: belongs to somebody else; remove it or set TMPDIR")
        return self._temporary

    def _read(self) -> None:
        """Take over what an earlier start wrote down, if that was since this machine booted."""
        try:
            tree = json.loads(self._file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return
        if tree["boot"] == _boot_id():
            self._processes = {p["pid"]: Process(**p) for p in tree["processes"]} | self._processes
            self._segments |= set(tree["segments"])


def clean_up_dead_runs(root: Path) -> dict[Path, CleanUp]:
    """Clean up after every run below `root` that has a ledger of this host and nobody holding its lock."""
    done = {}
    for file in sorted(root.glob(f"*/processes-{socket.gethostname()}.json")):
        lock = Lock(file.parent)
        try:
            lock.take()
        except (ConfigError, OSError):
            continue  # it lives, or belongs to somebody else
        done[file.parent] = Ledger(file.parent).clean_up()
        lock.release()
    return done


def _ancestors(pid: int) -> set[int]:
    above: set[int] = set()
    while (process := processes.describe(pid)) and process.parent > 0 and process.parent not in above:
        above.add(pid := process.parent)
    return above


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
