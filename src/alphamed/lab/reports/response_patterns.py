"""Patterns of responses that reward can teach in place of medicine: told from the text of one response. Pure, linear time.

bare       a boxed answer with fewer than 5 words before it: no reasoning
afterwards reasoning that follows the answer: it cannot have led to it
several    more than one box side by side: hedging
repeats    the same words over and over
"""

from __future__ import annotations

from enum import StrEnum

from alphamed.answers.extraction import closed_boxes
from alphamed.data.text import is_unspaced, pieces, word_count
from alphamed.records import Outcome
from alphamed.rundir.metrics import is_bare_box

AFTERWARDS_WORDS = 10
"""A response that goes on for fewer words after its first box has only said good-bye."""
NGRAM = 4
TAIL_WORDS = 300
"""Only this many last words are searched for repetition: a model that repeats itself does so until the token limit, and
the bound keeps 100,000 long responses within seconds."""
LEAST_NGRAMS = 12
"""Shorter texts are too short to repeat themselves."""
REPEATED = 0.4
"""Share of repeated word 4-grams from which on a response counts as repeating itself: a judgement, not a measurement."""


class ResponsePattern(StrEnum):
    BARE = "bare"
    AFTERWARDS = "afterwards"
    SEVERAL = "several"
    REPEATS = "repeats"


def response_patterns(text: str, outcome: Outcome) -> frozenset[ResponsePattern]:
    """The patterns that a response shows. Only responses that ended in time with a readable box (`metrics` calls them boxed)
    can be bare."""
    found = set()
    boxes = side_by_side(closed_boxes(text))
    if outcome.boxed and is_bare_box(text):
        found.add(ResponsePattern.BARE)
    if boxes and _goes_on(text, *boxes[0]):
        found.add(ResponsePattern.AFTERWARDS)
    if len(boxes) > 1:
        found.add(ResponsePattern.SEVERAL)
    if repetition(text) >= REPEATED:
        found.add(ResponsePattern.REPEATS)
    return frozenset(found)


def side_by_side(boxes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The boxes that lie in no other one, from left to right; (start, end) of their contents."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(boxes):
        if not found or start > found[-1][1]:
            found.append((start, end))
    return found


def repetition(text: str) -> float:
    """Share of word 4-grams among the last TAIL_WORDS words that occurred before; 0 for short texts."""
    words = (pieces(text[-10 * TAIL_WORDS :]) if is_unspaced(text) else text.rsplit(maxsplit=TAIL_WORDS))[-TAIL_WORDS:]
    total = len(words) - NGRAM + 1
    if total < LEAST_NGRAMS:
        return 0.0
    return 1 - len(set(zip(*(words[k:] for k in range(NGRAM))))) / total


def _goes_on(text: str, start: int, end: int) -> bool:
    """Whether at least AFTERWARDS_WORDS words follow the first box, and more than stand before it."""
    after = word_count(text[end + 1 :])
    return after >= AFTERWARDS_WORDS and after > word_count(text[:start]) - 1  # the box itself begins a word
