"""`alphamed eval` but for the engines: what is asked, kept, graded, refused and written. Answers come from a script."""

import contextlib
import json
from pathlib import Path

import pytest
from tiny import tiny_hf

from alphamed import cli
from alphamed.data.tokenizer import load_tokenizer
from alphamed.evaluation import answers
from alphamed.evaluation.command import _out, _split
from alphamed.records import FinishReason, Outcome, Rollout, RolloutGroup, ScoredGroup


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("model") / "run" / "hf", head_dim=32)


class Script:
    """In place of the engines: says `says(question, sample)`, notes what it was asked, dies after `dies_after` questions."""

    def __init__(self, says, dies_after=None):
        self.says, self.dies_after, self.tasks = says, dies_after, []

    @contextlib.contextmanager
    def answering(self, config, model):
        yield self.answer

    def answer(self, tasks):
        for task in tasks:
            if len(self.tasks) == self.dies_after:
                raise KeyboardInterrupt
            self.tasks.append(task)
            rollouts = []
            for j in range(task.sampling.n):
                text = self.says(task.question, j)
                reason = FinishReason.LENGTH if text.endswith("...") else FinishReason.STOP
                words = tuple(range(len(text.split())))
                rollouts.append(Rollout(task.group_id, task.question.id, j, words, (), text, reason, 0))
            group = RolloutGroup(task.group_id, task.question, task.prompt_token_ids, tuple(rollouts))
            n = len(rollouts)
            yield ScoredGroup(group, (Outcome.WRONG,) * n, (0.0,) * n, (0.0,) * n, (None,) * n)  # not read


def script(monkeypatch, says, dies_after=None):
    one = Script(says, dies_after)
    monkeypatch.setattr(answers, "answering", one.answering)
    return one


def questions(folder, name="e.jsonl", count=4):
    rows = [
        {
            "id": f"q{i}",
            "question": f"Which is {i}?",
            "options": {"A": f"one {i}", "B": f"two {i}", "C": f"three {i}"},
            "answer": "ABC"[i % 3],
            "source": "s/even" if i % 2 == 0 else "s/odd",
            "level": 1 + i,
        }
        for i in range(count)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def evaluate(model, out, *rest):
    arguments = [
        "eval",
        "--model",
        str(model),
        "--out",
        str(out),
        *map(str, rest),
        "rollout.max_response_tokens=16",
        "prompt.max_tokens=512",
        "rollout.dtype=fp32",
        "cluster.device=cpu",
    ]
    return cli.main(arguments)


def items(out):
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]


def results(out):
    return json.loads((out / "results.json").read_text())


def test_scores_of_four_answers_by_hand(tmp_path, model, monkeypatch, capsys):
    said = {"q0": "so \\boxed{A}", "q1": "\\boxed{C}", "q2": "I do not know", "q3": "\\boxed{A} and then ..."}
    asked = script(monkeypatch, lambda question, j: said[question.id])
    assert evaluate(model, tmp_path / "out", "--benchmarks", questions(tmp_path)) == 0
    found = results(tmp_path / "out")["benchmarks"]["e"]
    assert all(task.sampling.temperature == 0 and task.sampling.n == 1 for task in asked.tasks)
    assert (found["n"], found["accuracy"], found["unparseable"], found["truncated"]) == (4, 0.25, 0.25, 0.25)
    assert (found["boxed"], found["accuracy_among_boxed"]) == (0.5, 0.5)
    # Wilson, 1 of 4: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n) with z2 = 3.8415
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.0456, 0.6994), abs=5e-4)
    assert found["tokens"] == {"mean": 2.75, "median": 3.0, "p90": 4, "max": 4}  # words: 2, 1, 4, 4
    assert found["by_source"]["s/even"]["n"] == 2 and found["by_source"]["s/even"]["accuracy"] == 0.5
    assert found["by_level"]["1"]["accuracy"] == 1.0 and found["by_level"]["4"]["truncated"] == 1.0
    assert "accuracy 25.0%" in capsys.readouterr().out


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, model, monkeypatch, capsys):
    """Killed after two questions, the last line torn: those two are not asked again, nor is anything once all is there."""
    file, out = questions(tmp_path), tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}", dies_after=2)
    assert evaluate(model, out, "--benchmarks", file) == 130
    with (out / "items.jsonl").open("a") as lines:
        lines.write('{"set": "e", "id": "q2", "te')
    second = script(monkeypatch, lambda question, j: "\\boxed{B}")
    assert evaluate(model, out, "--benchmarks", file) == 0
    assert [task.question.id for task in second.tasks] == ["q2", "q3"]
    assert [(item["id"], item["letter"]) for item in items(out)] == [("q0", "A"), ("q1", "A"), ("q2", "B"), ("q3", "B")]
    third = script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, out, "--benchmarks", file) == 0 and third.tasks == []


