"""From a checked configuration to running processes: torchrun's command, the whole of `alphamed train`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alphamed.cluster import failure, variables
from alphamed.cluster.environment import run_environment
from alphamed.cluster.hardware import gpus_present, trainer_threads, wants_cuda
from alphamed.cluster.hosts import plan_nodes
from alphamed.cluster.ledger import Ledger, Lock, clean_up_dead_runs
from alphamed.cluster.variables import Start
from alphamed.config.loading import dump_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed
from alphamed.launch.supervisor import Grace, SupervisedExit, supervise

SHUTDOWN_TIMEOUT_S = 10
"""What torchrun gives its workers between SIGTERM and SIGKILL: a rank that is stuck delays the end by this much."""
LAUNCH_FILE = "launch.yaml"
"""The resolved configuration that the ranks read. (config.yaml in the same folder is the run's own record.)"""

START_MARK = "=== started"
"""Begins the part of every start in a rank's log, to which each start appends."""


def check_world(config: Config, environment: Mapping[str, str]) -> None:
    """Raises ConfigError where torchrun started another number of ranks than the layout has."""
    needed, present = config.parallel.world, int(environment.get("WORLD_SIZE", "1"))
    if needed == present:
        return
    p, per_node = config.parallel, min(needed, config.cluster.ranks_per_host or config.cluster.gpus_per_node)
    raise ConfigError(
        f"parallel: {p.axes()} needs {needed} ranks, torchrun started "
        f"{present}; export PET_NNODES={-(-needed // per_node)} PET_NPROC_PER_NODE={per_node} (and PET_NODE_RANK, "
        f"PET_MASTER_ADDR on several nodes) or change parallel"
    )


def refuse_sbatch(script: Path, environment: Mapping[str, str]) -> None:
    """Raises ConfigError where Slurm runs the launcher itself as a batch script: it would run on the first node only,
    from a copy in Slurm's spool folder that knows neither its configuration nor its interpreter."""
    if script.name == "slurm_script" and "SLURM_JOB_ID" in environment:
        name = Path(environment.get("SLURM_JOB_NAME", "train_alphamed_70b.sh")).stem
        raise ConfigError(
            f"sbatch {name}.sh: a launcher is no batch script; submit it with "
            f"`sbatch examples/slurm/train.sbatch examples/{name}.yaml [key=value ...]`"
        )


def config_of_script(script: Path) -> Path:
    """A launcher's configuration has its name: train_alphamed_8b.sh -> train_alphamed_8b.yaml."""
    return script.with_suffix(".yaml")


# ------------------------------------------------------------------------------------------------------------- one node
def torchrun_command(
    run_dir: Path,
    ranks: int,
    rendezvous: Sequence[str] = ("--standalone", "--local-addr=127.0.0.1"),
    own: Path | None = None,
) -> list[str]:
    """The agent that starts `ranks` workers on this node. `own`: the folder for this host's records."""
    return [
        sys.executable,
        "-m",
        "alphamed.launch.agent",
        str(own or run_dir),
        *rendezvous,
        f"--nproc-per-node={ranks}",
        f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}",
        "-m",
        "alphamed.cli",
        "worker",
        "--config",
        str(run_dir / LAUNCH_FILE),
    ]


def single_node_environment(config: Config, temporary: Path) -> dict[str, str]:
    env = run_environment(config, temporary, Start.ONE_HOST)
    env["OMP_NUM_THREADS"] = str(trainer_threads(config, config.parallel.world, wants_cuda(config)))
    env["GLOO_SOCKET_IFNAME"] = "lo"  # works without any network, and host names need not resolve
    return env


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[Ledger]:
    """Make the run directory, keep other starts out of it, clean up after dead ones.

    Raises ConfigError where the run is being run, or its directory cannot be made."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.root: {run_dir} cannot be made ({error.strerror}); choose another") from None
    lock = Lock(run_dir)
    lock.take()
    try:
        for path, done in clean_up_dead_runs(run_dir.parent).items():
            print(f"{path}: an earlier start died; {done}", file=sys.stderr)
        ledger = Ledger(run_dir)
        done = ledger.clean_up()  # also what carries the tag but was never written down
        if done.ended or done.segments:
            print(f"{run_dir}: an earlier start died; {done}", file=sys.stderr)
        failure.forget(run_dir)
        failure.reserve(run_dir)
        yield ledger
    finally:
        failure.release(run_dir)
        lock.release()


def train(config: Config, grace: Grace | None = None) -> int:
    """Run training on this machine under a supervisor; returns the exit code. The configuration has been checked."""
    gpus = gpus_present() if wants_cuda(config) else 0
    plan = plan_nodes(config, ["localhost"], gpus)
    run_dir = config.run_dir
    with owned(run_dir) as ledger:
        variables.settle(run_dir, Start.ONE_HOST)
        (run_dir / LAUNCH_FILE).write_text(dump_config(config), encoding="utf-8")
        environment = single_node_environment(config, ledger.make_temporary_folder())
        ended = supervise(torchrun_command(run_dir, plan.hosts[0].ranks), environment, run_dir, grace)
        return report(run_dir, ended)


def report(run_dir: Path, ended: SupervisedExit) -> int:
    """Say on stderr how the run ended where it did not end well; returns the exit code."""
    if ended.clean_up.stuck:
        print(f"warning: {ended.clean_up}", file=sys.stderr)
    if ended.stopped_by:
        # sent by the launcher itself, once the batch script has passed the warning on
        by = "Slurm's warning" if ended.stopped_by == signal.SIGUSR1 else ended.stopped_by.name
        failure.record_end(run_dir, f"stopped by {by}")
        print(f"run stopped by {by}; the same command continues it from its last checkpoint", file=sys.stderr)
        return 128 + ended.stopped_by
    if ended.status == 0:
        failure.record_end(run_dir, "ended")
        print(f"CPU time of all processes: {ended.cpu_s:,.0f} s", file=sys.stderr)
        return 0
    verdict = failure.verdict(run_dir, ended.status)
    failure.record_end(run_dir, f"failed: {verdict}")
    if verdict.user_error:
        print(f"error: {verdict}", file=sys.stderr)
        return 2
    show_log_tail(run_dir, verdict)
    print(f"run failed: {verdict}", file=sys.stderr)
    return 1


def show_log_tail(run_dir: Path, verdict: RunFailed, lines: int = 25) -> None:
    """The end of the failed component's log: its traceback, most likely."""
    rank = verdict.component.split()[1] if verdict.component.startswith("rank ") else "0"
    path = run_dir / "logs" / f"rank_{rank}.log"
    if path.is_file():
        this_start = path.read_text(encoding="utf-8", errors="replace").rpartition(START_MARK)[2]
        words = this_start.splitlines()[1:][-lines:]
        print(f"--- the last lines of {path}", *words, "---", sep="\n", file=sys.stderr)
