"""In which form a file names its right options: found from all keys of the file, declared, or refused; never one option off."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphamed.config.choices import BadRows
from alphamed.data import adapters
from alphamed.data.keys import AnswerForm, form_of
from alphamed.data.mcq import RawRow, check_questions
from alphamed.data.reading import interpret
from alphamed.data.sources import load_questions
from alphamed.errors import DataError
from alphamed.lab.datasets.catalogue import SOURCES

FOUR = ["Aortic", "Pulmonary", "Mitral", "Tricuspid"]


def rows(keys, options=FOUR, field="answer"):
    """One row a key, in a file called F."""
    return [
        RawRow("F", i, {"id": f"q{i}", "question": f"Which valve is number {i}?", "options": options, field: key})
        for i, key in enumerate(keys, start=1)
    ]


def read(keys, declared=None, **changes):
    """The right texts of the good rows, the problems of the others."""
    interpreted, _ = interpret(rows(keys, **changes), declared)
    questions, problems = check_questions(interpreted)
    return [q.options[q.answer] for q in questions], [f"{p.line}: {p.problem}" for p in problems]


FIRST_LAST = (["Aortic", "Tricuspid"], [])


@pytest.mark.parametrize(
    "keys",
    [
        (0, 3),
        ("0", "3"),
        (0.0, 3.0),
        ("A", "D"),
        ("a", "d"),
        ("\uff21", "\uff24"),
        (" a ", "D"),
        (0, 2, 3),
        (1, 4),
        ("1", "4"),
        ("1.0", "4.0"),
        (1.0, 4.0),
        ("Aortic", "Tricuspid"),
        (" aortic.", "TRICUSPID"),
    ],
)
def test_every_form_is_found(keys):
    texts, problems = read(keys)
    assert (texts[0], texts[-1], problems) == ("Aortic", "Tricuspid", [])


@pytest.mark.parametrize(
    "keys, either", [((1, 2, 3), "B or A"), ((2,), "C or B"), (("1", "3"), "B or A"), ((3.0,), "D or C")]
)
def test_numbers_that_both_bases_fit_are_refused_with_what_decides(keys, either):
    with pytest.raises(DataError) as error:
        read(keys)
    message = str(error.value)
    assert message.startswith(
        "F: its keys (answer) can be numbers from 0 or numbers from 1, and nothing in the file says which (F:1: "
    )
    assert (
        f"is option {either}); declare their form: FILE:index or FILE:index1 with --from" in message and "\n" not in message
    )
    from_0, from_1 = read(keys, AnswerForm.INDEX), read(keys, AnswerForm.INDEX1)
    assert (
        from_0[1] == from_1[1] == []
        and from_0[0][0] == FOUR[int(float(keys[0]))]
        and from_1[0][0] == FOUR[int(float(keys[0])) - 1]
    )


def test_a_row_with_more_options_can_decide():
    """4 of 5 options fits both bases; 3 of 3 counts from 1, so that the whole file does."""
    interpreted, reading = interpret(rows([4], list("vwxyz")) + rows([3], list("xyz")))
    assert [row.value["answer"] for row in interpreted] == ["D", "C"] and reading.forms == {"answer": AnswerForm.INDEX1}


@pytest.mark.parametrize(
    "keys, words",
    [
        (
            (0, 1, 4),
            "F:3: answer 4 of 4 options is of another form than 2 of 3 keys of the file, numbers from 0 (F:1: 0 of 4 options)",
        ),
        (
            (4, 4, 2, 0),
            "F:4: answer 0 of 4 options is of another form than 3 of 4 keys of the file, numbers from 1 (F:1: 4 of 4 options)",
        ),
        (("A", "B", 2), "F:3: answer 2 of 4 options is of another form than 2 of 3 keys of the file, letters"),
        (("A", "Mitral"), "F:2: answer 'Mitral' of 4 options is of another form than 1 of 2 keys of the file, letters"),
    ],
)
def test_two_forms_in_one_file_are_refused_and_a_declared_one_makes_bad_rows_of_the_others(keys, words):
    with pytest.raises(DataError) as error:
        read(keys)
    assert str(error.value).startswith(
        words
    ) and "correct the file, or, to treat keys of other forms as bad rows, declare their form: FILE:" in str(error.value)


def test_with_a_declared_form_keys_of_another_one_are_bad_rows():
    assert read((0, 1, 4), AnswerForm.INDEX) == (
        ["Aortic", "Pulmonary"],
        ["3: answer 4 is not among the options A, B, C, D (keys are numbers from 0)"],
    )
    assert read(("A", "Mitral", "b"), AnswerForm.LETTER) == (
        ["Aortic", "Pulmonary"],
        ["2: answer 'Mitral' is not among the options A, B, C, D"],
    )
    assert read(("Mitral", "B"), AnswerForm.TEXT) == (
        ["Mitral"],
        ["2: answer 'B' is not among the options A, B, C, D (keys are texts of options)"],
    )


@pytest.mark.parametrize(
    "keys, declared, words",
    [
        (
            (1, 2, 4),
            "index",
            "F:3: keys are declared as index (numbers from 0), but answer of the file holds numbers from 1",
        ),
        ((0, 1), "index1", "F:1: keys are declared as index1 (numbers from 1), but answer of the file holds numbers from 0"),
        (("A", "B"), "text", "F:1: keys are declared as text (texts of options), but answer of the file holds letters"),
        (("Mitral",), "letter", "F:1: keys are declared as letter (letters), but answer of the file holds texts of options"),
    ],
)
def test_a_declaration_that_the_file_contradicts_is_refused(keys, declared, words):
    """With bad_rows=skip the rows that show it would be left out, and the rest be one option off."""
    with pytest.raises(DataError) as error:
        read(keys, AnswerForm(declared))
    assert str(error.value).startswith(words)


def test_keys_that_name_nothing_say_nothing_of_the_form():
    assert read((1, 4, 7, -1, None)) == (
        ["Aortic", "Tricuspid"],
        [
            "3: answer 7 is not among the options A, B, C, D (keys are numbers from 1)",
            "4: answer -1 is not among the options A, B, C, D (keys are numbers from 1)",
            "5: no answer",
        ],
    )
    assert read(("x", True)) == (
        [],
        ["1: answer 'x' is not among the options A, B, C, D", "2: answer True is not among the options A, B, C, D"],
    )


def test_letters_that_are_texts_of_other_options():
    """Blood groups: where the file calls its options by letters, an answer is a letter; in a list it may be either."""
    groups = {"A": "AB", "B": "A", "C": "B", "D": "O"}
    assert read(("A", "B"), options=groups) == (["AB", "A"], [])
    assert read(("A", "B", "O"), options=list(groups.values())) == (["A", "B", "O"], [])
    with pytest.raises(DataError, match="can be letters or texts of options"):
        read(("A", "B"), options=list(groups.values()))


def test_numbers_as_options():
    assert read(("4", "6"), options=["4", "5", "6", "7"]) == (["4", "6"], [])  # as an index 6 is none of four
    with pytest.raises(DataError, match="numbers from 0 or numbers from 1 or texts of options"):
        read(("1", "2"), options=["2", "3", "1", "4"])


def test_texts_that_differ_by_signs_alone_are_matched_as_they_stand():
    assert read(("+1", "-1"), options=["+1", "-1"]) == (["+1", "-1"], [])


# -------------------------------------------------------------------------------------------------- several fields
def stated(**fields):
    return RawRow(
        "F", 1, {"id": "q1", "question": "Which?", "options": {"A": "Spleen", "B": "Liver", "C": "Thymus"}} | fields
    )


def test_fields_that_agree_decide_for_each_other():
    """MedQA's text and letter; an index that alone could be counted from 0 or 1."""
    for fields in (
        {"answer": "Liver", "answer_idx": "B"},
        {"answer": "B", "answer_index": 1},
        {"answer": "B", "answer_index": 2},
        {"answer_idx": 2, "answer": "Liver"},
    ):
        (row,), _ = interpret([stated(**fields)])
        assert row.value["answer"] == "B"


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"answer": "Liver", "answer_idx": "C"},
            "its keys contradict each other (answer 'Liver' is option B, answer_idx 'C' is option C)",
        ),
        ({"answer": "Heart", "answer_idx": "C"}, None),
    ],
)
def test_fields_that_contradict_each_other_are_a_bad_row(fields, words):
    """A text that no row of the file has among its options is no key: the field is not read."""
    interpreted, _ = interpret([stated(**fields)])
    _, problems = check_questions(interpreted)
    assert [p.problem for p in problems] == ([words] if words else [])
    interpreted, _ = interpret([stated(**fields), replace(stated(answer="Liver", answer_idx="B"), line=2)])
    _, problems = check_questions([interpreted[0]])
    assert [p.problem for p in problems] == [
        words or "answer 'Heart' is not among the options A, B, C (keys are texts of options)"
    ]


