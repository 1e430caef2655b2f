"""Benchmarks that diverge: by hand where one set rose and another fell, in sentences, on the page and in the numbers."""

import json

import pytest
from test_compare import answers, item, make_run
from test_report import C, Page, W

from alphamed.files import replace_json, replace_json_lines, replace_text
from alphamed.lab.reports.compare_page import main
from alphamed.lab.reports.comparison import comparison
from alphamed.lab.reports.divergence import divergence_sentences, divergences, diverging_sets
from alphamed.lab.reports.evaluations import pair
from alphamed.lab.reports.runs import read_runs


def change(tmp_path, gained, lost, n=40):
    """The paired change of n questions of which so many became right and so many no longer are."""
    same = [W] * (n - gained - lost)
    paired = pair(
        answers(tmp_path, "s", [W] * gained + [C] * lost + same), answers(tmp_path, "s", [C] * gained + [W] * lost + same)
    )
    return {"n": paired.n, "difference": paired.difference, "interval": list(paired.interval), "p": paired.p}


# p of 10 : 0 is 2 / 2^10, of 0 : 8 it is 2 / 2^8, of 5 : 0 it is 2 / 2^5 = 0.0625
def test_one_rises_and_one_falls(tmp_path):
    sets = diverging_sets({"up": change(tmp_path, 10, 0), "down": change(tmp_path, 0, 8), "same": change(tmp_path, 2, 2)})
    (up,), (down,) = sets["rose"], sets["fell"]
    assert (up["set"], up["n"], up["difference"], up["p"]) == ("up", 40, 0.25, 2 / 2**10)
    assert (down["set"], down["difference"], down["p"]) == ("down", -0.2, 2 / 2**8)
    # Holm over three sets: the smallest x 3, the next x 2
    assert (up["p_adjusted"], down["p_adjusted"]) == (6 / 2**10, 4 / 2**8)
    # Agresti and Min: (10.5 - 0.5) / 42 -+ 1.96 sqrt(11 / 42 - 0.2381^2) / sqrt(42)
    assert up["interval"] == pytest.approx([0.1011, 0.3751], abs=5e-5)


@pytest.mark.parametrize(
    "flips",
    [
        [(10, 0), (8, 0)],  # both rose
        [(0, 10), (0, 8)],  # both fell
        [(10, 0), (0, 5)],  # the fall may be chance
        [(5, 0), (0, 10)],  # the rise may be
        [(10, 0)],
        [],
    ],
)
def test_changes_that_do_not_diverge(tmp_path, flips):
    assert diverging_sets({str(k): change(tmp_path, *changes) for k, changes in enumerate(flips)}) is None


@pytest.mark.parametrize("unmoved, flagged", [(4, True), (6, False)])
def test_the_number_of_sets_counts(tmp_path, unmoved, flagged):
    """Of six sets the second smallest p counts 5 / 128 = 0.039, of eight 7 / 128 = 0.055."""
    sets = {"up": change(tmp_path, 10, 0), "down": change(tmp_path, 0, 8)}
    sets |= {f"same{k}": change(tmp_path, 1, 1) for k in range(unmoved)}
    assert (diverging_sets(sets) is not None) == flagged


def folder(root, name, asked=None, **right):
    """What `alphamed eval` writes: of each set 40 questions, the first `right` of them right."""
    replace_json_lines(
        root / name / "items.jsonl",
        [item(f"{of}{i}", C if i < count else W, name=of) for of, count in right.items() for i in range(40)],
    )
    if asked:
        replace_json(
            root / name / "evaluation.json",
            {
                "format": 1,
                "sets": {},
                "asked": {"model": {}, "prompt": asked, "sampling": {"samples": 1, "temperature": 0, "max_tokens": 9}},
            },
        )
    return root / name


def test_two_evaluations_that_diverge(tmp_path):
    numbers = comparison(
        read_runs([folder(tmp_path, "easy", medqa=10, pubmedqa=20), folder(tmp_path, "hard", medqa=20, pubmedqa=12)])
    )
    (row,) = numbers["divergences"]
    assert (row["first"], row["second"]) == (1, 2)
    assert [change["set"] for change in row["rose"]] == ["medqa"] and [change["set"] for change in row["fell"]] == [
        "pubmedqa"
    ]
    # pubmedqa: (0.5 - 8.5) / 42 -+ 1.96 sqrt(9 / 42 - 0.1905^2) / sqrt(42) = -0.1905 -+ 0.1276
    assert numbers["verdict"] == [
        "No run other than a control was evaluated before and after training, so there is no gain to report.",
        "hard and easy diverge: after training hard is better on medqa (+25.0 points [+10.1, +37.5], n = 40) "
        "and worse on pubmedqa (-20.0 points [-31.8, -6.3], n = 40).",
    ]


