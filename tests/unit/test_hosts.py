"""Which host holds how many trainer ranks and engine workers."""

from pathlib import Path

import pytest

from alphamed.cluster import placement
from alphamed.cluster.hosts import HostShare, plan_nodes
from alphamed.config.loading import build_config, load_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError

ROOT = Path(__file__).parents[2]
NODES = tuple("abcdefgh")


def config(**sections) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}} | sections
    return build_config(tree)


def layout(
    tensor: int, pipeline: int, data: int, engines: int, engine_gpus: int, ranks_per_host: int | None = None
) -> Config:
    return config(
        parallel={"tensor": tensor, "pipeline": pipeline, "data": data},
        rollout={"engines": engines, "tensor_parallel": engine_gpus},
        cluster={"ranks_per_host": ranks_per_host},
    )


def shares(shape: Config, nodes: int, gpus: int) -> list[tuple[str, int, int]]:
    return [(host.name, host.ranks, host.engine_slots) for host in plan_nodes(shape, NODES[:nodes], gpus).hosts]


@pytest.mark.parametrize(
    "shape, nodes, gpus, expected",
    [
        # one host: trainer and engines share it, on GPUs of their own
        ((4, 1, 1, 4, 1), 1, 8, [("a", 4, 4)]),
        ((1, 1, 1, 1, 1), 1, 0, [("a", 1, 1)]),  # CPU
        ((2, 2, 2, 1, 1), 1, 0, [("a", 8, 1)]),
        ((2, 2, 2, 1, 1, 1), 1, 0, [("a", 8, 1)]),  # a CPU host takes all that there is, where it is alone
        # 32 ranks fill four hosts, two engines of 8 two more
        ((8, 4, 1, 2, 8), 6, 8, [(name, 8, 0) for name in "abcd"] + [("e", 0, 8), ("f", 0, 8)]),
        ((8, 4, 1, 2, 8), 8, 8, [(name, 8, 0) for name in "abcd"] + [("e", 0, 8), ("f", 0, 8)]),  # g and h are not needed
        ((8, 1, 1, 4, 2), 2, 8, [("a", 8, 0), ("b", 0, 8)]),
        (
            (4, 1, 1, 3, 2),
            2,
            8,
            [("a", 4, 0), ("b", 0, 6)],
        ),  # what is left of the trainer's host stays free unless asked for
        ((8, 2, 1, 5, 4), 5, 8, [("a", 8, 0), ("b", 8, 0), ("c", 0, 8), ("d", 0, 8), ("e", 0, 4)]),
        # half of each host trains, half generates
        ((4, 1, 2, 4, 2, 4), 2, 8, [("a", 4, 4), ("b", 4, 4)]),
        ((4, 1, 4, 5, 2, 4), 4, 8, [("a", 4, 4), ("b", 4, 2), ("c", 4, 2), ("d", 4, 2)]),
        ((4, 1, 2, 3, 4, 4), 3, 8, [("a", 4, 4), ("b", 4, 4), ("c", 0, 4)]),  # more than the halves hold
        ((2, 1, 3, 2, 8, 6), 3, 8, [("a", 6, 0), ("b", 0, 8), ("c", 0, 8)]),  # the rest is too small for an engine
        # hosts without GPUs: engines on those that the trainer leaves
        ((1, 1, 2, 1, 1, 1), 3, 0, [("a", 1, 0), ("b", 1, 0), ("c", 0, 1)]),
        ((2, 1, 2, 2, 2, 2), 3, 0, [("a", 2, 0), ("b", 2, 0), ("c", 0, 4)]),
        ((3, 1, 1, 1, 2, 4), 2, 0, [("a", 3, 0), ("b", 0, 2)]),
        # or beside it, where it takes all
        ((1, 1, 2, 2, 1, 1), 2, 0, [("a", 1, 1), ("b", 1, 1)]),
        ((2, 1, 2, 1, 2, 2), 2, 0, [("a", 2, 2), ("b", 2, 0)]),
    ],
)
def test_hosts_are_dealt_out(shape, nodes, gpus, expected):
    assert shares(layout(*shape), nodes, gpus) == expected


