"""Graded answers, one format for all: a line of JSON for every response of an evaluation, with its text, so that it can be graded
again at any time.

    {"set": "medqa+shuffled", "benchmark": "medqa", "variant": "shuffled", "id": ..., "sample": 0,
     "question", "context", "options", "answer", "source", "level", "informativeness",      as it was graded
     "letter", "outcome",                                                  the result of grading
     "finish_reason", "tokens", "text"}                                    the response

`alphamed eval` writes items.jsonl, the evaluations of a run step_000012.items.jsonl. The file of `alphamed eval` grows while it
runs; a question is finished when all of its samples are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.answers.thinking import Thinking
from alphamed.config.choices import TruncatedReward
from alphamed.data.attributes import values_of
from alphamed.errors import ConfigError
from alphamed.evaluation.variants import VARIANTS, free_letter, vote_of
from alphamed.files import append_json_lines, read_json_lines, replace_json_lines
from alphamed.records import FinishReason, Outcome, Question, ScoredGroup
from alphamed.response_stats import ResponseStats
from alphamed.reward.rules import correct, grade

ITEMS = "items.jsonl"
Key = tuple[str, str]
"""(set, question id)."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as one set of an evaluation asks it. A set is a benchmark, or a variant of one."""

    benchmark: str
    variant: str | None
    question: Question

    @property
    def set(self) -> str:
        return f"{self.benchmark}+{self.variant}" if self.variant else self.benchmark

    @property
    def key(self) -> Key:
        return self.set, self.question.id

    @property
    def shown(self) -> Question:
        """What the prompt is made of."""
        return VARIANTS[self.variant].shown(self.question) if self.variant else self.question


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """One graded response. `tokens` counts the end-of-text token."""

    asked: Asked
    sample: int
    text: str
    finish_reason: FinishReason
    tokens: int
    letter: str | None
    outcome: Outcome

    @property
    def right(self) -> bool:
        return self.outcome == Outcome.CORRECT

    @property
    def vote(self) -> str | None:
        """What counts in a majority vote. A truncated response has none, as in grading, and without options every box that
        holds anything is one."""
        return vote_of(self.letter, self.text) if self.outcome.boxed else None


def stats_of(answers: Iterable[GradedAnswer]) -> ResponseStats:
    return ResponseStats.of((answer.outcome, answer.tokens, answer.finish_reason.truncated) for answer in answers)


@dataclass(frozen=True, slots=True)
class Grading:
    """What grading depends on besides response and question; `evaluation.json` holds it."""

    truncated: TruncatedReward = TruncatedReward.NOTHING
    thinking: Thinking = Thinking()

    def json(self) -> dict[str, Any]:
        return {
            "truncated": str(self.truncated),
            "answer_after": self.thinking.end,
            "prompt_opens_thinking": self.thinking.opened,
        }

    @classmethod
    def of_json(cls, settings: Mapping[str, Any]) -> Grading:
        """Evaluations of before there was thinking hold nothing about it: all of a response counted."""
        return cls(
            TruncatedReward(settings["truncated"]),
            Thinking(settings.get("answer_after", ""), settings.get("prompt_opens_thinking", False)),
        )


def graded(asked: Asked, sample: int, text: str, finish_reason: FinishReason, tokens: int, grading: Grading) -> GradedAnswer:
    """The response as the grader of training sees it (`reward.rules.grade`); without options as `free_letter` does."""
    question = asked.question
    if asked.variant and VARIANTS[asked.variant].hides_options:
        letter, outcome = _graded_free(question, grading.thinking.answer(text) or "", finish_reason, grading.truncated)
    else:
        result = grade(question, text, finish_reason, correct, grading.truncated, grading.thinking)
        letter, outcome = result.letter, result.outcome
    return GradedAnswer(asked, sample, text, finish_reason, tokens, letter, outcome)


def of_group(set_name: str, scored: ScoredGroup) -> list[GradedAnswer]:
    """The answers of a group that the reward process has graded for an evaluation."""
    asked = Asked(set_name, None, scored.group.question)
    return [
        GradedAnswer(asked, j, rollout.text, rollout.finish_reason, len(rollout.response_token_ids), letter, outcome)
        for j, (rollout, letter, outcome) in enumerate(
            zip(scored.group.rollouts, scored.letters, scored.outcomes, strict=True)
        )
    ]


