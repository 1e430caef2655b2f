"""Changed forms of questions, and the grading of answers given without options."""

from collections import Counter

import pytest

from alphamed.data.mcq import parse_question
from alphamed.data.output import question_row
from alphamed.evaluation.variants import NONE, VARIANTS, free, free_letter, none_of_the_others, one_removed, shuffled
from alphamed.records import Question

OPTIONS = {"A": "Vitamin A", "B": "Vitamin B12", "C": "Vitamin C", "D": "Vitamin D"}


def question(i=0, answer="C", options=OPTIONS, text="Which vitamin is missing?"):
    return Question(f"q{i}", text, dict(options), answer, "context", "src", 3)


def test_shuffling_keeps_texts_and_key_and_moves_the_letter():
    for i in range(50):
        changed = shuffled(question(i), seed=1)
        assert sorted(changed.options.values()) == sorted(OPTIONS.values()) and list(changed.options) == list("ABCD")
        assert changed.options[changed.answer] == "Vitamin C" and changed.answer != "C"


def test_the_key_goes_to_every_other_place_about_equally_often():
    places = Counter(shuffled(question(i), seed=2).answer for i in range(600))
    assert set(places) == set("ABD") and min(places.values()) > 150  # 200 each, four standard deviations are 46


def test_removing_takes_one_wrong_option_and_closes_the_gap():
    gone = Counter()
    for i in range(300):
        changed = one_removed(question(i), seed=1)
        assert list(changed.options) == list("ABC") and changed.options[changed.answer] == "Vitamin C"
        gone[(set(OPTIONS.values()) - set(changed.options.values())).pop()] += 1
    assert set(gone) == {"Vitamin A", "Vitamin B12", "Vitamin D"} and min(gone.values()) > 65


def test_none_of_the_others_takes_the_keys_place():
    assert dict(none_of_the_others(question(), 1).options) == OPTIONS | {"C": NONE}
    assert none_of_the_others(question(), 1).answer == "C"


def test_without_options_nothing_but_the_prompt_changes():
    assert free(question(), 1) == question() and VARIANTS["free"].shown(question()).options == {}
    assert VARIANTS["shuffled"].shown(question()).options == OPTIONS


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_questions_of_the_schema_and_depend_on_seed_and_id_alone(name):
    change = VARIANTS[name].change
    one = change(question(), 5)
    assert parse_question(question_row(one), "here") == one == change(question(), 5)
    assert (one.id, one.context, one.source, one.level) == ("q0", "context", "src", 3)


@pytest.mark.parametrize("name", VARIANTS)
def test_options_that_speak_of_others_have_no_variants(name):
    options = OPTIONS | {"D": "Both A and C"}
    assert VARIANTS[name].change(question(options=options), 1) is None


def test_two_options_can_not_lose_one():
    assert one_removed(question(options={"A": "yes", "B": "no"}, answer="A"), 1) is None


@pytest.mark.parametrize(
    "text", ["Which of the following is true?", "All occur in scurvy EXCEPT:", "Which statement holds?"]
)
def test_questions_about_their_options_are_not_asked_without_them(text):
    assert free(question(text=text), 1) is None
    assert free(question(text="Which of the following is the most likely diagnosis?"), 1) is not None


@pytest.mark.parametrize(
    "text, letter",
    [
        ("\\boxed{Vitamin C}", "C"),
        ("\\boxed{\\text{vitamin  c}.}", "C"),
        ("\\boxed{Start vitamin C today}", "C"),
        ("It is vitamin C.", None),  # no box
        ("\\boxed{ascorbic acid}", None),  # a synonym: known to count as wrong
        ("\\boxed{Vitamin}", None),  # a part of an option is none
        ("\\boxed{Vitamin C or Vitamin D}", None),  # two of them
        ("\\boxed{Vitamin A} \\boxed{Vitamin D}", "D"),
        ("\\boxed{C}", None),
        ("\\boxed{}", None),
    ],
)
def test_free_answers(text, letter):
    assert free_letter(text, OPTIONS) == letter


def test_the_longest_option_counts_where_one_holds_another():
    options = {"A": "Anemia", "B": "Iron deficiency anemia", "C": "Iron"}
    assert free_letter("\\boxed{mild iron deficiency anemia}", options) == "B"
    assert free_letter("\\boxed{anemia}", options) == "A"
    assert free_letter("\\boxed{iron and anemia}", options) is None
