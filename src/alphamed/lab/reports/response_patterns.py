"""Patterns of responses that reward may teach instead of medicine, found in the text of one response. Pure, linear time.

bare       a boxed answer with fewer than 5 words before it: no reasoning
afterwards reasoning that follows the answer: it cannot have led to it
several    more than one box, none inside another: hedging
repeats    the same words again and again
"""

from __future__ import annotations

from enum import StrEnum

from alphamed.answers.extraction import closed_boxes
from alphamed.data.text import is_unspaced, pieces, word_count
from alphamed.records import Outcome
from alphamed.rundir.metrics import is_bare_box

AFTERWARDS_WORDS = 10
"""A response with fewer words than this after its first box has only a closing phrase there."""
NGRAM = 4
TAIL_WORDS = 300
"""Only the last TAIL_WORDS words are searched for repetition: a model that repeats itself does so until the token limit, and
with the bound 100,000 long responses take seconds."""
LEAST_NGRAMS = 12
"""Shorter texts are too short to repeat themselves."""
REPEATED = 0.4
"""The smallest share of repeated word 4-grams at which a response counts as repeating itself: chosen, not measured."""


class ResponsePattern(StrEnum):
    BARE = "bare"
    AFTERWARDS = "afterwards"
    SEVERAL = "several"
    REPEATS = "repeats"


def response_patterns(text: str, outcome: Outcome) -> frozenset[ResponsePattern]:
    """The patterns that a response shows. Only responses that ended in time with a readable box (boxed ones, in the metrics)
    can be bare."""
    patterns = set()
    boxes = outermost(closed_boxes(text))
    if outcome.boxed and is_bare_box(text):
        patterns.add(ResponsePattern.BARE)
    if boxes and _continues(text, *boxes[0]):
        patterns.add(ResponsePattern.AFTERWARDS)
    if len(boxes) > 1:
        patterns.add(ResponsePattern.SEVERAL)
    if repetition(text) >= REPEATED:
        patterns.add(ResponsePattern.REPEATS)
    return frozenset(patterns)


def outermost(boxes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The boxes that are inside no other box, from left to right; (start, end) of their contents."""
    outer: list[tuple[int, int]] = []
    for start, end in sorted(boxes):
        if not outer or start > outer[-1][1]:
            outer.append((start, end))
    return outer


def repetition(text: str) -> float:
    """Share of word 4-grams among the last TAIL_WORDS words that occurred before; 0 for short texts."""
    words = (pieces(text[-10 * TAIL_WORDS :]) if is_unspaced(text) else text.rsplit(maxsplit=TAIL_WORDS))[-TAIL_WORDS:]
    total = len(words) - NGRAM + 1
    if total < LEAST_NGRAMS:
        return 0.0
    return 1 - len(set(zip(*(words[k:] for k in range(NGRAM))))) / total


def _continues(text: str, start: int, end: int) -> bool:
    """Whether at least AFTERWARDS_WORDS words follow the first box, and more than precede it."""
    after = word_count(text[end + 1 :])
    return after >= AFTERWARDS_WORDS and after > word_count(text[:start]) - 1  # the box's own start counts as a word
