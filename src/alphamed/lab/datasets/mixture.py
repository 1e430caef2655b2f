"""Which questions of a pool make a training set: filters, balance, quotas, order and letters. Pure and seeded.

Every choice sorts by a hash of (seed, what for, id): it does not depend on the order of files, and a smaller quota takes a
part of what a larger one takes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.describe import length_words
from alphamed.data.mcq import LEVELS
from alphamed.data.option_order import refers_to_options, shuffle_options
from alphamed.data.text import normalised, normalised_option, option_set
from alphamed.errors import DataError
from alphamed.hashing import draw
from alphamed.lab.datasets.recipe import BalanceRecipe, FilterRecipe, QuotaRecipe, Short
from alphamed.records import Question

ANNOTATE = "annotate them (alphamed data difficulty) and name the result as levels of the source"


@dataclass(frozen=True, slots=True)
class PoolItem:
    """A question in the pool, the name of the source it came from (`sources[].name`) and its licence."""

    question: Question
    origin: str
    licence: str


# ------------------------------------------------------------------------------------------------------------- filters
def filtered(items: Iterable[PoolItem], recipe: FilterRecipe) -> tuple[list[PoolItem], Counter[str]]:
    """The items that pass, and per reason the number that does not (the first reason counts)."""
    patterns = [re.compile(text, re.IGNORECASE) for text in recipe.exclude]
    pool, passing, dropped = list(items), [], Counter()
    _require_annotated(pool, recipe)
    for item in pool:
        reason = _reason(item.question, recipe, patterns)
        if reason is None:
            passing.append(item)
        else:
            dropped[reason] += 1
    return passing, dropped


def _reason(question: Question, recipe: FilterRecipe, patterns: Sequence[re.Pattern[str]]) -> str | None:
    if recipe.sources and not any(_is_of(question.source, name) for name in recipe.sources):
        return "source"
    for attribute in ATTRIBUTES:
        values = getattr(recipe, attribute.axis)
        if values and attribute.of(question) not in values:
            return attribute.field
    if not recipe.min_options <= len(question.options) <= recipe.max_options:
        return "options"
    if recipe.min_words or recipe.max_words:
        length = length_words(question)
        if length < recipe.min_words or (recipe.max_words is not None and length > recipe.max_words):
            return "length"
    if any(pattern.search(question.question) for pattern in patterns):
        return "excluded text"
    return None


def _require_annotated(pool: Sequence[PoolItem], recipe: FilterRecipe) -> None:
    """Raises DataError where a filter needs an attribute that no question has: such a set lacks annotations, not
    questions."""
    for attribute in ATTRIBUTES:
        values = getattr(recipe, attribute.axis)
        if values and pool and all(attribute.of(item.question) is None for item in pool):
            raise DataError(
                f"filter.{attribute.axis}: {list(values)} is required, but no question has {attribute.field}; {ANNOTATE}"
            )


def _is_of(source: str | None, name: str) -> bool:
    return source is not None and (source == name or source.startswith(name + "/"))


# ----------------------------------------------------------------------------------------------------------- conflicts
def conflicting(items: Iterable[PoolItem]) -> list[list[PoolItem]]:
    """Groups of items with the same question (stem, context and options, up to case, punctuation and letters) but different
    keys."""
    groups: dict[tuple, list[PoolItem]] = defaultdict(list)
    for item in items:
        q = item.question
        groups[normalised(q.question), normalised(q.context or ""), option_set(q.options)].append(item)
    return [
        group
        for group in groups.values()
        if len({normalised_option(item.question.options[item.question.answer]) for item in group}) > 1
    ]


# ------------------------------------------------------------------------------------------------------------- balance
def balanced(items: Sequence[PoolItem], recipe: BalanceRecipe, seed: int) -> tuple[list[PoolItem], int]:
    """The items with the commonest answers of one source cut down to `max_share`, and the number left out."""
    by_answer: dict[str, list[PoolItem]] = defaultdict(list)
    for item in items:
        if item.origin == recipe.source:
            by_answer[normalised_option(item.question.options[item.question.answer])].append(item)
    cap = largest_cap([len(group) for group in by_answer.values()], recipe.max_share)
    if cap == 0 and by_answer:
        raise DataError(
            f"balance: {recipe.source} has {len(by_answer)} different answers, none of which can make up at "
            f"most {recipe.max_share:g} of it; raise max_share"
        )
    left_out = {
        item.question.id
        for group in by_answer.values()
        for item in sorted(group, key=lambda item: draw(seed, "balance", item.question.id))[cap:]
    }
    return [item for item in items if item.question.id not in left_out], len(left_out)


def largest_cap(counts: Sequence[int], max_share: float) -> int:
    """The largest cap c such that with every count cut to c the largest is at most `max_share` of the sum; 0 where none is
    possible. The share of the largest falls as the cap does, so the first cap from above that fits is it."""
    low, high = 0, max(counts, default=0)
    while low < high:
        middle = (low + high + 1) // 2
        total = sum(min(count, middle) for count in counts)
        if middle <= max_share * total * (1 + 1e-12):
            low = middle
        else:
            high = middle - 1
    return low


def commonest_answer(items: Iterable[PoolItem], source: str) -> tuple[str, float] | None:
    """The answer that most questions of a source have, and its share of them; None where there are none."""
    counts = Counter(
        normalised_option(item.question.options[item.question.answer]) for item in items if item.origin == source
    )
    if not counts:
        return None
    text, most = counts.most_common(1)[0]
    return text, most / counts.total()


# -------------------------------------------------------------------------------------------------------------- quotas
def mixed(
    items: Sequence[PoolItem], quotas: Sequence[QuotaRecipe], seed: int, short: Short
) -> tuple[list[PoolItem], list[str]]:
    """The items that fill the quotas, in their order, and a line for each quota that is not filled. Without quotas all
    items. DataError where a quota cannot be filled and `short` refuses that."""
    if not quotas:
        return list(items), []
    drawn_items: dict[str, PoolItem] = {}
    missing = []
    for quota in quotas:
        pool = [item for item in items if item.origin == quota.source and item.question.id not in drawn_items]
        for label, part, count in _parts(pool, quota):
            chosen = sorted(part, key=lambda item: draw(seed, "quota", item.question.id))[:count]
            drawn_items |= {item.question.id: item for item in chosen}
            if len(chosen) < count:
                missing.append(f"{label}: {len(chosen)} of {count}")
    if missing and short == Short.REFUSE:
        by_level = any(quota.per_level or quota.levels for quota in quotas)
        none = (
            f"; no question has a level, {ANNOTATE}"
            if by_level and items and not any(item.question.level for item in items)
            else ""
        )
        raise DataError(
            f"quotas: not enough questions ({', '.join(missing)}){none}; lower the quotas, or take what there "
            f"is with short=take"
        )
    return [item for item in items if item.question.id in drawn_items], missing


def _parts(pool: Sequence[PoolItem], quota: QuotaRecipe) -> list[tuple[str, list[PoolItem], int]]:
    """The draws of a quota: (label, items to draw from, how many)."""
    if quota.per_level is None:
        assert quota.count is not None
        part = [item for item in pool if not quota.levels or item.question.level in quota.levels]
        return [(quota.source, part, quota.count)]
    return [
        (f"{quota.source} level {level}", [item for item in pool if item.question.level == level], quota.per_level)
        for level in quota.levels or LEVELS
    ]


def drawn(items: Sequence[PoolItem], size: int | None, seed: int) -> list[PoolItem]:
    """At most `size` of the items, in their order."""
    if size is None or len(items) <= size:
        return list(items)
    chosen = {item.question.id for item in sorted(items, key=lambda item: draw(seed, "size", item.question.id))[:size]}
    return [item for item in items if item.question.id in chosen]


# --------------------------------------------------------------------------------------------------- order and letters
def shuffled(items: Iterable[PoolItem], seed: int) -> list[PoolItem]:
    return sorted(items, key=lambda item: draw(seed, "order", item.question.id))


def relettered(items: Sequence[PoolItem], seed: int) -> tuple[list[PoolItem], int]:
    """The items with their options in a new order, and how many keep theirs. Among n neighbours with n options the answer
    has every letter once; questions whose options refer to others ("both A and C") are left as they are."""
    decks: dict[int, list[int]] = {}
    lettered, unchanged = [], 0
    for number, item in enumerate(items):
        if refers_to_options(item.question):
            lettered.append(item)
            unchanged += 1
            continue
        size = len(item.question.options)
        if not decks.get(size):
            decks[size] = sorted(range(size), key=lambda place: draw(seed, "place", number, place))
        lettered.append(PoolItem(shuffle_options(item.question, seed, 0, decks[size].pop()), item.origin, item.licence))
    return lettered, unchanged
