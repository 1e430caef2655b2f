"""`alphamed sft` for real: it starts no engine unless asked, survives a kill to the same weights, is evaluated by the grader of
training, and `alphamed train` goes on from what it exports.

The tiny model learns to box A whatever it is asked, which a random one never does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import DEADLINE_S, Workplace, clean_temporary, metrics
from waiting import until

from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id
from alphamed.evaluation.runner import read_scores
from alphamed.rundir.rollout_files import read_rollouts, rollout_path

pytestmark = pytest.mark.slow
STEPS = 30
TRAINING = {
    "run": {"name": "tiny", "steps": STEPS},
    "data": {"train": ["examples.jsonl"]},
    "sft": {"prompts_per_step": 4},
    "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2},
    "checkpoint": {"every": 5},
    "reward": {"name": "correct", "truncated": "grade"},
    "logging": {"wandb": "off", "report": True, "export_hf": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """Examples in several forms; the questions of the tiny runs to evaluate on and to train on afterwards."""
    made = Workplace(tmp_path_factory.mktemp("sft"), **TRAINING)
    box = r"\boxed{A}"
    forms = [
        lambda i: {"question": f"Which is {i}?", "options": {"A": f"a {i}", "B": f"b {i}"}, "responses": [box, box]},
        lambda i: {"prompt": f"Question: Which is {i}?\n\nOptions:\nA: {i}\nB: none", "response": box},
        lambda i: {"messages": [{"role": "user", "content": f"Which? {i}"}, {"role": "assistant", "content": box}]},
    ]
    rows = [forms[i % 3](i) for i in range(9)]
    (made.folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.fixture(scope="module")
def straight(place) -> Path:
    return place.run("sft", "straight")


def test_the_loss_falls_and_no_engine_is_started(place, straight):
    found = metrics(straight)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[1]["policy/loss"] > 4 and found[STEPS]["policy/loss"] < 0.1
    assert found[STEPS]["data/epochs"] == pytest.approx(STEPS * 4 / 9)
    assert found[1]["batch/shared_fraction"] > 0
    log = (straight / "logs" / "rank_0.log").read_text()
    assert not [words for words in ("starting the engines", "EngineCore", "Started a local Ray") if words in log]
    assert "Loss fell" in (straight / "report.html").read_text()
    assert "fine-tuned on given responses" in (straight / "hf" / "README.md").read_text()


def test_a_killed_run_ends_with_the_same_weights(place, straight):
    run_dir = place.run_dir("killed")

    def reached() -> bool:
        assert process.poll() is None, process.stderr.read()
        path = run_dir / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= 7

    with clean_temporary() as environment:
        process = subprocess.Popen(
            place.command("sft", "killed"), cwd=place.folder, env=environment, stderr=subprocess.PIPE, text=True
        )
        until(reached, "step 7", DEADLINE_S, pause_s=0.05)
        living = processes.tagged(run_id(run_dir), processes.everything())
        ranks = [one.pid for one in living.values() if re.search(r"alphamed\.cli worker", one.command)]
        rank = next(pid for pid in ranks if "\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_text())  # not torchrun's agent
        os.kill(rank, signal.SIGKILL)
        said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 1 and "was killed by signal 9" in said.splitlines()[-1], said
    place.run("sft", "killed")
    again, once = metrics(run_dir), metrics(straight)
    assert sorted(again) == list(range(1, STEPS + 1))
    for step in once:
        for name in ("policy/loss", "policy/grad_norm", "policy/lr", "data/epochs"):
            assert again[step][name] == pytest.approx(once[step][name], rel=1e-5, abs=1e-6), f"step {step}: {name}"
    one, other = (load_file(run / "hf" / "model.safetensors") for run in (straight, run_dir))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    starts = json.loads((run_dir / "provenance.json").read_text())["starts"]
    assert [start["continued_after_step"] for start in starts] in ([0, 5], [0, 10], [0, 15])


def test_evaluation_before_during_and_after(place):
    wanted = ["evaluation.files=[questions.jsonl]", "evaluation.before=true", "evaluation.every=15", "evaluation.after=true"]
    run_dir = place.run("sft", "evaluated", *wanted)
    boxed = {}
    for step in (0, 15, 30):
        (score,) = read_scores(run_dir / "evaluations" / f"step_{step:06d}.json").values()
        boxed[step] = (score.boxed.value, score.accuracy.value)
    assert boxed[0][0] == 0
    assert boxed[30] == (1.0, pytest.approx(1 / 3))  # A is right for every third question
    assert metrics(run_dir).keys() == set(range(1, STEPS + 1))


def test_train_goes_on_from_the_export(place, straight):
    """The engines answer with what was taught, and agree with the policy on its log-probs."""
    run_dir = place.run(
        "train", "rl", f"model.path={straight / 'hf'}", "sft=null", "data.train=[questions.jsonl]", "run.steps=2",
        "optimizer.warmup_steps=0", "optimizer.lr=1e-6",
    )  # fmt: skip
    found = metrics(run_dir)
    assert found[1]["policy/logprob_diff_max"] < 1e-3
    assert found[1]["reward/boxed"] > 0.9
    texts = [r.text for scored in read_rollouts(rollout_path(run_dir, 1)) for r in scored.group.rollouts]
    assert sum(text.startswith(r"\boxed{A}") for text in texts) > 0.9 * len(texts)
