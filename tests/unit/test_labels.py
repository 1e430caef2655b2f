"""Labels that option texts carry themselves: removed, refused, or left where they are none; and ids made from content."""

import hashlib
import json

import pytest

from alphamed.cli import main
from alphamed.data.keys import AnswerForm
from alphamed.data.labels import without_labels
from alphamed.data.mcq import RawRow, check_questions
from alphamed.data.reading import interpret
from alphamed.data.sources import load_questions
from alphamed.errors import DataError
from alphamed.evaluation.benchmarks import load_benchmark


def lettered(*texts):
    return dict(zip("ABCDEFGHIJ", texts))


PLAIN = lettered("Spleen", "Liver", "Thymus")


@pytest.mark.parametrize(
    "texts",
    [
        ("A. Spleen", "B. Liver", "C. Thymus"),
        ("A) Spleen", "B) Liver", "C) Thymus"),
        ("(A) Spleen", "(B) Liver", "(C) Thymus"),
        ("A: Spleen", "B: Liver", "C: Thymus"),
        ("A.Spleen", "B.Liver", "C.Thymus"),
        ("a) Spleen", "b) Liver", "c) Thymus"),
        ("a. Spleen", "b. Liver", "c. Thymus"),
        ("1) Spleen", "2) Liver", "3) Thymus"),
        ("1. Spleen", "2. Liver", "3. Thymus"),
        ("(1) Spleen", "(2) Liver", "(3) Thymus"),
        ("[A] Spleen", "[B] Liver", "[C] Thymus"),
        ("A - Spleen", "B - Liver", "C - Thymus"),
        ("A． Spleen", "B． Liver", "C． Thymus"),
        ("A、Spleen", "B、Liver", "C、Thymus"),
        ("（A）Spleen", "（B）Liver", "（C）Thymus"),
        (" A. Spleen", "B.  Liver", "C) Thymus"),
        ("\uff21\uff0eSpleen", "\uff22\uff0eLiver", "\uff23\uff0eThymus"),
        ("\u200bA. Spleen", "\ufeffB. Liver", "C.\u00a0Thymus"),
        ("Option A: Spleen", "Option B: Liver", "Option C: Thymus"),
        ("i. Spleen", "ii. Liver", "iii. Thymus"),
        ("(I) Spleen", "(II) Liver", "(III) Thymus"),
        ("0. Spleen", "1. Liver", "2. Thymus"),
        ("0) Spleen", "1) Liver", "2) Thymus"),
        ("\u2460Spleen", "\u2461 Liver", "\u2462Thymus"),
        ("A) A. Spleen", "B) B. Liver", "C) C. Thymus"),
    ],
)
def test_labels_of_all_options_in_order_are_removed(texts):
    assert without_labels(lettered(*texts)) == (PLAIN, True, None)


@pytest.mark.parametrize(
    "texts",
    [
        ("A. fumigatus", "C. difficile", "E. coli", "B. cereus"),
        ("C. difficile", "Rotavirus", "E. coli"),
        ("E. coli", "B. cereus"),
        ("C. albicans", "C. tropicalis", "C. Krusei"),
        ("S. Aureus", "E. Coli", "B. Anthracis", "C. Perfringens"),
        ("1. only", "1 and 2", "2. only"),
        ("1. day", "2. day", "3. day"),
        ("1.5 mg", "2.5 mg", "3.5 mg", "4.5 mg"),
        ("1.2", "2.4", "3.1", "4.8"),
        ("1:2", "2:3", "3:4"),
        ("A.S.D.", "P.D.A.", "T.O.F."),
        ("A", "B", "AB", "O"),
        ("A.", "B.", "C."),
        ("A type of spasm", "B cells", "C fibres"),
        ("(R)-ibuprofen", "(S)-ibuprofen"),
        ("A: T", "C: G", "G: C"),
        ("D. Orem", "H. Peplau"),
        ("a - b - c", "b - a - c", "c - b - a", "c - a - b"),
        ("A-delta fibres", "B-fibres", "C-fibres"),
        ("A 62 year old", "B", "C"),
        ("\u2460\u2461", "\u2461\u2462", "\u2462\u2463"),
        ("(1)(2)", "(2)(3)", "(3)(4)"),
        ("I. ricinus", "V. cholerae", "X. cheopis"),
        ("I", "II", "III"),
        ("II and III", "I only", "III only"),
        ("0. day", "1. day", "2. day"),
        ("0.5 mg", "1.5 mg", "2.5 mg"),
        ("Vitamin A", "Vitamin B", "Vitamin C"),
        ("Staphylococcus", "B. anthracis", "C. botulinum", "Yersinia"),
    ],
)
def test_texts_that_only_begin_like_labels_are_left(texts):
    assert without_labels(lettered(*texts)) == (lettered(*texts), False, None)


