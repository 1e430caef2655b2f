"""`alphamed sft` before and around its loop: what is checked, what is refused, lengths, plan, report; and the loop on
real parts in this process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_hf

from alphamed import sft
from alphamed.cli import main
from alphamed.cluster.failure import request_stop
from alphamed.config.loading import build_config, dump_config
from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import ConfigError
from alphamed.files import read_json_lines, replace_json, replace_text
from alphamed.lab.planner.plan import job_of, make_plan
from alphamed.lab.planner.time import step_time
from alphamed.lab.reports.model_card import write_card
from alphamed.lab.reports.report import write_report
from alphamed.lab.reports.summary import summary
from alphamed.megatron.checkpoint_folder import latest
from alphamed.planner.batch import batch_of
from alphamed.rundir.directory import check_resume, finished_step, is_finished
from alphamed.session import open_session


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
        ({"sft": {"response_format": "{reasonning} {response}"}}, "{reasonning} is none of {reasoning}, {response}, {letter}"),
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


@pytest.mark.parametrize("verb", ["launch", "plan"])
def test_the_length_is_given_once_whatever_starts_it(start, verb):
    code, _, error = start(verb=verb, sft={"epochs": 2}, run={"steps": 5})
    assert code == 2 and "sft.epochs: 2 and run.steps: 5 both say how long; remove one" in error


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
def test_the_plan_says_that_it_simulates_reinforcement_learning_only(start):
    code, _, error = start("--simulate", verb="plan", cluster={"device": "cpu", "skip_memory_check": True})
    assert code == 2 and "--simulate: runs reinforcement learning in small" in error


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
    assert plan.assessment.engine is None and "reference" not in plan.assessment.trainer.causes
    assert plan.assessment.trainer.causes["sync buckets"] == 0


def test_the_plan_counts_engines_for_evaluations(tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps(QUESTION) + "\n")
    config = config_of(tmp_path, evaluation={"every": 1, "files": [str(tmp_path / "held.jsonl")]})
    job, _ = job_of(config)
    plan = make_plan(job)
    assert (job.engines, job.gpus) == (1, 2)
    assert plan.assessment.engine is not None and plan.assessment.evaluations.questions == 1
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
    assert "supervised, 4 prompts per step" in page and "Loss fell" in page and "samples no responses" in page
    assert "Mean reward" not in page
    assert json.loads((folder / "report.json").read_text())["sentences"] == [said]
    write_card(folder, config, folder / "hf")
    card = (folder / "hf" / "README.md").read_text()
    assert "fine-tuned on given responses (cross entropy): 12 steps of 4 prompts" in card and "grpo" not in card


# ---------------------------------------------------------------------------------------------------------------- the loop
@pytest.fixture
def whole(tmp_path, model):
    """A function: the configuration of a run of six steps by epochs, in this process, with further sections."""
    rows = [{"prompt": f"{i}?", "responses": [r"\boxed{A}", r" \boxed{A}"]} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(name, **sections):
        tree = {
            "run": {"root": str(tmp_path), "name": name},
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"train": [str(tmp_path / "train.jsonl")]},
            "sft": {"prompts_per_step": 2, "epochs": 2.4},
            "prompt": {"max_tokens": 100},
            "rollout": {"max_response_tokens": 16, "temperature": 0.5},
            "optimizer": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 1},
            "parallel": {"micro_batch_tokens": 256},
            "checkpoint": {"every": 2},
            "logging": {"wandb": "off", "report": False},
            "cluster": {"device": "cpu"},
        }
        return build_config({section: tree.get(section, {}) | sections.get(section, {}) for section in tree | sections})

    return config


def recorded(config):
    return {row["step"]: row for row in read_json_lines(config.run_dir / "metrics.jsonl")}


def test_a_run_in_two_parts_is_the_run_in_one(whole):
    """Loss, gradients, learning rate, place in the data and the exported weights; the second part begins at a checkpoint with
    one step lost, as after a kill."""
    once, twice = whole("once"), whole("twice")
    sft.main(once)
    sft.main(whole("twice", run={"stop_after": 3}, logging={"export_hf": False}))
    shutil.rmtree(twice.run_dir / "checkpoints" / "step_000003")
    sft.main(twice)
    one, two = recorded(once), recorded(twice)
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6] and finished_step(twice.run_dir) == 6
    for step, row in one.items():
        for name in ("policy/loss", "policy/grad_norm", "policy/lr", "data/epochs"):
            assert two[step][name] == pytest.approx(row[name], rel=1e-6), f"step {step}: {name}"
    assert one[6]["policy/loss"] < one[1]["policy/loss"] - 1 and one[6]["data/epochs"] == pytest.approx(2.4)
    assert not [name for name in one[1] if name.startswith(("reward/", "policy/ratio", "policy/kl", "time/sync"))]
    weights = [load_file(config.run_dir / "hf" / "model.safetensors") for config in (once, twice)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-6, atol=1e-7)


def test_the_first_loss_is_transformers(whole, model):
    """Cross entropy of the step's responses at temperature 1, whatever rollout.temperature is, their end tokens included."""
    from transformers import AutoModelForCausalLM

    config = whole("first", run={"stop_after": 1}, sft={"prompts_per_step": 5}, optimizer={"warmup_steps": 0})
    sft.main(config)
    tokenizer, total, count = load_tokenizer(model), 0.0, 0
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for i in range(5):
        prompt = tokenizer.encode(tokenizer.chat_text([{"role": "user", "content": f"{i}?"}]))
        for response in (r"\boxed{A}<|im_end|>", r" \boxed{A}<|im_end|>"):
            ids = torch.tensor([[*prompt, *tokenizer.encode(response)]])
            labels = torch.where(torch.arange(ids.shape[1])[None] < len(prompt), -100, ids)
            trained = int((labels != -100).sum())
            total, count = total + network(ids, labels=labels).loss.item() * trained, count + trained
    assert recorded(config)[1]["policy/loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_is_not_finished(whole):
    config = whole("stopped")
    with open_session(config) as session:
        take = session.rollouts.next

        def stopping(step):
            if step == 3:
                request_stop(config.run_dir)
            return take(step)

        session.rollouts.next = stopping
        sft.train(session)
    assert list(recorded(config)) == [1, 2, 3] and finished_step(config.run_dir) is None
    assert latest(config.run_dir / "checkpoints").name == "step_000003"
    assert not (config.run_dir / "hf").exists()
