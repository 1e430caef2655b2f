"""The lesson in form: every option is named once, nothing says which is right, and what it teaches is graded as boxed."""

import json
from collections import Counter

import pytest

from alphamed.evaluation.choices import named_option
from alphamed.lab.datasets import form, medfacts
from alphamed.records import FinishReason, Outcome, Question
from alphamed.reward.rules import correct, grade


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    medfacts.write(folder, 0, levels=(1,), categories=("antidotes", "signs", "nutrients"), facts=12, copies=4)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(folder, tmp_path, *arguments):
    assert form.main([str(tmp_path / "lesson.jsonl"), "--questions", str(folder / "train.jsonl"), *arguments]) == 0
    return rows(tmp_path / "lesson.jsonl")


def test_every_option_is_named_once_and_its_own_letter_boxed(folder, tmp_path):
    lesson = write(folder, tmp_path)
    assert len(lesson) == 48 == len({row["id"] for row in lesson})
    for row in lesson:
        assert set(row) == {"id", "question", "options", "responses"}
        assert row["responses"] == [f" {text} ({letter}) \\boxed{{{letter}}}" for letter, text in row["options"].items()]
        for letter, response in zip("ABCD", row["responses"], strict=True):
            assert named_option(response, row["options"]) == letter
            question = Question("q", row["question"], row["options"], letter)
            assert grade(question, response, FinishReason.STOP, correct).outcome == Outcome.CORRECT


def test_no_row_says_which_option_is_right(folder, tmp_path):
    """Over many rows the key of a question stands at every place about equally often, and in no field."""
    keys = {(row["question"]): row["options"][row["answer"]] for row in rows(folder / "train.jsonl")}
    lesson = write(folder, tmp_path, "--rows", "480")
    places = Counter(list(row["options"].values()).index(keys[row["question"]]) for row in lesson)
    assert all(abs(places[place] - 120) < 4 * (480 * 0.25 * 0.75) ** 0.5 for place in range(4)), places
    assert len({row["id"] for row in lesson}) == 480
    assert Counter(row["question"] for row in lesson) == Counter(
        {question: 10 * n for question, n in Counter(row["question"] for row in rows(folder / "train.jsonl")).items()}
    )


def test_a_seed_gives_the_same_lesson_and_another_one_another(folder, tmp_path):
    first = write(folder, tmp_path, "--rows", "20")
    assert write(folder, tmp_path, "--rows", "20") == first
    assert write(folder, tmp_path, "--rows", "20", "--seed", "1") != first


def test_the_response_can_be_another(folder, tmp_path):
    row = write(folder, tmp_path, "--rows", "1", "--response", "{letter}: {text}. The answer is \\boxed{{letter}}")[0]
    assert row["responses"][2] == f"C: {row['options']['C']}. The answer is \\boxed{{C}}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "--rows: 0 is no number of rows"),
        (["--response", "{text}"], "--response: '{text}' lacks {text} or {letter}"),
        (["--response", "{text} {letter}"], "does not box A, the letter of its option"),
        (["--response", "{letter} \\boxed{{text}}"], "does not box A, the letter of its option"),
    ],
)
def test_what_teaches_no_box_is_refused(folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "lesson.jsonl"
    assert form.main([str(out), "--questions", str(folder / "train.jsonl"), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1 and not out.exists()


def test_the_questions_are_not_written_over(folder, capsys):
    before = (folder / "train.jsonl").read_bytes()
    assert form.main([str(folder / "train.jsonl"), "--questions", str(folder / "train.jsonl")]) == 2
    assert "is what --questions reads" in capsys.readouterr().err and (folder / "train.jsonl").read_bytes() == before


def test_questions_that_refer_to_options_are_left_out(tmp_path):
    row = {"question": "Which?", "options": {"A": "x", "B": "all of the above"}, "answer": "A"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"id": "a"}) + "\n")
    assert form.main([str(tmp_path / "out.jsonl"), "--questions", str(tmp_path / "q.jsonl")]) == 2
    plain = {"id": "b", "question": "Which?", "options": {"A": "x", "B": "y"}, "answer": "A", "context": "A case."}
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"id": "a"}) + "\n" + json.dumps(plain) + "\n")
    assert form.main([str(tmp_path / "out.jsonl"), "--questions", str(tmp_path / "q.jsonl")]) == 0
    (only,) = rows(tmp_path / "out.jsonl")
    assert only["context"] == "A case." and sorted(only["options"].values()) == ["x", "y"]
