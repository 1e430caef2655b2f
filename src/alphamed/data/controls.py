"""Training keys that are independent of the truth: the control `data.answer_keys: shuffled`.

A run that gains as much from such keys has learnt nothing from the true ones. So that nothing else differs, a question keeps
its key in all epochs (it can be memorised like a true one; changing keys would be the reward `random` again), and questions
with the same options (yes, no, maybe) roughly keep their shares of answers, which a model may learn without any knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from alphamed.hashing import draw
from alphamed.records import Question


def with_shuffled_keys(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions with keys drawn by (seed, id), the true key being one of the possible outcomes.

    An option is drawn with weight 1 + the number of other questions with the same options whose key it is; its own key does
    not count. Options that occur in only one question are thus drawn uniformly.
    """
    keys = {group: Counter() for group in map(_group, questions)}
    for question in questions:
        keys[_group(question)][question.options[question.answer]] += 1
    return [replace(question, answer=_drawn(question, keys[_group(question)], seed)) for question in questions]


def _group(question: Question) -> tuple[str, ...]:
    return tuple(sorted(question.options.values()))


def _drawn(question: Question, keys: Counter[str], seed: int) -> str:
    weights = {letter: 1 + keys[text] - (letter == question.answer) for letter, text in question.options.items()}
    position = int(draw(seed, "answer key", question.id), 16) % sum(weights.values())
    # by text, not by letter: the order of options in the file does not matter
    letters = sorted(weights, key=question.options.__getitem__)
    return next(letter for letter, up_to in zip(letters, accumulate(map(weights.__getitem__, letters))) if position < up_to)
