"""The responses that a report quotes: answers that got better or worse, and rollouts of the first and the last step.

Quoted answers are chosen by a hash of the question id, never by their content.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.evaluation.items import GradedAnswer, Key
from alphamed.records import ScoredGroup
from alphamed.rundir.rollout_files import read_rollouts, recorded_steps, rollout_path

_BOX = re.compile(r"(\\boxed\s*\{[^{}]*\})")
Items = Mapping[Key, GradedAnswer]


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """The answers to one evaluation question before and after."""

    before: GradedAnswer
    after: GradedAnswer


@dataclass(frozen=True, slots=True)
class Changes:
    """How the answers of a question set changed: counts over all questions, and some of those that changed."""

    stayed_correct: int
    got_better: int
    got_worse: int
    stayed_wrong: int
    better: tuple[AnswerPair, ...]
    worse: tuple[AnswerPair, ...]


@dataclass(frozen=True, slots=True)
class RolloutExample:
    """Responses to one question of a training step: each of `samples` has text, outcome, reward, advantage, tokens,
    letter."""

    step: int
    question: str
    options: Mapping[str, str]
    answer: str
    samples: tuple[dict[str, Any], ...]


def changes(before: Items, after: Items, name: str, limit: int = 4) -> Changes | None:
    """Compare the items of one set that both evaluations hold; None where they share none. Any outcome but correct counts as
    wrong."""
    pairs = [AnswerPair(item, after[key]) for key, item in before.items() if key in after and key[0] == name]
    if not pairs:
        return None
    pairs.sort(key=lambda pair: hashlib.sha256(pair.before.asked.question.id.encode()).hexdigest())
    better = [pair for pair in pairs if pair.after.right and not pair.before.right]
    worse = [pair for pair in pairs if pair.before.right and not pair.after.right]
    stayed = sum(pair.before.right and pair.after.right for pair in pairs)
    return Changes(
        stayed,
        len(better),
        len(worse),
        len(pairs) - stayed - len(better) - len(worse),
        tuple(better[:limit]),
        tuple(worse[:limit]),
    )


def rollout_examples(run_dir: Path, questions: int = 2, samples: int = 4) -> list[RolloutExample]:
    """Responses to the first questions of the first and the last recorded step; [] where none are recorded."""
    steps = recorded_steps(run_dir)
    chosen = sorted({steps[0], steps[-1]}) if steps else []
    return [
        _example(step, group, samples)
        for step in chosen
        for group in _with_signal_first(read_rollouts(rollout_path(run_dir, step)), questions)
    ]


def marked(text: str) -> list[tuple[str, bool]]:
    """The text in pieces, True for those that are a closed `\\boxed{...}`. Joined they give the text again."""
    return [(piece, k % 2 == 1) for k, piece in enumerate(_BOX.split(text)) if piece]


def _with_signal_first(groups: Sequence[ScoredGroup], count: int) -> list[ScoredGroup]:
    """Questions whose responses differ in reward come first: the step learned from these."""
    return sorted(groups, key=lambda group: not group.has_signal)[:count]


def _example(step: int, scored: ScoredGroup, count: int) -> RolloutExample:
    question = scored.group.question
    rows = zip(scored.group.rollouts, scored.outcomes, scored.rewards, scored.advantages, scored.letters)
    return RolloutExample(
        step,
        question.question,
        question.options,
        question.answer,
        tuple(
            {
                "text": rollout.text,
                "outcome": str(outcome),
                "reward": reward,
                "advantage": advantage,
                "letter": letter,
                "tokens": len(rollout.response_token_ids),
            }
            for rollout, outcome, reward, advantage, letter in list(rows)[:count]
        ),
    )
