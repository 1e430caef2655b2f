"""Controls: keys that know nothing, and a run that evaluates the unchanged model."""

from collections import Counter

import pytest

from alphamed.config.loading import build_config
from alphamed.data.controls import with_shuffled_keys
from alphamed.errors import ConfigError
from alphamed.records import Question

SMALL = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}}


def single(i, answer="A"):
    return Question(f"q{i}", f"Question {i}?", {letter: f"{letter.lower()}{i}" for letter in "ABCD"}, answer)


def yes_no_maybe(i, text):
    options = {"A": "yes", "B": "no", "C": "maybe"}
    return Question(f"p{i}", f"Is it {i}?", options, next(letter for letter in options if options[letter] == text))


def test_options_that_occur_once_are_drawn_evenly():
    """1,000 questions of 4 options: 250 each, standard deviation 13.7; 5 are allowed. The truth is one of them."""
    before = [single(i, "ABCD"[i // 250]) for i in range(1000)]
    after = with_shuffled_keys(before, seed=3)
    assert [(q.id, q.question, q.options) for q in after] == [(q.id, q.question, q.options) for q in before]
    assert all(abs(n - 250) < 5 * 13.7 for n in Counter(q.answer for q in after).values())
    assert abs(sum(a.answer == b.answer for a, b in zip(before, after)) - 250) < 5 * 13.7


def test_a_set_with_the_same_options_keeps_its_shares():
    """Of 1,000 with 550 yes, 350 no, 100 maybe the draws expect as many of each (standard deviations 15.7, 15.1, 9.5), and
    agree with the truth as often as chance has it: .55^2 + .35^2 + .1^2 = 435, with 15.7."""
    before = [yes_no_maybe(i, "yes" if i < 550 else "no" if i < 900 else "maybe") for i in range(1000)]
    after = with_shuffled_keys(before, seed=1)
    keys = Counter(q.options[q.answer] for q in after)
    assert [abs(keys[text] - n) < 5 * 15.7 for text, n in (("yes", 550), ("no", 350), ("maybe", 100))] == [True] * 3
    assert abs(sum(a.answer == b.answer for a, b in zip(before, after)) - 435) < 5 * 15.7


def test_a_question_does_not_know_its_own_key():
    """The draw of one question is the same whatever its own key is."""
    others = [yes_no_maybe(i, "yes") for i in range(1, 4)]
    drawn = {with_shuffled_keys([yes_no_maybe(0, text), *others], 5)[0].answer for text in ("yes", "no", "maybe")}
    assert len(drawn) == 1


def test_keys_follow_from_seed_and_id_alone():
    questions = [single(i) for i in range(40)]
    keys = {q.id: q.answer for q in with_shuffled_keys(questions, 1)}
    assert {q.id: q.answer for q in with_shuffled_keys(questions[::-1], 1)} == keys
    assert {q.id: q.answer for q in with_shuffled_keys(questions[:7], 1)} == {q.id: keys[q.id] for q in questions[:7]}
    assert {q.id: q.answer for q in with_shuffled_keys(questions, 2)} != keys


def test_zero_steps_are_an_evaluation():
    run = {"run": {"stop_after": 0}, "evaluation": {"files": ["e.jsonl"], "before": True}}
    assert build_config(SMALL | run).run.last_step == 0
    with pytest.raises(ConfigError, match="^run.stop_after: 0 evaluates and ends, but .*; set evaluation.before=true$"):
        build_config(SMALL | {"run": {"stop_after": 0}})
