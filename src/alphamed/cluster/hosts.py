"""Which host of a job holds how many trainer ranks and engine workers: pure arithmetic, the same for GPUs and for CPUs.

A host has slots: its GPUs, or on CPU as many as it is given to hold. Trainer ranks fill hosts in the order of the list;
engines get the rest of a single host, hosts of their own, or, with `cluster.ranks_per_host`, what it leaves of the
trainer's hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphamed.config.schema import Config
from alphamed.errors import ConfigError


@dataclass(frozen=True, slots=True)
class HostShare:
    """What one host holds: trainer ranks, and slots for the workers of engines (an engine takes as many as it has tensor
    ranks)."""

    name: str
    ranks: int
    engine_slots: int


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The hosts that are needed, in the order of the job's list: trainer ranks are numbered along it."""

    hosts: tuple[HostShare, ...]

    @property
    def trainers(self) -> tuple[HostShare, ...]:
        return tuple(host for host in self.hosts if host.ranks)

    @property
    def engine_hosts(self) -> tuple[HostShare, ...]:
        return tuple(host for host in self.hosts if host.engine_slots)

    def of(self, name: str) -> HostShare | None:
        """A host's share; None where it is not needed."""
        return next((host for host in self.hosts if host.name == name), None)


def plan_nodes(config: Config, nodes: Sequence[str], gpus_per_node: int) -> NodePlan:
    """Place trainer ranks and engines on `nodes`. `gpus_per_node` 0 means CPU.

    Raises ConfigError where the nodes do not suffice, naming needed and present.
    """
    world, ranks = config.parallel.world, config.cluster.ranks_per_host
    engines = config.rollout.engines if config.generates else 0
    if gpus_per_node == 0:
        if len(nodes) == 1:  # all on it: they share the cores, and nothing says how many are too many
            return _named(nodes, [(world, engines * config.rollout.tensor_parallel)])
        slots, mixed = _cpu_slots(config, len(nodes), engines)
    else:
        slots, mixed = gpus_per_node, ranks is not None
    shares = deal(config, engines, slots, mixed, share=config.cluster.share_gpus and gpus_per_node > 0)
    if len(nodes) < len(shares):
        trainers, size = sum(own > 0 for own, _ in shares), config.rollout.tensor_parallel
        kind = "GPUs" if gpus_per_node else "slots"
        raise ConfigError(
            f"cluster: {world} trainer ranks and {engines} engines of {size} {kind} need "
            f"{world + engines * size} {kind} on {trainers} + {len(shares) - trainers} nodes of {slots}, present are "
            f"{len(nodes) * slots} on {len(nodes)}; lower parallel or rollout.engines, or start on more nodes "
            f"(examples/slurm/train.sbatch)"
        )
    return _named(nodes, shares)


def deal(config: Config, engines: int, slots: int, mixed: bool, share: bool) -> list[tuple[int, int]]:
    """(trainer ranks, engine slots) of as many hosts of `slots` as are needed. `mixed`: engines take what ranks leave of the
    trainer's hosts, evenly, before they get hosts of their own. `share`: both are on the GPUs of one host.

    Raises ConfigError where ranks or engines do not fit hosts of this size.
    """
    world, size = config.parallel.world, config.rollout.tensor_parallel
    workers, ranks = engines * size, config.cluster.ranks_per_host
    if share:
        if max(world, workers) > slots:
            raise ConfigError(
                f"cluster.share_gpus: {world} trainer ranks and {workers} engine workers share the GPUs of one "
                f"node, it has {slots}; lower parallel or rollout.engines, or set it to false"
            )
        return [(world, workers)]
    if ranks is not None and ranks > slots:
        raise ConfigError(f"cluster.ranks_per_host: {ranks} is more than the {slots} GPUs of a node; lower it")
    if world + workers <= slots and world <= (ranks or slots):
        return [(world, workers)]
    if slots % size and workers:
        raise ConfigError(
            f"rollout.tensor_parallel: {size} does not divide the {slots} GPUs of a node; choose a divisor, an "
            f"engine stays within its node"
        )
    per_host = min(world, ranks or slots)
    if world % per_host:
        raise ConfigError(
            f"parallel: {config.parallel.axes()} = {world} ranks do not fill nodes of {per_host} "
            f"{'trainer ranks (cluster.ranks_per_host)' if ranks else 'GPUs'}; choose a multiple of {per_host}"
        )
    hosts = world // per_host
    room = (slots - per_host) // size if mixed else 0
    inside = min(engines, hosts * room)
    shares = [(per_host, (inside // hosts + (host < inside % hosts)) * size) for host in range(hosts)]
    left, most = engines - inside, slots // size
    while left:
        shares.append((0, min(left, most) * size))
        left -= min(left, most)
    return shares


def _cpu_slots(config: Config, nodes: int, engines: int) -> tuple[int, bool]:
    """Slots of a CPU host in a job of several, and whether engines share the trainer's hosts: only the settings determine
    how much a CPU can hold. Engines get the hosts that the trainer leaves, evenly, or share its hosts where it takes all."""
    ranks, world, size = config.cluster.ranks_per_host, config.parallel.world, config.rollout.tensor_parallel
    if ranks is None:
        raise ConfigError(
            f"cluster.ranks_per_host: is not set, and on {nodes} hosts without GPUs nothing else says how many "
            f"of the {world} trainer ranks each gets; set it"
        )
    trainers = -(-world // ranks)
    filled = -(-min(ranks, world) // size) * size
    own = nodes - trainers
    if own > 0:
        return max(filled, -(-engines // own) * size), False
    return filled + -(-engines // trainers) * size, True


def _named(nodes: Sequence[str], shares: Sequence[tuple[int, int]]) -> NodePlan:
    return NodePlan(tuple(HostShare(name, *share) for name, share in zip(nodes, shares)))
