"""Rewards by name, and grading of responses: the outcome follows from the letter, the reward from the rule."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from alphamed.answers.extraction import extract_answer
from alphamed.answers.thinking import SAMPLE, Thinking
from alphamed.config.choices import TruncatedReward
from alphamed.config.sections import PromptConfig, RewardConfig
from alphamed.errors import ConfigError
from alphamed.records import FinishReason, Outcome, Question, Rollout
from alphamed.reward.grader import GraderPool, RewardCrash, RewardTimeout

Reward = Callable[[Question, str, str | None], float]
"""A built-in reward: (question, text, letter) -> reward. `text` is the response. `letter` is the answer in its last box, or None."""

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


# ----------------------------------------------------------------------------------------------------- built-in rewards
def correct(question: Question, text: str, letter: str | None) -> float:
    """1 for the right letter, otherwise 0 (the paper's reward)."""
    return float(letter == question.answer)


def correct_and_format(question: Question, text: str, letter: str | None) -> float:
    """0.9 for the right letter, plus 0.1 for stating any letter."""
    return 1.0 if letter == question.answer else 0.1 if letter is not None else 0.0


def format_only(question: Question, text: str, letter: str | None) -> float:
    """1 for stating a letter, right or wrong. A control from which the model can learn only to box."""
    return float(letter is not None)


@dataclass(frozen=True, slots=True)
class CoinToss:
    """The reward `random`: 1 or 0 with equal probability, whatever the response is. A control without a signal. Random rewards
    are known to improve some base models ("Spurious Rewards", 2506.10947, which uses the same probability).

    The reward is derived from the run's seed, the group id and the sample index. The group id contains step, position and
    question. A resumed run and `replay` therefore get the same rewards, and a question asked again gets new ones.
    """

    seed: int

    def reward(self, sample: str) -> float:
        return float(hashlib.sha256(f"coin\x1f{self.seed}\x1f{sample}".encode()).digest()[0] & 1)


Rule = Reward | GraderPool | CoinToss
"""A reward that can grade: built-in, a user's function, or random."""
RANDOM = "random"
RULES: dict[str, Reward] = {"correct": correct, "correct_and_format": correct_and_format, "format_only": format_only}
NAMES = (*RULES, RANDOM)
"""All built-in rewards."""


# -------------------------------------------------------------------------------------------------------------- grading
@dataclass(frozen=True, slots=True)
class Graded:
    """One graded response. `letter` is the answer in its last box, whatever the outcome. If the outcome is TIMEOUT or CRASH,
    `problem` is the error of the user's reward function (a traceback), and the reward is 0 without meaning."""

    outcome: Outcome
    reward: float
    letter: str | None
    problem: str | None = None


def grade_rollout(
    question: Question,
    rollout: Rollout,
    rule: Rule,
    truncated: TruncatedReward = TruncatedReward.NOTHING,
    thinking: Thinking = Thinking(),
) -> Graded:
    """Grade a sampled response with `grade`, passing its group and sample index."""
    return grade(
        question,
        rollout.text,
        rollout.finish_reason,
        rule,
        truncated,
        thinking,
        sample=f"{rollout.group_id}#{rollout.sample_index}",
    )


def grade(
    question: Question,
    text: str,
    finish_reason: FinishReason,
    rule: Rule,
    truncated: TruncatedReward = TruncatedReward.NOTHING,
    thinking: Thinking = Thinking(),
    sample: str = "",
) -> Graded:
    """Grade one response by the text after its thinking.

    - A response that did not end by itself (token limit, abort) is TRUNCATED and earns 0 without calling the rule. With
      `truncated=grade` it is graded like any other.
    - A response whose thinking did not end is UNPARSEABLE.
    - A user's function that fails gives TIMEOUT or CRASH. GraderDied is passed on.
    - A random reward is drawn for truncated responses too. Otherwise it would reward ending in time.
    """
    answer_text = thinking.answer(text) or ""
    letter = extract_answer(answer_text, question.options)
    cut = finish_reason != FinishReason.STOP and truncated == TruncatedReward.NOTHING
    if cut and not isinstance(rule, CoinToss):
        return Graded(Outcome.TRUNCATED, 0.0, letter)
    try:
        if isinstance(rule, CoinToss):
            reward = rule.reward(sample)
        elif isinstance(rule, GraderPool):
            reward = rule(question, text, letter, answer_text)
        else:
            reward = rule(question, text, letter)
    except RewardTimeout as error:
        return Graded(Outcome.TIMEOUT, 0.0, letter, str(error))
    except RewardCrash as error:
        return Graded(Outcome.CRASH, 0.0, letter, str(error))
    if cut:
        return Graded(Outcome.TRUNCATED, reward, letter)
    if letter is None:
        return Graded(Outcome.UNPARSEABLE, reward, letter)
    return Graded(Outcome.CORRECT if letter == question.answer else Outcome.WRONG, reward, letter)


# ------------------------------------------------------------------------------------------------------------- by name
def resolve_rule(
    name: str,
    *,
    seed: int = 0,
    timeout_s: float = 10.0,
    workers: int = 1,
    search_path: Sequence[str] | None = None,
    signature: str = "alphamed",
    prompt: PromptConfig = PromptConfig(),
) -> Rule:
    """Return the reward `name`: a built-in, or a user's `module:function` as a pool of grader processes. Close the pool when
    done; its processes end with it in any case.

    `seed` is the run's seed, for `random`. `signature` selects the arguments of a user's function. `prompt` is how the model
    is asked, for the signature of TRL. A user's module is searched in the current directory, on `search_path` (None: this
    process's) and on PYTHONPATH, and imported only in a grader.

    Raises ConfigError for a name that is unknown or cannot be used.
    """
    check_name(name)
    if name in RULES:
        return RULES[name]
    if name == RANDOM:
        return CoinToss(seed)
    return GraderPool(name, workers, timeout_s, search_path, signature, prompt)


def check_name(name: str) -> None:
    """Raise ConfigError for a name that is neither a built-in reward nor of the form module:function. Starts nothing."""
    if name in NAMES:
        return
    if ":" not in name:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}; or give module:function"
        raise ConfigError(f"reward.name: {name!r} is not a reward; {fix}")
    if not _FUNCTION.fullmatch(name):
        raise ConfigError(f"reward.name: {name!r} is not of the form module:function; write it like my.rewards:strict")


