"""Counts over recorded responses, question histories and warnings, against numbers worked out by hand."""

from collections import Counter

import pytest

from alphamed.lab.reports.history import QuestionHistory, count_questions
from alphamed.lab.reports.response_patterns import ResponsePattern
from alphamed.lab.reports.rollout_stats import Count, RolloutStats, merged
from alphamed.lab.reports.watch import collapse, ends, response_warnings
from alphamed.records import Outcome, Question
from alphamed.rundir.rollout_files import Answers

C, W, U = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE
LONG = "because of this and of that it must be "


def group(name, letters, key="A", *, level=None, source=None, text=LONG + "\\boxed{{{0}}}"):
    """Responses that box these letters (None: no box); the reward is 1 for the key."""
    question = Question(name, f"{name}?", dict.fromkeys("ABCD", "x"), key, None, source, level)
    outcomes = tuple(U if letter is None else C if letter == key else W for letter in letters)
    return Answers(
        name,
        question,
        tuple(text.format(letter) if letter else "no idea" for letter in letters),
        outcomes,
        tuple(letters),
        tuple(float(o is C) for o in outcomes),
        tuple(range(1, len(letters) + 1)),
        (False,) * len(letters),
    )


def count(*groups):
    total = Count()
    for hits, cases in groups:
        total.add(hits, cases)
    return total


# --------------------------------------------------------------------------------------------------------------- counts
@pytest.mark.parametrize(
    "groups, effective",
    [
        ([(4, 4), (0, 4), (4, 4), (0, 4)], 4),  # alike within groups: 3 by the formula, but 4 groups are 4 cases
        ([(2, 4)] * 4, 16),  # no spread between groups
        # squared deviations 4 + 0 + 0 + 4; variance 4/3 x 8 / 16^2 = 1/24; of 16 independent cases 1/64; 16 x 24/64 = 6
        ([(4, 4), (2, 4), (2, 4), (0, 4)], 6),
        ([(4, 4), (4, 4)], 2),
        ([(3, 8)], 1),
    ],
)
def test_responses_to_one_question_count_as_fewer(groups, effective):
    assert count(*groups).effective_cases == pytest.approx(effective)


def test_the_interval_is_wilsons_for_the_effective_cases():
    # 3 of 6: (0.5 + z2/12 -+ z sqrt(0.25/6 + z2/144)) / (1 + z2/6) with z2 = 3.8415
    assert count((4, 4), (2, 4), (2, 4), (0, 4)).interval == pytest.approx((0.1876, 0.8124), abs=1e-4)
    assert Count().interval == (0.0, 1.0) and Count().share is None


def test_merging_counts_is_adding_their_groups():
    first, second, both = count((1, 4), (3, 4)), count((0, 2)), count((1, 4), (3, 4), (0, 2))
    first.merge(second)
    assert first == both and first.effective_cases == both.effective_cases


def test_a_step_is_counted_by_level_source_letter_and_pattern():
    stats = RolloutStats()
    stats.add(3, [group("a", "AABB", level=1, source="medqa"), group("b", ["A", None], "B", level=6)])
    step = stats.steps[0]
    assert (step.step, step.whole.responses, step.whole.correct.hits, step.whole.boxed.hits) == (3, 6, 2, 5)
    assert step.whole.reward == 2.0 and step.whole.tokens == 10 + 3 and step.chance == 6 / 4
    assert step.answers == Counter(A=3, B=2) and step.keys == Counter(A=4, B=1)
    assert {name: part.correct.share for name, part in step.parts["levels"].items()} == {"level 1": 0.5, "level 6": 0.0}
    assert {name: part.responses for name, part in step.parts["sources"].items()} == {"medqa": 4, "no source": 2}
    assert (
        step.response_patterns[ResponsePattern.BARE].cases == 5
        and step.response_patterns[ResponsePattern.SEVERAL].cases == 6
    )
    assert {quote.letter for quote in stats.quotes["B"]} == {"B"} and len(stats.quotes["B"]) == 2
    assert merged([step, step]).whole.responses == 12