@pytest.mark.parametrize(
    "shape, nodes, gpus, words",
    [
        ((8, 1, 1, 1, 1), 1, 8, ("9 GPUs", "1 + 1 nodes", "present are 8 on 1")),
        ((8, 4, 1, 2, 8), 5, 8, ("48 GPUs", "4 + 2 nodes", "present are 40 on 5")),
        ((4, 3, 1, 1, 1), 4, 8, ("12 ranks", "multiple of 8")),
        ((8, 1, 1, 1, 3), 2, 8, ("rollout.tensor_parallel", "3", "divisor")),
        ((4, 1, 3, 1, 1, 5), 4, 8, ("12 ranks", "cluster.ranks_per_host", "multiple of 5")),
        ((4, 1, 2, 4, 2, 4), 1, 8, ("16 GPUs", "2 + 0 nodes", "present are 8 on 1")),
        ((8, 1, 2, 1, 1, 16), 4, 8, ("cluster.ranks_per_host: 16", "8 GPUs")),
        ((1, 1, 2, 1, 1), 3, 0, ("cluster.ranks_per_host", "3 hosts without GPUs", "2 trainer ranks")),
        ((1, 1, 4, 1, 1, 1), 3, 0, ("4 trainer ranks", "4 + 0 nodes", "on 3")),
    ],
)
def test_hosts_that_do_not_suffice_are_named_with_needed_and_present(shape, nodes, gpus, words):
    with pytest.raises(ConfigError) as error:
        plan_nodes(layout(*shape), NODES[:nodes], gpus)
    assert all(word in str(error.value) for word in words), error.value


def test_engines_may_share_the_gpus_of_the_trainer():
    shared = config(cluster={"share_gpus": True, "device": "cuda"})
    assert plan_nodes(shared, ["a"], 1).hosts == (HostShare("a", 1, 1),)
    two = config(cluster={"share_gpus": True, "device": "cuda"}, parallel={"tensor": 2}, rollout={"engines": 2})
    assert plan_nodes(two, ["a", "b"], 2).hosts == (HostShare("a", 2, 2),)
    with pytest.raises(ConfigError, match="cluster.share_gpus: 2 trainer ranks and 2 engine workers .* it has 1; lower"):
        plan_nodes(two, ["a"], 1)


def test_shared_gpus_are_all_open_to_engines(monkeypatch):
    monkeypatch.setattr(placement, "gpus_present", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert placement.engine_gpus(config(cluster={"device": "cuda"}), 2) == [2, 3]
    assert placement.engine_gpus(config(cluster={"device": "cuda", "share_gpus": True}), 2) == [0, 1, 2, 3]


def test_replayed_rollouts_need_no_engine_hosts():
    replayed = config(parallel={"tensor": 8}, rollout={"engines": 4, "replay": "runs/old"})
    assert plan_nodes(replayed, ["a"], 8).hosts == (HostShare("a", 8, 0),)
    over_two = config(parallel={"data": 2}, rollout={"replay": "runs/old"}, cluster={"ranks_per_host": 1})
    assert plan_nodes(over_two, ["a", "b", "c"], 0).hosts == (HostShare("a", 1, 0), HostShare("b", 1, 0))


@pytest.mark.parametrize("name, nodes", [("train_alphamed_8b", 1), ("train_alphamed_70b", 6)])
def test_shipped_configurations_fit_the_nodes_that_they_name(name, nodes):
    shipped = load_config(ROOT / "examples" / f"{name}.yaml")
    assert len(plan_nodes(shipped, NODES[:nodes], shipped.cluster.gpus_per_node).hosts) == nodes
    if nodes > 1:
        with pytest.raises(ConfigError):
            plan_nodes(shipped, NODES[: nodes - 1], shipped.cluster.gpus_per_node)
