"""Arguments of a user's reward function: by name, those of this project, of verl and of TRL, and what is refused."""

import json
import re

import pytest

from alphamed.answers.thinking import Thinking
from alphamed.config.choices import RewardSignature
from alphamed.config.sections import PromptConfig
from alphamed.errors import ConfigError
from alphamed.records import FinishReason, Outcome, Question
from alphamed.reward.rules import check_rule, grade, resolve_rule, try_rule
from alphamed.reward.signatures import SIGNATURES, Refused, bind

QUESTION = Question(
    "q1", "Scurvy is a lack of which vitamin?", {"A": "Vitamin C", "B": "Vitamin D"}, "A", source="made up", level=2
)
RIGHT, WRONG = r"It is \boxed{A}", r"It is \boxed{B}"
MODULE = r"""
import json, re

def letter_of(text):
    found = re.findall(r"\\boxed\{([A-J])\}", text)
    return found[-1] if found else None

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 1.0 if letter_of(solution_str) == ground_truth else 0.0

def compute_score_dict(data_source, solution_str, ground_truth, extra_info=None, **reward_kwargs):
    assert not reward_kwargs
    return {"score": float(letter_of(solution_str) == ground_truth), "acc": True}

def without_score(data_source, solution_str, ground_truth):
    return {"acc": True}

def verl_is(solution_str, data_source, ground_truth, extra_info):
    return [data_source, ground_truth, extra_info] == json.loads(solution_str)

def batch_rewards(prompts, completions, answer, **kwargs):
    return [1.0 if letter_of(one) == right else 0.0 for one, right in zip(completions, answer)]

def chat_rewards(completions, answer, **kwargs):
    return [float(letter_of(one[0]["content"]) == right) for one, right in zip(completions, answer)]

def trl_is(prompts, completions, **columns):
    text = completions[0] if isinstance(completions[0], str) else completions[0][0]["content"]
    return [float([prompts, columns] == json.loads(text))]

def one_number(completions):
    return 1.0

def two_numbers(completions):
    return [1.0, 2.0]

def nothing_to_say(completions):
    return [None]

def by_name(letter, question):
    return float(letter == question["answer"])

def only_positional(text, letter, /):
    return len(text) + (letter == "A")

def the_rest(**all):
    return float(sorted(all) == ["answer_text", "letter", "question", "text"])

def with_a_default(text, weight=0.5):
    return weight * len(text)

def answer_length(answer_text):
    return len(answer_text)

class Scorer:
    def __call__(self, text):
        return 2.0

scorer = Scorer()
"""


@pytest.fixture
def ported(tmp_path, monkeypatch):
    (tmp_path / "ported.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return "ported"


def reward(name, text, signature="alphamed", prompt=PromptConfig(), thinking=Thinking()):
    with resolve_rule(f"ported:{name}", timeout_s=60, signature=signature, prompt=prompt) as rule:
        return grade(QUESTION, text, FinishReason.STOP, rule, thinking=thinking)


def test_every_choice_has_a_signature():
    assert set(SIGNATURES) == {str(one) for one in RewardSignature}


# ------------------------------------------------------------------------------------------------------- this project's own
@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("by_name", RIGHT, 1.0),
        ("by_name", WRONG, 0.0),  # in another order than they are listed
        ("only_positional", RIGHT, len(RIGHT) + 1.0),
        ("the_rest", RIGHT, 1.0),
        ("with_a_default", "1234", 2.0),
        ("scorer", RIGHT, 2.0),
    ],
)
def test_arguments_go_by_name_and_any_of_them_may_be_left_out(ported, name, text, expected):
    assert reward(name, text).reward == expected


def test_a_function_sees_the_whole_response_and_the_part_that_decides(ported):
    text, thinking = r"<think>\boxed{B} at first</think>\boxed{A}", Thinking("</think>")
    assert reward("answer_length", text, thinking=thinking).reward == len(r"\boxed{A}")
    assert reward("by_name", text, thinking=thinking).reward == 1.0
    assert reward("only_positional", text, thinking=thinking).reward == len(text) + 1
    unended = reward("answer_length", r"<think>\boxed{A}", thinking=thinking)
    assert (unended.outcome, unended.reward, unended.letter) == (Outcome.UNPARSEABLE, 0.0, None)


# --------------------------------------------------------------------------------------------------------------- verl's
@pytest.mark.parametrize("name", ["compute_score", "compute_score_dict"])
def test_verls_ground_truth_is_the_right_letter(ported, name):
    """Not the one that the response boxes: taken by position, every boxed letter earned 1."""
    assert [reward(name, text, "verl").reward for text in (RIGHT, WRONG, "?")] == [1.0, 0.0, 0.0]


def test_what_verls_arguments_hold(ported):
    extra = {"index": "q1", "question": QUESTION.question, "options": dict(QUESTION.options), "context": None, "level": 2}
    assert reward("verl_is", json.dumps(["made up", "A", extra]), "verl").reward == 1.0
    assert reward("without_score", RIGHT, "verl").problem.rstrip().endswith("returned {'acc': True}, a dict without 'score'")


# ---------------------------------------------------------------------------------------------------------------- TRL's
def test_trls_columns_are_lists_of_one_and_completions_of_raw_prompts_are_texts(ported):
    raw = PromptConfig(template="raw", instruction="Box it.")
    assert [reward("batch_rewards", text, "trl", raw).reward for text in (RIGHT, WRONG, "?")] == [1.0, 0.0, 0.0]
    prompt = "Question: Scurvy is a lack of which vitamin?\n\nOptions:\nA: Vitamin C\nB: Vitamin D\n\nBox it.\n\nAnswer:"
    columns = {
        "id": ["q1"],
        "question": [QUESTION.question],
        "options": [dict(QUESTION.options)],
        "answer": ["A"],
        "context": [None],
        "source": ["made up"],
        "level": [2],
    }
    assert reward("trl_is", json.dumps([[prompt], columns]), "trl", raw).reward == 1.0


