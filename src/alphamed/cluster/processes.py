"""Find, describe and end processes by id, and the shared-memory segments they hold (Linux /proc).

A process is a pid *and* its start time: the kernel reuses pids, so nothing is signalled unless both still match.
The processes of a run are found in two ways that complement each other: by ancestry (a supervisor is the subreaper of
all its descendants) and by a tag, an environment variable that every descendant inherits. The tag alone would miss
processes that overwrite their environment with a title; ancestry alone would miss those whose supervisor has died.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

TAG = "ALPHAMED_RUN_ID"
"""Environment variable that marks the processes of a run; its value is `ledger.run_id(run_dir)`."""

SHARED_MEMORY = Path("/dev/shm")

MAX_COMMAND_CHARS = 400
RESOURCE_TRACKER = "multiprocessing.resource_tracker"
"""In the command of the process with which Python unlinks semaphores and shared memory after violent deaths."""
TRACKER_GRACE_S = 3.0

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Process:
    """`start` is the start time in clock ticks since boot: with the pid it names a process for good."""

    pid: int
    start: int
    parent: int
    command: str


# ----------------------------------------------------------------------------------------------------------- describing
def describe(pid: int) -> Process | None:
    """The process with this pid; None when it is gone, or a zombie that only waits to be reaped."""
    try:
        return _described(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return None


def everything() -> dict[int, Process]:
    """All living processes that can be read, by pid."""
    described = (_described(process) for process in psutil.process_iter())
    return {process.pid: process for process in described if process}


def _described(process: psutil.Process) -> Process | None:
    try:
        with process.oneshot():
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return None
            command = " ".join(process.cmdline()).strip() or process.name()
            return Process(process.pid, _start_ticks(process.pid), process.ppid(), command[:MAX_COMMAND_CHARS])
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _start_ticks(pid: int) -> int:
    """Field 22 of its status line. psutil gives seconds since 1970, which move with every correction of the clock."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")  # the name before may hold blanks and brackets
    return int(fields.split()[19])


def is_alive(process: Process) -> bool:
    """Whether this very process lives, not a later one with the same pid."""
    now = describe(process.pid)
    return now is not None and now.start == process.start


def descendants(roots: Iterable[int], processes: dict[int, Process]) -> dict[int, Process]:
    """Those of `processes` that come from `roots` (without the roots themselves), by pid."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    below: dict[int, Process] = {}
    open_pids = list(roots)
    while open_pids:
        for child in children.get(open_pids.pop(), []):
            if child.pid not in below:
                below[child.pid] = child
                open_pids.append(child.pid)
    return below


def tagged(run_id: str, processes: dict[int, Process]) -> dict[int, Process]:
    """Those of `processes` that were started with the tag of this run."""
    return {pid: process for pid, process in processes.items() if _environment(pid).get(TAG) == run_id}


def _environment(pid: int) -> dict[str, str]:
    try:
        return psutil.Process(pid).environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, PermissionError):
        return {}


# --------------------------------------------------------------------------------------------------------------- ending
def send(process: Process, number: signal.Signals) -> bool:
    """Signal this very process. False when it is gone. The pidfd is opened before the start time is compared, so that
    the pid cannot pass to another process in between."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(handle, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)


