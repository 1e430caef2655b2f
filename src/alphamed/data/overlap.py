"""Refuses questions that are in both training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from alphamed.data.text import normalised, option_set
from alphamed.errors import ConfigError
from alphamed.records import Question


def refuse_overlap(training: Sequence[Question], evaluation: Sequence[Question]) -> None:
    """Refuse questions that are the same up to case, punctuation and letters; finding reworded ones is left to `alphamed
    data decontaminate`."""
    trained = {_content(question): question.id for question in training}
    both = [question for question in evaluation if _content(question) in trained]
    if both:
        raise ConfigError(
            f"evaluation.files: {len(both)} of {len(evaluation)} questions are in data.train too (the first: "
            f"{both[0].id} is {trained[_content(both[0])]}); take them out of data.train with `alphamed data "
            f"decontaminate`, or set evaluation.allow_overlap=true"
        )


def _content(question: Question) -> tuple[str, str, tuple[str, ...]]:
    return normalised(question.question), normalised(question.context or ""), option_set(question.options)
