"""Rewards by name: what each pays, the outcome of each kind of response, names that cannot be used."""

import hashlib
import re
import sys
from types import MappingProxyType

import pytest

from alphamed.config.choices import TruncatedReward
from alphamed.errors import ConfigError
from alphamed.records import FinishReason, Outcome, Question, Rollout
from alphamed.reward.grader import GraderDied, GraderPool
from alphamed.reward.rules import NAMES, RULES, check_rule, grade, grade_rollout, resolve_rule

QUESTION = Question(
    "q1",
    "Scurvy is a lack of which vitamin?",
    MappingProxyType({"A": "Vitamin C", "B": "Vitamin D"}),
    "A",
    source="made up",
    level=1,
)
RIGHT, WRONG, BARE, OTHER = r"... \boxed{A}", r"... \boxed{B}", "A, of course", r"... \boxed{C}"
STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT
NOTHING, GRADE = TruncatedReward.NOTHING, TruncatedReward.GRADE


@pytest.mark.parametrize(
    "text, finish, truncated, outcome, letter, correct, with_format, format_only",
    [
        (RIGHT, STOP, NOTHING, Outcome.CORRECT, "A", 1.0, 1.0, 1.0),
        (WRONG, STOP, NOTHING, Outcome.WRONG, "B", 0.0, 0.1, 1.0),
        (BARE, STOP, NOTHING, Outcome.UNPARSEABLE, None, 0.0, 0.0, 0.0),
        (OTHER, STOP, NOTHING, Outcome.UNPARSEABLE, None, 0.0, 0.0, 0.0),
        ("", STOP, NOTHING, Outcome.UNPARSEABLE, None, 0.0, 0.0, 0.0),
        (RIGHT, LENGTH, NOTHING, Outcome.TRUNCATED, "A", 0.0, 0.0, 0.0),
        (BARE, LENGTH, NOTHING, Outcome.TRUNCATED, None, 0.0, 0.0, 0.0),
        (RIGHT, ABORT, NOTHING, Outcome.TRUNCATED, "A", 0.0, 0.0, 0.0),
        (RIGHT, LENGTH, GRADE, Outcome.CORRECT, "A", 1.0, 1.0, 1.0),
        (WRONG, LENGTH, GRADE, Outcome.WRONG, "B", 0.0, 0.1, 1.0),
        (BARE, LENGTH, GRADE, Outcome.UNPARSEABLE, None, 0.0, 0.0, 0.0),
        (RIGHT, STOP, GRADE, Outcome.CORRECT, "A", 1.0, 1.0, 1.0),
    ],
)
def test_table(text, finish, truncated, outcome, letter, correct, with_format, format_only):
    for name, reward in (("correct", correct), ("correct_and_format", with_format), ("format_only", format_only)):
        graded = grade(QUESTION, text, finish, resolve_rule(name), truncated)
        assert (graded.outcome, graded.reward, graded.letter, graded.problem) == (outcome, reward, letter, None)


def test_every_built_in_reward_has_a_row_above():
    assert set(RULES) == {"correct", "correct_and_format", "format_only"}


# ------------------------------------------------------------------------------------------------------------ the random one
def tosses(seed, groups, samples=8, text=RIGHT, finish=STOP):
    rule = resolve_rule("random", seed=seed)
    return [
        grade_rollout(QUESTION, Rollout(group, "q1", i, (), (), text, finish, 1), rule)
        for group in groups
        for i in range(samples)
    ]


def test_a_coin_is_fair_and_each_sample_has_its_own():
    """2,000 tosses: 1,000 heads, standard deviation 22; 5 deviations are allowed. Of pairs a quarter is (1, 1): 250 of 1,000
    with 14."""
    found = [one.reward for one in tosses(7, [f"{step}:0:q1" for step in range(250)])]
    assert set(found) == {0.0, 1.0} and abs(sum(found) - 1000) < 5 * 22.4
    assert abs(sum(a == b == 1 for a, b in zip(found[::2], found[1::2])) - 250) < 5 * 13.7


def test_a_coin_knows_run_group_and_sample_and_nothing_else():
    """Written down once: another coin would give a resumed run other rewards."""
    assert [one.reward for one in tosses(7, ["3:0:q1"])] == [one.reward for one in tosses(7, ["3:0:q1"], text=BARE)]
    assert [int(one.reward) for one in tosses(7, ["3:0:q1", "4:0:q1"])] == [
        hashlib.sha256(f"coin\x1f7\x1f{step}:0:q1#{i}".encode()).digest()[0] % 2 for step in (3, 4) for i in range(8)
    ]
    assert tosses(8, ["3:0:q1"]) != tosses(7, ["3:0:q1"]) != tosses(7, ["3:1:q1"])


def test_a_coin_is_tossed_for_what_the_limit_cut():
    cut = tosses(7, ["3:0:q1"], finish=LENGTH)
    assert [one.reward for one in cut] == [one.reward for one in tosses(7, ["3:0:q1"])]
    assert {one.outcome for one in cut} == {Outcome.TRUNCATED}


