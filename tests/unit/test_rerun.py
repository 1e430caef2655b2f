"""Running a recorded update again: what is compared, what is needed, and that the run itself stays as it was."""

import pytest

from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.files import append_json
from alphamed.replay.update import COMPARED, compare, prepare, recorded_metrics, replay_config

ROW = dict.fromkeys(COMPARED, 0.5)


@pytest.fixture
def run_dir(tmp_path):
    """A run with steps 1 to 6 recorded and the checkpoint of step 4."""
    root = tmp_path / "runs" / "one"
    for folder in ("rollouts", "checkpoints/step_000004"):
        (root / folder).mkdir(parents=True)
    (root / "checkpoints" / "step_000004" / "weights").write_text("w")
    for step in range(1, 7):
        (root / "rollouts" / f"step_{step:06d}.parquet").write_bytes(b"x")
        append_json(root / "metrics.jsonl", {"step": step, "policy/loss": step / 10})
    config = build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["a.jsonl"]},
            "run": {"name": "one", "steps": 9},
            "optimizer": {"lr": 1e-5, "schedule": "linear"},
            "evaluation": {"files": ["e.jsonl"], "before": True},
        }
    )
    (root / "config.yaml").write_text(dump_config(config))
    return root


def test_the_replay_keeps_the_schedule_and_ends_after_the_step(run_dir):
    config = replay_config(run_dir, 5, ["optimizer.lr=2e-5"])
    assert (config.run.steps, config.run.last_step) == (9, 5)
    assert config.run_dir == run_dir / "replays" / "step_000005" and config.rollout.replay == run_dir
    assert config.optimizer.lr == 2e-5 and not config.evaluation.before


def test_the_checkpoint_before_is_linked_and_the_run_untouched(run_dir):
    scratch = run_dir / "replays" / "step_000005"
    prepare(run_dir, 5, scratch)
    assert (scratch / "checkpoints" / "step_000004" / "weights").read_text() == "w"
    assert (scratch / "checkpoints" / "latest").read_text() == "step_000004\n"
    (scratch / "left over").write_text("")
    prepare(run_dir, 1, scratch)  # the first step starts from the model itself
    assert [p.name for p in scratch.rglob("*")] == ["checkpoints"]
    assert (run_dir / "checkpoints" / "step_000004" / "weights").exists()


def test_what_can_not_be_run_again_is_said(run_dir):
    with pytest.raises(ConfigError, match="no rollouts of step 7"):
        prepare(run_dir, 7, run_dir / "replays" / "s")
    with pytest.raises(ConfigError, match="checkpoint of step 2, which is not kept; steps that can be run again: 1, 5 "):
        prepare(run_dir, 3, run_dir / "replays" / "s")
    with pytest.raises(ConfigError, match="holds no step 8"):
        recorded_metrics(run_dir, 8)


@pytest.mark.parametrize("change, same", [(0.0, True), (0.4e-4, True), (2e-4, False)])
def test_rounding_is_no_difference(change, same):
    lines, agree = compare(ROW, ROW | {"policy/grad_norm": 0.5 * (1 + change)})
    assert agree is same
    assert ("differs" in next(line for line in lines if "grad_norm" in line)) is not same


def test_a_number_that_is_missing_on_one_side_differs():
    assert not compare(ROW, {k: v for k, v in ROW.items() if k != "policy/kl"})[1]
