"""Suspect keys and decisions on them: what is found, what a decision does, and by which version."""

import json

import pytest

from alphamed.config.choices import BadRows
from alphamed.config.loading import dump_tree, load_tree, validated
from alphamed.data.decisions import Decision, Decisions, Verdict, apply_decisions, apply_files, merged, read_decisions
from alphamed.data.text import fingerprint
from alphamed.errors import ConfigError, DataError
from alphamed.evaluation.runner import load_sets
from alphamed.lab.datasets.suspects import read_models, suspects
from alphamed.records import Question

OPTIONS = {"A": "Insulin", "B": "Glucagon", "C": "Cortisol", "D": "Renin"}


def question(name, answer="A", stem="Which hormone lowers blood glucose?", options=None, context=None):
    return Question(name, stem, options or OPTIONS, answer, context)


# ----------------------------------------------------------------------------------------------------------- conflicts
TURNED = {"A": "Renin", "B": "Cortisol", "C": "Insulin", "D": "glucagon."}
OTHER = {"A": "Glucagon", "B": "Insulin", "C": "Leptin", "D": "Ghrelin"}


@pytest.mark.parametrize(
    "second, conflict",
    [
        (question("b", "B"), True),
        (question("b", "D", options=TURNED), True),  # glucagon, under another letter and written otherwise
        (question("b", "C", options=TURNED), False),  # insulin both times
        (question("b", "A", options=OTHER), True),  # other options that hold both keys
        (question("b", "C", options=OTHER), False),  # leptin is no option of the first
        (question("b", "B", stem="which HORMONE lowers the blood-glucose"), True),
        (question("b", "B", stem="Which hormone raises blood glucose?"), False),
        (question("b", "B", context="An abstract."), False),  # asked about another text
    ],
)
def test_duplicates_with_conflicting_keys(second, conflict):
    decisions = suspects([question("a"), second, question("c", "D", stem="Which enzyme comes from the kidney?")], {})
    assert set(decisions) == ({"a", "b"} if conflict else set())
    if conflict:
        evidence = decisions["a"].evidence[0]
        assert (evidence["kind"], evidence["other"], evidence["key"]) == ("conflict", "b", "Insulin")
        assert decisions["a"].decision == Verdict.OPEN and decisions["a"].fingerprint == fingerprint(question("a"))


# ---------------------------------------------------------------------------------------------------------- agreements
def rows(letters, options=None):
    return [{"id": "a", "letter": letter, "options": options or OPTIONS} for letter in letters]


@pytest.mark.parametrize(
    "items, found",
    [
        (
            {"m": rows("BBBB"), "n": rows("BBBA")},
            {"models_say": "Glucagon", "share": 0.875, "answers": 8, "models": ["m", "n"]},
        ),
        ({"m": rows("BBBB")}, None),  # one model is not enough
        ({"m": rows("BBBB"), "n": rows("CCCC")}, None),  # they do not agree
        ({"m": rows("BBBB"), "n": rows("AAAA")}, None),  # one agrees with the key
        ({"m": rows("BBAC"), "n": rows("BBAD")}, None),  # 4 of 8 is below 0.6
        ({"m": rows("BBAA"), "n": rows("BBBB")}, None),  # m has no favourite
        ({"m": rows([None] * 4), "n": rows([None] * 4)}, None),  # nothing was boxed
        (
            {"m": rows("D", TURNED), "n": rows("B")},
            {"models_say": "Glucagon", "share": 1.0, "answers": 2, "models": ["m", "n"]},
        ),
    ],
)
def test_models_that_agree_on_another_letter(items, found):
    decisions = suspects([question("a")], items)
    if found is None:
        assert decisions == {}
    else:
        assert decisions["a"].evidence[0] == {"kind": "agreement", "key": "Insulin"} | found


