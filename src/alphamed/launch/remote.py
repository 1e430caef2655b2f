"""A run on several hosts without Slurm: this process starts a launcher on each over ssh, and ends them with itself.

What a launcher needs to know goes over ssh's standard input, never over a command line that others can read. That input stays
open: when it ends, because this process has ended however that came, the launcher ends the run on its host.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster.addresses import FIRST_PORT, LAST_PORT
from alphamed.cluster.cluster_job import ClusterHost, ClusterJob
from alphamed.cluster.failure import HOSTS_FOLDER
from alphamed.cluster.hardware import wants_cuda
from alphamed.cluster.hosts import NodePlan, plan_nodes
from alphamed.cluster.variables import Start, rule_of
from alphamed.config.choices import Device
from alphamed.config.loading import load_run
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.launch import nodes

SSH_VARIABLE = "ALPHAMED_SSH"
"""How ssh is called, where `ssh` alone does not do (`ssh -F file -p 2222`)."""
PASSED_ON = ("TMPDIR", "ALPHAMED_")
"""Names, or beginnings of them, of variables that the launchers get from here in addition to those that a run honours."""
SSH_FAILED = 255
END_DEADLINE_S = 60.0
BATCH_SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "slurm" / "train.sbatch"


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """What one launcher receives. `arguments`: configuration file, then overrides."""

    folder: str
    environment: dict[str, str]
    arguments: list[str]
    names: list[str]
    rank: int
    port: int


def main(options: argparse.Namespace) -> int:
    config = load_run(options.config, options.overrides)
    if options.slurm and not options.dry_run:
        raise ConfigError(
            "--slurm: only shows what a job would do; add --dry-run, or submit it with `sbatch -N HOSTS "
            "examples/slurm/train.sbatch CONFIG`"
        )
    names = nodes.named(options.hosts, 0) if options.hosts else [f"host{i + 1}" for i in range(fewest(config))]
    if options.dry_run:
        print(preview(config, names, options.config, options.overrides, options.slurm))
        return 0
    return start(names, options.config, options.overrides)


# ------------------------------------------------------------------------------------------------------- what would be done
def fewest(config: Config) -> int:
    """The fewest hosts that a run needs. Raises ConfigError."""
    if not _on_cuda(config):
        ranks = config.cluster.ranks_per_host
        return 1 if ranks is None else -(-config.parallel.world // ranks) + config.generates
    count = 1
    while True:
        try:
            plan_nodes(config, [f"host{i}" for i in range(count)], config.cluster.gpus_per_node)
            return count
        except ConfigError as error:
            if "present are" not in str(error):  # too few is the only thing that more of them repair
                raise
            count += 1


def preview(config: Config, names: Sequence[str], file: Path, overrides: Sequence[str], slurm: bool) -> str:
    """What each host will run; with `slurm` the batch script and its submission before."""
    plan = plan_nodes(config, names, config.cluster.gpus_per_node if _on_cuda(config) else 0)
    lines = []
    if slurm:
        command = shlex.join(["sbatch", "-N", str(len(plan.hosts)), "examples/slurm/train.sbatch", str(file), *overrides])
        lines += [f"# {command}", BATCH_SCRIPT.read_text(encoding="utf-8")]
    return "\n".join(lines + _parts(config, plan))


def _parts(config: Config, plan: NodePlan) -> list[str]:
    job = ClusterJob(
        tuple(ClusterHost(host.name, host.name, "", host.ranks, host.engine_slots) for host in plan.hosts), 29500, 6379
    )
    lines = ["# Addresses and ports are found when the job starts; each launcher runs, under its supervisor:"]
    for place in job.places:
        own = config.run_dir if place is job.head else config.run_dir / HOSTS_FOLDER / place.name
        part = nodes.commands_of(job, place, config, own, Path("TMPDIR"))
        lines += [f"# {place.name}: {nodes.describe(job, place)}"]
        lines += [shlex.join(command) for command in (part.command, part.beside) if command]
    return lines


def _on_cuda(config: Config) -> bool:
    """Of the hosts that will run it, not of this one."""
    return config.cluster.device != Device.CPU and (
        config.cluster.device == Device.CUDA or config.cluster.ranks_per_host is None or wants_cuda(config)
    )


# ---------------------------------------------------------------------------------------------------------------- over ssh
def start(names: Sequence[str], file: Path, overrides: Sequence[str]) -> int:
    """Run on these hosts to the end; returns the exit code. However this process ends, the launchers end too."""
    port = random.SystemRandom().randrange(FIRST_PORT, LAST_PORT)
    passed = passed_on(os.environ) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    stopped: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: stopped.append(received))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    launchers: list[subprocess.Popen] = []
    try:
        for rank, name in enumerate(names):
            order = LaunchOrder(os.getcwd(), passed, [str(file), *overrides], list(names), rank, port)
            launchers.append(_launch(name, order))
        return _wait(names, launchers, stopped)
    finally:
        _end(launchers)
        for number, handler in before.items():
            signal.signal(number, handler)


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What the launchers get of this process's environment: what a run over several hosts honours, as under Slurm, which hands
    over everything."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(PASSED_ON) or (rule := rule_of(name)) is not None and Start.NODES in rule.honoured
    }


def _launch(name: str, order: LaunchOrder) -> subprocess.Popen:
    ssh = shlex.split(os.environ.get(SSH_VARIABLE, "ssh"))
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(_FIRST_WORDS)}"
    # a session of its own: a terminal's Ctrl-C reaches this process alone, which ends the others cleanly
    launcher = subprocess.Popen(
        [*ssh, "-o", "BatchMode=yes", "-T", name, command], stdin=subprocess.PIPE, start_new_session=True
    )
    assert launcher.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        launcher.stdin.write(json.dumps({slot: getattr(order, slot) for slot in LaunchOrder.__slots__}).encode() + b"\n")
        launcher.stdin.flush()
    return launcher


_FIRST_WORDS = """
import json, os, sys
order = json.loads(sys.stdin.readline())
os.environ.update(order["environment"])
os.chdir(order["folder"])
sys.path[:0] = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
from alphamed.launch.remote import serve
from alphamed.lab.hooks import check
sys.exit(serve(order, check))
"""


def _wait(names: Sequence[str], launchers: Sequence[subprocess.Popen], stopped: Sequence[int]) -> int:
    while True:
        status = [launcher.poll() for launcher in launchers]
        for name, code in zip(names, status, strict=True):
            if code == SSH_FAILED:
                print(
                    f"run failed: host {name}: ssh could not start or keep the launcher there; see its messages above, and try "
                    f"`ssh {name} true`",
                    file=sys.stderr,
                )
                return 1
        if stopped:
            print(
                f"stopped by {signal.Signals(stopped[0]).name}; the same command continues it from its last checkpoint",
                file=sys.stderr,
            )
            return 128 + stopped[0]
        codes = [code for code in status if code is not None]
        if len(codes) == len(launchers):
            return codes[0] or max(codes)
        time.sleep(0.2)


def _end(launchers: Sequence[subprocess.Popen]) -> None:
    """Close their inputs, by which they end; what does not is left to the hosts after the deadline."""
    for launcher in launchers:
        with contextlib.suppress(OSError):
            if launcher.stdin:
                launcher.stdin.close()
    until = time.monotonic() + END_DEADLINE_S
    for launcher in launchers:
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(max(0.1, until - time.monotonic()))
        if launcher.poll() is None:
            launcher.kill()
            launcher.wait()


# --------------------------------------------------------------------------------------------------------- on the far side
def serve(order: dict, validate: Callable[[Config], object]) -> int:
    """The launcher of one host. Its input ends with the process that started it. `validate`: as for `nodes.run`."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    file, *overrides = order["arguments"]
    try:
        return nodes.run(lambda: load_run(Path(file), overrides), order["names"], order["rank"], order["port"], validate)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