def end(processes: Iterable[Process], grace_s: float = 5.0, deadline_s: float = 10.0) -> list[Process]:
    """SIGTERM, then after `grace_s` SIGKILL. Returns what is still there `deadline_s` after the SIGKILL (a process in
    uninterruptible sleep cannot be ended). A zombie counts as gone; whose child it was may reap it.

    Python's resource trackers come last: they ignore SIGTERM, end by themselves when the last process is gone that they
    serve, and unlink what it has left."""
    left = [process for process in processes if send(process, signal.SIGTERM)]
    for process in left:  # a stopped process takes a SIGTERM only once it runs again
        send(process, signal.SIGCONT)
    trackers = [process for process in left if RESOURCE_TRACKER in process.command]
    served = wait_gone((process for process in left if process not in trackers), grace_s)
    for process in served:
        send(process, signal.SIGKILL)
    stuck = wait_gone(served, deadline_s)
    trackers = wait_gone(trackers, TRACKER_GRACE_S)
    for process in trackers:
        send(process, signal.SIGKILL)
    return stuck + wait_gone(trackers, deadline_s)


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Wait until the processes are gone; returns those that are not after `timeout_s`."""
    left = list(processes)
    until = time.monotonic() + timeout_s
    while True:
        left = [process for process in left if is_alive(process)]
        if not left or time.monotonic() >= until:
            return left
        time.sleep(0.05)


def reap(keep: int | None = None) -> None:
    """Collect all dead children of a subreaper, but leave `keep`, whose exit status it waits for."""
    for process in list(_child_pids()):
        if process != keep:
            try:
                os.waitpid(process, os.WNOHANG)
            except ChildProcessError:
                pass  # not ours after all: it was reaped in between


class CpuMeter:
    """CPU seconds of this process and all below it. Two ways find most of them each, and the larger sum counts: what the kernel
    has added up for children that were waited for (Ray waits for none of its own), and the last look at each descendant."""

    def __init__(self) -> None:
        self._before_s = _waited_for_s()
        self._seen: dict[tuple[int, int], float] = {}  # pid and start time -> CPU seconds

    def look(self) -> None:
        for process in descendants([os.getpid()], everything()).values():
            if (spent_s := _spent_s(process)) is not None:
                self._seen[process.pid, process.start] = spent_s

    def total_s(self) -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return max(_waited_for_s() - self._before_s, sum(self._seen.values()) + own.ru_utime + own.ru_stime)


def _waited_for_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _spent_s(process: Process) -> float | None:
    """CPU seconds of this very process; None when it is gone."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if int(fields[19]) != process.start:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child_pids() -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{os.getpid()}/task")
        return [int(pid) for task in tasks for pid in Path(f"/proc/{os.getpid()}/task/{task}/children").read_text().split()]
    except FileNotFoundError:  # a thread ended while the list was read: next time
        return []


def become_subreaper() -> None:
    """Orphaned descendants become children of this process in place of init's, so that none is lost from sight."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """This process is sent SIGTERM when the thread that started it ends; for `preexec_fn`, from a thread that stays."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}, {value}): {os.strerror(error)}")


# -------------------------------------------------------------------------------------------------------- shared memory
Inode = tuple[int, int]
"""Device and number. A container has a /dev/shm of its own, with the same small numbers."""


def segments_of(pid: int, names: dict[Inode, str] | None = None, written: bool = True) -> set[str]:
    """Names of the files in /dev/shm that this process shares: maps for writing with others, or holds open for writing. With
    `written` false also those that it only reads, such as a user's data. `names`: of all files there, where they have been
    listed already.

    A file is known by its inode: glibc's sem_open maps a semaphore under a temporary name and links it to its own afterwards,
    so in the process that made it the mapping reads as that of a deleted file.
    """
    names = segment_names() if names is None else names
    shared: set[Inode] = set()
    prefix = f"{SHARED_MEMORY}/"
    try:
        with open(f"/proc/{pid}/maps", errors="replace") as maps:
            for line in maps:
                if prefix in line:
                    _, access, _, device, inode, _ = line.split(maxsplit=5)
                    if access[1::2] == "ws" or not written:  # as in rw-s
                        shared.add((os.makedev(*(int(part, 16) for part in device.split(":"))), int(inode)))
        for entry in os.scandir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(entry.path).startswith(prefix) and (not written or _opened_for_writing(pid, entry.name)):
                    status = os.stat(entry.path)
                    shared.add((status.st_dev, status.st_ino))
            except FileNotFoundError:  # closed in the meantime
                pass
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return {names[inode] for inode in shared if inode in names}


def _opened_for_writing(pid: int, descriptor: str) -> bool:
    flags = next(line for line in Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines() if line[:6] == "flags:")
    return int(flags.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def segment_names() -> dict[Inode, str]:
    """The files in /dev/shm by inode."""
    names: dict[Inode, str] = {}
    try:
        for entry in os.scandir(SHARED_MEMORY):
            try:
                status = entry.stat(follow_symlinks=False)
                names[status.st_dev, status.st_ino] = entry.name
            except FileNotFoundError:  # removed in the meantime
                pass
    except FileNotFoundError:  # a system without it
        pass
    return names


def unlink_segments(names: Iterable[str]) -> list[str]:
    """Remove those of the named segments that no living process maps or holds open; returns the removed names."""
    present = [name for name in names if (SHARED_MEMORY / name).is_file()]
    if not present:
        return []
    all_names = segment_names()
    in_use = set().union(*(segments_of(pid, all_names, written=False) for pid in everything()))
    removed = [name for name in present if name not in in_use]
    for name in removed:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return removed
