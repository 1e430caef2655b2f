"""Scores against published Wilson intervals and counts by hand; sentences that claim no more than the numbers hold."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from alphamed.config.choices import BadRows
from alphamed.evaluation.items import read_items
from alphamed.evaluation.runner import (
    Evaluation,
    QuestionSet,
    SetResult,
    affordable,
    asked_before,
    begin_evaluation,
    evaluate_within,
    load_sets,
    read_scores,
    summary,
    within,
    write_evaluation,
)
from alphamed.evaluation.score import Change, Score, Share, change, score, verdict
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup

C, W, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TRUNCATED


# ------------------------------------------------------------------------------------------------------------ intervals
@pytest.mark.parametrize(
    "count, total, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
    ],
)  # the mirror of 0 of 20
def test_wilson_interval_equals_the_published_one(count, total, low, high):
    assert Share(count, total).interval == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_solve_their_defining_equation():
    """An end p of the interval of x/n is where |x/n - p| = z sqrt(p (1 - p) / n)."""
    for end in Share(37, 120).interval:
        assert abs(37 / 120 - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / 120), rel=1e-12)


def test_no_cases_have_no_value_and_the_widest_interval():
    assert math.isnan(Share(0, 0).value) and Share(0, 0).interval == (0.0, 1.0) and str(Share(0, 0)) == "no cases"


def test_shares_are_written_with_their_interval():
    assert str(Share(81, 263)) == "30.8% [25.5%, 36.6%]"


# -------------------------------------------------------------------------------------------------------------- scoring
def graded(name, outcome, tokens, options=4, letter=None):
    question = Question(name, f"question {name}?", dict(zip("ABCDEFGHIJ"[:options], "abcdefghij")), "A")
    rollout = Rollout(
        f"g-{name}",
        name,
        0,
        tuple(range(tokens)),
        (0.0,) * tokens,
        f"text of {name}",
        FinishReason.LENGTH if outcome == T else FinishReason.STOP,
        0,
    )
    return ScoredGroup(
        RolloutGroup(f"g-{name}", question, (1,), (rollout,)), (outcome,), (float(outcome == C),), (0.0,), (letter,)
    )


def test_score_of_eight_answers_by_hand():
    outcomes = [C, C, C, W, W, U, T, Outcome.CRASH]
    found = score([graded(str(i), outcome, 10 * i, options=4 if i < 4 else 5) for i, outcome in enumerate(outcomes)])
    assert found == Score(
        n=8,
        boxed=Share(5, 8),
        accuracy=Share(3, 8),
        accuracy_among_boxed=Share(3, 5),
        truncated=Share(1, 8),
        failed=Share(1, 8),
        tokens_mean=35.0,
        tokens_max=70,
        chance=pytest.approx((4 / 4 + 4 / 5) / 8),
    )
    assert found.accuracy.value == pytest.approx(found.boxed.value * found.accuracy_among_boxed.value)


def test_truncated_are_those_that_the_limit_cut_however_they_were_graded():
    """With `reward.truncated: grade` a cut answer can be right."""
    found = score([cut(graded("a", C, 5)), cut(graded("b", U, 5)), graded("c", W, 5), graded("d", C, 5)])
    assert (found.truncated, found.accuracy, found.boxed) == (Share(2, 4), Share(2, 4), Share(3, 4))


def cut(scored):
    rollout = replace(scored.group.rollouts[0], finish_reason=FinishReason.LENGTH)
    return replace(scored, group=replace(scored.group, rollouts=(rollout,)))


def test_a_letter_in_a_truncated_answer_does_not_count_as_boxed():
    assert score([graded("a", T, 5, letter="A")]).boxed == Share(0, 1)


def test_an_empty_evaluation_is_refused():
    with pytest.raises(ValueError, match="give it questions"):
        score([])


# ------------------------------------------------------------------------------------------------------------ sentences
def numbers(boxed, correct, n=200, truncated=0, chance=0.2):
    return Score(
        n, Share(boxed, n), Share(correct, n), Share(correct, boxed), Share(truncated, n), Share(0, n), 50.0, 64, chance
    )


def test_change_needs_intervals_that_do_not_touch():
    assert change(Share(20, 100), Share(50, 100)) == Change.ROSE
    assert change(Share(50, 100), Share(20, 100)) == Change.FELL
    # 40 of 100: [.309, .498], 50 of 100: [.404, .596]: they overlap, though 50 lies outside the first
    assert change(Share(40, 100), Share(50, 100)) == Change.OPEN
    assert change(Share(0, 0), Share(50, 100)) == Change.OPEN


def test_a_risen_boxed_rate_is_called_format_and_not_knowledge():
    sentences = verdict(numbers(boxed=90, correct=20), numbers(boxed=195, correct=45))  # 22.2% -> 23.1% of boxed
    text = " ".join(sentences)
    assert sentences[0].startswith("The answer format was learnt")
    assert "More questions are answered correctly" in text and "That is format, not knowledge" in text
    assert "not shown to be better than picking letters blindly (20.0%)" in text
    assert "Knowledge:" not in text


def test_knowledge_is_spoken_of_only_outside_the_interval():
    text = " ".join(verdict(numbers(boxed=150, correct=35), numbers(boxed=190, correct=110)))
    assert "Knowledge: among boxed answers more are right than before" in text and "blindly" not in text
    assert "23.3% [17.3%, 30.7%] -> 57.9% [50.8%, 64.7%]" in text


def test_boxing_the_easy_questions_only_is_not_knowledge():
    """40 of 190 boxed answers were right, then 38 of 60: nobody got better at anything but leaving questions out."""
    text = " ".join(verdict(numbers(boxed=190, correct=40), numbers(boxed=60, correct=38)))
    assert "Knowledge:" not in text and "No gain in knowledge is shown: among boxed answers more are right" in text
    assert "the questions that are still boxed may be the easy ones" in text


def test_what_is_had_without_reading_is_not_knowledge():
    """From a letter that is never right to chance, and to the best of the policies that read nothing."""
    for before, after, blind in ((0, 50, 0.0), (50, 110, 0.6)):  # 25% [19.5%, 31.4%]; 55% [48.1%, 61.7%]
        text = " ".join(verdict(numbers(200, before, chance=0.25), numbers(200, after, chance=0.25), blind))
        assert "Knowledge:" not in text and "No gain in knowledge is shown: among boxed answers more are right" in text
        assert f"not more than without reading the question ({max(blind, 0.25):.1%})" in text
    assert "Knowledge:" in " ".join(verdict(numbers(200, 50), numbers(200, 110), 0.45))


def test_nothing_moved():
    text = " ".join(verdict(numbers(100, 30), numbers(104, 33)))
    assert text.count("did not move outside its interval") == 2 and "No gain in knowledge is shown" in text


def test_losses_are_said_too():
    text = " ".join(verdict(numbers(190, 120), numbers(60, 10, truncated=120)))
    assert "format was lost in part" in text and "Fewer questions are answered correctly" in text
    assert "among boxed answers fewer are right" in text.lower() and "More responses run into the token limit" in text


def test_without_boxed_answers_before_nothing_is_compared():
    text = " ".join(verdict(numbers(0, 0), numbers(190, 120)))
    assert "cannot be compared: 0 boxed answers before, 190 after" in text and "Knowledge:" not in text


# -------------------------------------------------------------------------------------------------------------- running
QUESTIONS = tuple(Question(f"q{i}", f"question {i}?", {"A": "a", "B": "b"}, "AB"[i % 2]) for i in range(4))


def answer_a(tasks):
    """Greedy "A" for everything, in another order than asked."""
    assert all(task.sampling.temperature == 0 and task.sampling.n == 1 for task in tasks)
    return [
        ScoredGroup(
            RolloutGroup(
                task.group_id,
                task.question,
                task.prompt_token_ids,
                (Rollout(task.group_id, task.question.id, 0, (1, 2, 3), (0.0,) * 3, "<b>\\boxed{A}", FinishReason.STOP, 4),),
            ),
            (C if task.question.answer == "A" else W,),
            (0.0,),
            (0.0,),
            ("A",),
        )
        for task in reversed(tasks)
    ]


def test_evaluation_keeps_order_and_reads_back(tmp_path):
    sets = [QuestionSet("one", Path("one.jsonl"), QUESTIONS[:3], 9), QuestionSet("two", Path("two.jsonl"), QUESTIONS, 4)]
    begun = []
    finish = begin_evaluation(
        sets,
        lambda question: [len(question.id)],
        lambda name, tasks: begun.append((name, tasks)) or (lambda: answer_a(tasks)),
        max_tokens=64,
        policy_version=4,
    )
    assert [name for name, _ in begun] == ["one", "two"]  # before anything is waited for
    assert all(task.evaluation for _, tasks in begun for task in tasks)
    found = finish()
    assert [group.group.question.id for group in found.results[0].groups] == ["q0", "q1", "q2"]
    assert found.results[0].score.accuracy == Share(2, 3) and found.results[1].score.accuracy == Share(2, 4)
    assert summary(found)[0].startswith("evaluation of one (n = 3): accuracy 66.7% [")

    path = write_evaluation(tmp_path, "step_000020", 20, found)
    assert path.name == "step_000020.json"
    assert read_scores(path) == {"one": found.results[0].score, "two": found.results[1].score}
    items = read_items(tmp_path / "step_000020.items.jsonl")
    assert len(items) == 7 and [answer.outcome for answer in items["two", "q3"]] == [W]
    assert items["one", "q0"][0].text == "<b>\\boxed{A}" and items["one", "q0"][0].asked.question == QUESTIONS[0]


def test_missing_answers_are_an_error():
    sets = [QuestionSet("one", Path("one.jsonl"), QUESTIONS, 4)]
    with pytest.raises(ValueError, match="1 of 4 questions came back without .*, the first is evaluation/one/q0"):
        begin_evaluation(sets, lambda question: [1], lambda _name, tasks: lambda: answer_a(tasks[1:]), 64, 0)()


def test_subsets_are_chosen_by_seed_not_by_place(tmp_path):
    import json

    rows = [{"id": f"q{i}", "question": f"question {i}?", "options": {"A": "a", "B": "b"}, "answer": "A"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))

    def ids(file, limit, seed):
        return [q.id for q in load_sets([tmp_path / file], limit, seed, BadRows.REFUSE)[0].questions]

    ten = ids("a.jsonl", 10, seed=1)
    assert len(ten) == 10 and ten == sorted(ten, key=lambda name: int(name[1:]))  # the order of the file
    assert set(ids("b.jsonl", 10, seed=1)) == set(ten) != set(ids("a.jsonl", 10, seed=2))
    assert set(ids("a.jsonl", 5, seed=1)) < set(ten) and len(ids("a.jsonl", None, seed=1)) == 50
    assert load_sets([tmp_path / "a.jsonl"], 10, 1, BadRows.REFUSE)[0].available == 50


# ----------------------------------------------------------------------------------------------------------- limited time
@pytest.mark.parametrize(
    ("wanted", "tried", "seconds", "limit", "asked"),
    [
        (200, 24, 12.0, 100.0, 200),  # 0.5 s each
        (200, 24, 24.0, 100.0, 100),  # 1 s each
        (200, 24, 240.0, 100.0, 48),  # 10 s each: 10 would fit, fewer than 48 say nothing
        (30, 24, 240.0, 100.0, 30),
        (10, 10, 1.0, 0.1, 10),
        (200, 24, 0.0, 1.0, 200),
    ],
)
def test_questions_that_there_is_time_for(wanted, tried, seconds, limit, asked):
    assert affordable(wanted, tried, seconds, limit) == asked


def timed(seconds_each: float, asked: list):
    """An evaluation of one set that takes so long for each question; notes the questions."""

    def evaluate(one):
        asked.append([question.id for question in one.questions])
        groups = tuple(
            ScoredGroup(
                RolloutGroup("g", question, (1,), (Rollout("g", question.id, 0, (1,), (0.0,), "", FinishReason.STOP, 3),)),
                (C,),
                (1.0,),
                (0.0,),
                ("A",),
            )
            for question in one.questions
        )
        return Evaluation(3, (SetResult(one, groups, score(groups)),), seconds_each * len(groups), 64)

    return evaluate


def question_set(name, count):
    questions = tuple(Question(f"{name}{i}", "?", {"A": "x", "B": "y"}, "A") for i in range(count))
    return QuestionSet(name, Path(f"{name}.jsonl"), questions, count)


def test_a_slow_evaluation_asks_a_part_of_each_set_that_any_later_one_can_ask_too(tmp_path):
    sets, asked, notes = (question_set("a", 200), question_set("b", 50)), [], []
    found = evaluate_within(sets, timed(1.0, asked), 125.0, 7, notes.append)  # 100 s for a, 25 s for b
    assert [result.score.n for result in found.results] == [100, 48] and found.seconds == 148.0
    assert [len(ids) for ids in asked] == [24, 76, 24, 24]
    first = found.results[0].questions
    assert sorted(asked[0] + asked[1]) == sorted(question.id for question in first.questions)  # each once
    assert [group.group.question.id for group in found.results[0].groups] == [question.id for question in first.questions]
    assert first.questions == within(sets[0], 100, 7).questions and first.available == 200
    assert notes == [
        "evaluation.time_limit_s: 24 questions of a took 24 s; 100 of 200 are asked in this run, 100 are left out",
        "evaluation.time_limit_s: 24 questions of b took 24 s; 48 of 50 are asked in this run, 2 are left out",
    ]
    write_evaluation(tmp_path / "evaluations", "step_000000", 0, found)
    assert asked_before(tmp_path) == {"a": 100, "b": 48}


def test_an_evaluation_that_has_time_asks_everything():
    asked, notes = [], []
    found = evaluate_within([question_set("a", 60)], timed(0.5, asked), 100.0, 7, notes.append)
    assert found.results[0].score.n == 60 and notes == [] and [len(ids) for ids in asked] == [24, 36]
    found = evaluate_within([question_set("a", 5)], timed(0.5, asked), 100.0, 7, notes.append)
    assert found.results[0].score.n == 5 and len(asked) == 3
