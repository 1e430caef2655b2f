"""The card of an exported model: training data, evaluation, warnings, and that it is not for clinical use."""

import json

import pytest
import yaml
from test_report import C, U, W, evaluate, graded, row

from alphamed.config.loading import build_config, changed_config, dump_config
from alphamed.files import append_json, replace_text
from alphamed.lab.reports.model_card import write_card
from alphamed.rundir.rollout_files import rollout_path, write_rollouts

RECORD = {
    "starts": [
        {"time": "2026-01-02T03:04:05+00:00", "command": [], "git": {"commit": "c" * 40}, "packages": {"alphamed": "0.1.0"}}
    ],
    "data": [{"path": "/home/someone/data/train.jsonl", "bytes": 12345, "sha256": "ab" * 32, "hashed": "all"}],
    "model": [],
    "train": {
        "questions": 1200,
        "content_sha256": "cd" * 32,
        "sources": {"medqa": 1000, "medmcqa": 200},
        "levels": {"1": 900, "6": 300},
        "informativeness": {"2": 700, "none": 500},
    },
}


@pytest.fixture
def run_dir(tmp_path):
    run_dir = tmp_path / "run"
    config = build_config({"model": {"path": "/models/Qwen2.5-3B-Instruct"}, "data": {"train": ["train.jsonl"]}})
    replace_text(run_dir / "config.yaml", dump_config(config))
    for step in range(1, 13):
        append_json(run_dir / "metrics.jsonl", row(step))
    (run_dir / "hf").mkdir()
    return run_dir, config


def written(run_dir, config, step=None):
    write_card(run_dir, config, run_dir / "hf", step)
    return (run_dir / "hf" / "README.md").read_text()


def test_the_card_has_data_evaluation_and_limits(run_dir):
    run_dir, config = run_dir
    replace_text(run_dir / "provenance.json", json.dumps(RECORD))
    evaluate(run_dir, 0, [W] * 60 + [C] * 10 + [U] * 130)
    evaluate(run_dir, 12, [C] * 150 + [W] * 40 + [U] * 10)
    text = written(run_dir, config)
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "Qwen2.5-3B-Instruct" and "not-for-clinical-use" in head["tags"]
    assert "**Not for clinical use.**" in text.split("\n## ")[0]
    assert "1,200 questions" in text and f"`{'cd' * 32}`" in text and "| medqa | 1,000 |" in text and "| 6 | 300 |" in text
    assert "| informativeness (bins from 1, little, on) | questions |\n|---|---|\n| 2 | 700 |\n| none | 500 |\n" in text
    assert f"| train.jsonl | 12,345 | `{'ab' * 32}` |" in text and "/home/someone" not in text and "/models" not in text
    assert "n = 200" in text and "| Correct answers | 5.0% [2.7%, 9.0%] | 75.0% [68.6%, 80.5%] |" in text
    assert "evaluated 2 times" in text and "12 steps of 256 questions x 8 responses" in text and "c" * 12 in text


def test_without_evaluation_no_accuracy_is_reported(run_dir):
    text = written(*run_dir)
    assert "Not evaluated by this run; its accuracy is not known." in text
    assert (
        "No training file is recorded." in text and "%" not in text.split("## Evaluation")[1].split("## Training results")[0]
    )


def test_a_model_of_an_earlier_step_is_not_credited_with_later_ones(run_dir):
    run_dir, config = run_dir
    for step, outcomes in ((0, [W] * 4), (5, [C, W, W, W]), (12, [C] * 4)):
        evaluate(run_dir, step, outcomes)
    text = written(run_dir, config, step=5)
    assert "| | step 0 | step 5 |" in text and "step 12" not in text and "trained with" in text and ": 5 steps of" in text


def test_the_card_has_the_settings_of_prompt_and_stop_strings(run_dir):
    run_dir, config = run_dir
    assert "Template: chat; at most" in written(run_dir, config)
    config = changed_config(
        config, ["prompt.template_variables={enable_thinking: false, budget: low}", "rollout.stop=['</answer>']"]
    )
    assert (
        'Template: chat with `enable_thinking: false`, `budget: "low"`, responses also stop at `</answer>`; at most'
        in written(run_dir, config)
    )


def test_warnings_of_the_run_are_on_its_card(run_dir):
    run_dir, config = run_dir
    for step in range(8, 13):
        groups = [graded(f"q{k}", [W, W], "because of all that \\boxed{B}") for k in range(4)]
        write_rollouts(
            rollout_path(run_dir, step),
            step,
            [type(group)(group.group, group.outcomes, group.rewards, group.advantages, ("B", "B"), 0.0) for group in groups],
        )
    assert "- Warning. One letter for all questions: in the last 5 recorded steps 100.0% of the answers are B" in written(
        run_dir, config
    )