@pytest.mark.parametrize(
    "texts, words",
    [
        (("C. Thymus", "A. Spleen", "B. Liver"), "option A carries another label, 'C. Thymus'"),
        (("A. Spleen", "C. Thymus", "B. Liver"), "option B carries another label, 'C. Thymus'"),
        (("2) Liver", "1) Spleen"), "option A carries another label"),
        (("1) Liver", "0) Spleen"), "option A carries another label"),
        (("ii) Liver", "i) Spleen"), "option A carries another label"),
        (("A. B) Liver", "B. A) Spleen"), "option A carries another"),
        (("Spleen", "a) Liver", "Thymus"), "option B carries another label, 'a) Liver'"),
        (("Spleen", "b)Liver", "Thymus"), "option B carries a label ('b)Liver'), option A does not"),
        (
            ("A. Spleen", "B. Liver", "C. Thymus", "None of these"),
            "options A, B, C carry labels ('A. Spleen'), option D does not",
        ),
        (("(A) Spleen", "(B) Liver", "None of these"), "options A, B carry labels ('(A) Spleen'), option C does not"),
    ],
)
def test_labels_at_other_places_or_of_some_options_are_refused(texts, words):
    options, removed, problem = without_labels(lettered(*texts))
    assert options == lettered(*texts) and not removed and problem.startswith(words)


def test_what_stands_behind_a_label_stays_as_it_was_written():
    options = lettered("\uff21\uff0e5 \u00b5g \u2265 \ufb01ve", "\u2461 \u201cx\u201d")
    assert without_labels(options) == (options, False, None)
    options = lettered("\uff21\uff0e5 \u00b5g \u2265 \ufb01ve", "\uff22\uff0e \u201cx\u201d")
    assert without_labels(options) == (lettered("5 \u00b5g \u2265 \ufb01ve", "\u201cx\u201d"), True, None)


def row(i, **changes):
    return {
        "id": f"q{i}",
        "question": f"Which organ {i}?",
        "options": ["A) Spleen", "B) Liver", "C) Thymus"],
        "answer": "B",
    } | changes


@pytest.mark.parametrize("answer, form", [("B", None), ("B) Liver", None), ("liver", None), (2, AnswerForm.INDEX1)])
def test_keys_of_labelled_options(answer, form):
    interpreted, reading = interpret([RawRow("F", 1, row(1, answer=answer))], form)
    (question,), _ = check_questions(interpreted)
    assert question.options == PLAIN and question.answer == "B" and reading.labels_removed == 1


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_removed_labels_are_counted_in_card_and_inspection(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [row(1), row(2, options=["x", "y", "z"]), row(3)])
    assert main(["data", "build", "--from", "a.jsonl", "--out", "s.jsonl"]) == 0
    note = "labels of options (A., (B), 3) ...) removed from 2 questions"
    card = json.loads((tmp_path / "s.card.json").read_text())
    assert card["sources"]["a"]["reading"]["labels_removed"] == 2 and note in (tmp_path / "s.card.md").read_text()
    assert note in capsys.readouterr().out
    assert main(["data", "inspect", "a.jsonl"]) == 0
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["reading"]["labels_removed"] == 2 and note in (tmp_path / "a.html").read_text()
    assert any(note in finding["text"] for finding in numbers["findings"])


# ------------------------------------------------------------------------------------------------------------------ ids
MEDQA_ROW = {
    "question": "Which organ makes bile?",
    "answer": "Liver",
    "options": {"A": "Spleen", "B": "Liver"},
    "meta_info": "step1",
    "answer_idx": "B",
    "metamap_phrases": [],
}
BILE = hashlib.sha256(json.dumps(["Which organ makes bile?", None, ["Liver", "Spleen"], "Liver"]).encode()).hexdigest()[:16]


