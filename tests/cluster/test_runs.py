"""Runs over several hosts, submitted to a real Slurm: they work, and compute what a single host computes."""

import pyarrow.parquet as pq
import pytest
from places import place
from tiny_run import metrics

pytestmark = pytest.mark.slow
LAYOUTS = {
    "data": ["parallel.data=2"],
    "tensor": ["parallel.tensor=2", "sync.mode=gather"],
    "pipeline": ["parallel.pipeline=2", "sync.mode=direct"],
}


def asked(run_dir) -> list[str]:
    """The questions of a run in the order of its steps, once for each group."""
    rows = [row for file in sorted((run_dir / "rollouts").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [row["question_id"] for row in rows if row["sample_index"] == 0]


def test_one_host_trains_and_another_generates(hosts):
    """The short one of every test run. What starts Python in a container is there and does nothing."""
    with place(logging={"wandb": "off", "report": False, "export_hf": True}) as here:
        run_dir = here.run(hosts, 2, "runs", "run.steps=2", environment={"ALPHAMED_EXEC": "env IN_CONTAINER=1"})
        assert sorted(metrics(run_dir)) == [1, 2]
        assert (run_dir / "hf" / "model.safetensors").is_file() and len(asked(run_dir)) == 8


@pytest.mark.matrix
def test_each_of_two_hosts_trains_and_generates(hosts):
    """A rank and an engine on each: gradients and weights cross the network."""
    with place() as here:
        run_dir = here.run(hosts, 2, "runs", "parallel.data=2", "rollout.engines=2", "run.steps=2")
        assert sorted(metrics(run_dir)) == [1, 2] and len(asked(run_dir)) == 8


@pytest.mark.matrix
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("staleness", [0, 1])
def test_every_layout_trains_over_two_hosts_with_the_engine_on_a_third(hosts, layout, staleness):
    """And a single process that replays the same rollouts finds the same losses."""
    with place(
        checkpoint={"every": 2}, evaluation={"files": ["questions.jsonl"], "allow_overlap": True, "after": True}
    ) as here:
        run_dir = here.run(hosts, 3, "runs", *LAYOUTS[layout], f"rollout.max_staleness={staleness}", "run.steps=2")
        assert sorted(metrics(run_dir)) == [1, 2] and (run_dir / "evaluations" / "step_000002.json").is_file()
        again = here.train(
            "alone",
            f"rollout.replay={run_dir}",
            "run.steps=2",
            "evaluation.after=false",
            f"rollout.max_staleness={staleness}",
        )
        for step, found in metrics(run_dir).items():
            alone = metrics(again)[step]
            for name in ("policy/loss", "policy/grad_norm"):
                assert found[name] == pytest.approx(alone[name], rel=2e-4, abs=2e-6), (step, name)