# ---------------------------------------------------------------------------------------------------- public sets
def medmcqa(cop, i=1):
    return adapters.medmcqa(
        {
            "id": f"e{i}",
            "question": f"Which valve is number {i}?",
            "cop": cop,
            **dict(zip(("opa", "opb", "opc", "opd"), FOUR)),
        }
    )


@pytest.mark.parametrize(
    "cops, right", [((1, 4, 2), ["Aortic", "Tricuspid", "Pulmonary"]), ((0, 3, 2), ["Aortic", "Tricuspid", "Mitral"])]
)
def test_medmcqa_of_its_authors_and_of_the_hub(cops, right):
    interpreted, reading = interpret(RawRow("F", i, medmcqa(cop, i)) for i, cop in enumerate(cops))
    questions, problems = check_questions(interpreted)
    assert [q.options[q.answer] for q in questions] == right and problems == []
    assert reading.forms["cop"] == (AnswerForm.INDEX1 if 4 in cops else AnswerForm.INDEX)


def test_the_pinned_copy_of_the_hub_is_known_to_count_from_0_and_checked():
    assert SOURCES["medmcqa"].answer == AnswerForm.INDEX
    interpreted, _ = interpret([RawRow("F", 1, medmcqa(2))], AnswerForm.INDEX)
    assert interpreted[0].value["answer"] == "C"
    with pytest.raises(DataError, match="cop of the file holds numbers from 1"):
        interpret([RawRow("F", 1, medmcqa(4))], AnswerForm.INDEX)


