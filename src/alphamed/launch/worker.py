"""One trainer rank: where its output goes, what it does before and after `alphamed.train.main`, how it reports failure.

Each rank writes everything it and its libraries print into `run_dir/logs/rank_N.log`. The console shows what rank 0
prints to sys.stdout, its progress, and the final error line.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

from alphamed.cluster import addresses, failure, placement, variables
from alphamed.cluster.cluster_job import ADDRESS_VARIABLE
from alphamed.cluster.environment import enter, run_environment
from alphamed.cluster.variables import Start
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.files import within_deadline
from alphamed.launch import guard
from alphamed.launch.single_host import START_MARK, check_world, owned

NETWORK_DEADLINE_S = 120.0
"""For the hosts of a bare torchrun to exchange their addresses."""

RANK_0_SPEAKS_S = 60.0
"""What another rank that has met a mistake first leaves rank 0 to report it: torchrun ends all ranks with the first."""


def run_worker(config: Config, train: Callable[[Config], None], validate: Callable[[Config], object] | None) -> int:
    """Train on this rank; returns its exit code. `validate` is given where there is no supervisor (a bare torchrun): rank 0
    then checks the input, cleans up after earlier starts and sets a guard."""
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        try:
            check_world(config, os.environ)
            if validate is not None:
                _prepare(config, rank, stack, validate)
        except ValueError as error:
            return _refuse(rank, error)
        console = stack.enter_context(_captured_output(config.run_dir, rank))
        try:
            train(config)
        except Exception as error:
            return _fail(config.run_dir, rank, error, console, supervised=validate is None)
    return 0


def _prepare(config: Config, rank: int, stack: contextlib.ExitStack, validate: Callable[[Config], object]) -> None:
    """What `alphamed train` would have done before the ranks were started."""
    before = dict(os.environ)
    _find_network()
    start = start_of(config, os.environ)
    if rank == 0:
        validate(config)
        temporary = stack.enter_context(owned(config.run_dir)).make_temporary_folder()
        variables.settle(config.run_dir, start, environment=before)
    else:
        temporary = Path(tempfile.gettempdir())  # only rank 0 starts what leaves sockets there
    enter(run_environment(config, temporary, start))
    if rank == 0:
        placement.check_ray_address()
        guard.start(config.run_dir, os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid())


def start_of(config: Config, environment: Mapping[str, str]) -> Start:
    """Whether a bare torchrun spans several hosts: by its ranks, or by `cluster.nodes` where the trainer needs only one."""
    ranks, here = (int(environment.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Start.TORCHRUN_HOSTS if ranks > here or (config.cluster.nodes or 1) > 1 else Start.TORCHRUN


def _find_network() -> None:
    """What the launcher of several hosts would have determined: this host's address, as the others see it, and its interface.

    On the first host MASTER_ADDR may well be a name of the loopback device: what it is, the second host reports through
    torchrun's store. Raises ConfigError."""
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1"):
        return
    from datetime import timedelta

    from alphamed.cluster.narrow_store import TCPStore

    master, group = os.environ["MASTER_ADDR"], int(os.environ["GROUP_RANK"])
    store = TCPStore(master, int(os.environ["MASTER_PORT"]), None, False, timeout=timedelta(seconds=NETWORK_DEADLINE_S))
    if group == 1:
        store.set("alphamed/first", addresses.resolve(master))
        store.set("alphamed/second", addresses.toward(master))
    other = store.get("alphamed/second" if group == 0 else "alphamed/first").decode()
    if addresses.is_loopback(other):
        raise ConfigError(
            f"MASTER_ADDR: {master} is an address of the loopback device on the second host; give torchrun "
            f"--master-addr with the first host's name or address in the cluster"
        )
    place = addresses.own([other])
    os.environ |= addresses.interface_settings(place) | {ADDRESS_VARIABLE: place.address}
    print(f"rank {os.environ['RANK']}: {place.address} on {place.interface}", file=sys.stderr)


def _refuse(rank: int, error: ValueError) -> int:
    from alphamed.errors import DataError

    if not isinstance(error, ConfigError | DataError):
        raise error
    report(rank, f"error: {error}", sys.stderr)
    return 2


def report(rank: int, line: str, console: TextIO) -> None:
    """Print a line once for all ranks: on rank 0. Another rank waits for torchrun to end it after that, and prints the line
    itself where rank 0 has no such trouble."""
    if rank != 0:
        time.sleep(RANK_0_SPEAKS_S)
    print(line, file=console, flush=True)


@contextlib.contextmanager
def _captured_output(run_dir: Path, rank: int) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to the rank's log; yields a stream to what was stderr. On rank 0 sys.stdout goes to
    the console and the log."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    console_out, console_error = os.dup(1), os.dup(2)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    print(START_MARK, time.strftime("%Y-%m-%d %H:%M:%S"), flush=True)
    faulthandler.enable()  # a crash in native code leaves its stack in the log
    with (
        open(console_out, "w", buffering=1, errors="replace") as out,
        open(console_error, "w", buffering=1, errors="replace") as error,
    ):
        before = sys.stdout, sys.stderr
        sys.stderr = _Log(sys.stderr)
        sys.stdout = _Log(sys.stdout, out if rank == 0 else None)
        try:
            yield error
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = before


class _Log:
    """A text stream into a log, and a console where one is given. What a full disk has no room for is not logged: the run
    does not end for that."""

    def __init__(self, log: TextIO, console: TextIO | None = None):
        self._log, self._console = log, console
        self.encoding, self.errors = log.encoding, log.errors

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._log.write(text)
        return self._console.write(text) if self._console else len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._log.flush()
        if self._console:
            self._console.flush()

    def isatty(self) -> bool:
        return bool(self._console and self._console.isatty())

    def fileno(self) -> int:
        return (self._console or self._log).fileno()


def _fail(run_dir: Path, rank: int, error: Exception, console: TextIO, supervised: bool = False) -> int:
    """Record the failure; its traceback goes to the log. The line is printed where no supervisor does, and where the log's file
    system does not answer: then this process ends here, as it could not flush its log."""
    failed = failure.of_exception(error, f"rank {rank} (pid {os.getpid()})")
    try:
        within_deadline(run_dir, "logging a traceback", lambda: _log_traceback(error), failure.ANSWER_DEADLINE_S)
    except TimeoutError:
        print(f"run failed: {failed}", file=console, flush=True)
        os._exit(1)
    failure.record(run_dir, failed)
    first = failure.recorded(run_dir) or failed
    if not supervised:
        report(rank, f"error: {first}" if first.user_error else f"run failed: {first}", console)
    return 2 if first.user_error else 1


def _log_traceback(error: Exception) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