def _graded_free(
    question: Question, text: str, finish_reason: FinishReason, truncated: TruncatedReward
) -> tuple[str | None, Outcome]:
    from alphamed.answers.extraction import boxed_text

    letter = free_letter(text, question.options)
    if finish_reason.truncated and truncated == TruncatedReward.NOTHING:
        return letter, Outcome.TRUNCATED
    if not boxed_text(text):
        return letter, Outcome.UNPARSEABLE
    return letter, Outcome.CORRECT if letter == question.answer else Outcome.WRONG


def regraded(answer: GradedAnswer, grading: Grading, question: Question | None = None) -> GradedAnswer:
    """The answer graded once more, with the key of `question` where there is one."""
    asked = replace(answer.asked, question=question) if question else answer.asked
    return graded(asked, answer.sample, answer.text, answer.finish_reason, answer.tokens, grading)


# ------------------------------------------------------------------------------------------------------------- the file
def write_items(path: Path, answers: Iterable[GradedAnswer]) -> None:
    """Replace the file by one that holds these answers; it appears whole or not at all."""
    replace_json_lines(path, map(_row, answers))


def append_items(path: Path, answers: Iterable[GradedAnswer]) -> None:
    """Add answers to the file, on the disk when this returns."""
    append_json_lines(path, map(_row, answers))


def read_items(path: Path) -> dict[Key, list[GradedAnswer]]:
    """The answers to each question in the order of samples; {} where there is no file. Half a last line is left out, and of a
    sample that occurs twice the last counts. ConfigError names a line that is not a graded answer."""
    answers: dict[Key, dict[int, GradedAnswer]] = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        try:
            answer = _answer(row)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{path}: line {number} is not a graded answer ({type(error).__name__}: {error}); remove it and evaluate again, "
                f"which asks this question once more"
            ) from None
        answers.setdefault(answer.asked.key, {})[answer.sample] = answer
    return {key: [samples[j] for j in sorted(samples)] for key, samples in answers.items()}


def _row(answer: GradedAnswer) -> dict[str, Any]:
    asked, question = answer.asked, answer.asked.question
    return {
        "set": asked.set,
        "benchmark": asked.benchmark,
        "variant": asked.variant,
        "id": question.id,
        "sample": answer.sample,
        "question": question.question,
        "context": question.context,
        "options": dict(question.options),
        "answer": question.answer,
        "source": question.source,
        **values_of(question),
        "letter": answer.letter,
        "outcome": str(answer.outcome),
        "finish_reason": str(answer.finish_reason),
        "tokens": answer.tokens,
        "text": answer.text,
    }


def _answer(row: Mapping[str, Any]) -> GradedAnswer:
    variant = row["variant"]
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known")
    question = Question(
        row["id"],
        row["question"],
        dict(row["options"]),
        row["answer"],
        row["context"],
        row["source"],
        row["level"],
        row.get("informativeness"),  # older files have none
    )
    if question.answer not in question.options:
        raise ValueError(f"its key {question.answer!r} is none of its options")
    return GradedAnswer(
        Asked(row["benchmark"], variant, question),
        int(row["sample"]),
        str(row["text"]),
        FinishReason(row["finish_reason"]),
        int(row["tokens"]),
        row["letter"],
        Outcome(row["outcome"]),
    )


def finished(
    wanted: Iterable[Asked], answered: Mapping[Key, Sequence[GradedAnswer]], samples: int, grading: Grading
) -> dict[Key, list[GradedAnswer]]:
    """The answers to wanted questions that need no new one: all samples are there, and the model saw the same text.
    They are graded with the keys of `wanted`: a key that was corrected since needs no new answer either."""
    complete = {}
    for asked in wanted:
        answers = list(answered.get(asked.key, ()))
        if [answer.sample for answer in answers] == list(range(samples)) and _same_prompt(
            answers[0].asked.question, asked.question
        ):
            complete[asked.key] = [regraded(answer, grading, asked.question) for answer in answers]
    return complete


def _same_prompt(first: Question, second: Question) -> bool:
    return (first.question, first.context, list(first.options.items())) == (
        second.question,
        second.context,
        list(second.options.items()),
    )