def test_a_question_with_some_of_its_samples_is_asked_anew(tmp_path, model, monkeypatch):
    file, out = questions(tmp_path), tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file, "--samples", "3") == 0
    lines = (out / "items.jsonl").read_text().splitlines(keepends=True)
    (out / "items.jsonl").write_text("".join(lines[:-1]))
    again = script(monkeypatch, lambda question, j: "\\boxed{C}")
    assert evaluate(model, out, "--benchmarks", file, "--samples", "3") == 0
    assert [task.question.id for task in again.tasks] == ["q3"]
    assert [item["letter"] for item in items(out)] == ["A"] * 9 + ["C"] * 3


def test_a_part_can_be_evaluated_first_and_only_what_was_asked_last_counts(tmp_path, model, monkeypatch):
    file, out = questions(tmp_path), tmp_path / "out"
    part = script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file, "evaluation.questions=2") == 0
    rest = script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file) == 0
    assert sorted(task.question.id for task in part.tasks + rest.tasks) == ["q0", "q1", "q2", "q3"] and len(part.tasks) == 2
    assert results(out)["benchmarks"]["e"]["n"] == 4
    nothing = script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, out, "--benchmarks", file, "evaluation.questions=2") == 0 and nothing.tasks == []
    assert results(out)["benchmarks"]["e"]["n"] == 2 and len(items(out)) == 4


def test_a_key_that_was_put_right_is_graded_without_asking_again(tmp_path, model, monkeypatch):
    file, out = questions(tmp_path), tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file) == 0
    file.write_text(file.read_text().replace('"answer": "B"', '"answer": "A"'))
    nothing = script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, out, "--benchmarks", file) == 0 and nothing.tasks == []
    assert results(out)["benchmarks"]["e"]["accuracy"] == 0.75


def test_what_a_killed_evaluation_has_can_be_graded_and_says_what_is_missing(tmp_path, model, monkeypatch, capsys):
    out = tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}", dies_after=3)
    assert evaluate(model, out, "--benchmarks", questions(tmp_path)) == 130 and not (out / "results.json").exists()
    assert cli.main(["eval", "--regrade", str(out)]) == 0
    assert "warning: e: 1 of 4 questions have no answer yet" in capsys.readouterr().out
    assert results(out)["benchmarks"]["e"]["n"] == 3


