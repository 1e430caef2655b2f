"""Comparisons: tests of significance by hand and R, the files of runs and of `alphamed eval`, the sentences, the page."""

import csv
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import Page, evaluate, graded

from alphamed import cli
from alphamed.config.loading import build_config, dump_tree
from alphamed.errors import ConfigError
from alphamed.evaluation.paired import mcnemar, split_gain
from alphamed.files import append_json, replace_json, replace_json_lines, replace_text
from alphamed.lab.reports.compare_page import main
from alphamed.lab.reports.comparison import comparison
from alphamed.lab.reports.evaluations import answered, holm, pair, read_answered
from alphamed.lab.reports.plots import gain_rows, scatter
from alphamed.lab.reports.runs import control_of, read_runs
from alphamed.records import Outcome
from alphamed.rundir import provenance
from alphamed.rundir.rollout_files import rollout_path, write_rollouts

C, W, U = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE


def item(i, outcome, letter=None, *, name="s", sample=0, level=None, answer="A", **more):
    letter = letter or {"correct": answer, "wrong": "B"}.get(str(outcome))
    return {
        "set": name,
        "benchmark": name.partition("+")[0],
        "variant": None,
        "id": i,
        "sample": sample,
        "question": f"{i}?",
        "options": {"A": "a", "B": "b", "C": "c", "D": "d"},
        "answer": answer,
        "context": None,
        "source": None,
        "level": level,
        "letter": letter,
        "outcome": str(outcome),
        "finish_reason": "stop",
        "tokens": 10,
        "text": "t",
    } | more


def sets(tmp_path, *items):
    file = tmp_path / "items.jsonl"
    replace_json_lines(file, items)
    return read_answered(file)


