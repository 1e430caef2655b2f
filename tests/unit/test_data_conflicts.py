"""`alphamed data build`: one question with two keys, keys declared on the command line, checks that would check nothing."""

import json
from pathlib import Path

import pytest
from test_data_cli import files, here, row, write  # noqa: F401 (here: a fixture)
from test_keys import FOUR

from alphamed.cli import main
from alphamed.data.sources import load_questions

TURNED = {"A": "Sign 2.", "B": "sign 1", "C": "sign 3"}


def refused(capsys, *arguments):
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("sources", [["--from", "a.jsonl"], ["--from", "b.jsonl", "--from", "c.jsonl"]])
def test_one_question_with_two_keys_is_refused_with_both_ids(capsys, sources):
    """Within a source and across sources, whatever letters, case and punctuation are."""
    rows = [row(1), row(1, id="twin", options=TURNED, answer="A"), row(2), row(1, id="same", answer="A")]
    write("a.jsonl", rows)
    write("b.jsonl", rows[:1] + rows[2:])
    write("c.jsonl", rows[1:2])
    assert "q1 ('sign 1') and twin ('Sign 2.') are one question with different keys; decide" in refused(
        capsys, "build", "--out", "s.jsonl", *sources
    )
    assert not Path("s.jsonl").exists()
    assert main(["data", "build", "--out", "s.jsonl", *sources, "conflicts=drop"]) == 0
    assert [q.id for q in load_questions(["s.jsonl"]).questions] == ["q2"]  # nothing says which key is right
    card = json.loads(Path("s.card.json").read_text())
    assert card["counts"] == {"read": 4, "left_out": card["counts"]["left_out"], "kept": 1}
    assert card["counts"]["left_out"]["conflicts"] == 3
    assert (
        "conflicts: 3 left out that are 1 question with different keys (the first: q1 ('sign 1') and twin ('Sign 2.'))"
        in Path("s.card.md").read_text()
    )


def test_a_question_of_two_sources_without_ids_is_kept_once(capsys):
    """Nobody can give the rows of two public files other ids; another question of the same id is refused all the same."""
    plain = {key: value for key, value in row(1).items() if key != "id"}
    write("a.jsonl", [plain, plain | {"question": "Other?"}])
    write("b.jsonl", [plain, plain | {"question": "Third?"}])
    arguments = ["build", "--out", "s.jsonl", "--from", "a.jsonl", "--from", "b.jsonl"]
    assert "is in a and in b; keep one of the two with drop_repeats=true" in refused(capsys, *arguments)
    assert main(["data", *arguments, "drop_repeats=true"]) == 0
    card = json.loads(Path("s.card.json").read_text())
    assert (card["counts"]["read"], card["counts"]["left_out"]["repeats"], card["counts"]["kept"]) == (4, 1, 3)
    assert "repeats: 1 left out" in card["steps"]
    write("c.jsonl", [row(1), row(2)])
    write("d.jsonl", [row(3, id="q2")])
    assert "id 'q2' is in c and in d; give the questions ids of their own" in refused(
        capsys, "build", "--out", "t.jsonl", "--from", "c.jsonl", "--from", "d.jsonl", "drop_repeats=true"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"context": "An abstract."},
        {"options": {"A": "sign 1", "B": "sign 2", "C": "sign 4"}},
        {"question": "Which finding number 1 points not to disease 1?"},
    ],
)
def test_another_context_option_or_word_is_another_question(change):
    write("a.jsonl", [row(1), row(1, id="other", answer="B") | change])
    assert main(["data", "build", "--out", "s.jsonl", "--from", "a.jsonl"]) == 0


@pytest.mark.parametrize("overlap", ["drop", "flag"])
def test_an_overlap_setting_without_benchmarks_is_refused(capsys, overlap):
    write("a.jsonl", [row(1)])
    assert f"overlap: {overlap} checks nothing without against; name the benchmarks there (--against)" in refused(
        capsys, "build", "--out", "s.jsonl", "--from", "a.jsonl", f"overlap={overlap}"
    )


# ------------------------------------------------------------------------------------------------- declared keys
def one_based(name="m.jsonl", cops=(1, 2, 3), **more):
    """Rows in MedMCQA's layout whose keys fit both bases, as its authors count them."""
    return write(
        name,
        [
            {
                "id": f"e{i}",
                "question": f"Which valve is number {i} of the heart?",
                "cop": cop,
                **more,
                **dict(zip(("opa", "opb", "opc", "opd"), FOUR)),
            }
            for i, cop in enumerate(cops)
        ],
    )


