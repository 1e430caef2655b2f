"""Looks at evaluation sets are logged and told; the checkpoint that is best on the development set outlives the others."""

from pathlib import Path

import pytest
from test_report import evaluate, run_dir  # noqa: F401                run_dir is a fixture
from test_run import STATS, Alone, config_of, rollouts_of

from alphamed.errors import ConfigError
from alphamed.evaluation.runner import Evaluation, QuestionSet, SetResult
from alphamed.evaluation.score import Score, Share
from alphamed.files import read_json_lines
from alphamed.lab.reports.report import write_report
from alphamed.megatron import checkpoint_folder as folders
from alphamed.megatron.checkpoint_digests import of_folder
from alphamed.records import Outcome
from alphamed.run import Run
from alphamed.rundir import evaluation_log


def save(directory, step, keep=1):
    partial = folders.begin(directory, step, 0)
    (partial / "weights").write_text(f"of step {step}")
    return folders.publish(partial, step, {}, keep, of_folder(partial, 0, 1))


def names(directory):
    return [folder.name for folder in folders.complete(directory)]


def test_the_best_checkpoint_stays_and_the_latest_is_continued_from(tmp_path):
    save(tmp_path, 10)
    assert folders.best(tmp_path) is None and folders.offer_best(tmp_path, 10, 0.5, 20, "dev")
    save(tmp_path, 20)
    assert not folders.offer_best(tmp_path, 20, 0.5, 20, "dev")  # a tie: the earlier one
    save(tmp_path, 30)
    assert names(tmp_path) == ["step_000010", "step_000030"]
    assert folders.best(tmp_path).name == "step_000010" and folders.latest(tmp_path).name == "step_000030"
    assert folders.offer_best(tmp_path, 30, 0.6, 20, "dev")
    save(tmp_path, 40)
    assert names(tmp_path) == ["step_000030", "step_000040"] and folders.best(tmp_path).name == "step_000030"


def test_a_step_without_a_checkpoint_can_not_be_the_best(tmp_path):
    assert not folders.offer_best(tmp_path, 0, 0.9, 20, "dev") and folders.best(tmp_path) is None


def test_a_run_that_went_back_forgets_the_best_of_the_past_that_is_gone(tmp_path):
    save(tmp_path, 10, keep=3)
    save(tmp_path, 20, keep=3)
    folders.offer_best(tmp_path, 20, 0.9, 20, "dev")
    save(tmp_path, 20, keep=3)  # the step is done again, with other weights
    assert folders.best(tmp_path) is None and folders.offer_best(tmp_path, 20, 0.1, 20, "dev")


def test_another_development_set_is_another_measure(tmp_path):
    """A resume may name another one, or ask more of its questions."""
    save(tmp_path, 10, keep=3)
    assert folders.offer_best(tmp_path, 10, 0.9, 20, "easy")
    save(tmp_path, 20, keep=3)
    assert folders.offer_best(tmp_path, 20, 0.3, 20, "hard") and folders.best(tmp_path).name == "step_000020"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step": null, "accuracy": 1}'])
def test_a_damaged_mark_is_named(tmp_path, text):
    save(tmp_path, 10)
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(folders.CheckpointError, match="best.json: cannot be read"):
        folders.best(tmp_path)


# --------------------------------------------------------------------------------------------------------------- a run
def found(development, right):
    def result(name, count):
        questions = QuestionSet(Path(name).stem, Path(name), (), 10)
        return SetResult(
            questions,
            (),
            Score(10, Share(10, 10), Share(count, 10), Share(count, 10), Share(0, 10), Share(0, 10), 5.0, 9, 0.25),
        )

    return Evaluation(0, (result("test.jsonl", 10 - right), result(development, right)), 1.0)


def test_training_keeps_the_checkpoint_of_the_development_set(tmp_path):
    """3, 7, 5, 4 of 10 right on the development set after steps 1 to 4; the test set would have chosen step 1."""
    config = config_of(
        tmp_path,
        checkpoint={"every": 1, "keep": 1},
        evaluation={"files": ["test.jsonl"], "development": "dev.jsonl", "every": 1},
    )
    run = Run.open(config, Alone())
    run.begin(None)
    for step in run.steps():
        run.record(rollouts_of(step), STATS, version=step)
        run.checkpoint(lambda state: save(run.checkpoints, state["step"]))
        run.evaluate(lambda _background, step=step: lambda: found("dev.jsonl", [3, 7, 5, 4][step - 1]))
        run.finish_evaluation()
    run.close()
    assert names(run.checkpoints) == ["step_000002", "step_000004"] and folders.best(run.checkpoints).name == "step_000002"
    rows = read_json_lines(config.run_dir / "evaluations.jsonl")
    assert [(row["step"], row["set"], row["role"], row["questions"]) for row in rows[:3]] == [
        (1, "test", "test", 10),
        (1, "dev", "development", 10),
        (2, "test", "test", 10),
    ]
    assert evaluation_log.sentences(config.run_dir) == [
        "Test set test was evaluated 4 times (steps 1, 2, 3, 4).",
        "Development set dev was evaluated 4 times (steps 1, 2, 3, 4).",
    ]


def test_a_look_of_the_exported_model_is_told_too(tmp_path):
    evaluation_log.record(tmp_path, 5, "training", [("medqa", evaluation_log.TEST, 3)])
    evaluation_log.record(
        tmp_path, None, "alphamed eval", [("medqa", evaluation_log.TEST, 3), ("gpqa", evaluation_log.TEST, 8)]
    )
    assert evaluation_log.sentences(tmp_path) == [
        "Test set medqa was evaluated 2 times (steps 5, after export).",
        "Test set gpqa was evaluated once (step after export).",
    ]
    assert evaluation_log.sentences(tmp_path / "nowhere") == []


def test_the_report_says_how_often_sets_were_looked_at(run_dir):
    evaluate(run_dir, 0, [Outcome.CORRECT, Outcome.WRONG])
    evaluation_log.record(run_dir, 0, "training", [("wording", evaluation_log.TEST, 2)])
    evaluation_log.record(run_dir, 40, "training", [("wording", evaluation_log.TEST, 2)])
    assert "Test set wording was evaluated 2 times (steps 0, 40)." in write_report(run_dir).read_text()


@pytest.mark.parametrize(
    "evaluation, message",
    [
        ({"development": "d.jsonl", "every": 3}, r"set evaluation.every \(3\) to a multiple of checkpoint.every \(2\)"),
        ({"development": "d.jsonl"}, "each evaluation needs one"),
        ({"development": "d.jsonl", "files": ["d.jsonl"], "every": 2}, "is one of evaluation.files"),
    ],
)
def test_a_development_set_that_can_not_choose_is_refused(tmp_path, evaluation, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, evaluation=evaluation)
