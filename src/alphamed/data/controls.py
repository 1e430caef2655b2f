"""Training keys that say nothing about the truth: the control `data.answer_keys: shuffled`.

A run that gains as much from such keys has not learnt what the true ones say. So that nothing else differs, a question keeps
its key through all epochs (it can be learnt by heart, as a true one can; keys that change would only be the reward `random`
again), and a set of questions with the same options (yes, no, maybe) keeps about its shares of answers, which a model may
learn without any knowledge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from alphamed.hashing import draw
from alphamed.records import Question


def with_shuffled_keys(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions with keys drawn by (seed, id), the true one among the possible.

    An option is drawn with weight 1 + the number of other questions with the same options whose key it is; its own key does
    not count. Options that occur in one question only are thus drawn evenly.
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