def headqa(right, numbers=(1, 2, 3, 4)):
    return RawRow(
        "F",
        1,
        adapters.headqa(
            {
                "name": "C",
                "qid": "1",
                "qtext": "Which valve?",
                "ra": right,
                "category": "medicine",
                "answers": [{"aid": n, "atext": text} for n, text in zip(numbers, FOUR)],
            }
        ),
    )


def test_headqas_options_say_how_its_keys_count():
    """`aid` numbers the options, so that 2 alone is certain; keys that count otherwise than their options are refused."""
    assert (
        interpret([headqa(2)])[0][0].value["answer"]
        == "B"
        == interpret([headqa("2", ("1", "2", "3", "4"))])[0][0].value["answer"]
    )
    assert interpret([headqa(2, (0, 1, 2, 3))])[0][0].value["answer"] == "C"
    with pytest.raises(DataError, match="ra of the file holds numbers from 0"):
        interpret([headqa(0), headqa(3)])
    with pytest.raises(ValueError, match="numbered"):
        headqa(2, (1, 3, 5, 7))


@pytest.mark.parametrize("index, letter, right", [(2, "C", "Femur"), (3, "C", "Femur"), (0, "A", "Tibia")])
def test_mmlu_pros_letter_and_index_count_what_is_no_option_too(index, letter, right):
    row = {
        "question_id": 1,
        "question": "Which bone is in the thigh?",
        "options": ["Tibia", "N/A", "Femur", "Ulna"],
        "answer": letter,
        "answer_index": index,
        "category": "health",
    }
    interpreted, _ = interpret([RawRow("F", 1, adapters.mmlu_pro_medical(row))])
    (question,), _ = check_questions(interpreted)
    assert question.options == {"A": "Tibia", "B": "Femur", "C": "Ulna"} and question.options[question.answer] == right


def test_mmlu_pros_contradiction_and_a_key_to_no_option():
    def problem(**changes):
        row = {
            "question_id": 1,
            "question": "Which bone?",
            "options": ["Tibia", "N/A", "Femur"],
            "category": "health",
        } | changes
        _, problems = check_questions(interpret([RawRow("F", 1, adapters.mmlu_pro_medical(row))])[0])
        return problems[0].problem

    assert "contradict each other (answer_index 0 is option A, answer 'C' is option C)" in problem(
        answer="C", answer_index=0
    )
    assert problem(answer="B", answer_index=1) == "answer 'B' is not among the options A, C"


# ---------------------------------------------------------------------------------------------------- files, places
@pytest.mark.parametrize(
    "place, expected",
    [
        ("x.jsonl", ("x.jsonl", None)),
        ("medmcqa=a/b.json:index1", ("medmcqa=a/b.json", AnswerForm.INDEX1)),
        ("x.jsonl:text", ("x.jsonl", AnswerForm.TEXT)),
        ("C:x.jsonl", ("C:x.jsonl", None)),
        ("medqa", ("medqa", None)),
        (":index", (":index", None)),
    ],
)
def test_a_form_behind_a_path(place, expected):
    assert form_of(place) == expected


def test_training_files_are_read_by_the_same_rule(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps(row.value) + "\n" for row in rows((1, 4))))
    assert [q.options[q.answer] for q in load_questions([file]).questions] == ["Aortic", "Tricuspid"]
    file.write_text("".join(json.dumps(row.value) + "\n" for row in rows((1, 3))))
    for bad_rows in BadRows:
        with pytest.raises(DataError, match="write the set with `alphamed data build` first"):
            load_questions([file], bad_rows)


def test_every_field_of_a_parquet_file_that_states_a_key_is_read(tmp_path):
    """q2's text and letter contradict each other, which one of the two alone would not show."""
    rows = [
        {"id": f"q{i}", "question": f"Valve {i}?", "options": FOUR, "answer": FOUR[i], "answer_idx": letter}
        for i, letter in enumerate("ABD")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    loaded = load_questions([tmp_path / "x.parquet"], BadRows.SKIP)
    assert [q.answer for q in loaded.questions] == ["A", "B"]
    assert [p.problem for p in loaded.skipped] == [
        "its keys contradict each other (answer 'Mitral' is option C, answer_idx 'D' is option D)"
    ]
