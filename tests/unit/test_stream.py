"""The order of questions and the letters of their options: seeded, complete, resumable, and right."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from alphamed.config.choices import Spread
from alphamed.data.stream import QuestionStream, refers_to_options, shuffle_options
from alphamed.errors import DataError
from alphamed.records import Question


def question(i, answer="B", **options) -> Question:
    return Question(f"q{i}", f"Question {i}?", options or {"A": "red", "B": "green", "C": "blue", "D": "grey"}, answer)


QUESTIONS = [question(i) for i in range(7)]


# --------------------------------------------------------------------------------------------------------------- order
def test_every_epoch_holds_every_question_once_in_an_order_of_its_own():
    stream = QuestionStream(QUESTIONS, seed=5)
    epochs = [[q.id for q in stream.take(7)] for _ in range(6)]
    assert all(sorted(epoch) == [f"q{i}" for i in range(7)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


def test_the_order_is_one_that_older_runs_can_be_resumed_with():
    """Written down once: another order would make a resumed run meet questions twice or never."""
    assert [q.id for q in QuestionStream(QUESTIONS, seed=5).take(7)] == ["q0", "q5", "q4", "q2", "q6", "q3", "q1"]


def test_seeds_differ_and_file_order_does_not_matter():
    first = [q.id for q in QuestionStream(QUESTIONS, seed=1).take(7)]
    assert first != [q.id for q in QuestionStream(QUESTIONS, seed=2).take(7)]
    assert first == [q.id for q in QuestionStream(QUESTIONS[::-1], seed=1).take(7)]


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3, 3], [14, 1], [7, 8], [1] * 15, [15]])
def test_steps_of_any_size_cut_the_same_stream(sizes):
    stream = QuestionStream(QUESTIONS, seed=3)
    assert [q for n in sizes for q in stream.take(n)] == QuestionStream(QUESTIONS, seed=3).take(15)


def test_a_stream_continues_exactly_from_every_position():
    reference = QuestionStream(QUESTIONS, seed=3).take(40)
    for position in range(30):
        stream = QuestionStream(QUESTIONS, seed=3)
        if position:
            stream.take(position)
        state = json.loads(json.dumps(stream.state()))
        resumed = QuestionStream(QUESTIONS[::-1], seed=3)
        resumed.take(5)
        resumed.load_state(state)
        assert resumed.take(10) == reference[position : position + 10]
        assert (state["epoch"], state["position"]) == divmod(position, 7)


def test_another_data_set_or_seed_is_refused_with_a_fix():
    state = QuestionStream(QUESTIONS, seed=3).state()
    with pytest.raises(DataError, match="^data.train: these 6 questions are not the ones .*; restore the files or"):
        QuestionStream(QUESTIONS[:6], seed=3).load_state(state)
    with pytest.raises(DataError, match="^data.train: these 7 questions are not the ones"):
        QuestionStream([*QUESTIONS[:6], question(8)], seed=3).load_state(state)
    with pytest.raises(DataError, match="^run.seed: 4 is not the 3 that the run was started with; set it back"):
        QuestionStream(QUESTIONS, seed=4).load_state(state)


def test_nothing_can_not_be_streamed():
    with pytest.raises(DataError, match="no question to train on"):
        QuestionStream([], seed=3)
    with pytest.raises(ValueError, match="ask for at least one"):
        QuestionStream(QUESTIONS, seed=3).take(0)


def kinds():
    """8 questions of each of three answers; a source has the questions of an answer and a half."""
    return [replace(question(i, "B", A="x", B=f"answer {i % 3}"), source="first" if i < 12 else "second") for i in range(24)]


@pytest.mark.parametrize("seed", range(5))
def test_answers_can_be_spread_evenly(seed):
    stream = QuestionStream(kinds(), seed, spread=Spread.ANSWER)
    epochs = [stream.take(24) for _ in range(2)]
    for epoch in epochs:
        assert len({q.id for q in epoch}) == 24
        for start in range(0, 24, 3):
            assert sorted(q.options[q.answer] for q in epoch[start : start + 3]) == ["answer 0", "answer 1", "answer 2"]
    answers = [[q.options[q.answer] for q in epoch] for epoch in epochs]
    assert answers[0] != answers[1] and answers[0] != answers[0][:3] * 8  # no order but that


def test_sources_can_be_spread_evenly_whatever_their_sizes():
    questions = [replace(question(i), source="large" if i < 15 else "small") for i in range(20)]
    order = QuestionStream(questions, seed=1, spread=Spread.SOURCE).take(20)
    for part in range(5):  # the part's own 3 + 1, give or take one at each border
        assert [q.source for q in order[4 * part : 4 * part + 4]].count("small") in (0, 1, 2)
    assert [sum(q.source == "small" for q in order[: 4 * n]) - n for n in range(1, 6)] == pytest.approx([0] * 5, abs=1)


def test_spreading_leaves_questions_without_equals_in_any_order_and_continues_exactly():
    lone = [replace(question(i), options={"A": "x", "B": f"answer {i}"}) for i in range(7)]
    orders = {tuple(q.id for q in QuestionStream(lone, seed, spread=Spread.ANSWER).take(7)) for seed in range(20)}
    assert len(orders) > 15
    reference = QuestionStream(kinds(), 3, spread=Spread.ANSWER).take(60)
    stream = QuestionStream(kinds(), 3, spread=Spread.ANSWER)
    stream.take(31)
    resumed = QuestionStream(kinds()[::-1], 3, spread=Spread.ANSWER)
    resumed.load_state(json.loads(json.dumps(stream.state())))
    assert resumed.take(29) == reference[31:]


# ------------------------------------------------------------------------------------------------------------- options
def test_shuffled_options_keep_letters_texts_and_answer():
    for epoch in range(50):
        shuffled = shuffle_options(question(1, answer="C"), seed=9, epoch=epoch)
        assert list(shuffled.options) == ["A", "B", "C", "D"]
        assert sorted(shuffled.options.values()) == ["blue", "green", "grey", "red"]
        assert shuffled.options[shuffled.answer] == "blue"
        assert (shuffled.id, shuffled.question) == ("q1", "Question 1?")


def test_the_answer_is_at_every_letter_equally_often():
    """2,400 independent draws of 4 letters: 600 each, standard deviation 21; 5 deviations are allowed."""
    places = Counter(shuffle_options(question(i), 9, epoch).answer for i in range(24) for epoch in range(100))
    assert sorted(places) == ["A", "B", "C", "D"]
    assert all(abs(n - 600) < 5 * 21 for n in places.values()), places


def test_all_orders_of_three_options_come_up_equally_often():
    """1,200 draws of 6 orders: 200 each, standard deviation 12.9; 5 deviations are allowed."""
    original = question(1, "A", A="y", B="n", C="m")
    orders = Counter("".join(shuffle_options(original, 1, epoch).options.values()) for epoch in range(1200))
    assert len(orders) == 6 and all(abs(n - 200) < 5 * 13 for n in orders.values()), orders


def test_every_four_neighbours_have_their_answers_at_all_four_letters():
    stream = QuestionStream([question(i, "C") for i in range(22)], seed=5)
    for _ in range(3):  # epochs of 22: five whole decks and a half one
        epoch = stream.take(22)
        for start in range(0, 20, 4):
            assert sorted(q.answer for q in epoch[start : start + 4]) == list("ABCD")
        assert all(q.options[q.answer] == "blue" for q in epoch)


def test_letters_depend_on_seed_epoch_and_id_alone():
    base = shuffle_options(question(1), 1, 1)
    assert shuffle_options(replace(question(1), context="c", level=2), 1, 1).options == base.options
    for other in (
        [shuffle_options(question(1), seed, 1) for seed in range(30)],
        [shuffle_options(question(1), 1, epoch) for epoch in range(30)],
        [shuffle_options(question(i), 1, 1) for i in range(30)],
    ):
        assert len({tuple(shuffled.options.values()) for shuffled in other}) > 10  # of 24 orders


def test_the_stream_letters_anew_every_epoch_and_only_when_asked():
    stream = QuestionStream(QUESTIONS[:1], seed=3)
    taken = stream.take(40)
    assert len({tuple(q.options.values()) for q in taken}) > 10 and {q.answer for q in taken} == set("ABCD")
    assert all(q.options[q.answer] == "green" for q in taken)
    assert QuestionStream(QUESTIONS[:1], seed=3, shuffle_options=False).take(3) == [QUESTIONS[0]] * 3


@pytest.mark.parametrize(
    "text",
    [
        "All of the above",
        "all the above",
        "None of the above.",
        "none",
        "None.",
        "NONE",
        "None of these",
        "All of these",
        "Both of the above",
        "Both A and B",
        "A and B",
        "A & C only",
        "Both (a) and (b)",
        "Both 'a' and 'c'",
        "A or B",
        "A only",
        "Only B",
        "A, B and D",
        "All",
        "Both",
        "Neither",
        "Neither of them",
        "Any of the above",
        "Anyone of the above.",
        "All are correct",
        "All are true.",
        "None is correct.",
        "No option is correct.",
        "No answer is correct.",
        "All the previous answers are correct.",
        "The answers 1 and 2 are the correct ones.",
        "1 and 3 are correct.",
        "1 only",
        "1, 2, and 3",
        "1,2,3 & 4",
        "In none of the above.",
        "Options B and C",
        "Same as A",
        "Two of these",
        "I and J",
    ],
)
def test_options_that_speak_of_others_stay_where_they_are(text):
    original = question(1, A="red", B="green", C="blue", D=text)
    assert refers_to_options(original)
    assert all(shuffle_options(original, 1, epoch) is original for epoch in range(5))


@pytest.mark.parametrize(
    "text",
    [
        "Vitamin A",
        "Hepatitis B virus",
        "All-trans retinoic acid",
        "Acute lymphoblastic leukemia (ALL)",
        "Both kidneys",
        "Neither consumes oxygen nor produces ATP",
        "Above 9 years",
        "Serum calcium above 11 mg/dL",
        "Previous chemotherapy",
        "Factor VIII and factor IX",
        "2 and a half years",
        "1,25-dihydroxyvitamin D",
        "Between 3 and 5 days",
        "3/4",
        "42",
        "yes",
        "no",
        "maybe",
        "Surgery is the treatment of choice",
        "A high fever",
        "Group A streptococcus",
        "Both males and females",
        "T cells only in the thymus",
        "Nonenhancing lesion",
        "Loss of all body hair",
        "L4 and L5",
        "P waves and QRS complexes unrelated to each other",
    ],
)
def test_options_that_only_look_like_it_are_shuffled(text):
    assert not refers_to_options(question(1, A="red", B="green", C="blue", D=text))


def test_a_stem_that_names_an_option_keeps_its_order():
    assert refers_to_options(replace(question(1), question="Why is option A wrong?"))
    assert refers_to_options(replace(question(1), question="Options (B) and (C) differ in what?"))
    assert not refers_to_options(replace(question(1), question="What is the drug of choice? A boy has group A strep."))