def test_trls_completions_of_chat_prompts_are_messages(ported):
    assert [reward("chat_rewards", text, "trl").reward for text in (RIGHT, WRONG, "?")] == [1.0, 0.0, 0.0]
    user = "Question: Scurvy is a lack of which vitamin?\n\nOptions:\nA: Vitamin C\nB: Vitamin D\n\nBox it."
    columns = {
        "id": ["q1"],
        "question": [QUESTION.question],
        "options": [dict(QUESTION.options)],
        "answer": ["A"],
        "context": [None],
        "source": ["made up"],
        "level": [2],
    }
    prompts = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]]
    chat = PromptConfig(system="Be brief.", instruction="Box it.")
    assert reward("trl_is", json.dumps([prompts, columns]), "trl", chat).reward == 1.0


@pytest.mark.parametrize(
    "name, problem",
    [
        ("one_number", "returned 1.0, not a list of one number for one completion"),
        ("two_numbers", "returned [1.0, 2.0], not a list of one number for one completion"),
        ("nothing_to_say", "returned None, not a finite number"),
    ],
)
def test_a_trl_function_returns_a_list_of_one_number(ported, name, problem):
    graded = reward(name, RIGHT, "trl")
    assert graded.outcome == Outcome.CRASH and graded.problem.rstrip().endswith(problem)


# -------------------------------------------------------------------------------------------------------------- refused
def of(parameters):
    """A function with these parameters."""
    return eval(f"lambda {parameters}: 1.0")


@pytest.mark.parametrize(
    "parameters, signature, problem",
    [
        ("data_source, solution_str, ground_truth, extra_info=None", "alphamed", "verl"),
        ("prompts, completions, answer, **kwargs", "alphamed", "trl"),
        ("completions, **kwargs", "alphamed", "trl"),
        ("question, text, letter", "verl", "alphamed"),
        ("solution_str, ground_truth", "trl", "verl"),
    ],
)
def test_the_arguments_of_another_signature_are_recognised(parameters, signature, problem):
    with pytest.raises(Refused, match=rf"set reward.signature={problem}$"):
        bind(of(parameters), signature)


@pytest.mark.parametrize(
    "parameters, problem",
    [
        ("question, response", "there is no response"),
        ("q, t, l", "there is no q, t, l"),
        ("", "it takes none of the arguments"),
        ("*all", "it takes none of the arguments"),
        ("weight=1.0", "it takes none of the arguments"),
    ],
)
def test_a_name_that_is_no_argument_is_refused_and_the_arguments_are_explained(parameters, problem):
    with pytest.raises(Refused) as refused:
        bind(of(parameters), "alphamed")
    assert problem in str(refused.value) and "\n" not in str(refused.value)
    for name, meaning in SIGNATURES["alphamed"].meanings.items():
        assert f"{name} ({meaning})" in str(refused.value)


def test_what_does_not_say_its_arguments_is_refused():
    with pytest.raises(Refused, match="does not say which arguments it takes"):
        bind(max, "alphamed")


def test_a_name_is_checked_with_its_signature(ported):
    check_rule("ported:compute_score", "verl")
    with pytest.raises(
        ConfigError,
        match=r"^reward.name: 'ported:compute_score' takes \(data_source, .* set "
        r"reward.signature=verl$",
    ):
        check_rule("ported:compute_score")


# ---------------------------------------------------------------------------------------------------------------- a trial
def test_a_trial_gives_the_rewards_of_a_right_a_wrong_and_an_empty_answer(ported):
    assert try_rule(resolve_rule("correct_and_format"), QUESTION) == {"right": 1.0, "wrong": 0.1, "empty": 0.0}
    with resolve_rule("ported:compute_score", signature="verl", timeout_s=60) as rule:
        assert try_rule(rule) == {"right": 1.0, "wrong": 0.0, "empty": 0.0}
    with resolve_rule("ported:answer_length", timeout_s=60) as rule:
        found = try_rule(rule, QUESTION, Thinking("</think>"))
    assert found == {
        "right": len("\n\nThe answer is \\boxed{A}"),
        "wrong": len("\n\nThe answer is \\boxed{B}"),
        "empty": 0.0,
    }


@pytest.mark.parametrize(
    "function, timeout_s, problem",
    [
        (
            "raises_for_b",
            60,
            r"a wrong answer to question 'q1' and failed: KeyError: 'no rule for B' \(.*rewards.py, line \d+\)",
        ),
        ("system_exit", 60, r"a right answer to question 'q1' and failed: SystemExit: bye"),
        ("segfaults", 60, r"a right answer .*: the process of reward function user_rewards:segfaults died of signal 11"),
        ("hangs", 0.5, r"a right answer .*: reward function user_rewards:hangs gave no answer within 0.5 s"),
    ],
)
def test_a_trial_that_fails_is_one_line(user_rewards, function, timeout_s, problem):
    with resolve_rule(f"{user_rewards}:{function}", timeout_s=timeout_s) as rule:
        with pytest.raises(ConfigError) as error:
            try_rule(rule, QUESTION)
    assert re.search(problem, str(error.value)) and "\n" not in str(error.value)