def test_several_samples_vote_and_pass(tmp_path, model, monkeypatch):
    """q0 (key A): A A B. q1 (key B): A B C, a tie of three. q2 (key C): never. q3 (key A): B, B, A."""
    said = {"q0": "AAB", "q1": "ABC", "q2": "AAB", "q3": "BBA"}
    asked = script(monkeypatch, lambda question, j: f"\\boxed{{{said[question.id][j]}}}")
    out = tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", questions(tmp_path), "--samples", "3", "--temperature", "0.6") == 0
    assert {(task.sampling.n, task.sampling.temperature) for task in asked.tasks} == {(3, 0.6)}
    found = results(tmp_path / "out")["benchmarks"]["e"]
    assert found["n"] == 4 and found["accuracy"] == pytest.approx((2 + 1 + 0 + 1) / 12)
    assert found["majority"]["accuracy"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert found["pass_at_k"] == pytest.approx({"1": 4 / 12, "2": (1 + 2 / 3 + 0 + 2 / 3) / 4, "3": 3 / 4})
    assert found["runs"]["accuracy"] == [0.25, 0.5, 0.25]


def test_regrading_reads_the_texts_and_generates_nothing(tmp_path, model, monkeypatch, capsys):
    out = tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", questions(tmp_path)) == 0
    before = results(out)
    rows = [item | {"letter": "B", "outcome": "wrong"} for item in items(out)]  # as an older grader saw them
    (out / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = script(monkeypatch, lambda question, j: "never")
    assert cli.main(["eval", "--regrade", str(out)]) == 0 and nothing.tasks == []
    assert "4 answers graded again, 4 changed (the first: e/q0)" in capsys.readouterr().out
    assert results(out) == before and [item["letter"] for item in items(out)] == ["A"] * 4


def test_a_wrong_count_is_said_in_the_results_and_on_the_terminal(tmp_path, model, monkeypatch, capsys):
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", f"medqa={questions(tmp_path)}") == 0
    assert results(tmp_path / "out")["benchmarks"]["medqa"]["complaint"] == "4 questions, 1,273 were expected"
    assert results(tmp_path / "out")["benchmarks"]["medqa"]["expected"] == 1273
    assert "warning: medqa: 4 questions, 1,273 were expected" in capsys.readouterr().out


def test_variants_stand_beside_their_benchmark(tmp_path, model, monkeypatch):
    """A model that always boxes the first letter: the key never stays where it was, so shuffling undoes it."""
    rows = [json.loads(line) | {"answer": "A"} for line in questions(tmp_path).read_text().splitlines()]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = script(monkeypatch, lambda question, j: "\\boxed{A}" if question.options else "\\boxed{One 1!}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", tmp_path / "e.jsonl", "--variants", "shuffled", "free") == 0
    found = results(tmp_path / "out")["benchmarks"]
    assert {name: (one["n"], one["accuracy"]) for name, one in found.items()} == {
        "e": (4, 1.0),
        "e+shuffled": (4, 0.0),
        "e+free": (4, 0.25),
    }
    assert found["e+shuffled"]["chance"] == pytest.approx(1 / 3) and found["e+free"]["chance"] is None
    change = found["e+shuffled"]["change"]
    assert (change["lost"], change["gained"], change["p_mcnemar"]) == (4, 0, 0.125)  # 2 * (1/2)^4
    assert results(tmp_path / "out")["mean"] is None  # one benchmark, variants are none
    tokenizer = load_tokenizer(model)
    for task in asked.tasks:
        assert ("Options:\nA: " in tokenizer.decode(task.prompt_token_ids)) == bool(task.question.options)


def test_two_evaluations_are_compared(tmp_path, model, monkeypatch, capsys):
    file = questions(tmp_path)
    script(monkeypatch, lambda question, j: "no box")
    assert evaluate(model, tmp_path / "before", "--benchmarks", file) == 0
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "after", "--benchmarks", file, "--against", tmp_path / "before") == 0
    found = json.loads((tmp_path / "after" / "comparison.json").read_text())["benchmarks"]["e"]
    assert (found["gain"], found["gain_from_boxed"], found["gain_from_accuracy_among_boxed"]) == (0.5, 0.5, 0.0)
    assert [(flip["id"], flip["way"], flip["before"][0]["outcome"]) for flip in found["flipped"]] == [
        ("q0", "gained", "unparseable"),
        ("q3", "gained", "unparseable"),
    ]
    assert "+50.0 points = +50.0 boxed more often +0.0 right among boxed" in capsys.readouterr().out


MARKED = "prompt.option_format='{text} ({letter})'"


def test_answers_to_another_option_format_do_not_mix(tmp_path, model, monkeypatch, capsys):
    file, out = questions(tmp_path), tmp_path / "before"
    asked = script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file) == 0
    assert evaluate(model, out, "--benchmarks", file, MARKED) == 2
    assert (
        "holds an evaluation with prompt.option_format '{letter}: {text}', now it is '{text} ({letter})'; choose another folder"
        in capsys.readouterr().err
    )
    assert evaluate(model, tmp_path / "after", "--benchmarks", file, "--against", out, MARKED) == 0
    tokenizer = load_tokenizer(model)
    assert "one 0 (A)\n" in tokenizer.decode(asked.tasks[-4].prompt_token_ids)
    shown = "prompt.option_format '{letter}: {text}' and '{text} ({letter})'"
    assert json.loads((tmp_path / "after" / "comparison.json").read_text())["prompts_differ"] == shown
    assert f"warning: the two were asked with different prompts ({shown})" in capsys.readouterr().out


