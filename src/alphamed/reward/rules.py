"""Rewards by name, and how a response is graded: the outcome follows from its letter, the reward from the rule."""
from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphamed.config import ConfigError
from alphamed.config_choices import TruncatedReward
from alphamed.records import FinishReason, Outcome, Question, Rollout
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


def format_only(question: Mapping[str, Any], text: str, letter: str | None) -> float:
    """1 for stating a letter, right or wrong: a control, which teaches the box and nothing else."""
    return float(letter is not None)


@dataclass(frozen=True, slots=True)
class CoinToss:
    """The reward `random`: 1 or 0 with equal chance whatever the response says, a control that teaches nothing. (Random
    rewards are known to lift some base models: "Spurious Rewards", 2506.10947, which uses the same chance.)

    The toss follows from the run's seed, the group and the number of the sample. The group's id holds step, place and
    question, so a resumed run and `replay` get the same rewards, and a question asked again gets new ones.
    """
    seed: int

    def reward(self, sample: str) -> float:
        return float(hashlib.sha256(f"coin\x1f{self.seed}\x1f{sample}".encode()).digest()[0] & 1)


RANDOM = "random"
RULES: dict[str, Reward] = {"correct": correct, "correct_and_format": correct_and_format, "format_only": format_only}
NAMES = (*RULES, RANDOM)
"""All built-in rewards."""


# -------------------------------------------------------------------------------------------------------------- grading
@dataclass(frozen=True, slots=True)
class Graded:
    """One graded response. `letter` is what its last box states whatever the outcome, `problem` what went wrong in a
    user's reward function (a traceback) where the outcome is TIMEOUT or CRASH; the reward is a meaningless 0 then."""
    outcome: Outcome
    reward: float
    letter: str | None
    problem: str | None = None


def grade_rollout(question: Question, rollout: Rollout, rule: Reward | CoinToss,
                  truncated: TruncatedReward = TruncatedReward.NOTHING) -> Graded:
    """Grade a sampled response, as `grade` does; this also knows which sample it is."""
    return grade(question, rollout.text, rollout.finish_reason, rule, truncated,
                 sample=f"{rollout.group_id}#{rollout.sample_index}")


def grade(question: Question, text: str, finish_reason: FinishReason, rule: Reward | CoinToss,
          truncated: TruncatedReward = TruncatedReward.NOTHING, sample: str = "") -> Graded:
    """Grade one response.

    A response that did not end by itself (token limit, abort) is TRUNCATED and earns 0 without asking the rule; with
    `truncated=grade` it is graded like any other. A user's function that fails gives TIMEOUT or CRASH; GraderDied is
    passed on. A coin is tossed for every response: truncated ones too, or it would teach to end in time.
    """
    letter = extract_answer(text, question.options)
    cut = finish_reason != FinishReason.STOP and truncated == TruncatedReward.NOTHING
    if cut and not isinstance(rule, CoinToss):
        return Graded(Outcome.TRUNCATED, 0.0, letter)
    try:
        reward = rule.reward(sample) if isinstance(rule, CoinToss) else rule(_as_dict(question), text, letter)
    except RewardTimeout as error:
        return Graded(Outcome.TIMEOUT, 0.0, letter, str(error))
    except RewardCrash as error:
        return Graded(Outcome.CRASH, 0.0, letter, str(error))
    if cut:
        return Graded(Outcome.TRUNCATED, reward, letter)
    if letter is None:
        return Graded(Outcome.UNPARSEABLE, reward, letter)
    return Graded(Outcome.CORRECT if letter == question.answer else Outcome.WRONG, reward, letter)


def _as_dict(question: Question) -> dict[str, Any]:
    return {"id": question.id, "question": question.question, "options": dict(question.options),
            "answer": question.answer, "context": question.context, "source": question.source, "level": question.level}


# ------------------------------------------------------------------------------------------------------------- by name
def resolve_rule(name: str, *, seed: int = 0, timeout_s: float = 10.0, workers: int = 1,
                 search_path: Sequence[str] | None = None) -> Reward | CoinToss:
    """The reward called `name`: a built-in, or a user's `module:function` as a pool of grader processes (close it when
    done; its processes end with it in any case). `seed` is the run's, for `random`.

    A user's module is looked for in the current directory, on `search_path` (None: this process's) and on PYTHONPATH,
    and is only ever imported in a grader. Raises ConfigError for a name that is not known or can not be used.
    """
    if name in RULES:
        return RULES[name]
    if name == RANDOM:
        return CoinToss(seed)
    if ":" not in name:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}; or give module:function"
        raise ConfigError(f"reward.name: {name!r} is not a reward; {mend}")
    if not _FUNCTION.fullmatch(name):
        raise ConfigError(f"reward.name: {name!r} is not of the form module:function; write it like my.rewards:strict")
    return GraderPool(name, workers, timeout_s, search_path)


def check_rule(name: str) -> None:
    """Raise ConfigError where `name` is no usable reward. A user's module is imported in a process that ends here."""
    rule = resolve_rule(name)
    if isinstance(rule, GraderPool):
        rule.close()