# ----------------------------------------------------------------------------------------------- a user's own function
@pytest.mark.parametrize(
    "function, text, outcome, reward",
    [
        ("half", RIGHT, Outcome.CORRECT, 0.5),  # the outcome follows from the letter, not from the reward
        ("half", WRONG, Outcome.WRONG, 0.0),
        ("half", BARE, Outcome.UNPARSEABLE, 0.5),
        ("echo", RIGHT, Outcome.CORRECT, 1.0),
        ("echo", WRONG, Outcome.WRONG, 2.0),  # an int is a number
        ("returns", "true", Outcome.UNPARSEABLE, 1.0),
        ("returns", "int", Outcome.UNPARSEABLE, 2.0),
        (
            "same_question",
            '{"id": "q1", "question": "Scurvy is a lack of which vitamin?", "options": {"A": "Vitamin C", '
            '"B": "Vitamin D"}, "answer": "A", "context": null, "source": "made up", "level": 1}',
            Outcome.UNPARSEABLE,
            1.0,
        ),
        ("length", "\ud800 \u00e9\n" + "x" * 1_000_000, Outcome.UNPARSEABLE, 1_000_004.0),  # any text passes unharmed
    ],
)
def test_a_user_function_is_asked(user_rewards, function, text, outcome, reward):
    with resolve_rule(f"{user_rewards}:{function}", timeout_s=600) as rule:
        graded = grade(QUESTION, text, STOP, rule)
    assert (graded.outcome, graded.reward, graded.problem) == (outcome, reward, None)


@pytest.mark.parametrize(
    "function, text, outcome, problem",
    [
        ("raises_for_b", WRONG, Outcome.CRASH, r"line \d+, in raises_for_b\n.*\n*.*KeyError: .no rule for B."),
        ("echo", BARE, Outcome.CRASH, "KeyError: None"),
        ("returns", "nan", Outcome.CRASH, "returned nan, not a finite number"),
        ("returns", "inf", Outcome.CRASH, "returned inf, not a finite number"),
        ("returns", "text", Outcome.CRASH, "returned '1.0', not a finite number"),
        ("returns", "none", Outcome.CRASH, "returned None, not a finite number"),
        ("system_exit", BARE, Outcome.CRASH, "SystemExit: bye"),
        ("segfaults", BARE, Outcome.CRASH, r"died of signal 11 \(SIGSEGV\)\n(.*\n)*.* in segfaults"),
        ("aborts", BARE, Outcome.CRASH, r"died of signal 6 \(SIGABRT\)\n(.*\n)*.* in aborts"),
        ("exits", BARE, Outcome.CRASH, "exited with code 3"),
    ],
)
def test_a_failure_is_typed_and_its_cause_kept(user_rewards, function, text, outcome, problem):
    with resolve_rule(f"{user_rewards}:{function}", timeout_s=600) as rule:
        for _ in range(2):  # the second call needs a new grader where the first one is gone
            graded = grade(QUESTION, text, STOP, rule)
            assert (graded.outcome, graded.reward) == (outcome, 0.0)
            assert re.search(problem, graded.problem), graded.problem


def test_a_function_that_hangs_is_typed_and_shown(user_rewards):
    """Where it hangs is written down when 9/10 of its time are over, if the machine gets to it before the whole is."""
    for timeout_s in (0.5, 5.0, 50.0):
        with resolve_rule(f"{user_rewards}:hangs", timeout_s=timeout_s) as rule:
            problems = []
            for _ in range(2):  # the second call needs a new grader, the first one is gone
                graded = grade(QUESTION, BARE, STOP, rule)
                assert (graded.outcome, graded.reward) == (Outcome.TIMEOUT, 0.0)
                assert f"gave no answer within {timeout_s:g} s" in graded.problem
                problems.append(graded.problem)
        if all(" in hangs" in problem for problem in problems):
            return
    pytest.fail(f"no word of where it hangs: {problems}")


def test_a_truncated_response_is_not_shown_to_the_function(user_rewards):
    with resolve_rule(f"{user_rewards}:raises_for_b", timeout_s=600) as rule:
        assert grade(QUESTION, WRONG, LENGTH, rule).outcome == Outcome.TRUNCATED
        assert grade(QUESTION, WRONG, LENGTH, rule, GRADE).outcome == Outcome.CRASH


def test_a_killed_grader_is_nobodys_crash(user_rewards):
    with resolve_rule(f"{user_rewards}:is_killed", timeout_s=600) as rule:
        with pytest.raises(
            GraderDied,
            match=r"^grader \(pid \d+\) of reward function user_rewards:is_killed: "
            r"was killed by signal 9 \(SIGKILL",
        ):
            grade(QUESTION, RIGHT, STOP, rule)


def test_the_users_module_is_not_imported_here(user_rewards):
    with resolve_rule(f"{user_rewards}:half") as rule:
        assert isinstance(rule, GraderPool) and "user_rewards" not in sys.modules


# ------------------------------------------------------------------------------------------------------------ bad names
@pytest.mark.parametrize(
    "name, problem",
    [
        ("corect", "'corect' is not a reward; did you mean 'correct'?"),
        ("correct_format", "did you mean 'correct_and_format'?"),
        ("accuracy", "known: correct, correct_and_format, format_only, random; or give module:function"),
        ("", "'' is not a reward"),
        ("a:b:c", "not of the form module:function"),
        ("module:", "not of the form module:function"),
        (":function", "not of the form module:function"),
        ("some/file.py:f", "not of the form module:function"),
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        ("broken_rewards:f", "cannot be imported (SyntaxError"),
        ("exiting_rewards:f", "cannot be imported (the process of reward function exiting_rewards:f exited with code 7)"),
        ("user_rewards:hlaf", "does not exist (functions in user_rewards: half, echo"),
        ("user_rewards:NOT_A_FUNCTION", "is not a function but int"),
        ("user_rewards:of_nothing", "takes (), but it takes none of the arguments"),
        ("user_rewards:coroutine", "is a coroutine function"),
    ],
)
def test_refused_in_one_line(user_rewards, name, problem):
    with pytest.raises(ConfigError) as error:
        check_rule(name)
    message = str(error.value)
    assert message.startswith("reward.name: ") and problem in message and "\n" not in message


def test_good_names_pass(user_rewards):
    for name in (*NAMES, f"{user_rewards}:half", f"{user_rewards}:two_arguments"):
        check_rule(name)
