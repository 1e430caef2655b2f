"""Finds pairs of similar question stems in large sets: an exact sparse join, no sampling, no hashing errors.

A stem is the set of its features: content words (text.py) and pairs of neighbouring ones. A feature weighs
log(1 + N / df), df the number of stems of both sides that have it, so that the words of a template weigh little. The
similarity of two stems is the weight of their common features over that of all their features (weighted Jaccard).

Why no candidate is missed at threshold t (prefix filtering, Chaudhuri et al., ICDE 2006): a pair with Jaccard >= t shares
at least t times the weight of either side. So the two share a feature among the rarest ones of the query that together
weigh more than 1 - t of it, and only postings of those are read. Posting lists of 200,000 templated stems stay short this
way, and numpy does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from alphamed.data.text import content_words

BATCH = 30_000  # candidates compared at once: bounds memory


@dataclass(frozen=True, slots=True)
class SimilarPair:
    """Stem `query` of one side is similar to stem `base` of the other."""

    query: int
    base: int
    similarity: float


@dataclass(frozen=True, slots=True)
class _Features:
    """Sets of features in one array: those of document d are ids[starts[d]:starts[d + 1]], sorted, each once."""

    ids: np.ndarray  # int64
    starts: np.ndarray  # int64, [documents + 1]


def similar_pairs(base: Sequence[str], queries: Sequence[str], threshold: float) -> Iterator[SimilarPair]:
    """All (query, base) pairs of stems with similarity >= threshold, query by query, then by decreasing similarity. Stems
    without a content word are similar to none."""
    if not base or not queries:
        return
    everything = _features([*base, *queries])
    cut = everything.starts[len(base)]
    count = int(everything.ids.max()) + 1 if len(everything.ids) else 0
    frequency = np.bincount(everything.ids, minlength=count)
    weight = np.log1p((len(base) + len(queries)) / np.maximum(frequency, 1))
    base_features = _Features(everything.ids[:cut], everything.starts[: len(base) + 1])
    query_features = _Features(everything.ids[cut:], everything.starts[len(base) :] - cut)
    yield from _join(base_features, query_features, weight, frequency, threshold)


def _features(texts: Sequence[str]) -> _Features:
    """Content words and pairs of neighbours as numbers from 0, for all texts at once."""
    vocabulary: dict[str, int] = {}
    flat, sizes = [], []
    for text in texts:
        content = content_words(text)
        flat += [vocabulary.setdefault(word, len(vocabulary)) for word in content]
        sizes.append(len(content))
    words = np.array(flat, dtype=np.uint64)
    document = np.repeat(np.arange(len(texts)), sizes)
    neighbours = document[1:] == document[:-1]
    size = np.uint64(len(vocabulary))  # words are 0 .. size - 1, pairs follow; exact below 2^32 words
    pairs = (words[:-1][neighbours] + np.uint64(1)) * size + words[1:][neighbours]
    keys, owners = np.concatenate([words, pairs]), np.concatenate([document, document[1:][neighbours]])
    ids = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    order = np.lexsort((ids, owners))
    ids, owners = ids[order], owners[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = (ids[1:] != ids[:-1]) | (owners[1:] != owners[:-1])
    ids, owners = ids[first], owners[first]
    return _Features(ids, np.searchsorted(owners, np.arange(len(texts) + 1)))


def _join(
    base: _Features, queries: _Features, weight: np.ndarray, frequency: np.ndarray, threshold: float
) -> Iterator[SimilarPair]:
    """`weight` [features] float64, `frequency` [features] int64."""
    documents = np.repeat(np.arange(len(base.starts) - 1), np.diff(base.starts))
    by_feature = np.argsort(base.ids, kind="stable")
    postings, bounds = documents[by_feature], np.searchsorted(base.ids[by_feature], np.arange(len(weight) + 1))
    totals = np.zeros(len(base.starts) - 1)
    np.add.at(totals, documents, weight[base.ids])
    inside = np.zeros(len(weight), dtype=bool)  # marks the features of the current query
    for query in range(len(queries.starts) - 1):
        features = queries.ids[queries.starts[query] : queries.starts[query + 1]]
        total = weight[features].sum()
        prefix = _prefix(features, weight, frequency, threshold * total)
        if not len(prefix):
            continue
        candidates = np.unique(np.concatenate([postings[bounds[f] : bounds[f + 1]] for f in prefix]))
        fits = (totals[candidates] >= threshold * total - 1e-9) & (totals[candidates] * threshold <= total + 1e-9)
        inside[features] = True
        pairs: list[SimilarPair] = []
        chosen = candidates[fits]
        for part in (chosen[first : first + BATCH] for first in range(0, len(chosen), BATCH)):
            common = _common_weight(part, base, inside, weight)
            score = common / (total + totals[part] - common)
            pairs += [SimilarPair(query, int(d), float(s)) for d, s in zip(part, score) if s >= threshold - 1e-9]
        inside[features] = False
        yield from sorted(pairs, key=lambda pair: (-pair.similarity, pair.base))


def _prefix(features: np.ndarray, weight: np.ndarray, frequency: np.ndarray, needed: float) -> np.ndarray:
    """The rarest features, so many that the others weigh less than `needed`."""
    order = features[np.argsort(frequency[features], kind="stable")]
    rest = weight[order].sum() - np.cumsum(weight[order])
    return order[: int(np.searchsorted(-rest, -needed + 1e-9, side="right")) + 1]


def _common_weight(documents: np.ndarray, base: _Features, inside: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weight that each document shares with the marked features."""
    starts, sizes = base.starts[documents], base.starts[documents + 1] - base.starts[documents]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, sizes)
    ids = base.ids[places]
    shared = np.where(inside[ids], weight[ids], 0.0)
    return np.add.reduceat(np.append(shared, 0.0), offsets[:-1])
