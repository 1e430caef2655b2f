"""`alphamed sft` before and around its loop: what is checked, what is refused, lengths, plan, report; and the loop's order."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_train import Called
from tiny import tiny_hf

from alphamed import sft
from alphamed.cli import main
from alphamed.config.loading import build_config, dump_config
from alphamed.errors import ConfigError
from alphamed.files import replace_json, replace_text
from alphamed.lab.planner.plan import job_of, make_plan
from alphamed.lab.planner.time import step_time
from alphamed.lab.reports.model_card import write_card
from alphamed.lab.reports.report import write_report
from alphamed.lab.reports.summary import summary
from alphamed.planner.batch import batch_of
from alphamed.rundir.directory import check_resume, is_finished


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture
def start(tmp_path, model, capsys):
    """Runs a verb on a configuration, a good one but for what is given: (exit code, standard output, standard error)."""

    def run(*arguments: str, rows=None, verb: str = "sft", **sections) -> tuple[int, str, str]:
        rows = rows or [{"prompt": f"{i}?", "responses": ["yes", "no"]} for i in range(6)]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "run": {"root": str(tmp_path / "runs")},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"train": [str(tmp_path / "train.jsonl")]},
            "sft": {"prompts_per_step": 2},
            "prompt": {"max_tokens": 200},
            "rollout": {"max_response_tokens": 32, "dtype": "fp32"},
            "parallel": {"micro_batch_tokens": 1024},
            "cluster": {"device": "cpu"},
        }
        tree = {name: tree.get(name, {}) | (sections.get(name) or {}) for name in tree | sections}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | {k: v for k, v in sections.items() if v is None}))
        code = main([verb, "--config", str(tmp_path / "run.yaml"), *arguments])
        return code, *capsys.readouterr()

    return run


def test_a_good_configuration_needs_no_engines(start):
    code, out, _ = start("--check")
    assert code == 0
    assert "in order; 6 examples, 0 questions for evaluation" in out and "1 ranks, 0 engines" in out
    code, out, _ = start("--check", sft=None)  # the section may be left out: its defaults ask for 32 prompts
    assert code == 2


QUESTION = {"id": "q", "question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "A"}


def test_an_evaluation_needs_engines(start, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps(QUESTION) + "\n")
    wanted = {"after": True, "files": [str(tmp_path / "held.jsonl")]}
    code, out, _ = start("--check", evaluation=wanted)
    assert code == 0 and "1 questions for evaluation" in out and "1 engines" in out
    shown = {"question": "which", "options": ["That", "This."], "response": "A"}
    code, _, error = start("--check", evaluation=wanted, rows=[shown, {"prompt": "?", "response": "!"}])
    assert code == 2 and "evaluation.files: 1 of 1 questions are in data.train too" in error


@pytest.mark.parametrize(
    "sections, words",
    [
        ({"sft": {"prompts_per_step": 7}}, "sft.prompts_per_step: 7 is more than the 6 examples of data.train"),
        ({"sft": {"prompts_per_step": 1}, "parallel": {"data": 2}}, "sft.prompts_per_step: 1 gives 2 data ranks less than one"),
        ({"sft": {"epochs": 2}, "run": {"steps": 5}}, "sft.epochs: 2 and run.steps: 5 both say how long; remove one"),
        ({"sft": {"response_format": "{reasoning}"}}, "sft.response_format: '{reasoning}' leaves the response out"),
        ({"sft": {"loss_on": "everything"}}, "sft.loss_on: 'everything' is not valid; it takes 'responses' or"),
        ({"sft": {"prompt_per_step": 1}}, "sft.prompt_per_step: unknown key; did you mean 'prompts_per_step'?"),
        ({"rollout": {"replay": "runs/other"}}, "rollout.replay: supervised training (sft) takes its responses from data"),
        ({"data": {"answer_keys": "shuffled"}}, "data.answer_keys: shuffled has no effect on given responses (sft)"),
        ({"data": {"levels": {"schedule": [{"step": 1, "weights": [1] * 6}]}}}, "data.levels.schedule: supervised training"),
        ({"rollout": {"max_response_tokens": 3}}, "train.jsonl:1: its response takes 4 tokens, rollout.max_response_tokens is 3"),
        ({"prompt": {"max_tokens": 20}}, "tokens, prompt.max_tokens is 20; raise it or leave such rows out"),
        ({"parallel": {"micro_batch_tokens": 100}}, "parallel.micro_batch_tokens: 100 cannot hold one prompt and response"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(start, sections, words):
    code, _, error = start("--check", **sections)
    assert code == 2 and words in error and error.count("\n") == 1, error


def test_train_refuses_what_is_for_sft(start):
    code, _, error = start("--check", verb="train")
    assert code == 2 and "sft: a configuration with this section is for `alphamed sft`" in error


def test_questions_of_rl_do_not_limit_supervised_training(start):
    """A configuration of `train` with a section more: what its rollouts need is not asked for."""
    code, _, error = start("--check", rollout={"questions_per_step": 3}, algorithm={"mini_batches": 2})
    assert code == 0, error


# ------------------------------------------------------------------------------------------------------------------ length
def config_of(tmp_path, **sections):
    rows = [{"prompt": f"{i}?", "responses": ["yes", "no", "both"]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run": {"root": str(tmp_path / "runs"), "name": "r"},
        "model": {"path": "Qwen/Qwen2.5-7B-Instruct"},
        "data": {"train": [str(tmp_path / "train.jsonl")]},
        "sft": {"prompts_per_step": 4},
        "logging": {"wandb": "off"},
    }
    return build_config({name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections})


def test_a_run_by_epochs_can_be_made_longer_and_is_finished_at_its_own_length(tmp_path):
    asked = config_of(tmp_path, sft={"epochs": 3})
    as_run = config_of(tmp_path, run={"steps": 6})  # what the ranks made of it
    replace_text(asked.run_dir / "config.yaml", dump_config(as_run))
    assert check_resume(asked).keys() <= {"sft.epochs", "run.steps"}
    for step, finished in ((5, False), (6, True)):
        replace_json(asked.run_dir / "finished.json", {"step": step})
        assert is_finished(asked) is finished
    with pytest.raises(ConfigError, match="sft.loss_on"):
        check_resume(config_of(tmp_path, sft={"loss_on": "assistant_turns"}))


# -------------------------------------------------------------------------------------------------------------------- plan
def test_the_plan_counts_nothing_that_is_sampled(tmp_path):
    config = config_of(tmp_path, sft={"epochs": 3}, algorithm={"kl_coefficient": 0.1, "mini_batches": 2})
    job, _ = job_of(config, prompt_tokens=100, response_tokens=10)
    assert (job.config.run.steps, job.engines, job.gpus) == (6, 0, 1)
    batch = batch_of(job)
    assert (batch.questions, batch.samples, batch.updates) == (4, 12, 1)
    assert batch.trained_tokens == 4 * (99 + 3 * 10)  # each prompt once
    time = step_time(job)
    assert time.generate == time.sync == time.logprobs == 0 < time.update
    plan = make_plan(job)
    assert plan.found.engine is None and "reference" not in plan.found.trainer.causes
    assert plan.found.trainer.causes["sync buckets"] == 0


def test_the_plan_counts_engines_for_evaluations(tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps(QUESTION) + "\n")
    config = config_of(tmp_path, evaluation={"every": 1, "files": [str(tmp_path / "held.jsonl")]})
    job, _ = job_of(config)
    plan = make_plan(job)
    assert (job.engines, job.gpus) == (1, 2)
    assert plan.found.engine is not None and plan.found.evaluations.questions == 1
    assert step_time(job).generate == 0


# ------------------------------------------------------------------------------------------------------------------ report
def test_report_card_and_last_words_speak_of_the_loss(tmp_path):
    config = config_of(tmp_path, run={"steps": 12})
    folder = config.run_dir
    replace_text(folder / "config.yaml", dump_config(config))
    rows = [{"step": i, "policy/loss": 3.0 - 0.1 * i, "policy/grad_norm": 1.0, "time/step_s": 1.0} for i in range(1, 13)]
    replace_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = "Loss fell: 2.700 in the first 5 steps, 2.000 in the last 5 (cross entropy, nats per response token)."
    assert f"  {said}" in summary(folder)
    page = write_report(folder).read_text()
    assert "supervised, 4 prompts a step" in page and "Loss fell" in page and "samples no responses" in page
    assert "Mean reward" not in page
    assert json.loads((folder / "report.json").read_text())["sentences"] == [said]
    write_card(folder, config, folder / "hf")
    card = (folder / "hf" / "README.md").read_text()
    assert "fine-tuned on given responses (cross entropy): 12 steps of 4 prompts" in card and "grpo" not in card


# ---------------------------------------------------------------------------------------------------------------- the loop
def session_of(calls, due=(), **run):
    return SimpleNamespace(
        config=build_config({"model": {"path": "m"}, "data": {"train": ["t"]}, "sft": {}, "logging": {"export_hf": True}}),
        run=Called(calls, evaluation_due=lambda last=False: last if due == "last" else bool(due), **run),
        policy=Called(calls, layout=None),
        rollouts=Called(calls, next=lambda step: SimpleNamespace(groups=())),
        sync=Called(calls, version=0),
        cursor=lambda: None,
        save_checkpoint=None,
        evaluate=None,
        export=lambda: calls.append("export"),
    )


@pytest.mark.parametrize(
    "due, stopped, expected",
    [
        ((), False, ["update", "finish_evaluation", "record", "require_finite", "checkpoint", "checkpoint", "export", "finish"]),
        ((), True, ["update", "finish_evaluation", "record", "require_finite", "checkpoint", "checkpoint"]),
        (
            "last",
            False,
            ["update", "finish_evaluation", "record", "require_finite", "checkpoint", "checkpoint", "push", "evaluate", "export"]
            + ["finish"],
        ),
    ],
)  # fmt: skip
def test_the_order_of_a_run(monkeypatch, due, stopped, expected):
    """A bad step is on the disk before the run ends, engines get weights before they are asked, a stopped run is not finished."""
    calls: list[str] = []
    session = session_of(calls, due, steps=lambda: iter([1]), stop_asked=lambda: stopped)
    monkeypatch.setattr(sft, "open_session", lambda *_: contextlib.nullcontext(session))
    monkeypatch.setattr(sft, "pack", lambda *_args, **_named: None)
    sft.main(session.config)
    assert calls == expected
