"""Rewards by name, and how a response is graded: the outcome follows from its letter, the reward from the rule."""
from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphamed.config import ConfigError
from alphamed.config_choices import TruncatedReward
from alphamed.records import FinishReason, Outcome, Question
from alphamed.reward.extraction import extract_answer
from alphamed.reward.grader import GraderPool, RewardCrash, RewardTimeout

Reward = Callable[[Mapping[str, Any], str, str | None], float]
"""(question, text, letter) -> reward. `question` holds the fields of `records.Question`, `text` is the response,
`letter` the answer that its last box states, None where it states none."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


# ----------------------------------------------------------------------------------------------------- built-in rewards
def correct(question: Mapping[str, Any], text: str, letter: str | None) -> float:
    """1 for the right letter, else 0 (the paper's reward)."""
    return float(letter == question["answer"])


def correct_and_format(question: Mapping[str, Any], text: str, letter: str | None) -> float:
    """0.9 for the right letter and 0.1 for stating a letter at all."""
    return 1.0 if letter == question["answer"] else 0.1 if letter is not None else 0.0


RULES: dict[str, Reward] = {"correct": correct, "correct_and_format": correct_and_format}


# -------------------------------------------------------------------------------------------------------------- grading
@dataclass(frozen=True, slots=True)
class Graded:
    """One graded response. `letter` is what its last box states whatever the outcome, `problem` what went wrong in a
    user's reward function (a traceback) where the outcome is TIMEOUT or CRASH; the reward is a meaningless 0 then."""
    outcome: Outcome
    reward: float
    letter: str | None
    problem: str | None = None


def grade(question: Question, text: str, finish_reason: FinishReason, rule: Reward,
          truncated: TruncatedReward = TruncatedReward.NOTHING) -> Graded:
    """Grade one response.

    A response that did not end by itself (token limit, abort) is TRUNCATED and earns 0 without asking the rule; with
    `truncated=grade` it is graded like any other. A user's function that fails gives TIMEOUT or CRASH; GraderDied is
    passed on.
    """
    letter = extract_answer(text, question.options)
    if finish_reason != FinishReason.STOP and truncated == TruncatedReward.NOTHING:
        return Graded(Outcome.TRUNCATED, 0.0, letter)
    try:
        reward = rule(_as_dict(question), text, letter)
    except RewardTimeout as error:
        return Graded(Outcome.TIMEOUT, 0.0, letter, str(error))
    except RewardCrash as error:
        return Graded(Outcome.CRASH, 0.0, letter, str(error))
    if letter is None:
        return Graded(Outcome.UNPARSEABLE, reward, letter)
    return Graded(Outcome.CORRECT if letter == question.answer else Outcome.WRONG, reward, letter)


def _as_dict(question: Question) -> dict[str, Any]:
    return {"id": question.id, "question": question.question, "options": dict(question.options),
            "answer": question.answer, "context": question.context, "source": question.source, "level": question.level}


# ------------------------------------------------------------------------------------------------------------- by name
def resolve_rule(name: str, *, timeout_s: float = 10.0, workers: int = 1,
                 search_path: Sequence[str] | None = None) -> Reward:
    """The reward called `name`: a built-in, or a user's `module:function` as a pool of grader processes (close it when
    done; its processes end with it in any case).

    A user's module is looked for in the current directory, on `search_path` (None: this process's) and on PYTHONPATH,
    and is only ever imported in a grader. Raises ConfigError for a name that is not known or can not be used.
    """
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(RULES)}; or give module:function"
        raise ConfigError(f"reward.name: {name!r} is not a reward; {mend}")
    if not _FUNCTION.fullmatch(name):
        raise ConfigError(f"reward.name: {name!r} is not of the form module:function; write it like my.rewards:strict")
    return GraderPool(name, workers, timeout_s, search_path)


def check_rule(name: str) -> None:
    """Raise ConfigError where `name` is no usable reward. A user's module is imported in a process that ends here."""
    rule = resolve_rule(name)
    if isinstance(rule, GraderPool):
        rule.close()