def earns_of(name: str) -> tuple[float, float] | None:
    """The rewards of a right and of a wrong letter. None if the letter does not decide the reward or both earn the same."""
    if name not in RULES:
        return None
    other = next(letter for letter in SAMPLE.options if letter != SAMPLE.answer)
    right, wrong = (RULES[name](SAMPLE, "", letter) for letter in (SAMPLE.answer, other))
    return (right, wrong) if right != wrong else None


def check_rule(name: str, signature: str = "alphamed") -> None:
    """Raise ConfigError if `name` is not a reward that can be called. A user's module is imported in a temporary process."""
    rule = resolve_rule(name, signature=signature)
    if isinstance(rule, GraderPool):
        rule.close()


@contextlib.contextmanager
def opened_rule(reward: RewardConfig, prompt: PromptConfig, seed: int) -> Iterator[Rule]:
    """The reward of a configuration with one grader, closed on exit. Raises ConfigError as `resolve_rule` does."""
    rule = resolve_rule(reward.name, seed=seed, timeout_s=reward.timeout_s, signature=str(reward.signature), prompt=prompt)
    try:
        yield rule
    finally:
        if isinstance(rule, GraderPool):
            rule.close()


def try_rule(rule: Rule, question: Question = SAMPLE, thinking: Thinking = Thinking()) -> dict[str, float]:
    """The rewards of a right, a wrong and an empty response to a question. Raises ConfigError if the function fails on one."""
    wrong = next(letter for letter in question.options if letter != question.answer)
    rewards: dict[str, float] = {}
    for kind, text in (
        ("right", thinking.example(f"The answer is \\boxed{{{question.answer}}}")),
        ("wrong", thinking.example(f"The answer is \\boxed{{{wrong}}}")),
        ("empty", ""),
    ):
        graded = grade(question, text, FinishReason.STOP, rule, thinking=thinking, sample=kind)
        if graded.problem is not None:
            assert isinstance(rule, GraderPool)
            answer = "an empty answer" if kind == "empty" else f"a {kind} answer"
            raise ConfigError(
                f"reward.name: {rule.function!r} was tried on {answer} to question {question.id!r} and "
                f"failed: {_one_line(graded.problem)}; fix it before it grades a run"
            )
        rewards |= {kind: graded.reward}
    return rewards


def _one_line(problem: str) -> str:
    """What a traceback or a stack comes down to: its last line, and where."""
    lines = problem.strip().splitlines()
    places = re.findall(r'File "([^"]+)", line (\d+)', problem)
    where = f" ({places[-1][0]}, line {places[-1][1]})" if places and lines[0].startswith("Traceback") else ""
    return f"{lines[-1] if where else lines[0]}{where}"[:400]