def test_an_evaluation_of_before_there_were_option_formats_goes_on(tmp_path, model, monkeypatch):
    file, out = questions(tmp_path), tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", file) == 0
    about = json.loads((out / "evaluation.json").read_text())
    del about["asked"]["prompt"]["option_format"]
    (out / "evaluation.json").write_text(json.dumps(about))
    again = script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, out, "--benchmarks", file) == 0 and again.tasks == []
    assert evaluate(model, out, "--benchmarks", file, MARKED) == 2


def test_two_models_called_hf_get_folders_of_their_own(tmp_path):
    from argparse import Namespace

    from alphamed.config.loading import build_config

    def place(model):
        config = build_config({"model": {"path": str(model)}, "data": {"train": ["d.jsonl"]}})
        return _out(Namespace(out=None, config=Path("c.yaml")), config)

    models = [tmp_path / name for name in ("a/one/hf", "a/two/hf", "b/one/hf", "plain")]
    assert len({place(model) for model in models}) == 4
    assert place(models[0]).name.startswith("one-hf-") and place(models[3]).name.startswith("plain-")
    assert place(models[0]) == place(models[0])  # found again on a second start


@pytest.mark.parametrize(
    "rest, message",
    [
        (["--samples", "2", "--temperature", "0"], "--temperature: 0 gives the same response 2 times"),
        (["--samples", "0"], "--samples: 0 is no number of samples"),
        (["--variants", "shufled"], "--variants: 'shufled' is not known; choose from shuffled"),
        (["--against", "nowhere"], "--against: nowhere holds no evaluation"),
        (["--max-tokens", "0"], "--max-tokens: 0 leaves no room"),
        (["--top-p", "0"], "--top-p: 0.0 is not above 0"),
        (["--top-p", "0.5"], "--top-p: 0.5 has no effect at temperature 0, which takes the likeliest token; raise"),
        (["--top-p", "0.5", "--samples", "2", "--temperature", "0"], "--temperature: 0 gives the same response 2 times"),
        (["--shots", "nowhere.jsonl"], "--shots: nowhere.jsonl: no such file; give a JSONL file"),
        (["--shots", "/dev/null"], "/dev/null: cannot be read (it is a device, not a regular file)"),
        (["--model", "nowhere"], "model.path: 'nowhere'"),
        (["--regrade", "x"], "--regrade: grades what is there, --model has no part in it"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tmp_path, model, monkeypatch, capsys, rest, message):
    script(monkeypatch, lambda question, j: "never")
    assert evaluate(model, tmp_path / "out", "--benchmarks", questions(tmp_path), *rest) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_settings_is_refused(tmp_path, model, monkeypatch, capsys):
    file = questions(tmp_path)
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", file) == 0
    assert evaluate(model, tmp_path / "out", "--benchmarks", file, "--template", "raw") == 2
    error = capsys.readouterr().err
    assert "holds an evaluation with prompt.template 'chat', now it is 'raw'; choose another folder" in error
    other = tiny_hf(tmp_path / "other", head_dim=32, seed=7)
    assert evaluate(other, tmp_path / "out", "--benchmarks", file) == 2
    assert "holds an evaluation with another model" in capsys.readouterr().err


def test_a_second_benchmark_joins_and_the_mean_is_over_both(tmp_path, model, monkeypatch):
    out = tmp_path / "out"
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", questions(tmp_path)) == 0  # 2 of 4
    second = script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, out, "--benchmarks", questions(tmp_path, "f.jsonl", 3)) == 0  # 1 of 3
    assert len(second.tasks) == 3
    found = results(out)
    assert list(found["benchmarks"]) == ["e", "f"] and found["mean"]["accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["mean"]["runs"] is None and found["mean"]["questions"]["ci_low"] < found["mean"]["accuracy"]


def test_a_benchmark_of_the_training_set_is_refused(tmp_path, model, monkeypatch, capsys):
    """The model is RUN/hf: its run says what it was trained on."""
    file = questions(tmp_path)
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    (model.parent / "config.yaml").write_text(f"model: {{path: m}}\ndata: {{train: [{file}]}}\n")
    try:
        assert evaluate(model, tmp_path / "out", "--benchmarks", file) == 2
        assert "4 of 4 questions are in data.train too (the first: q0 is q0)" in capsys.readouterr().err
        assert evaluate(model, tmp_path / "out", "--benchmarks", file, "evaluation.allow_overlap=true") == 0
    finally:
        (model.parent / "config.yaml").unlink()


def test_shots_and_template_reach_the_prompt(tmp_path, model, monkeypatch):
    (tmp_path / "shots.jsonl").write_text(
        json.dumps({"question": "Which organ?", "options": {"A": "x", "B": "y"}, "response": "It is \\boxed{B}", "id": "s"})
    )
    asked = script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert (
        evaluate(
            model,
            tmp_path / "out",
            "--benchmarks",
            questions(tmp_path),
            "--shots",
            tmp_path / "shots.jsonl",
            "--template",
            "raw",
        )
        == 0
    )
    text = load_tokenizer(model).decode(asked.tasks[0].prompt_token_ids)
    assert text.startswith("Question: Which organ?") and "Answer: It is \\boxed{B}" in text and text.endswith("Answer:")


# ------------------------------------------------------------------------------------------- bad rows, keys, places
def bad_rows(folder):
    file = questions(folder)
    file.write_text(
        file.read_text() + json.dumps({"id": "bad", "question": "?", "options": ["x", "y"], "answer": "z"}) + "\n"
    )
    return file


def test_bad_rows_of_a_benchmark_are_refused_or_counted_in_the_result(tmp_path, model, monkeypatch, capsys):
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    file, out = bad_rows(tmp_path), tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", file) == 2 and not out.exists()
    told = capsys.readouterr().err
    assert told.startswith(f"error: {file}:5: answer 'z' is not among the options A, B; ") and "--bad-rows skip" in told
    assert evaluate(model, out, "--bad-rows", "skip", "--benchmarks", file) == 0
    told = capsys.readouterr().out
    assert "n = 4 (1 bad row left out), " in told and f"1 bad row left out (the first: {file}:5: answer 'z'" in told
    assert results(out)["benchmarks"]["e"]["bad_rows"] == [f"{file}:5: answer 'z' is not among the options A, B"]
    assert (
        json.loads((out / "evaluation.json").read_text())["sets"]["e"]["bad_rows"]
        == results(out)["benchmarks"]["e"]["bad_rows"]
    )


def test_keys_of_a_benchmark_are_declared_behind_its_path(tmp_path, model, monkeypatch, capsys):
    """q0 has key 1, q1 key 2 of three options: from 0 B and C, from 1 A and B."""
    script(monkeypatch, lambda question, j: "\\boxed{B}")
    file = questions(tmp_path, count=2)
    rows = [json.loads(line) | {"answer": i + 1} for i, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(model, tmp_path / "out", "--benchmarks", file) == 2
    assert "can be numbers from 0 or numbers from 1" in capsys.readouterr().err
    for form, right in (("index", [True, False]), ("index1", [False, True])):
        out = tmp_path / form
        assert evaluate(model, out, "--benchmarks", f"{file}:{form}") == 0
        assert [item["outcome"] == "correct" for item in items(out)] == right
        assert results(out)["benchmarks"]["e"]["reading"]["keys"] == {"answer": form}
    assert "e: keys read as numbers from 1 (answer)" in capsys.readouterr().out


def test_a_folder_of_other_files_is_no_place_for_an_evaluation(tmp_path, model, monkeypatch, capsys):
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    file, out = questions(tmp_path), tmp_path / "out"
    out.mkdir()
    assert evaluate(model, out, "--benchmarks", file) == 0  # an empty one is
    (out / "notes.txt").write_text("mine")
    assert evaluate(model, out, "--benchmarks", file) == 0  # so is an evaluation
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert evaluate(model, other, "--benchmarks", file) == 2
    assert capsys.readouterr().err == (
        f"error: --out: {other} holds other files (notes.txt) and no evaluation; choose another "
        "folder, or put it there all the same with --overwrite\n"
    )
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert evaluate(model, other, "--overwrite", "--benchmarks", file) == 0
    assert (other / "notes.txt").read_text() == "mine" and len(items(other)) == 4


def test_an_evaluation_with_other_settings_is_replaced_with_overwrite_only(tmp_path, model, monkeypatch, capsys):
    asked, file, out = script(monkeypatch, lambda question, j: "\\boxed{A}"), questions(tmp_path), tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", file) == 0
    before = (out / "items.jsonl").read_bytes()
    assert evaluate(model, out, "--samples", "2", "--benchmarks", file) == 2 and (out / "items.jsonl").read_bytes() == before
    assert "replace it with --overwrite" in capsys.readouterr().err
    asked.tasks.clear()
    assert evaluate(model, out, "--overwrite", "--benchmarks", file) == 0 and asked.tasks == []  # the same: taken up
    assert evaluate(model, out, "--overwrite", "--samples", "2", "--benchmarks", file) == 0
    assert len(items(out)) == 8 and results(out)["asked"]["sampling"]["samples"] == 2


def test_settings_among_benchmarks_are_told_apart():
    assert _split(["medqa=copy/e.jsonl", "rollout.dtype=fp32", "x.jsonl"]) == (
        ["medqa=copy/e.jsonl", "x.jsonl"],
        ["rollout.dtype=fp32"],
    )


@pytest.mark.parametrize("rest", [["--samples", "5"], ["--top-p", "0.5"], ["--temperature", "0"], ["--temperature", "1"]])
def test_regrading_refuses_what_it_would_not_heed(tmp_path, capsys, rest):
    assert cli.main(["eval", "--regrade", str(tmp_path), *rest]) == 2
    assert capsys.readouterr().err == f"error: --regrade: grades what is there, {rest[0]} has no part in it; leave it out\n"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda about: about.pop("grading"), "KeyError: 'grading'"),
        (lambda about: about["sets"]["e"].pop("ids"), "ids missing"),
        (lambda about: about.update(asked={}), "max_tokens, model, prompt, samples, sampling, temperature missing"),
        (lambda about: about.update(sets=[]), "format 1"),
    ],
)
def test_damaged_settings_are_one_line(tmp_path, model, monkeypatch, capsys, change, words):
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", questions(tmp_path)) == 0
    about = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    change(about)
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert cli.main(["eval", "--regrade", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "not the settings of an evaluation" in told and words in told and told.count("\n") == 1


def test_one_rule_for_truncated_answers_holds_for_all_sets_of_a_folder(tmp_path, model, monkeypatch):
    """The settings that results.json tells are those that every set was graded with."""
    script(monkeypatch, lambda question, j: "\\boxed{A} and ...")
    out = tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", questions(tmp_path)) == 0
    assert evaluate(model, out, "--benchmarks", questions(tmp_path, "f.jsonl"), "reward.truncated=grade") == 0
    found = results(out)
    assert found["grading"] == {"truncated": "grade", "answer_after": "", "prompt_opens_thinking": False}
    assert {name: (one["accuracy"], one["truncated"]) for name, one in found["benchmarks"].items()} == {
        "e": (0.5, 1.0),
        "f": (0.5, 1.0),
    }  # all were cut, and graded all the same


def test_what_follows_the_thinking_decides_and_a_regrade_knows_it(tmp_path, model, monkeypatch, capsys):
    """q0's draft is right and its answer wrong, q1 never ends thinking, q2 answers at once, q3 boxes its answer last."""
    said = {
        "q0": "<think>\\boxed{A}</think>\\boxed{B}",
        "q1": "<think>\\boxed{B}",
        "q2": "\\boxed{C}",
        "q3": "<think>\\boxed{B}</think>\\boxed{A}",
    }
    script(monkeypatch, lambda question, j: said[question.id])
    out = tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", questions(tmp_path), "reward.answer_after=</think>") == 0
    expected = {"q0": ("B", "wrong"), "q1": (None, "unparseable"), "q2": ("C", "correct"), "q3": ("A", "correct")}
    assert {item["id"]: (item["letter"], item["outcome"]) for item in items(out)} == expected
    capsys.readouterr()
    assert cli.main(["eval", "--regrade", str(out)]) == 0
    assert "4 answers graded again, 0 changed" in capsys.readouterr().out
    about = json.loads((out / "evaluation.json").read_text())
    about["grading"] = {"truncated": "nothing"}  # as older evaluations have it: the last box of all
    (out / "evaluation.json").write_text(json.dumps(about))
    assert cli.main(["eval", "--regrade", str(out)]) == 0
    assert "4 answers graded again, 1 changed (the first: e/q1)" in capsys.readouterr().out
    about["grading"] = {"truncated": "nothing", "answer_after": 7}
    (out / "evaluation.json").write_text(json.dumps(about))
    assert cli.main(["eval", "--regrade", str(out)]) == 2
    assert "grading.answer_after is text" in capsys.readouterr().err


def test_an_evaluation_needs_no_reward_function(tmp_path, model, monkeypatch):
    """It grades strictly: the module need not be on this machine."""
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert (
        evaluate(
            model, tmp_path / "out", "--benchmarks", questions(tmp_path), "reward.name=not_here:f", "reward.signature=trl"
        )
        == 0
    )
    assert results(tmp_path / "out")["benchmarks"]["e"]["accuracy"] == 0.5


def test_another_file_of_the_same_name_does_not_take_the_place_of_the_first(tmp_path, model, monkeypatch, capsys):
    for folder in ("a", "b", "moved"):
        (tmp_path / folder).mkdir()
    first, second, moved = (questions(tmp_path / folder) for folder in ("a", "b", "moved"))
    second.write_text(second.read_text().replace("Which is", "What is"))
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    assert evaluate(model, tmp_path / "out", "--benchmarks", first) == 0
    before = items(tmp_path / "out")
    assert evaluate(model, tmp_path / "out", "--benchmarks", second) == 2
    told = capsys.readouterr().err
    assert f"holds e of {first}" in told and str(second) in told and items(tmp_path / "out") == before
    assert evaluate(model, tmp_path / "out", "--benchmarks", moved) == 0 and items(tmp_path / "out") == before


def test_a_refused_environment_costs_no_earlier_evaluation(model, tmp_path, monkeypatch, capsys):
    script(monkeypatch, lambda question, j: "\\boxed{A}")
    asked, out = questions(tmp_path), tmp_path / "out"
    assert evaluate(model, out, "--benchmarks", asked) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    assert evaluate(model, out, "--benchmarks", asked, "--overwrite", "--max-tokens", "20") == 2
    assert "environment: PYTHONOPTIMIZE=1 is refused" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert evaluate(model, tmp_path / "new", "--benchmarks", asked) == 2 and not (tmp_path / "new").exists()
