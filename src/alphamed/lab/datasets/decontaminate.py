"""Which training questions a benchmark holds too: exact, by their options, or reworded; each with the evidence.

Three rules, tried in this order; a pair of questions is reported once, by the first rule that holds:
  exact    the stems have the same words in the same order
  options  the same set of options, the same right answer, and stems with OPTION_STEM of their words in common
  similar  stems whose weighted similarity (matching.py) is at least the threshold
A short stem alone proves nothing ("Pyruvate carboxylase:" begins many questions), and one word can make it another question
(anterior, posterior). So `exact` and `similar` also ask for the same right answer; or, from a similarity of SURE on, for
OPTION_OVERLAP of the options in common. From LONG_STEM words on a stem is a case, and another question about the same case
is contamination as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from alphamed.data.text import content_length, content_words, normalised, normalised_option, option_set
from alphamed.records import Question

OPTION_STEM = 0.2  # of 196 MedMCQA pairs with equal options and key, those that share fewer words are different questions
OPTION_OVERLAP = 0.5
SURE = 0.9
LONG_STEM = 25  # content words; 98% of MedQA's stems have more, 2% of MedMCQA's
COMMON_OPTIONS = 100  # a set of options that more training questions share says nothing (yes, no, maybe)
SIMILARITY = 0.6


class MatchRule(StrEnum):
    EXACT = "exact"
    OPTIONS = "options"
    SIMILAR = "similar"


@dataclass(frozen=True, slots=True)
class Hit:
    """A training question and the benchmark question that it repeats."""

    train: Question
    against: Question
    benchmark: str
    rule: MatchRule
    similarity: float  # of the stems: 1 where exact, shared words for `options`, weighted for `similar`
    same_answer: bool
    shared_options: float  # Jaccard of the option sets


@dataclass(frozen=True, slots=True)
class _Text:
    """The parts of a question that are compared."""

    stem: str
    options: tuple[str, ...]
    answer: str
    content: frozenset[str]
    long: bool


def find_hits(
    train: Sequence[Question], benchmarks: Mapping[str, Sequence[Question]], threshold: float = SIMILARITY
) -> list[Hit]:
    """All hits, benchmark by benchmark, in the benchmark's order."""
    texts = [_text(question) for question in train]
    hits: list[Hit] = []
    for name, questions in benchmarks.items():
        hits += _hits(train, texts, name, questions, threshold)
    return hits


def _text(question: Question) -> _Text:
    content = content_words(question.question)
    return _Text(
        normalised(question.question),
        option_set(question.options),
        normalised_option(question.options[question.answer]),
        frozenset(content),
        len(content) >= LONG_STEM and content_length(content) >= LONG_STEM,
    )


def _hits(
    train: Sequence[Question], texts: Sequence[_Text], name: str, questions: Sequence[Question], threshold: float
) -> Iterator[Hit]:
    others = [_text(question) for question in questions]
    seen: set[tuple[int, int]] = set()
    for rule, i, j, similarity in _pairs(train, texts, questions, others, threshold):
        if (i, j) not in seen:
            seen.add((i, j))
            yield Hit(
                train[i],
                questions[j],
                name,
                rule,
                round(similarity, 4),
                texts[i].answer == others[j].answer,
                round(_shared_options(texts[i], others[j]), 4),
            )


def _pairs(
    train: Sequence[Question],
    texts: Sequence[_Text],
    questions: Sequence[Question],
    others: Sequence[_Text],
    threshold: float,
) -> Iterator[tuple[MatchRule, int, int, float]]:
    """(rule, place in train, place in the benchmark, similarity), rule by rule."""
    from alphamed.lab.datasets.matching import similar_pairs

    by_stem, by_options = _places(text.stem for text in texts), _places(text.options for text in texts)
    for j, other in enumerate(others):
        for i in by_stem.get(other.stem, ()):
            if _is_same_question(texts[i], other, 1.0):
                yield MatchRule.EXACT, i, j, 1.0
    for j, other in enumerate(others):
        places = by_options.get(other.options, ())
        for i in places if len(places) <= COMMON_OPTIONS else ():
            overlap = _overlap(texts[i].content, other.content)
            if texts[i].answer == other.answer and overlap >= OPTION_STEM:
                yield MatchRule.OPTIONS, i, j, overlap
    for pair in similar_pairs([q.question for q in train], [q.question for q in questions], threshold):
        if _is_same_question(texts[pair.base], others[pair.query], pair.similarity):
            yield MatchRule.SIMILAR, pair.base, pair.query, pair.similarity


def _is_same_question(first: _Text, second: _Text, similarity: float) -> bool:
    """Whether two stems of this similarity ask the same, or describe the same case."""
    if (first.long and second.long) or first.answer == second.answer:
        return True
    return similarity >= SURE and _shared_options(first, second) >= OPTION_OVERLAP


def _shared_options(first: _Text, second: _Text) -> float:
    return _overlap(frozenset(first.options), frozenset(second.options))


def _overlap(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second) if first or second else 0.0


def _places(keys) -> dict[Any, list[int]]:
    by_key: dict[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        by_key[key].append(place)
    return by_key


# --------------------------------------------------------------------------------------------------------------- report
def report(
    train: Sequence[Question], benchmarks: Mapping[str, Sequence[Question]], hits: Sequence[Hit], threshold: float
) -> dict[str, Any]:
    """The hits with their evidence as plain values, and how much of the set and of every benchmark they touch."""
    touched = {name: {hit.against.id for hit in hits if hit.benchmark == name} for name in benchmarks}
    return {
        "train_questions": len(train),
        "contaminated": len({hit.train.id for hit in hits}),
        "threshold": threshold,
        "constants": {
            "option_stem": OPTION_STEM,
            "option_overlap": OPTION_OVERLAP,
            "sure": SURE,
            "long_stem": LONG_STEM,
            "common_options": COMMON_OPTIONS,
        },
        "benchmarks": {
            name: {
                "questions": len(questions),
                "touched": len(touched[name]),
                "rules": dict(Counter(str(hit.rule) for hit in hits if hit.benchmark == name)),
            }
            for name, questions in benchmarks.items()
        },
        "hits": [_evidence(hit) for hit in hits],
    }


def _evidence(hit: Hit) -> dict[str, Any]:
    plain = {
        "benchmark": hit.benchmark,
        "rule": str(hit.rule),
        "similarity": hit.similarity,
        "same_answer": hit.same_answer,
        "shared_options": hit.shared_options,
    }
    return plain | {
        side: {"id": q.id, "question": q.question, "options": dict(q.options), "answer": q.answer, "source": q.source}
        for side, q in (("train", hit.train), ("against", hit.against))
    }