def test_a_form_behind_the_path_of_a_source(capsys):
    one_based()
    for bad_rows in ("refuse", "skip"):
        assert "keys (cop) can be numbers from 0 or numbers from 1" in refused(
            capsys, "build", "--out", "s.jsonl", "--from", "medmcqa=m.jsonl", f"bad_rows={bad_rows}"
        )
    assert main(["data", "build", "--out", "s.jsonl", "--from", "medmcqa=m.jsonl:index1", "shuffle=false"]) == 0
    assert [q.options[q.answer] for q in load_questions(["s.jsonl"]).questions] == FOUR[:3]
    card = json.loads(Path("s.card.json").read_text())
    assert card["sources"]["medmcqa"]["reading"]["keys"] == {"cop": "index1"}
    assert (
        card["recipe"]["sources"][0]["answer"] == "index1" and "keys read as numbers from 1 (cop)" in capsys.readouterr().out
    )


@pytest.mark.parametrize("form, same_answer", [("index1", True), ("index", False)])
def test_a_form_behind_the_path_of_a_benchmark(form, same_answer):
    one_based()
    write(
        "a.jsonl",
        [
            row(9, answer="sign 9"),
            *(
                {"id": f"t{i}", "question": f"Which valve is number {i} of the heart?", "options": FOUR, "answer": FOUR[i]}
                for i in range(3)
            ),
        ],
    )
    assert (
        main(
            [
                "data",
                "decontaminate",
                "--train",
                "a.jsonl",
                "--against",
                f"medmcqa=m.jsonl:{form}",
                "--out",
                "s.jsonl",
                "--report",
                "r.json",
            ]
        )
        == 0
    )
    report = json.loads(Path("r.json").read_text())
    assert report["reading"]["medmcqa"]["keys"] == {"cop": form} and report["reading"]["train"]["keys"] == {"answer": "text"}
    hits = {(hit["train"]["id"], hit["against"]["id"]): hit["same_answer"] for hit in report["hits"]}
    assert {hits[f"t{i}", f"medmcqa-e{i}"] for i in range(3)} == {same_answer}


def test_benchmarks_with_bad_rows_need_a_word(capsys):
    """A training question that only a bad row of the benchmark repeats would not be found."""
    one_based(cops=(1, 4, 9))
    write("a.jsonl", [row(1)])
    arguments = ["build", "--out", "s.jsonl", "--from", "a.jsonl", "--against", "medmcqa=m.jsonl"]
    assert "m.jsonl:3: cop 9 is not among the options A, B, C, D (keys are numbers from 1); fix" in refused(
        capsys, *arguments
    )
    assert main(["data", *arguments, "bad_rows=skip"]) == 0
    assert "1 bad row left out (the first: m.jsonl:3: cop 9" in capsys.readouterr().out
    (benchmark,) = json.loads(Path("s.card.json").read_text())["benchmarks"]
    assert benchmark["bad_rows"] == 1 and benchmark["reading"]["keys"] == {"cop": "index1"}


def test_medqa_with_ids_and_an_answer_in_a_recipe(capsys):
    """`answer` is the text, `answer_idx` the letter: read as they are, and the setting is heeded for a name that is known."""
    rows = [
        {
            "id": f"m{i}",
            "question": f"Valve {i}?",
            "options": dict(zip("ABCD", FOUR)),
            "answer": FOUR[i],
            "answer_idx": "ABCD"[i],
        }
        for i in range(3)
    ]
    write("m.jsonl", rows)
    for out, setting in (("a.jsonl", ""), ("b.jsonl", ", answer: text"), ("c.jsonl", ", answer: letter")):
        assert (
            main(["data", "build", "--out", out, "shuffle=false", f"sources=[{{name: medqa, path: m.jsonl{setting}}}]"]) == 0
        )
        assert [q.answer for q in load_questions([out]).questions] == ["A", "B", "C"]
    assert "declared as index (numbers from 0), but answer of the file holds texts of options" in refused(
        capsys, "build", "--out", "d.jsonl", "sources=[{name: medqa, path: m.jsonl, answer: index}]"
    )
