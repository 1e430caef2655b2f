"""What a set of questions holds, in numbers: counts, lengths and distributions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.output import content_sha256
from alphamed.data.text import word_count
from alphamed.records import Question


def describe(questions: Sequence[Question]) -> dict[str, Any]:
    """Counts, lengths and distributions of a set, as plain values."""
    return {
        "questions": len(questions),
        "content_sha256": content_sha256(questions),
        "sources": _counts(q.source or "unknown" for q in questions),
        **{kind.axis: _counts(str(kind.of(q) or "none") for q in questions) for kind in ATTRIBUTES},
        "options": _counts(str(len(q.options)) for q in questions),
        "answers": _counts(q.answer for q in questions),
        "with_context": sum(q.context is not None for q in questions),
        "words": _lengths([length_words(q) for q in questions]),
        "question_words": _lengths([word_count(q.question) for q in questions]),
    }


def length_words(question: Question) -> int:
    """Words of context, question and options (`text.word_count`: characters in scripts without blanks)."""
    return sum(map(word_count, (question.context or "", question.question, *question.options.values())))


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _lengths(values: Sequence[int]) -> dict[str, float]:
    if not values:
        return {"min": 0, "median": 0, "mean": 0, "p95": 0, "max": 0}
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "median": statistics.median(ordered),
        "mean": round(statistics.fmean(ordered), 1),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "max": ordered[-1],
    }
