"""One node's part of a run over several: its torchrun, or its share of Ray, under a supervisor of its own.

Slurm starts `alphamed launch --nodes A,B,C --node-rank N` once per node. The first node trains, and holds Ray's head
beside its ranks; nodes after the trainer's hold engines. A node ends when its part ends; engine nodes end with the
head.
"""
from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster import launch, variables
from alphamed.cluster.environment import run_environment
from alphamed.cluster.hardware import gpus_present, trainer_threads
from alphamed.cluster.launch import LAUNCH_FILE, NodePlan, plan_nodes, torchrun_command
from alphamed.cluster.ledger import run_id
from alphamed.cluster.processes import TAG
from alphamed.cluster.supervisor import supervise
from alphamed.cluster.variables import Start
from alphamed.config import Config, ConfigError
from alphamed.config_file import dump_config
from alphamed.preflight import validate

RENDEZVOUS_PORT = 29500
RAY_PORT = 6379
HEAD_DEADLINE_S = 300.0


@dataclass(frozen=True, slots=True)
class Part:
    """What one node runs: `command` to its end and, for as long as that takes, `beside` it. Where `waits_for_head`,
    once Ray's head answers."""
    command: tuple[str, ...]
    beside: tuple[str, ...] = ()
    waits_for_head: bool = False


def part_of(plan: NodePlan, node: str, run_dir: Path, gpus: int) -> Part:
    """The part of `node` (pure). Every node is in exactly one of the plan's lists."""
    head = plan.trainer_nodes[0]
    ray = (sys.executable, "-m", "alphamed.cluster.quiet_ray", "start", "--block", "--disable-usage-stats")
    if node in plan.engine_nodes:
        return Part((*ray, f"--address={head}:{RAY_PORT}", f"--num-gpus={gpus}"), waits_for_head=True)
    torchrun = torchrun_command(run_dir, plan.ranks_per_node, (
        f"--nnodes={len(plan.trainer_nodes)}", f"--node-rank={plan.trainer_nodes.index(node)}",
        f"--master-addr={head}", f"--master-port={RENDEZVOUS_PORT}"))
    if node != head:
        return Part(tuple(torchrun))
    # no GPUs for Ray here: the trainer's ranks have them
    beside = (*ray, "--head", f"--port={RAY_PORT}", "--num-gpus=0", "--include-dashboard=false")
    return Part(tuple(torchrun), beside)


def named(given: str, rank: int | None) -> list[str]:
    """The nodes of --nodes, among which `rank` is a position. Raises ConfigError."""
    nodes = given.split(",")
    for node in nodes:
        if not node.strip():
            raise ConfigError(f"--nodes: {given!r} leaves a node without a name; give all nodes of the job as A,B,C")
        if nodes.count(node) > 1:
            raise ConfigError(f"--nodes: {given!r} names {node} twice; give every node once")
    if rank is None:
        raise ConfigError(f"--node-rank: is missing; give this node's position in --nodes, 0 to {len(nodes) - 1}")
    if not 0 <= rank < len(nodes):
        raise ConfigError(f"--node-rank: {rank} is no position in the {len(nodes)} --nodes; give 0 to {len(nodes) - 1}")
    return nodes


def run(config: Config, nodes: Sequence[str], rank: int) -> int:
    """This node's part, to its end; returns the exit code. Raises ConfigError where the nodes do not suffice."""
    node, gpus = nodes[rank], config.cluster.gpus_per_node
    plan = plan_nodes(config, nodes, gpus)
    if gpus_present() != gpus:
        raise ConfigError(f"cluster.gpus_per_node: {gpus}, node {node} has {gpus_present()}; set it to what each has")
    if node not in (*plan.trainer_nodes, *plan.engine_nodes):
        print(f"node {node} is not needed", file=sys.stderr)
        return 0
    if rank == 0:
        validate(config).print_notes()
    if plan.shared:
        return launch.train(config)
    # beyond the first node a folder for its own lock and records; the ranks write to the run's
    own = config.run_dir if rank == 0 else config.run_dir / "nodes" / node
    with launch.owned(own) as ledger:
        variables.settle(own, Start.NODES, quiet=rank > 0)
        if rank == 0:
            (own / LAUNCH_FILE).write_text(dump_config(config), encoding="utf-8")
        return _play(config, plan, part_of(plan, node, config.run_dir, gpus), own, ledger.make_temporary_folder())


def _play(config: Config, plan: NodePlan, part: Part, own: Path, temporary: Path) -> int:
    head = plan.trainer_nodes[0]
    environment = run_environment(config, temporary, Start.NODES) | {
        TAG: run_id(own), "RAY_ADDRESS": f"{head}:{RAY_PORT}",
        "OMP_NUM_THREADS": str(trainer_threads(config, plan.ranks_per_node, on_cuda=True))}
    if part.waits_for_head:
        wait_for(head, RAY_PORT, HEAD_DEADLINE_S)
    if part.beside:
        beside = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
        subprocess.Popen(part.beside, env=beside, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        wait_for(head, RAY_PORT, HEAD_DEADLINE_S)
    ended = supervise(part.command, environment, own)     # which ends what runs beside, too
    if part.waits_for_head:
        return 0                                # it goes when the head goes; the first node says how the run went
    return launch.report(own, ended)


def wait_for(host: str, port: int, deadline_s: float) -> None:
    """Until somebody listens there. Raises ConfigError after the deadline."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise ConfigError(f"Ray's head on {host}:{port} did not answer within {deadline_s:.0f} s; see the first node")