def test_models_are_named_by_row_file_or_folder(tmp_path):
    row = {"id": "a", "letter": "B", "options": OPTIONS}
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "items.jsonl").write_text(json.dumps(row) + "\n\n")
    (tmp_path / "llama.items.jsonl").write_text(json.dumps(row | {"model": "llama-8b"}) + "\n" + json.dumps(row) + "\n")
    answers = read_models([tmp_path / "qwen" / "items.jsonl", tmp_path / "llama.items.jsonl"])
    assert {name: len(items) for name, items in answers.items()} == {"qwen": 1, "llama-8b": 1, "llama.items": 1}


@pytest.mark.parametrize(
    "content, word",
    [
        ('{"id": "a"}\n', ":1: no graded answer"),
        ("[]\n", ":1: no graded answer"),
        *(
            (json.dumps({"id": "a", "letter": "A", "options": {"A": "x"}} | change) + "\n", ":1: no graded answer")
            for change in (
                {"options": None},
                {"options": ["x"]},
                {"id": ["a"]},
                {"letter": ["A"]},
                {"options": {"A": 7}},
                {"letter": 1},
            )
        ),
        ("{\n", "x.jsonl:1: not JSON: "),
        ("[" * 100_000, "not JSON that can be used"),
    ],
)
def test_files_that_hold_no_graded_answers(tmp_path, content, word):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=word):
        read_models([tmp_path / "x.jsonl"])


def test_a_file_of_answers_given_twice_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a", "letter": None, "options": OPTIONS}) + "\n")
    assert len(read_models([tmp_path / "x.jsonl"])["x"]) == 1
    with pytest.raises(DataError, match="x.jsonl is given twice"):
        read_models([tmp_path / "x.jsonl", tmp_path / "." / "x.jsonl"])


# ----------------------------------------------------------------------------------------------------------- decisions
SIGNED = {"who": "R. Reader", "when": "2026-01-31", "why": "textbook"}


def decided(verdict, answer=None, of=None):
    return Decision(id="a", fingerprint=fingerprint(of or question("a")), decision=verdict, answer=answer, **SIGNED)


@pytest.mark.parametrize(
    "decision, letter, touched",
    [
        (decided("keep"), "A", ""),
        (decided("quarantine"), None, "quarantined"),
        (decided("fix", "glucagon"), "B", "fixed"),
        (decided("quarantine", of=question("a", stem="Revised?")), "A", "stale"),
        (decided("fix", "Insulin", of=question("a", "B")), "A", "fixed"),  # fixed already
        (Decision(id="a", fingerprint="0" * 16), "A", "open"),
    ],
)
def test_what_a_decision_does(decision, letter, touched):
    applied = apply_decisions([question("a"), question("z", "D")], [decision])
    by_id = {q.id: q.answer for q in applied.questions}
    assert by_id == ({"a": letter} if letter else {}) | {"z": "D"}
    assert {name for name in ("fixed", "quarantined", "stale", "open") if getattr(applied, name)} == {touched} - {""}


def test_a_decision_holds_whatever_the_letters_are():
    shuffled = question("a", "C", options={"A": "Renin", "B": "Cortisol", "C": "Insulin", "D": "Glucagon"})
    assert fingerprint(shuffled) == fingerprint(question("a"))
    assert apply_decisions([shuffled], [decided("fix", "Glucagon")]).questions[0].answer == "D"


def test_evaluation_applies_decisions_and_records_their_version(tmp_path):
    questions = [question("a"), question("z", "D")]
    (tmp_path / "e.jsonl").write_text(
        "".join(
            json.dumps({"id": q.id, "question": q.question, "options": dict(q.options), "answer": q.answer}) + "\n"
            for q in questions
        )
    )
    tree = {
        "version": 4,
        "decisions": [
            decided("quarantine").model_dump(mode="json"),
            Decision(id="z", fingerprint=fingerprint(questions[1]), decision="fix", answer="Cortisol", **SIGNED).model_dump(
                mode="json"
            ),
        ],
    }
    (tmp_path / "d.yaml").write_text(dump_tree(tree))
    (loaded,) = load_sets([tmp_path / "e.jsonl"], None, 0, BadRows.REFUSE, [tmp_path / "d.yaml"])
    assert [(q.id, q.answer) for q in loaded.questions] == [("z", "C")] and loaded.available == 1
    assert {key: loaded.decisions[0][key] for key in ("version", "fixed", "quarantined")} == {
        "version": 4,
        "fixed": 1,
        "quarantined": 1,
    }


