"""items.jsonl: one line for every response of an evaluation, with its text, so that it can be graded again at any time.

    {"set": "medqa+shuffled", "benchmark": "medqa", "variant": "shuffled", "id": ..., "sample": 0,
     "question", "context", "options", "answer", "source", "level", "informativeness",      as it was graded
     "text", "finish_reason", "tokens",                                    what the model said
     "letter", "outcome"}                                                  what the grader makes of it

The file grows while an evaluation runs. A question is finished when all of its samples are there.
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
from alphamed.files import read_json_lines
from alphamed.records import FinishReason, Outcome, Question
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
class Item:
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
    def boxed(self) -> bool:
        """Whether it ended in time with a readable answer. Without options every box that says something is one."""
        return self.outcome in (Outcome.CORRECT, Outcome.WRONG)

    @property
    def cut(self) -> bool:
        """Whether the token limit cut it, however it was graded."""
        return self.finish_reason != FinishReason.STOP

    @property
    def vote(self) -> str | None:
        """What counts in a majority vote. A truncated response has none, as in grading."""
        return vote_of(self.letter, self.text) if self.boxed else None


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
    def of_json(cls, found: Mapping[str, Any]) -> Grading:
        """Evaluations of before there was thinking say nothing of it: all of a response counted."""
        return cls(
            TruncatedReward(found["truncated"]),
            Thinking(found.get("answer_after", ""), found.get("prompt_opens_thinking", False)),
        )


def graded(asked: Asked, sample: int, text: str, finish_reason: FinishReason, tokens: int, grading: Grading) -> Item:
    """The response as the grader of training sees it (`reward.rules.grade`); without options as `free_letter` does."""
    question = asked.question
    if asked.variant and VARIANTS[asked.variant].hides_options:
        letter, outcome = _graded_free(question, grading.thinking.answer(text) or "", finish_reason, grading.truncated)
    else:
        found = grade(question, text, finish_reason, correct, grading.truncated, grading.thinking)
        letter, outcome = found.letter, found.outcome
    return Item(asked, sample, text, finish_reason, tokens, letter, outcome)


def _graded_free(
    question: Question, text: str, finish_reason: FinishReason, truncated: TruncatedReward
) -> tuple[str | None, Outcome]:
    from alphamed.answers.extraction import boxed_text

    letter = free_letter(text, question.options)
    if finish_reason != FinishReason.STOP and truncated == TruncatedReward.NOTHING:
        return letter, Outcome.TRUNCATED
    if not boxed_text(text):
        return letter, Outcome.UNPARSEABLE
    return letter, Outcome.CORRECT if letter == question.answer else Outcome.WRONG


def regraded(item: Item, grading: Grading, question: Question | None = None) -> Item:
    """The item graded once more, with the key of `question` where that is given."""
    asked = replace(item.asked, question=question) if question else item.asked
    return graded(asked, item.sample, item.text, item.finish_reason, item.tokens, grading)


# ------------------------------------------------------------------------------------------------------------- the file
def row(item: Item) -> dict[str, Any]:
    asked, question = item.asked, item.asked.question
    return {
        "set": asked.set,
        "benchmark": asked.benchmark,
        "variant": asked.variant,
        "id": question.id,
        "sample": item.sample,
        "question": question.question,
        "context": question.context,
        "options": dict(question.options),
        "answer": question.answer,
        "source": question.source,
        **values_of(question),
        "letter": item.letter,
        "outcome": str(item.outcome),
        "finish_reason": str(item.finish_reason),
        "tokens": item.tokens,
        "text": item.text,
    }


def read_items(folder: Path) -> dict[Key, list[Item]]:
    """What an evaluation's folder holds, per question in the order of samples; {} where there is none. Half a last line is
    left out. ConfigError names a line that is no item."""
    found: dict[Key, dict[int, Item]] = {}
    for number, one in enumerate(read_json_lines(folder / ITEMS), start=1):
        try:
            item = _item(one)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{folder / ITEMS}: line {number} is no item of `alphamed eval` ({type(error).__name__}: "
                f"{error}); remove it, its question is then asked again"
            ) from None
        found.setdefault(item.asked.key, {})[item.sample] = item
    return {key: [samples[j] for j in sorted(samples)] for key, samples in found.items()}


def _item(one: Mapping[str, Any]) -> Item:
    variant = one["variant"]
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not known")
    question = Question(
        one["id"],
        one["question"],
        dict(one["options"]),
        one["answer"],
        one["context"],
        one["source"],
        one["level"],
        one.get("informativeness"),
    )  # older files have none
    if question.answer not in question.options:
        raise ValueError(f"its key {question.answer!r} is none of its options")
    return Item(
        Asked(one["benchmark"], variant, question),
        int(one["sample"]),
        str(one["text"]),
        FinishReason(one["finish_reason"]),
        int(one["tokens"]),
        one["letter"],
        Outcome(one["outcome"]),
    )


def finished(
    wanted: Iterable[Asked], found: Mapping[Key, Sequence[Item]], samples: int, grading: Grading
) -> dict[Key, list[Item]]:
    """The items of wanted questions that need no new answer: all samples are there, and the model saw the same text.
    They are graded with the keys of `wanted`: a key that was put right since needs no new answer either."""
    kept = {}
    for asked in wanted:
        items = list(found.get(asked.key, ()))
        if [item.sample for item in items] == list(range(samples)) and _same_prompt(items[0].asked.question, asked.question):
            kept[asked.key] = [regraded(item, grading, asked.question) for item in items]
    return kept


def _same_prompt(one: Question, other: Question) -> bool:
    return (one.question, one.context, list(one.options.items())) == (
        other.question,
        other.context,
        list(other.options.items()),
    )
