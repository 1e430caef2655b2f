"""Informativeness as an axis beside levels: in studies, sets, provenance, evaluations, reports and comparisons."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_compare import item, make_run
from test_report import C, Page, W
from test_study_plan import BASE

from alphamed.cli import main
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.sources import load_questions
from alphamed.evaluation.items import Asked, Grading, graded, read_items, write_items
from alphamed.evaluation.results import set_result
from alphamed.evaluation.runner import Evaluation, QuestionSet, SetResult, write_evaluation
from alphamed.evaluation.score import score
from alphamed.files import read_json_lines, replace_json_lines, replace_text
from alphamed.lab.reports.compare_page import main as compare
from alphamed.lab.reports.comparison import comparison
from alphamed.lab.reports.evaluations import read_answered
from alphamed.lab.reports.report import write_report
from alphamed.lab.reports.runs import read_runs
from alphamed.lab.study.data import make_sets
from alphamed.lab.study.grid import plan_runs, run_name
from alphamed.lab.study.spec import load_study
from alphamed.records import FinishReason, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rundir import provenance
from alphamed.rundir.rollout_files import rollout_path, write_rollouts


def question(i, **more):
    return {
        "id": f"q{i}",
        "question": f"Which is number {i}?",
        "answer": "A",
        "options": {"A": f"this {i}", "B": f"that {i}"},
    } | more


def write(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------------------------------------- studies
def study(axes, **data):
    """60 questions, number i of level 1 + i mod 6 and bin 1 + (i mod 12) // 3 of informativeness."""
    write("questions.jsonl", [question(i, level=1 + i % 6, informativeness=1 + i % 12 // 3) for i in range(60)])
    write("exam.jsonl", [question(99)])
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    tree = {
        "name": "s",
        "base": "base.yaml",
        "data": {"sources": [{"name": "own", "path": "questions.jsonl"}], **data},
        "grids": [{"name": "g", "axes": {"sources": ["own"]} | axes}],
    }
    Path("s.yaml").write_text(yaml.safe_dump(tree))
    return load_study(Path("s.yaml"))


def rows(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_informativeness_is_an_axis_beside_levels():
    loaded = study({"levels": [[1, 2]], "informativeness": ["all", [1], [3, 4]]})
    planned = plan_runs(loaded)
    assert [run.name for run in planned] == ["own-l1.2-s5", "own-l1.2-i1-s5", "own-l1.2-i3.4-s5"]
    assert [run.axes.get("informativeness") for run in planned] == ["all", (1,), (3, 4)]
    made = make_sets(loaded, planned, "test")
    # of 12 numbers in a row 0, 1, 6 and 7 are of levels 1 and 2; 0 and 1 are in bin 1, 6 and 7 in bin 3
    assert [len(rows(file)) for file in made] == [20, 10, 10]
    assert [{row["informativeness"] for row in rows(file)} for file in made] == [{1, 3}, {1}, {3}]
    assert all(row["level"] in (1, 2) for file in made for row in rows(file))


def test_bins_and_sizes_dealt_to_levels_go_together():
    loaded = study({"levels": [[1, 2]], "informativeness": [[3]], "sizes": [4]}, per_level=True)
    made = make_sets(loaded, plan_runs(loaded), "test")
    assert [sorted((row["level"], row["informativeness"]) for row in rows(file)) for file in made] == [
        [(1, 3), (1, 3), (2, 3), (2, 3)]
    ]


def test_results_of_a_study_have_the_axis(capsys):
    study({"informativeness": ["all", [3, 4]]})
    assert main(["study", "s.yaml", "--collect"]) == 1  # nothing has been run
    assert [row["axis:informativeness"] for row in csv.DictReader(open("studies/s/results.csv"))] == ["all", "[3, 4]"]
    assert [row["axis:informativeness"] for row in json.loads(Path("studies/s/results.json").read_text())] == ["all", [3, 4]]


def test_names_say_bins():
    assert run_name({"sources": "a", "levels": (6,), "informativeness": (3, 4), "seeds": 1}, None) == "a-l6-i3.4-s1"
    assert run_name({"sources": "a", "levels": "all", "informativeness": "all"}, None) == "a"
    assert len({attribute.short for attribute in ATTRIBUTES} | {"n", "s"}) == 2 + len(ATTRIBUTES)


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"informativeness": [[0]]}, "informativeness"),
        ({"informativeness": [[1], [1]]}, "[1] is listed twice"),
        ({"informativeness": [[]]}, "informativeness"),
        ({"informativenes": [[1]]}, "did you mean 'informativeness'?"),
    ],
)
def test_a_bad_axis_is_refused_in_one_line(capsys, axes, words):
    study({})
    tree = yaml.safe_load(Path("s.yaml").read_text())
    tree["grids"][0]["axes"] |= axes
    Path("s.yaml").write_text(yaml.safe_dump(tree))
    assert main(["study", "s.yaml", "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and message.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------------ sets
def annotations(suffix, table):
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(table), "levels.parquet")
        return "levels.parquet"
    return write("levels.jsonl", table)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_annotations_bring_informativeness_with_levels(suffix):
    write("a.jsonl", [question(i, informativeness=9) for i in range(4)])
    file = annotations(
        suffix, [{"id": f"q{i}", "level": 1 + i, "informativeness": [2, None, 4][i], "pass_rate": 0.5} for i in range(3)]
    )
    recipe = f"sources: [{{name: a, path: a.jsonl, levels: {file}}}]\nshuffle: false\n"
    Path("recipe.yaml").write_text(recipe)
    assert main(["data", "build", "--out", "set.jsonl", "--config", "recipe.yaml"]) == 0
    assert [(q.id, q.level, q.informativeness) for q in load_questions(["set.jsonl"]).questions] == [
        ("q0", 1, 2),
        ("q1", 2, 9),
        ("q2", 3, 4),
        ("q3", None, 9),
    ]
    card = json.loads(Path("set.card.json").read_text())
    assert card["set"]["informativeness"] == {"2": 1, "4": 1, "9": 2}
    assert card["steps"][:2] == [
        f"levels: 3 of 4 questions of a from {file}",
        f"informativeness: 2 of 4 questions of a from {file}",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_annotations_without_informativeness_change_levels_only(suffix):
    write("a.jsonl", [question(i, informativeness=3) for i in range(2)])
    file = annotations(suffix, [{"id": "q0", "level": 5}])
    Path("recipe.yaml").write_text(f"sources: [{{name: a, path: a.jsonl, levels: {file}}}]\nshuffle: false\n")
    assert main(["data", "build", "--out", "set.jsonl", "--config", "recipe.yaml"]) == 0
    assert [(q.level, q.informativeness) for q in load_questions(["set.jsonl"]).questions] == [(5, 3), (None, 3)]
    assert not [text for text in json.loads(Path("set.card.json").read_text())["steps"] if "informativeness" in text]


@pytest.mark.parametrize(
    "row, setting, words",
    [
        ({"level": 7}, "seed=0", "level 7 is not a whole number from 1 to 6"),
        ({"level": 1, "informativeness": 0}, "seed=0", "informativeness 0 is not a whole number from 1 to 1000"),
        ({"level": 1, "informativeness": 1001}, "seed=0", "informativeness 1001 is not a whole number from 1 to 1000"),
        ({"level": float("inf")}, "seed=0", "level inf is not a whole number from 1 to 6"),
        ({"level": float("nan")}, "seed=0", "level nan is not a whole number from 1 to 6"),
        ({"level": 10**400}, "seed=0", "level 1000000000"),
        ({"level": True}, "seed=0", "level True is not a whole number from 1 to 6"),
        ({"level": None}, "seed=0", "levels.jsonl: holds no level and no informativeness of any question; annotate again"),
        ({"level": 2.5}, "seed=0", "level 2.5 is not a whole number"),
        ({"informativeness": 1}, "seed=0", "rows need id and level (KeyError: 'level')"),
        (
            {"level": 1},
            "filter.informativeness=[2]",
            "filter.informativeness: [2] is required, but no question has informativeness; annotate them",
        ),
    ],
)
def test_annotations_that_can_not_be_used_are_one_line(capsys, row, setting, words):
    write("a.jsonl", [question(0)])
    write("levels.jsonl", [{"id": "q0"} | row])
    Path("recipe.yaml").write_text("sources: [{name: a, path: a.jsonl, levels: levels.jsonl}]\n")
    assert main(["data", "build", "--out", "set.jsonl", "--config", "recipe.yaml", setting]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and words in message and message.count("\n") == 1
    assert not Path("set.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------- evaluations
def scored(name, outcomes, **more):
    subject = Question(name, f"{name}?", {"A": "a", "B": "b"}, "A", **more)
    texts = ["so \\boxed{A}" if outcome == C else "so \\boxed{B}" for outcome in outcomes]
    rollouts = tuple(
        Rollout(name, name, j, (1, 2), (-0.5, -0.5), text, FinishReason.STOP, 0) for j, text in enumerate(texts)
    )
    rewards = tuple(float(outcome == C) for outcome in outcomes)
    return ScoredGroup(
        RolloutGroup(name, subject, (1,), rollouts),
        tuple(outcomes),
        rewards,
        rewards,
        tuple("A" if outcome == C else "B" for outcome in outcomes),
    )


def test_answers_of_a_run_and_of_eval_carry_the_bin():
    group = scored("q", [C], level=2, informativeness=3)
    sets = QuestionSet("e", Path("e.jsonl"), (group.group.question,), 1)
    write_evaluation(Path("evaluations"), "step_000000", 0, Evaluation(0, (SetResult(sets, (group,), score([group])),), 1.0))
    of_run = read_answered(Path("evaluations/step_000000.items.jsonl"))["e"].answers["q"]
    answer = graded(Asked("e", None, group.group.question), 0, "\\boxed{A}", FinishReason.STOP, 3, Grading())
    write_items(Path("out/items.jsonl"), [answer])
    of_eval = read_answered(Path("out/items.jsonl"))["e"].answers["q"]
    assert of_run.attributes == of_eval.attributes == {"level": 2, "informativeness": 3}
    assert read_items(Path("out/items.jsonl"))["e", "q"] == [answer]
    (row,) = read_json_lines(Path("out/items.jsonl"))
    del row["informativeness"]  # as an older version wrote it
    replace_json_lines(Path("out/items.jsonl"), [row])
    assert read_items(Path("out/items.jsonl"))["e", "q"][0].asked.question.informativeness is None


def test_results_are_told_by_informativeness():
    def answer(i, text, bin_):
        item = Asked("e", None, Question(f"q{i}", "?", {"A": "a", "B": "b"}, "A", informativeness=bin_))
        return [graded(item, 0, text, FinishReason.STOP, 3, Grading())]

    result = set_result([answer(0, "\\boxed{A}", 1), answer(1, "\\boxed{B}", 1), answer(2, "\\boxed{A}", 4)])
    assert {name: (values["n"], values["accuracy"]) for name, values in result["by_informativeness"].items()} == {
        "1": (2, 0.5),
        "4": (1, 1.0),
    }
    assert result["by_level"] == {}


# ------------------------------------------------------------------------------------------------------ runs and reports
def test_provenance_counts_bins():
    write("train.jsonl", [question(0, informativeness=1), question(1, informativeness=4), question(2)])
    recorded = provenance.training_set([Path("train.jsonl")])
    assert recorded["informativeness"] == {"1": 1, "4": 1, "none": 1} and recorded["levels"] == {"none": 3}


def test_provenance_says_how_training_files_were_read():
    """Keys from 1 and labels: question 1 has key 3 of its three options; the row with key 9 is left out."""
    options = {letter: f"{letter}) finding {letter}" for letter in "ABC"}
    write(
        "one.jsonl",
        [
            question(0, options=options, answer=1),
            question(1, options=options, answer=3),
            question(2, options=options, answer=9),
        ],
    )
    write("two.jsonl", [question(3)])
    recorded = provenance.training_set([Path("one.jsonl"), Path("two.jsonl")])
    assert (recorded["questions"], recorded["bad_rows"]) == (3, 1)
    assert recorded["reading"] == {
        "one.jsonl": {"keys": {"answer": "index1"}, "labels_removed": 3, "ids_made": 0, "repeats": []},
        "two.jsonl": {"keys": {"answer": "letter"}, "labels_removed": 0, "ids_made": 0, "repeats": []},
    }


def test_the_report_counts_by_bin_where_there_are_several(tmp_path):
    run = make_run(tmp_path, "r")
    write_rollouts(
        rollout_path(run, 1),
        1,
        [scored("a", [C, W], informativeness=1), scored("b", [C, C], informativeness=2), scored("c", [W, W])],
    )
    text = Page(write_report(run).read_text()).text
    assert "Accuracy by informativeness" in text and "Accuracy by level" not in text and "By informativeness" in text
    responses = json.loads((run / "report.json").read_text())["responses"]
    assert responses["questions"]["informativeness"] == {"1": 1, "2": 1, "none": 1}
    assert {
        name: (part["responses"], part["correct"])
        for name, part in responses["recorded_steps"][0]["informativeness"].items()
    } == {"bin 1": (2, 1), "bin 2": (2, 2), "no bin": (2, 0)}
    seen = read_runs([run])[0].training
    assert (seen.questions, seen.mean("informativeness"), seen.mean("levels"), seen.seen_only) == (3, 1.5, None, True)


# ----------------------------------------------------------------------------------------------------------- comparisons
def trained(root, name, bins, right):
    """A run trained on 40 questions with these bins; of eight evaluation questions, four in bin 1 and four in bin 3, those
    with a number below `right` are answered right after training."""
    train = {"questions": 40, "content_sha256": "0", "sources": {"s": 40}, "levels": {"none": 40}}
    run = make_run(root, name, train=train | ({"informativeness": bins} if bins else {}))
    for step, solved in ((0, 0), (12, right)):
        path = run / "evaluations" / f"step_{step:06d}"
        replace_json_lines(
            Path(f"{path}.items.jsonl"),
            [item(f"q{i}", C if i < solved else W, name="exam", informativeness=1 if i < 4 else 3) for i in range(8)],
        )
        replace_text(Path(f"{path}.json"), json.dumps({"sets": {"exam": {"asked": "x"}}}))
    return run


def test_a_comparison_shows_accuracy_against_the_mean_bin_and_by_bin(tmp_path):
    runs = [
        trained(tmp_path, "short", {"1": 30, "3": 10}, 5),
        trained(tmp_path, "long", {"4": 39, "none": 1}, 4),
        trained(tmp_path, "old", None, 0),
    ]
    assert compare(runs, tmp_path / "c.html", False) == 0
    numbers = json.loads((tmp_path / "c.json").read_text())
    # (30 x 1 + 10 x 3) / 40; 4 for all that have a bin; an older record has not counted them
    assert [run["training"]["mean_informativeness"] for run in numbers["runs"]] == [1.5, 4.0, None]
    assert numbers["runs"][0]["training"]["informativeness"] == {"1": 30, "3": 10}
    first = numbers["sets"][0]["runs"][0]["by_informativeness"]
    assert {value: (part["n"], part["accuracy"]) for value, part in first.items()} == {"1": (4, 1.0), "3": (4, 0.25)}
    # Wilson: all of 4 gives 1 / (1 + 3.8415 / 4); 1 of 4 as in test_eval_command
    assert first["1"]["interval"] == pytest.approx([0.5101, 1.0], abs=5e-5)
    assert first["3"]["interval"] == pytest.approx([0.0456, 0.6994], abs=5e-4)
    lines = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [line["mean_informativeness"] for line in lines] == ["1.5", "4.0", ""]
    assert [line["mean_level"] for line in lines] == ["", "", ""]
    parts = list(csv.DictReader((tmp_path / "c.parts.csv").open()))
    assert [
        (line["set"], line["run"], line["attribute"], line["value"], line["n"], line["after"]) for line in parts[:3]
    ] == [
        ("exam", "short", "informativeness", "1", "4", "1.0"),
        ("exam", "short", "informativeness", "3", "4", "0.25"),
        ("exam", "long", "informativeness", "1", "4", "1.0"),
    ]
    assert len(parts) == 6 and float(parts[1]["after_low"]) == first["3"]["interval"][0]


def test_the_page_of_a_comparison_draws_and_tells_bins(tmp_path):
    compare([trained(tmp_path, "short", {"1": 40}, 5), trained(tmp_path, "long", {"4": 40}, 4)], tmp_path / "c.html", False)
    page = Page((tmp_path / "c.html").read_text())
    assert "exam: after training, by informativeness of the evaluation question" in page.text
    assert "run bin 1 bin 3" in page.text and "25.0% [4.6%, 69.9%] n = 4" in page.text
    assert "mean 1.00" in page.text and "mean 4.00" in page.text
    # levels are not known: said once; accuracy against the mean bin, and by bin, is drawn
    assert page.text.count("No two evaluated runs were trained on questions of different mean") == 1
    svgs = (tmp_path / "c.html").read_text().split("<svg")[1:]
    assert sum("1, 3: 25% [4.6%, 69.9%]" in svg for svg in svgs) == 1  # run 1 at bin 3
    assert sum("2, 4: 50%" in svg for svg in svgs) == 1  # run 2 at mean bin 4


def test_evaluation_questions_of_one_bin_have_no_table(tmp_path):
    run = make_run(tmp_path, "r", before=[C, W], after=[C, C])
    numbers = comparison(read_runs([run]))
    assert list(numbers["sets"][0]["runs"][0]["by_informativeness"]) == ["none"]
    compare([run], tmp_path / "c.html", False)
    assert "of the evaluation question" not in (tmp_path / "c.html").read_text()
    assert (tmp_path / "c.parts.csv").read_text().count("\n") == 1
