"""One host's part of a run over several: its torchrun, its share of Ray, or both, under a supervisor of its own.

Slurm or ssh starts `alphamed launch --nodes A,B,C --node-rank N` once per host. The hosts meet (`meeting.py`), the first one
checks everything and makes the job, and each plays its part: hosts in front train, rank 0's holds Ray's head, hosts with
engines join that. The first host says how the run went; where it is lost, the others do.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster import addresses, failure, variables
from alphamed.cluster.cluster_job import ADDRESS_VARIABLE, HOST_VARIABLE, VARIABLE, ClusterHost, ClusterJob
from alphamed.cluster.environment import run_environment, without_torchrun
from alphamed.cluster.failure import HOSTS_FOLDER, of_exception
from alphamed.cluster.hardware import gpus_present, trainer_threads, wants_cuda
from alphamed.cluster.hosts import plan_nodes
from alphamed.cluster.ledger import run_id
from alphamed.cluster.placement import environment_of_ray, worker_command
from alphamed.cluster.processes import TAG
from alphamed.cluster.variables import Start
from alphamed.config.loading import dump_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed
from alphamed.launch import single_host
from alphamed.launch.meeting import Meeting, host_name
from alphamed.launch.single_host import LAUNCH_FILE, torchrun_command
from alphamed.launch.supervisor import SupervisedExit, supervise

JOB_FILE = "job.json"
STOP_FILE_VARIABLE = "ALPHAMED_STOP_FILE"
"""Names a file; once it is there the run writes a checkpoint and ends."""
EXIT_HOST_LOST = 75
"""sysexits' EX_TEMPFAIL: the same command may succeed on other hosts."""
SHARED_DEADLINE_S = 20.0
"""For a file that one host has made to be seen on another: network file systems remember for seconds what was not there."""
ENDED_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What a host reports of itself when all meet."""

    own: addresses.Own
    gpus: int


@dataclass(frozen=True, slots=True)
class HostCommands:
    """What one host runs: `command` to its end and, for as long as that takes, `beside` it. A host that only `serves` ends
    with the first one."""

    command: tuple[str, ...]
    beside: tuple[str, ...] = ()
    serves: bool = False


def commands_of(job: ClusterJob, place: ClusterHost, config: Config, own: Path, temporary: Path) -> HostCommands:
    """The part of a host (pure)."""
    worker = ()
    if place.engine_slots and place is not job.head:
        worker = tuple(worker_command(job, place, wants_cuda(config), temporary))
    if not place.ranks:
        return HostCommands(worker, serves=True)
    torchrun = torchrun_command(
        config.run_dir,
        place.ranks,
        (
            f"--nnodes={len(job.trainers)}",
            f"--node-rank={job.trainers.index(place)}",
            f"--local-addr={place.address}",
            f"--master-addr={job.head.address}",
            f"--master-port={job.master_port}",
        ),
        own,
    )
    return HostCommands(tuple(torchrun), worker)


def named(option: str, rank: int | None) -> list[str]:
    """The hosts of --nodes, among which `rank` is a position. Raises ConfigError."""
    nodes = option.split(",")
    for node in nodes:
        if not node.strip():
            raise ConfigError(f"--nodes: {option!r} leaves a node without a name; give all nodes of the job as A,B,C")
        if nodes.count(node) > 1:
            raise ConfigError(f"--nodes: {option!r} names {node} twice; give every node once")
    if rank is None:
        raise ConfigError(f"--node-rank: is missing; give this node's position in --nodes, 0 to {len(nodes) - 1}")
    if not 0 <= rank < len(nodes):
        raise ConfigError(f"--node-rank: {rank} is no position in the {len(nodes)} --nodes; give 0 to {len(nodes) - 1}")
    return nodes


def run(load: Callable[[], Config], names: Sequence[str], rank: int, port: int, validate: Callable[[Config], object]) -> int:
    """This host's part, to its end; returns the exit code. `load` reads the configuration, `validate` checks it on the
    first host, which listens on `port`. Only one host prints why a run failed, and only its exit code is not 0."""
    meeting = None
    try:
        config = load()
    except ConfigError as error:
        return _report(RunFailed("", str(error), user_error=True), names, 0, None) if rank == 0 else 2
    try:
        token = os.environ.get("RAY_AUTH_TOKEN") or (secrets.token_hex(32) if len(names) == 1 else "")
        if not token:
            raise ConfigError("RAY_AUTH_TOKEN: is not set; all hosts of a job need the same (examples/slurm/train.sbatch)")
        meeting = Meeting.join(names, rank, port, token, config.cluster.join_deadline_s, config.cluster.heartbeat_timeout_s)
        with meeting:
            job = _agree(config, meeting, validate)
            place = job.place(names[rank])
            if place is None:
                print(f"host {names[rank]} is not needed", file=sys.stderr)
                return 0
            if len(job.places) == 1:
                for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the launchers' own; a run on one host draws another
                    os.environ.pop(name, None)
                return single_host.train(config, _Grace(config, meeting))
            return _Player(config, meeting, job, place).play()
    except (ValueError, RunFailed) as error:
        failed = of_exception(error, host_name(names[rank]))
        if not (isinstance(error, RunFailed) or failed.user_error):
            raise
        return _report(failed, names, rank, meeting)


def _report(failed: RunFailed, names: Sequence[str], rank: int, meeting: Meeting | None) -> int:
    """Print why the run failed, on one host only; returns the exit code."""
    lost = failed.component.startswith("host ") and not failed.user_error
    if rank and meeting and failed.component != host_name(names[0]):
        return 0  # the first host prints it
    print(f"error: {failed}" if failed.user_error else f"run failed: {failed}", file=sys.stderr)
    return 2 if failed.user_error else EXIT_HOST_LOST if lost else 1


# ------------------------------------------------------------------------------------------------------------ the beginning
def _agree(config: Config, meeting: Meeting, validate: Callable[[Config], object]) -> ClusterJob:
    """The job, checked by the first host before anything starts. Raises ConfigError, DataError or RunFailed."""
    others = [name for name in meeting.names if name != meeting.names[meeting.rank]]
    facts = meeting.gather("what it has", Facts(addresses.own(others), gpus_present() if wants_cuda(config) else 0))

    def make() -> ClusterJob:
        assert facts is not None, "only the first host makes the job"
        job = make_job(config, meeting.names, facts)
        validate(config)
        for place in job.places if len(job.places) > 1 else ():
            print(f"host {place.name} ({place.address} on {place.interface}): {describe(job, place)}", file=sys.stderr)
        return job

    job = meeting.share("the job", make)
    _require_shared(config, meeting)
    return job


def make_job(config: Config, names: Sequence[str], facts: Sequence[Facts]) -> ClusterJob:
    """Raises ConfigError where the hosts do not suffice or are not what is configured."""
    gpus = config.cluster.gpus_per_node if wants_cuda(config) else 0
    plan = plan_nodes(config, names, gpus)
    by_name = dict(zip(names, facts, strict=True))
    for host in plan.hosts:
        if by_name[host.name].gpus != gpus:
            raise ConfigError(
                f"cluster.gpus_per_node: {gpus}, host {host.name} has {by_name[host.name].gpus}; set it to what "
                f"each has, or cluster.device=cpu"
            )
    places = tuple(
        ClusterHost(
            host.name, by_name[host.name].own.address, by_name[host.name].own.interface, host.ranks, host.engine_slots
        )
        for host in plan.hosts
    )
    ports = addresses.free_ports(places[0].address, 2)
    return ClusterJob(places, *ports)


def describe(job: ClusterJob, place: ClusterHost) -> str:
    """What a host does, as text."""
    first = job.first_rank(place.name)
    last = first + place.ranks - 1
    parts = []
    if place.ranks:
        parts.append(f"rank{'s' * (place.ranks > 1)} {first}{f' to {last}' if last > first else ''}")
    if place.engine_slots:
        parts.append(f"room for {place.engine_slots} engine worker{'s' * (place.engine_slots > 1)}")
    if place is job.head:
        parts.append(f"torchrun's store on port {job.master_port}, Ray's head on port {job.ray_port}")
    return ", ".join(parts)


def _require_shared(config: Config, meeting: Meeting) -> None:
    """Each host reads in the run directory what the first one has written, and the other way round. Raises ConfigError."""
    run_dir, names, rank = config.run_dir, meeting.names, meeting.rank
    if len(names) == 1:
        return
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()] if rank == 0 else []
    nonce = meeting.share("a file in the run directory", lambda: _write_nonce(run_dir))
    own = run_dir / f".shared-{nonce}-{rank}"
    seen = rank == 0 or _appears(run_dir / f".shared-{nonce}-0")
    with contextlib.suppress(OSError):
        if seen:
            own.touch()
    reports = meeting.gather("whether it sees the run directory", seen)
    try:
        problem = next(
            (
                name
                for number, (name, ok) in enumerate(zip(names, reports or ()))
                if not ok or not _appears(run_dir / f".shared-{nonce}-{number}")
            ),
            None,
        )
    finally:
        for path in run_dir.glob(f".shared-{nonce}-*") if rank == 0 else ():
            path.unlink(missing_ok=True)

    def verdict() -> None:
        if problem is not None:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise ConfigError(
                f"run.root: {run_dir.absolute()} on host {problem} is not the folder that host {names[0]} has under "
                f"this name; choose one on a file system that all hosts share"
            )

    meeting.share("the run directory", verdict)


def _write_nonce(run_dir: Path) -> str:
    nonce = secrets.token_hex(8)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / f".shared-{nonce}-0").touch()
    return nonce


def _appears(path: Path) -> bool:
    until = time.monotonic() + SHARED_DEADLINE_S
    while True:
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------------------------ the run
class _Grace:
    """What the first host does when the batch script passes Slurm's warning on: the run gets some time to write a checkpoint.
    The script makes a file, upon which this process sends itself SIGUSR1: Slurm's own signals reach every process of the run,
    which can then do nothing but end."""

    def __init__(self, config: Config, meeting: Meeting):
        self._config, self._meeting = config, meeting
        self.over = False
        if meeting.rank == 0 and (path := os.environ.get(STOP_FILE_VARIABLE)):
            threading.Thread(target=self._wait_for, args=(Path(path),), name="stop-file", daemon=True).start()

    def _wait_for(self, path: Path) -> None:
        while not path.exists():
            time.sleep(1)
        if not self.over:
            os.kill(os.getpid(), signal.SIGUSR1)

    def __call__(self, number: signal.Signals) -> float:
        if self.over or self._meeting.failure or number != signal.SIGUSR1:
            return 0.0
        failure.request_stop(self._config.run_dir)
        return self._config.cluster.stop_grace_s


class _Player:
    """A host at its part."""

    def __init__(self, config: Config, meeting: Meeting, job: ClusterJob, place: ClusterHost):
        self.config, self.meeting, self.job, self.place = config, meeting, job, place
        self.first = meeting.rank == 0
        # beyond the first host a folder for its own lock and records; the ranks write to the run's
        self.own = config.run_dir if self.first else config.run_dir / HOSTS_FOLDER / place.name
        self._grace = _Grace(config, meeting)
        self._ended = threading.Event()  # nothing is supervised any more

    def play(self) -> int:
        with single_host.owned(self.own) as ledger:
            variables.settle(self.own, Start.NODES, quiet=not self.first)
            if self.first:
                (self.own / LAUNCH_FILE).write_text(dump_config(self.config), encoding="utf-8")
                (self.own / JOB_FILE).write_text(self.job.to_json(), encoding="utf-8")
            temporary = ledger.make_temporary_folder()
            part = commands_of(self.job, self.place, self.config, self.own, temporary)
            self.meeting.share("the start", lambda: None)  # the first host's records are written, old ones are gone
            ended = self._supervise(part, self._environment(temporary))
            self._grace.over = True
            self._ended.set()
        return self._end(ended)

    def _environment(self, temporary: Path) -> dict[str, str]:
        place = self.place
        environment = without_torchrun(run_environment(self.config, temporary, Start.NODES))
        environment |= addresses.interface_settings(addresses.Own(place.address, place.interface))
        return environment | {
            TAG: run_id(self.own),
            VARIABLE: self.job.to_json(),
            HOST_VARIABLE: place.name,
            ADDRESS_VARIABLE: place.address,
            "OMP_NUM_THREADS": str(trainer_threads(self.config, max(1, place.ranks), wants_cuda(self.config))),
        }

    def _supervise(self, part: HostCommands, environment: dict[str, str]) -> SupervisedExit:
        gpus = range(self.place.ranks, self.place.ranks + self.place.engine_slots)
        of_ray = environment_of_ray(self.config, environment, gpus)
        log = self.config.run_dir / "logs" / f"ray_{self.place.name}.log"
        log.parent.mkdir(exist_ok=True)
        self.meeting.watch(self._stop)
        if not self.first:
            threading.Thread(target=self._wait_for_the_end, args=(part.serves,), name="end", daemon=True).start()
        if part.beside:
            with open(log, "ab") as output:
                subprocess.Popen(
                    part.beside, env=of_ray, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )  # Slurm's signals go to this process's group
        if part.serves:
            # on SIGTERM `ray start` first waits for its parts, up to half a minute; this shell ends at once, and what it
            # leaves is ended as all that a run leaves
            into_log = ("bash", "-c", '"${@:2}" >>"$1" 2>&1 & wait $!', "-", str(log))
            return supervise((*into_log, *part.command), of_ray, self.own, self._grace)
        return supervise(part.command, environment, self.own, self._grace)  # which ends what runs beside, too

    def _stop(self, failed: RunFailed) -> None:
        """A host is lost, or has failed: what runs here ends now. That takes a while, so the first host names the lost one at
        once; the last line of the run does it again."""
        if self.first and not self._ended.is_set():
            print(f"{failed}; ending the run on all hosts", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            failure.record(self.config.run_dir, failed)
        self._end_supervision()

    def _wait_for_the_end(self, serves: bool) -> None:
        """The first host announces when its part is over; a host that only serves ends then."""
        with contextlib.suppress(RunFailed):
            self.meeting.share("the end", lambda: None, threading.TIMEOUT_MAX)
            self._grace.over = True
            if not serves:
                self._ended.wait(ENDED_DEADLINE_S / 2)  # its ranks end by themselves, as those of the first host have
            self._end_supervision()

    def _end_supervision(self) -> None:
        if not self._ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, ended: SupervisedExit) -> int:
        meeting, run_dir = self.meeting, self.config.run_dir
        if not self.first:
            if meeting.failure is None:
                with contextlib.suppress(RunFailed):
                    meeting.gather("its end", ended.status)
                    # stays in the meeting until the first host has reported why the run ended
                    self._leave_after_first()
            return _report(meeting.failure, meeting.names, meeting.rank, meeting) if meeting.failure else 0
        meeting.share("the end", lambda: None)
        with contextlib.suppress(RunFailed):
            meeting.gather("its end", ended.status, ENDED_DEADLINE_S)
        if meeting.failure and not (ended.stopped_by and not meeting.failure.component):
            failure.record_end(run_dir, f"failed: {meeting.failure}")
            return _report(meeting.failure, meeting.names, 0, meeting)
        return single_host.report(run_dir, ended)

    def _leave_after_first(self) -> None:
        until = time.monotonic() + ENDED_DEADLINE_S
        while time.monotonic() < until and not self.meeting.has_left(0):
            time.sleep(0.1)