def test_templates_are_compared_by_their_options_only():
    """300 questions of one stem: two of them have the same options and different keys."""
    pairs = [question(f"t{i}", "A", "Which pair is false?", {"A": f"a{i}", "B": f"b{i}"}) for i in range(299)]
    twin = question("twin", "B", "Which pair is false?", {"A": "a7", "B": "b7"})
    assert set(suspects([*pairs, twin], {})) == {"t7", "twin"}


def test_decisions_on_questions_that_are_not_there_are_counted(tmp_path):
    """Of three decisions one is on a question, which the first file takes out, and two are on none."""
    tree = [
        decided("quarantine").model_dump(mode="json"),
        *({"id": name, "fingerprint": "0" * 16} for name in ("gone", "of another set")),
    ]
    for name in ("d.yaml", "e.yaml"):
        (tmp_path / name).write_text(dump_tree({"version": 1, "decisions": tree}))
    questions, summaries = apply_files([question("a"), question("z")], [tmp_path / "d.yaml", tmp_path / "e.yaml"])
    assert [q.id for q in questions] == ["z"]
    assert [(summary["quarantined"], summary["open"], summary["absent"]) for summary in summaries] == [(1, 0, 2), (0, 0, 2)]


def test_a_fix_that_names_no_option_is_refused():
    with pytest.raises(ConfigError, match="'Leptin' is 0 of its options"):
        apply_decisions([question("a")], [decided("fix", "Leptin")])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"decision": "fix"}, "fix needs answer"),
        ({"who": None}, "needs who, when and why"),
        ({"decision": "drop"}, "'drop' is not valid"),
        ({"fingerprint": "x"}, "fingerprint"),
        ({"verdict": "keep"}, "unknown key"),
    ],
)
def test_mistakes_in_decisions(tmp_path, change, word):
    tree = {"version": 1, "decisions": [{"id": "a", "fingerprint": "0" * 16, "decision": "keep", **SIGNED} | change]}
    (tmp_path / "d.yaml").write_text(dump_tree(tree))
    with pytest.raises(ConfigError, match=word):
        read_decisions(tmp_path / "d.yaml")


def test_a_file_is_asked_for_by_version(tmp_path):
    (tmp_path / "d.yaml").write_text(dump_tree({"version": 3, "decisions": []}))
    assert read_decisions(tmp_path / "d.yaml", 3).version == 3
    with pytest.raises(ConfigError, match="has version 3, 2 is required"):
        read_decisions(tmp_path / "d.yaml", 2)


def test_new_suspects_join_a_file_and_leave_what_is_decided(tmp_path):
    path = tmp_path / "d.yaml"
    first = suspects([question("a"), question("b", "B")], {})
    path.write_text(merged(path, first))
    tree = load_tree(path)
    assert (tree["version"], [decision["id"] for decision in tree["decisions"]]) == (1, ["a", "b"])
    tree["decisions"][0] |= {"decision": "keep"} | SIGNED
    path.write_text(dump_tree(tree))
    assert load_tree(path)["version"] == 1
    path.write_text(merged(path, suspects([question("a"), question("b", "B"), question("c", "C")], {})))
    content = validated(Decisions, load_tree(path))
    assert content.version == 2
    assert {decision.id: str(decision.decision) for decision in content.decisions} == {"a": "keep", "b": "open", "c": "open"}
    assert merged(path, {}) == path.read_text()  # nothing new: the same version
