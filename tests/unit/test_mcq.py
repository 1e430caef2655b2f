"""One row in, a question or a plain statement of what is wrong out."""

import pickle

import pytest

from alphamed.data.mcq import QuestionError, RawRow, RowProblem, check_questions, parse_question

GOOD = {
    "id": "q1",
    "question": "Which vitamin prevents scurvy?",
    "options": {"A": "Vitamin A", "B": "Vitamin C"},
    "answer": "B",
}
HALF_PAIR = "\ud800"  # JSON can spell it, UTF-8 cannot encode it


def without(key: str) -> dict:
    return {k: v for k, v in GOOD.items() if k != key}


def test_a_minimal_row():
    question = parse_question(GOOD, "x")
    assert (question.id, question.question, question.answer) == ("q1", "Which vitamin prevents scurvy?", "B")
    assert list(question.options.items()) == [("A", "Vitamin A"), ("B", "Vitamin C")]
    assert (question.context, question.source, question.level) == (None, None, None)


def test_a_full_row_with_the_extra_keys_of_public_data_sets():
    row = GOOD | {"context": "A sailor.", "source": "medqa", "level": 6, "split": "dev", "licence": "MIT", "o": [1]}
    question = parse_question(row, "x")
    assert (question.context, question.source, question.level) == ("A sailor.", "medqa", 6)


def test_optional_keys_may_be_null_or_blank():
    question = parse_question(GOOD | {"context": " ", "source": None, "level": None}, "x")
    assert (question.context, question.source, question.level) == (None, None, None)


def test_white_space_around_texts_is_dropped():
    row = GOOD | {"question": "\n Why? ", "options": {"A": " yes\n", "B": "no"}, "context": " c "}
    question = parse_question(row, "x")
    assert (question.question, dict(question.options), question.context) == ("Why?", {"A": "yes", "B": "no"}, "c")


def test_ten_options_and_options_that_differ_in_case_only_are_fine():
    options = {letter: f"gene {i}" for i, letter in enumerate("ABCDEFGH")} | {"I": "Aa", "J": "aa"}
    assert list(parse_question(GOOD | {"options": options}, "x").options) == list("ABCDEFGHIJ")


BROKEN = {
    "list": ([1], "not an object of keys and values but a list"),
    "null": (None, "not an object of keys and values but nothing"),
    "no id": (without("id"), "no id"),
    "blank id": (GOOD | {"id": " "}, "id is empty"),
    "number as id": (GOOD | {"id": 7}, "id is a number, not text"),
    "no question": (without("question"), "no question"),
    "null question": (GOOD | {"question": None}, "no question"),
    "blank question": (GOOD | {"question": "\n"}, "question is empty"),
    "question is a list": (GOOD | {"question": ["a"]}, "question is a list, not text"),
    "question half a pair": (
        GOOD | {"question": HALF_PAIR},
        "question holds half a surrogate pair, which is not valid Unicode",
    ),
    "no options": (without("options"), "no options"),
    "options are numbers": (GOOD | {"options": ["a", 20]}, "an option is a number (20), not text"),
    "options are a list": (GOOD | {"options": ["a", "b"]}, "options are a list, not letter -> text"),
    "no option at all": (GOOD | {"options": {}}, "0 options, at least 2 are needed"),
    "one option": (GOOD | {"options": {"A": "x"}}, "1 option, at least 2 are needed"),
    "letters swapped": (GOOD | {"options": {"B": "x", "A": "y"}}, "option letters are B, A, not A, B, C ... in order"),
    "letter left out": (GOOD | {"options": {"A": "x", "C": "y"}}, "option letters are A, C, not A, B, C ... in order"),
    "lower case": (GOOD | {"options": {"a": "x", "b": "y"}}, "option letters are a, b, not A, B, C ... in order"),
    "numbers": (GOOD | {"options": {"1": "x", "2": "y"}}, "option letters are 1, 2, not A, B, C ... in order"),
    "option is a number": (GOOD | {"options": {"A": "x", "B": 5}}, "option B is a number, not text"),
    "option is null": (GOOD | {"options": {"A": None, "B": "x"}}, "option A is nothing, not text"),
    "empty option": (GOOD | {"options": {"A": "x", "B": ""}}, "option B is empty"),
    "option half a pair": (
        GOOD | {"options": {"A": "x", "B": HALF_PAIR}},
        "option B holds half a surrogate pair, which is not valid Unicode",
    ),
    "duplicate options": (GOOD | {"options": {"A": "x", "B": "a  b", "C": "a b "}}, "options B and C are the same: 'a b'"),
    "no answer": (without("answer"), "no answer"),
    "empty answer": (GOOD | {"answer": ""}, "answer is empty"),
    "answer is an index": (GOOD | {"answer": 1}, "answer is a number, not text"),
    "answer outside": (GOOD | {"answer": "C"}, "answer 'C' is not among the options A, B"),
    "lower-case answer": (GOOD | {"answer": "b"}, "answer 'b' is not among the options A, B"),
    "answer is the text": (GOOD | {"answer": "Vitamin C"}, "answer 'Vitamin C' is not among the options A, B"),
    "context is a list": (GOOD | {"context": ["a"]}, "context is a list, not text"),
    "source is a number": (GOOD | {"source": 3}, "source is a number, not text"),
    "level 0": (GOOD | {"level": 0}, "level 0 is not a whole number from 1 to 6"),
    "level 7": (GOOD | {"level": 7}, "level 7 is not a whole number from 1 to 6"),
    "level is text": (GOOD | {"level": "3"}, "level '3' is not a whole number from 1 to 6"),
    "level is true": (GOOD | {"level": True}, "level True is not a whole number from 1 to 6"),
    "level is a fraction": (GOOD | {"level": 2.5}, "level 2.5 is not a whole number from 1 to 6"),
}


@pytest.mark.parametrize("row, problem", BROKEN.values(), ids=BROKEN)
def test_a_broken_row_is_named_by_its_first_problem(row, problem):
    with pytest.raises(QuestionError) as error:
        parse_question(row, "data.jsonl:3")
    assert error.value.problem == problem
    assert str(error.value) == f"data.jsonl:3: {problem}"
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_long_values_are_cut_and_kept_on_one_line():
    with pytest.raises(QuestionError) as error:
        parse_question(GOOD | {"answer": "x\n" * 500}, "f:1")
    assert len(str(error.value)) < 150 and "\n" not in str(error.value)


def test_check_questions_splits_good_from_bad_and_finds_duplicate_ids():
    rows = [
        RawRow("f", 1, GOOD),
        RawRow("f", 2, problem="not JSON"),
        RawRow("f", 3, GOOD | {"id": "q2", "answer": "Z"}),
        RawRow("g", 1, GOOD | {"id": "q2"}),
        RawRow("g", 2, GOOD),
    ]
    questions, problems = check_questions(rows)
    assert [q.id for q in questions] == ["q1", "q2"]  # the q2 of g counts: the one before it was bad
    assert problems == [
        RowProblem("f", 2, "not JSON"),
        RowProblem("f", 3, "answer 'Z' is not among the options A, B"),
        RowProblem("g", 2, "duplicate id 'q1', first at f:1"),
    ]