def test_ids_are_made_from_the_content_wherever_a_row_stands(tmp_path):
    other = MEDQA_ROW | {"question": "Which organ stores bile?"}
    turned = MEDQA_ROW | {"options": {"A": "Liver", "B": "Spleen"}, "answer_idx": "A"}
    for rows in ([MEDQA_ROW, other], [other, MEDQA_ROW], [turned]):
        loaded = load_questions([write(tmp_path / "x.jsonl", rows)])
        assert {q.id for q in loaded.questions if q.question.startswith("Which organ makes")} == {f"q-{BILE}"}
        assert loaded.readings[0].ids_made == len(rows) == len({q.id for q in loaded.questions})
    assert load_benchmark(f"medqa={tmp_path / 'x.jsonl'}").questions[0].id == f"medqa-{BILE}"


def test_a_source_is_part_of_a_made_id_and_an_id_of_its_own_is_kept():
    interpreted, _ = interpret([RawRow("F", 1, MEDQA_ROW | {"source": "my set/x"})])
    assert interpreted[0].value["id"] == f"my_set-{BILE}"
    interpreted, reading = interpret([RawRow("F", 1, MEDQA_ROW | {"id": "own"})])
    assert interpreted[0].value["id"] == "own" and reading.ids_made == 0


def test_another_key_is_another_id_and_the_same_content_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "x.jsonl", [MEDQA_ROW, MEDQA_ROW | {"answer": "Spleen", "answer_idx": "A"}, MEDQA_ROW])
    loaded = load_questions([file])
    assert [q.id for q in loaded.questions][::2] == [f"q-{BILE}", f"q-{BILE}-2"] and len(
        {q.id for q in loaded.questions}
    ) == 3
    assert loaded.readings[0].repeats == (f"{file}:3 repeats {file}:1",)
    write(file, [MEDQA_ROW, MEDQA_ROW, MEDQA_ROW])
    assert (
        main(["data", "build", "--from", "x.jsonl", "--out", "s.jsonl"]) == 0
        and len(load_questions(["s.jsonl"]).questions) == 3
    )
    assert (
        "2 questions of the same content as an earlier one (the first: x.jsonl:2 repeats x.jsonl:1)"
        in capsys.readouterr().out
    )
    assert main(["data", "build", "--from", "x.jsonl", "--out", "t.jsonl", "drop_repeats=true"]) == 0
    assert [q.id for q in load_questions(["t.jsonl"]).questions] == [f"q-{BILE}"]


def test_a_row_without_id_among_rows_with_ids_is_a_bad_one():
    interpreted, reading = interpret([RawRow("F", 1, row(1)), RawRow("F", 2, row(2) | {"id": None})])
    assert [p.problem for p in check_questions(interpreted)[1]] == ["no id"] and reading.ids_made == 0


# -------------------------------------------------------------------------------------------------- what is no options
def harness(**changes):
    return {
        "id": "Text-0",
        "question": "What comes next? Answer Choices: (A) rest (B) ice (C) heat",
        "label": "B",
        "answer": "B",
    } | changes


def test_options_that_stand_in_the_question_alone_are_refused_with_what_to_do(tmp_path):
    """MedXpertQA as benchmark harnesses have it."""
    file = write(tmp_path / "x.jsonl", [harness()])
    for name in (str(file), f"medxpertqa={file}"):
        with pytest.raises(
            DataError,
            match="no options: they are in the text of the question; take them out of it and give them as "
            r"options \(letter -> text\)",
        ):
            load_benchmark(name)
    with pytest.raises(DataError, match=r"x.jsonl:1: no options; fix"):
        load_questions([write(tmp_path / "x.jsonl", [harness(question="What comes next (A or B)?")])])


@pytest.mark.parametrize("count, problem", [(26, None), (27, "27 options, at most 26 can have a letter")])
def test_a_list_of_more_options_than_letters(count, problem):
    interpreted, _ = interpret([RawRow("F", 1, row(1, options=[f"finding {i}" for i in range(count)], answer="finding 25"))])
    questions, problems = check_questions(interpreted)
    assert [p.problem for p in problems] == ([problem] if problem else [])
    assert [(len(q.options), q.answer) for q in questions] == ([] if problem else [(26, "Z")])