def test_examples_are_those_of_the_last_step_that_has_any():
    stats = RolloutStats()
    for step, text in ((1, "The answer is \\boxed{{{0}}}"), (2, "So \\boxed{{{0}}}"), (3, LONG + "\\boxed{{{0}}}")):
        stats.add(step, [group("a", "AAAA", text=text)])
    assert [quote.step for quote in stats.quotes["bare"]] == [2, 2]


# -------------------------------------------------------------------------------------------------------------- history
def test_first_solved_and_forgotten():
    def history_of(*visits):
        return QuestionHistory(None, {}, [(step, right, 8) for step, right in visits])

    first, later, lost, never = (
        history_of((1, 5)),
        history_of((1, 4), (9, 8)),
        history_of((2, 8), (5, 3)),
        history_of((1, 4), (7, 0)),
    )
    assert [history.first_solved for history in (first, later, lost, never)] == [1, 9, 2, None]  # 4 of 8 is not solved
    assert [history.forgotten for history in (first, later, lost, never)] == [False, False, True, False]
    counts = count_questions([first, later, lost, never, history_of((2, 8), (5, 3), (8, 8))])
    assert (counts.visited, counts.revisited, counts.solved_first, counts.solved_later, counts.never_solved) == (
        5,
        4,
        3,
        1,
        1,
    )
    assert (counts.forgotten, counts.could_be_forgotten) == (1, 2)
    assert counts.first_solved_at == {1: 1, 2: 2, 9: 1} and counts.new_at == {1: 3, 2: 2}


# ------------------------------------------------------------------------------------------------------------- warnings
@pytest.mark.parametrize(
    "answers, keys, letter",
    [
        (dict(A=98, B=2), dict(A=25, B=75), "A"),
        (dict(A=69, B=31), dict(A=25, B=75), None),
        (dict(A=80, B=20), dict(A=56, B=44), None),  # yes and no with skewed keys: 24 points ahead
        (dict(A=85, B=15), dict(A=55, B=45), "A"),
        (dict(A=19), dict(B=19), None),
        ({}, {}, None),
    ],
)
def test_one_letter_is_a_collapse_only_far_beyond_the_keys(answers, keys, letter):
    collapsed = collapse(Counter(answers), Counter(keys))
    assert (collapsed and collapsed.letter) == letter


def run(steps):
    """The counts of steps, each a list of letters for four questions with the keys A, B, C and D."""
    stats = RolloutStats()
    for number, letters in enumerate(steps, start=1):
        stats.add(number, [group(key, letters, key) for key in "ABCD"])
    return stats.steps


def test_a_collapsed_run_is_reported():
    assert response_warnings(run(["ABCD"] * 12)) == []
    sentences = response_warnings(run(["ABCD"] * 6 + ["CCCC"] * 6))
    assert sentences == [
        "One letter for all questions: in the last 5 recorded steps 100.0% of the answers are C, which is the "
        "key of 25.0% of these questions. Rewards earned that way show no knowledge."
    ]


def test_boxes_without_knowledge_are_reported():
    few = [None, None, None, "A"]
    sentences = response_warnings(run([few] * 8 + ["ABCD"] * 8))
    assert len(sentences) == 1 and sentences[0].startswith("More boxes, not more knowledge: 25.0% [")
    assert sentences[0].endswith("Picking letters at random gives 25.0%.")


def test_a_short_run_is_judged_by_its_end():
    edge = ends(run(["ABCD"] * 3))
    assert edge.first is None and edge.steps == 3 and edge.last.whole.responses == 48
    assert response_warnings(run(["BBBB", "BBBB"])) != [] and response_warnings([]) == []


def test_a_pattern_that_spread_is_reported():
    stats = RolloutStats()
    for step in range(1, 11):
        text = LONG + "\\boxed{{{0}}}" + (" or \\boxed{{{0}}}" if step > 5 else "")
        stats.add(step, [group(key, "ABCD", key, text=text) for key in "ABCD"])
    assert response_warnings(stats.steps) == [
        "Several boxes: in the last 5 recorded steps 100.0% of responses have more than one "
        "box; the last one counts; in the first 5 it was 0.0%."
    ]