def answers(tmp_path, name, outcomes):
    return sets(tmp_path, *(item(f"q{i}", outcome, name=name) for i, outcome in enumerate(outcomes)))[name]


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize(
    "gained, lost, p",
    [(2, 10, 0.03857421875), (10, 2, 0.03857421875), (0, 5, 0.0625), (0, 0, 1.0), (7, 7, 1.0), (1, 0, 1.0)],
)  # R: binom.test(2, 12)$p.value = 0.03857; 2 x 79 / 4096
def test_mcnemars_exact_p(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_p_is_finite_for_thousands_of_flips():
    assert mcnemar(2000, 2000) == 1.0 and 0 < mcnemar(1900, 2100) < 0.01


def test_a_gain_is_split_without_a_rest():
    # boxed 50% -> 100%, among boxed 20% -> 30%: 0.5 x 0.25 by boxing, 0.1 x 0.75 by being right
    parts = split_gain(0.5, 0.1, 1.0, 0.3)
    assert (parts.gain, parts.from_boxed, parts.from_accuracy_among_boxed) == pytest.approx((0.2, 0.125, 0.075))
    assert split_gain(0.0, 0.0, 0.8, 0.4).from_accuracy_among_boxed == 0.0  # nothing was boxed: all is format


def test_holm_adjusts_for_the_number_of_tests():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


def test_questions_are_paired_by_what_was_asked(tmp_path):
    first = sets(tmp_path, item("a", C), item("b", W), item("c", C), item("d", U), item("only", C), item("keyed", C))["s"]
    second = sets(tmp_path, item("a", C), item("b", C), item("c", W), item("d", C), item("keyed", W, answer="C"))["s"]
    paired = pair(first, second)
    assert (paired.n, paired.left_out, paired.gained, paired.lost) == (4, 2, ("b", "d"), ("c",))
    assert paired.difference == 0.25 and paired.split.gain == 0.25 and paired.p == 1.0
    # boxed 3/4 -> 4/4; among boxed 2/3 -> 3/4: 1/4 x (2/3 + 3/4) / 2
    assert paired.split.from_boxed == pytest.approx(17 / 96)
    assert pair(first, answered("s", [])) is None


def test_the_interval_of_a_difference_is_agresti_and_mins(tmp_path):
    # their approval ratings: 1,144 people, 132 and 107 changed: (132.5 - 107.5) / 1146 -+ 1.96 x 0.013503
    first = answers(tmp_path, "s", [C] * 107 + [W] * 132 + [C] * 905)
    second = answers(tmp_path, "s", [W] * 107 + [C] * 132 + [C] * 905)
    assert pair(first, second).interval == pytest.approx((-0.00465, 0.04828), abs=2e-5)


def test_several_samples_vote_and_share(tmp_path):
    answered_set = sets(
        tmp_path,
        *(item("a", outcome, letter, sample=j) for j, (outcome, letter) in enumerate([(C, "A"), (C, "A"), (W, "B")])),
        *(item("b", outcome, letter, sample=j) for j, (outcome, letter) in enumerate([(C, "A"), (W, "B"), (U, None)])),
    )["s"]
    assert (
        answered_set.n,
        answered_set.samples,
        answered_set.accuracy,
        answered_set.boxed,
        answered_set.among_boxed,
    ) == pytest.approx((2, 6, 0.5, 5 / 6, 0.6))
    assert answered_set.answers["a"].right and not answered_set.answers["b"].right  # a tie is no answer


def test_a_broken_line_of_answers_is_named(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"set": "s", "id": "a"}\n')
    with pytest.raises(ConfigError, match="items.jsonl: line 1 is not a graded answer"):
        read_answered(tmp_path / "items.jsonl")


# ----------------------------------------------------------------------------------------------------------------- runs
def make_run(root, name, *, before=None, after=None, train=None, steps=12, files=("wording.jsonl",), **settings):
    run_dir = root / name
    run_dir.mkdir(parents=True)
    tree = {
        "model": {"path": "some/model"},
        "data": {"train": ["train.jsonl"]},
        "run": {"name": name, "steps": 40},
        "evaluation": {"files": list(files)},
    }
    config = build_config(tree).model_dump(mode="json")
    for key, value in settings.items():  # settings that this version may not know
        section, _, field = key.partition("__")
        config[section][field] = value
    replace_text(run_dir / "config.yaml", dump_tree(config))
    for step in range(1, steps + 1):
        append_json(run_dir / "metrics.jsonl", {"step": step, "reward/mean": step / 40, "response/tokens_mean": 20.0})
    if before:
        evaluate(run_dir, 0, before)
    if after:
        evaluate(run_dir, steps, after)
    if train:
        replace_text(run_dir / "provenance.json", json.dumps({"starts": [], "data": [], "model": [], "train": train}))
    return run_dir


BEFORE = [C] * 40 + [W] * 100 + [U] * 60
BETTER = [C] * 90 + [W] * 100 + [U] * 10


@pytest.mark.parametrize(
    "tree, control",
    [
        ({"reward": {"name": "correct"}}, None),
        ({"reward": {"name": "random"}}, "random reward"),
        ({}, None),
        ({"reward": {"name": "format_only"}, "data": {"answer_keys": "shuffled"}}, "format-only reward, shuffled keys"),
        ({"run": {"stop_after": 0}}, "unchanged model"),
        ({"data": {"answer_keys": "given"}, "run": {"stop_after": 3}}, None),
    ],
)
def test_controls_are_known_by_their_configuration(tree, control):
    assert control_of(tree) == control


def test_gains_are_compared_with_controls(tmp_path):
    runs = read_runs(
        [
            make_run(tmp_path, "true", before=BEFORE, after=BETTER),
            make_run(tmp_path, "coin", before=BEFORE, after=[C] * 50 + [W] * 100 + [U] * 50, reward__name="random"),
            make_run(tmp_path, "boxes", before=BEFORE, after=[C] * 85 + [W] * 110 + [U] * 5, reward__name="format_only"),
        ]
    )
    assert [run.control for run in runs] == [None, "random reward", "format-only reward"]
    numbers = comparison(runs)
    # 40 were right and stay right, 50 became right: 25 points, p = 2 / 2^50; 50/202 -+ 1.96 x 0.03077;
    # boxed 70% -> 95%, among boxed 28.6% -> 47.4%
    assert numbers["verdict"] == [
        "true on wording: +25.0 points [+18.7, +30.8], n = 200, McNemar p = 1.8e-15; +9.5 by boxing more answers, +15.5 by "
        "being correct more often when boxed. More than the control coin (random reward): difference +20.0 points, "
        "p = 1.8e-12. Not shown to be more than the control boxes (format-only reward): difference +2.5 points, p = "
        "0.062."
    ]
    assert [(row["first"], row["second"], len(row["gained"]), len(row["lost"])) for row in numbers["pairs"]] == [
        (1, 2, 0, 40),
        (1, 3, 0, 5),
        (2, 3, 35, 0),
    ]
    assert numbers["pairs"][1]["p_adjusted"] == 0.0625 and numbers["pairs"][0]["p_adjusted"] == 3 * 2 * 0.5**40


def test_runs_without_an_evaluation_are_listed_with_the_reason(tmp_path):
    paths = [
        make_run(tmp_path, "never", files=()),
        make_run(tmp_path, "dead", steps=3),
        make_run(tmp_path, "half", before=BEFORE),
        make_run(tmp_path, "late", after=[C, W]),
    ]
    reasons = [run.reason for run in read_runs(paths)]
    assert reasons[0] == "it was not evaluated: evaluation.files is empty"
    assert reasons[1].startswith("it was not evaluated: no evaluation is recorded by step 3")
    assert reasons[2] == "it has no evaluation after training (evaluation.after); its last step is 12"
    assert reasons[3] == "it has no evaluation before training of the same questions (evaluation.before)"
    main(paths, tmp_path / "c.html", False)
    page = Page((tmp_path / "c.html").read_text())
    assert all(reason in page.text for reason in reasons)
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert {row["run"]: row["not_compared"] for row in rows} == dict(
        zip(("half", "late", "never", "dead"), (reasons[k] for k in (2, 3, 0, 1)))
    )


def test_other_questions_before_are_not_compared(tmp_path):
    run = read_runs([make_run(tmp_path, "resumed", before=[C, W, U], after=[C, W])])[0]
    assert run.before == {} and run.reason.startswith("it has no evaluation before training of the same questions")


def test_the_unchanged_model_is_a_control_with_one_evaluation(tmp_path):
    runs = read_runs(
        [
            make_run(tmp_path, "true", before=BEFORE, after=BETTER),
            make_run(tmp_path, "as_is", before=BEFORE, steps=0, run__stop_after=0),
        ]
    )
    assert (runs[1].control, runs[1].reason, runs[1].after["wording"].n) == ("unchanged model", None, 200)
    assert comparison(runs)["verdict"][0].endswith(
        "More than the control as_is (unchanged model): difference +25.0 points, p = 1.8e-15."
    )
    main([run.path for run in runs], tmp_path / "c.html", False)
    assert "the model before training" in Page((tmp_path / "c.html").read_text()).text


def test_a_before_is_shared_with_runs_of_the_same_model_and_questions(tmp_path):
    paths = [
        make_run(tmp_path, "first", before=BEFORE, after=BETTER),
        make_run(tmp_path, "second", after=BETTER),
        make_run(tmp_path, "other", after=BETTER, prompt__max_tokens=99),
    ]
    first, second, other = read_runs(paths)
    assert second.before_from == {"wording": "first"} and second.reason is None and second.before["wording"].n == 200
    assert first.before_from == {} and other.before_from == {} and other.reason is not None


def test_training_sets_come_from_provenance_or_what_was_seen(tmp_path):
    record = {"questions": 1200, "content_sha256": "0", "sources": {"medqa": 1200}, "levels": {"1": 600, "4": 600}}
    recorded, seen = make_run(tmp_path, "recorded", train=record), make_run(tmp_path, "seen")
    write_rollouts(rollout_path(seen, 1), 1, [graded("q1", [C, W]), graded("q2", [U, U])])
    first, second = (run.training for run in read_runs([recorded, seen]))
    assert (first.questions, first.mean("levels"), first.seen_only) == (1200, 2.5, False)
    assert (second.questions, second.mean("levels"), second.seen_only) == (2, None, True)
    assert read_runs([make_run(tmp_path, "bare")])[0].training is None


def test_provenance_counts_the_training_questions(tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "question": "?",
            "options": {"A": "a", "B": "b"},
            "answer": "A",
            "source": "medqa" if i else None,
            "level": 1 + i,
        }
        for i in range(3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not a row\n")
    record = provenance.training_set([file])
    assert record["questions"] == 3 and record["levels"] == {"1": 1, "2": 1, "3": 1}
    assert record["sources"] == {"medqa": 2, "unknown": 1}
    file.write_text("")
    assert provenance.training_set([file]) is None and provenance.training_set([]) is None


def test_an_evaluation_folder_is_compared_with_runs(tmp_path):
    folder = tmp_path / "evaluated"
    replace_json_lines(folder / "items.jsonl", [item(f"q{i}", C, name="wording") for i in range(3)])
    run = read_runs([folder])[0]
    assert (
        run.after["wording"].n == 3
        and run.reason == "an evaluation of one model, not a run: it has no evaluation before training"
    )
    with pytest.raises(ConfigError, match="neither config.yaml .a run. nor items.jsonl"):
        read_runs([tmp_path])
    with pytest.raises(ConfigError, match="is given twice"):
        read_runs([folder, folder])


def test_benchmarks_that_diverge_are_reported(tmp_path):
    run_dir = make_run(tmp_path, "apart", before=BEFORE)
    for step, right in ((0, 5), (12, 25)):
        path = run_dir / "evaluations" / f"step_{step:06d}"
        items = [json.loads(line) for line in Path(f"{path}.items.jsonl").read_text().splitlines()] if step == 0 else []
        rows = items or [
            item(f"q{i}", W, name="wording", question=f"<i>q{i}</i> & more?", options={"A": "<b>a</b>", "B": "b"})
            for i in range(200)
        ]
        rows += [item(f"p{i}", C if i < right else W, name="other") for i in range(30)]
        replace_json_lines(Path(f"{path}.items.jsonl"), rows)
        replace_text(Path(f"{path}.json"), json.dumps({"sets": {name: {"asked": name} for name in ("wording", "other")}}))
    numbers = comparison(read_runs([run_dir]))
    # 20 of 30 gained: 20 / 32 -+ 1.96 sqrt(21 / 32 - 0.625^2) / sqrt(32); 40 of 200 lost: -40 / 202 -+ 1.96 x 0.02847
    assert (
        "The benchmarks of apart diverge: it gains on other (+66.7 points [+44.6, +80.4], n = 30) and loses on wording "
        "(-20.0 points [-25.4, -14.2], n = 200)."
    ) in numbers["verdict"]


# ----------------------------------------------------------------------------------------------------------------- page
@pytest.fixture
def page(tmp_path, capsys):
    big = {"questions": 1200, "content_sha256": "0", "sources": {"medqa": 1200}, "levels": {"1": 1200}}
    small = big | {"questions": 300, "levels": {"6": 300}, "sources": {"<script>": 300}}
    paths = [
        make_run(tmp_path, "big", before=BEFORE, after=BETTER, train=big),
        make_run(tmp_path, "small", before=BEFORE, after=[W] * 200, train=small),
    ]
    assert cli.main(["compare", *map(str, paths), "--out", str(tmp_path / "c.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "c.json").read_text())
    return (tmp_path / "c.html").read_text()


def test_the_page_answers_three_questions_and_requests_nothing(page):
    parsed = Page(page)
    assert parsed.addresses == [] and not parsed.tags & {"script", "img", "i", "b>a", "link", "iframe"}
    assert "default-src 'none'" in page and "prefers-color-scheme:dark" in page
    for text in (
        "1. Does reinforcement learning alone",
        "2. How do quantity",
        "3. How do difficulty",
        "1,200",
        "mean 6.00",
        "+25.0 points",
        "small on wording: -20.0 points",
        "Accuracy fell.",
        "No control is among these runs",
        "+9.5",
        "50 / 0",
        "<script> 100.0%",
    ):
        assert text in parsed.text, text
    # sizes and levels differ: both are drawn; informativeness is not known
    assert page.count("No two evaluated runs were trained") == page.count("different mean informativeness") == 1


def test_a_damaged_evaluation_is_named(tmp_path):
    run_dir = make_run(tmp_path, "a", before=BEFORE)
    (run_dir / "evaluations" / "step_000000.json").write_text('{"sets": ')
    with pytest.raises(ConfigError, match="step_000000.json: not readable .JSONDecodeError"):
        read_runs([run_dir])


def marks(svg, tag):
    return [(element.get("class"), element) for element in ElementTree.fromstring(svg).findall(f".//{{*}}{tag}")]


def test_gains_are_drawn_to_scale_and_controls_are_grey():
    svg = gain_rows([("<a>", 0.1, 0.0, 0.2, False), ("coin", -0.05, -0.1, 0.0, True)])
    (first, gain), (second, loss) = marks(svg, "circle")
    zero = next(float(line.get("x1")) for kind, line in marks(svg, "line") if kind == "axis")
    assert (first, second) == ("f0", "f4")
    assert float(gain.get("cx")) - zero == pytest.approx(2 * (zero - float(loss.get("cx"))), abs=0.2)


def test_points_of_equal_x_stand_side_by_side():
    svg = scatter(
        [("1", 300, 0.5, 0.4, 0.6, False), ("2", 300, 0.5, 0.4, 0.6, False), ("3", 1200, 1.0, 0.9, 1.0, True)], "size"
    )
    (_, first), (_, second), (kind, top) = marks(svg, "circle")
    assert first.get("cy") == second.get("cy") and first.get("cx") != second.get("cx") and kind == "f4"
    assert float(top.get("cy")) == pytest.approx(float(first.get("cy")) * 2 - 216, abs=0.2)  # the axis lies at 250 - 34


def test_only_html_is_written(tmp_path):
    with pytest.raises(ConfigError, match="does not end in .html"):
        main([make_run(tmp_path, "a")], tmp_path / "c.pdf", False)


@pytest.mark.parametrize("name", ["set.json", "set.csv"])
def test_the_numbers_replace_those_of_a_comparison_only(tmp_path, name):
    """A training set may be called so, too."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"{name} exists already"):
        main([make_run(tmp_path, "a")], tmp_path / "set.html", False)
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "set.html").exists()


def test_answers_without_options_are_compared_by_their_texts(tmp_path):
    """No letter to collapse to, no chance level, and a vote that counts what the boxes say, as `alphamed eval` does."""

    def graded_item(i, j, outcome, letter, text):
        return item(i, outcome, name="e+free", sample=j, variant="free", text=f"\\boxed{{{text}}}") | {"letter": letter}

    rows = [
        graded_item(f"q{i}", j, *sample)
        for i in range(20)
        for j, sample in enumerate([(C, "A", "a"), (W, None, f"other {i}")])
    ]
    rows += [
        graded_item("last", j, *sample) for j, sample in enumerate([(C, "A", "a"), (W, None, "Zinc"), (W, None, "zinc.")])
    ]
    rows += [
        graded_item("apart", j, *sample)
        for j, sample in enumerate([(C, "A", "a"), (C, "A", "a"), (W, None, "x"), (W, None, "y")])
    ]
    folder = tmp_path / "free"
    replace_json_lines(folder / "items.jsonl", rows)
    answered_set = read_answered(folder / "items.jsonl")["e+free"]
    assert math.isnan(answered_set.chance) and answered_set.letters[0] == {"A": 23}
    assert (
        not answered_set.answers["last"].right
        and answered_set.answers["apart"].right
        and not answered_set.answers["q0"].right
    )
    assert main([folder], tmp_path / "c.html", False) == 0


def test_evaluations_with_another_prompt_or_sampling_are_not_alike(tmp_path):
    prompt = {"template": "chat", "max_tokens": 64}
    raw = prompt | {"template": "raw"}
    for name, asked, samples in (("a", prompt, 1), ("b", prompt, 1), ("c", raw, 1), ("d", prompt, 5)):
        sampling = {"samples": samples, "temperature": float(samples > 1), "max_tokens": 9}
        replace_json_lines(tmp_path / name / "items.jsonl", [item("q", C, sample=0)])
        replace_json(
            tmp_path / name / "evaluation.json",
            {"format": 1, "sets": {}, "asked": {"model": {}, "prompt": asked, "sampling": sampling}},
        )
    pairs = comparison(read_runs([tmp_path / name for name in "abcd"]))["pairs"]
    assert [(row["first"], row["second"]) for row in pairs if row["same_protocol"]] == [(1, 2)]


@pytest.mark.parametrize(
    "file, content, problem",
    [
        ("evaluations/step_000000.items.jsonl", {"set": "s"}, "line 1 is not a graded answer"),
        ("evaluations/step_000000.json", {"sets": []}, "not readable"),
        ("evaluations.jsonl", {"time": "now"}, "line 1 records no evaluation"),
    ],
)
def test_the_report_names_a_damaged_file(tmp_path, capsys, file, content, problem):
    run = make_run(tmp_path, "a", before=[W] * 4, after=[C] * 4)
    (run / file).write_text(json.dumps(content) + "\n")
    assert cli.main(["report", str(run)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and file in message and problem in message and message.count("\n") == 1


def test_a_damaged_record_of_training_is_named_and_a_damaged_report_counted_again(tmp_path):
    run = make_run(tmp_path, "a", before=[W] * 4, after=[C] * 4)
    (run / "report.json").write_text('{"responses": 5, "warnings": 7, "last_step": 12}')
    assert read_runs([run])[0].warnings == ()
    older = {"responses": {"questions": {"asked": 3, "sources": {}}}, "warnings": ["a warning"], "last_step": 12}
    (run / "report.json").write_text(json.dumps(older))
    assert read_runs([run])[0].warnings == ()
    (run / "provenance.json").write_text('{"starts": [], "data": [], "model": [], "train": {"questions": 1}}')
    with pytest.raises(ConfigError, match="provenance.json: train is not readable"):
        read_runs([run])


def test_runs_of_one_name_are_distinguished_by_their_folders(tmp_path):
    folders = [tmp_path / name for name in ("a/x/r", "b/x/r", "b/y/r", "other")]
    for folder in folders:
        replace_json_lines(folder / "items.jsonl", [item("q", C)])
    assert [run.name for run in read_runs(folders)] == ["a/x/r", "b/x/r", "y/r", "other"]
