"""A study of real trainings on a tiny model: a run, a control whose reward is a coin, and the unchanged model; then nothing
is left to do. Bundled and checked, the run is the one that was made."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import DEADLINE_S, Workplace, clean_temporary, metrics

from alphamed.reward.rules import CoinToss
from alphamed.rundir.rollout_files import read_rollouts, rollout_path

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
STEPS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    place = Workplace(
        tmp_path_factory.mktemp("study"),
        run={"name": "base", "steps": STEPS},
        evaluation={"files": ["questions.jsonl"], "allow_overlap": True, "after": True},
    )
    (place.folder / "study.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "base": "run.yaml",
                "deadline_s": DEADLINE_S,
                "settings": {"rollout.deterministic": True},
                "grids": [{"name": "g", "axes": {"seeds": [7]}, "controls": ["random_reward", "unchanged"]}],
            }
        )
    )
    return place


def alphamed(place: Workplace, *words: str) -> subprocess.CompletedProcess[str]:
    with clean_temporary() as environment:
        return subprocess.run(
            [sys.executable, "-m", "alphamed.cli", *words],
            cwd=place.folder,
            capture_output=True,
            text=True,
            timeout=3 * DEADLINE_S,
            env=environment,
        )


def test_a_study_runs_to_its_end_and_is_not_repeated(place):
    done = alphamed(place, "study", "study.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = place.folder / "studies" / "tiny"
    rows = {row["run"]: row for row in csv.DictReader((folder / "results.csv").open())}
    assert {name: (row["status"], row["steps"], row["questions:n"]) for name, row in rows.items()} == {
        "s7": ("finished", "2", "6"),
        "s7-random_reward": ("finished", "2", "6"),
        "s7-unchanged": ("finished", "0", "6"),
    }
    assert sorted(metrics(folder / "runs" / "s7")) == [1, 2]
    _tossed(folder / "runs" / "s7-random_reward")
    assert json.loads((folder / "runs" / "s7-unchanged" / "evaluations" / "step_000000.json").read_text())["step"] == 0
    assert not (folder / "runs" / "s7-unchanged" / "metrics.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("metrics.jsonl")}
    again = alphamed(place, "study", "study.yaml")
    assert again.returncode == 0 and "its output is in" not in again.stdout, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("metrics.jsonl")} == before


def _tossed(run_dir: Path) -> None:
    """Every recorded reward is the coin's, heads and tails both occur, and the update learnt from them."""
    coin, rewards = CoinToss(7), []
    for step in range(1, STEPS + 1):
        for scored in read_rollouts(rollout_path(run_dir, step)):
            rewards += scored.rewards
            samples = [f"{one.group_id}#{one.sample_index}" for one in scored.group.rollouts]
            assert list(scored.rewards) == [coin.reward(sample) for sample in samples]
    assert set(rewards) == {0.0, 1.0}
    assert all(row["policy/grad_norm"] > 0 for row in metrics(run_dir).values())


def test_the_run_is_bundled_and_checked(place):
    done = alphamed(place, "bundle", "studies/tiny/runs/s7", "--out", "s7.tar.gz")
    assert done.returncode == 0, done.stdout + done.stderr
    checked = alphamed(place, "reproduce", "s7.tar.gz", "--check")
    assert checked.returncode == 0 and "ok: data.train.0: in the bundle" in checked.stdout, checked.stdout + checked.stderr
    assert "differs" not in checked.stdout