def test_evaluations_with_another_prompt_are_left_out(tmp_path):
    prompt = {"template": "chat", "max_tokens": 64}
    paths = [
        folder(tmp_path, "easy", prompt, medqa=10, pubmedqa=20),
        folder(tmp_path, "hard", prompt | {"template": "raw"}, medqa=20, pubmedqa=12),
        folder(tmp_path, "hard_too", prompt, medqa=20, pubmedqa=12),
    ]
    assert [(row["first"], row["second"]) for row in comparison(read_runs(paths))["divergences"]] == [(1, 3)]


def trained(root, name, levels, **right):
    """A run with answers before (10 of 40 everywhere) and after training."""
    run = make_run(root, name, train={"questions": 40, "content_sha256": "0", "sources": {}, "levels": levels})
    for step in (0, 12):
        path = run / "evaluations" / f"step_{step:06d}"
        replace_json_lines(
            path.with_suffix(".items.jsonl"),
            [
                item(f"{of}{i}", C if i < (count if step else 10) else W, name=of)
                for of, count in right.items()
                for i in range(40)
            ],
        )
        replace_text(path.with_suffix(".json"), json.dumps({"sets": {of: {"asked": of} for of in right}}))
    return run


def test_runs_and_their_training_are_on_the_page(tmp_path):
    paths = [
        trained(tmp_path, "easy", {"1": 40}, medqa=11, pubmedqa=10),
        trained(tmp_path, "hard", {"5": 20, "6": 20}, medqa=24, pubmedqa=2),
    ]
    main(paths, tmp_path / "c.html", False)
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert [(row["first"], row["second"]) for row in numbers["divergences"]] == [(None, 2), (1, 2)]
    sentences = [text for text in numbers["verdict"] if "diverge" in text]
    # against itself 14 gained of 40 and 8 lost; against the easy one 13 and 8
    assert sentences[0].startswith("The benchmarks of hard diverge: it gains on medqa (+35.0 points")
    assert sentences[1].startswith("hard and easy diverge: after training hard is better on medqa (+32.5 points")
    assert sentences[1].endswith("; its training questions have mean level 5.50 against 1.00.")
    page = Page((tmp_path / "c.html").read_text()).text
    section = page.split("Benchmarks that diverge")[1].split("Run against run")[0]
    assert "itself before training" in section and "medqa +35.0" in section and "pubmedqa -20.0" in section
    assert "None." not in section and sentences[1] in page


def test_a_run_and_the_unchanged_model_that_its_before_comes_from_are_listed_once(tmp_path):
    run = trained(tmp_path, "hard", {"6": 40}, medqa=24, pubmedqa=2)
    as_is = make_run(tmp_path, "as_is", steps=0, run__stop_after=0)
    for end in (".items.jsonl", ".json"):
        (run / "evaluations" / f"step_000000{end}").rename(as_is / f"moved{end}")
        (as_is / "evaluations").mkdir(exist_ok=True)
        (as_is / f"moved{end}").rename(as_is / "evaluations" / f"step_000000{end}")
    numbers = comparison(read_runs([run, as_is]))
    assert numbers["sets"][0]["runs"][0]["before_from"] == "as_is"
    assert [(row["first"], row["second"]) for row in numbers["divergences"]] == [(None, 1)]


def test_without_any_the_page_says_so(tmp_path):
    main([folder(tmp_path, "a", medqa=10), folder(tmp_path, "b", medqa=20)], tmp_path / "c.html", False)
    assert (
        "below 0.05. With true gains and no true loss, up to 1 comparison in 40 shows a loss by chance. None."
        in Page((tmp_path / "c.html").read_text()).text
    )


def test_the_most_certain_pairs_come_first_and_the_rest_are_counted(tmp_path):
    """Pair k loses 8 + k questions: the more, the smaller its larger p."""
    pairs = [
        {"first": 1, "second": 2 + k, "same_protocol": True, "set": of, **change(tmp_path, *flips)}
        for k in range(8)
        for of, flips in (("up", (20, 0)), ("down", (0, 8 + k)))
    ]
    runs = {number: {"name": f"r{number}", "control": None, "training": None} for number in range(1, 10)}
    diverging = divergences([], pairs, runs)
    assert [row["second"] for row in diverging] == [9, 8, 7, 6, 5, 4, 3, 2]
    sentences = divergence_sentences(diverging, runs)
    assert len(sentences) == 7 and sentences[0].startswith("r9 and r1 diverge: after training r9 is better on")
    assert sentences[-1] == "2 more pairs of runs diverge; the page lists them."
