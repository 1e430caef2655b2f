"""Closed groups of facts: the right answers of a group are one another's wrong options.

Every fact of a group is asked with the same options in the same order, so that within the group each option and each letter
is right exactly once, and whoever chooses without reading the question is right once in as many questions as there are
options. Facts can stand in one group where no answer of one is true or arguable for another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from random import Random
from typing import TypeVar

from alphamed.data.text import content_words
from alphamed.hashing import draw
from alphamed.lab.datasets.medfacts_table import FEWEST_OPTIONS, Fact

T = TypeVar("T")
HELD_OUT_SHARE = 0.2  # of the facts of each category, in whole groups, at least one
TRIES = 200


class Reach(StrEnum):
    """Where wrong options come from first: other sections of the category, anywhere in it, the fact's own section."""

    FAR = "far"
    ANY = "any"
    NEAR = "near"


class Groups:
    """The groups that can be made of some facts of one category."""

    def __init__(self, facts: Sequence[Fact]):
        self.facts = tuple(facts)
        self._beside = {fact: {other for other in facts if _exclusive(fact, other)} for fact in facts}

    def around(self, first: Fact, size: int, reach: Reach, ahead: Mapping[Fact, int], key: str) -> list[Fact]:
        """A group of `first` and up to `size` - 1 others, those first that are the least `ahead` of how often they are to
        be asked, then those that `reach` prefers. ValueError where there is none of FEWEST_OPTIONS facts."""
        best = [first]
        for attempt in range(TRIES):
            group = self._grown(first, size, reach, ahead if attempt == 0 else {}, f"{key}/{attempt}")
            best = max(best, group, key=len)
            if len(best) == size or (attempt >= 5 and len(best) >= FEWEST_OPTIONS):
                return best
        if len(best) >= FEWEST_OPTIONS:
            return best
        raise ValueError(
            f"medfacts.yaml: {first.category}: {first.subject}: fewer than {FEWEST_OPTIONS - 1} facts can stand beside it; "
            f"add facts with other answers to the category"
        )

    def _grown(self, first: Fact, size: int, reach: Reach, ahead: Mapping[Fact, int], key: str) -> list[Fact]:
        group, possible = [first], self._beside[first]
        while len(group) < size and possible:
            near = {fact: sum(member.section == fact.section for member in group) for fact in possible}
            sign = {Reach.FAR: 1, Reach.ANY: 0, Reach.NEAR: -1}[reach]
            chosen = min(possible, key=lambda fact: (ahead.get(fact, 0), sign * near[fact], draw(key, fact.subject)))
            group.append(chosen)
            possible = possible & self._beside[chosen]
        return group

    def stray(self) -> Fact | None:
        """A fact that stands in no group of FEWEST_OPTIONS; None where there is none."""
        return next((fact for fact in self.facts if not self._reaches(self._beside[fact], FEWEST_OPTIONS - 1)), None)

    def _reaches(self, possible: set[Fact], more: int) -> bool:
        """Whether `more` of the possible facts can stand beside one another."""
        if len(possible) < more:
            return False
        return more <= 1 or any(self._reaches(possible & self._beside[fact], more - 1) for fact in possible)


def _exclusive(fact: Fact, other: Fact) -> bool:
    return not fact.allows(other.answer) and not other.allows(fact.answer)


def split_facts(facts: Sequence[Fact], key: str) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The facts (held out, trained) of a category; each of either part stands in a group of its own part."""
    count = FEWEST_OPTIONS * max(1, round(HELD_OUT_SHARE * len(facts) / FEWEST_OPTIONS))
    for attempt in range(TRIES):
        order = shuffled(facts, f"{key}/{attempt}")
        held_out = _picked(order, count)
        trained = tuple(fact for fact in order if fact not in held_out)
        if len(held_out) == count and Groups(trained).stray() is None:
            return held_out, trained
    raise ValueError(f"medfacts.yaml: {facts[0].category}: no {count} facts can be held out; add facts with other answers")


def choose(facts: Mapping[str, Sequence[Fact]], count: int, key: str) -> dict[str, tuple[Fact, ...]]:
    """`count` facts dealt evenly to the categories, at least FEWEST_OPTIONS to each that gets any; each stands in a group of
    the chosen ones. Facts whose subject shares no word with the answer come first. ValueError where a category has not so
    many."""
    names = shuffled(facts, key)[: count // FEWEST_OPTIONS]
    shares = {name: count // len(names) + (place < count % len(names)) for place, name in enumerate(names)}
    chosen = {}
    for name, share in shares.items():
        for attempt in range(TRIES):
            order = sorted(shuffled(facts[name], f"{key}/{name}/{attempt}"), key=_gives_itself_away)
            picked = _picked(order, share)
            if len(picked) == share:
                chosen[name] = picked
                break
        else:
            raise ValueError(
                f"medfacts: facts: {count} are {share} of {name}, which has {len(facts[name])} to train on; ask for fewer "
                f"facts or more categories"
            )
    return chosen


def other_answers(
    facts: Sequence[Fact], held_out: Sequence[Fact], trained: Collection[Fact], answers: Collection[str], key: str
) -> tuple[Fact, ...]:
    """Facts of a category to be held out beside few trained ones: as many as `held_out`, those first, whose answer is none of
    `answers`. Fewer where there are not so many in groups, down to none."""
    possible = [fact for fact in facts if fact not in trained and fact.answer not in answers]
    for count in range(len(held_out), 0, -FEWEST_OPTIONS):
        for attempt in range(TRIES if len(possible) >= count else 0):
            order = sorted(shuffled(possible, f"{key}/{attempt}"), key=lambda fact: fact not in held_out)
            picked = _picked(order, count)
            if len(picked) == count:
                return picked
    return ()


def _gives_itself_away(fact: Fact) -> bool:
    return not set(content_words(fact.subject)).isdisjoint(content_words(fact.answer))


def _picked(order: Sequence[Fact], count: int) -> tuple[Fact, ...]:
    """`count` facts: as large a group as `order` begins with, then further ones. None of them where one stands in no group
    of the picked ones."""
    picked: list[Fact] = []
    while len(picked) < min(count, len(order)):
        group: list[Fact] = []
        for fact in order:
            if fact not in picked and len(picked) + len(group) < count and all(_exclusive(fact, member) for member in group):
                group.append(fact)
        picked += group
    return tuple(picked) if Groups(picked).stray() is None else ()


def shuffled(items: Iterable[T], key: str) -> list[T]:
    """The items in an order that depends on theirs and the key alone, on every Python version."""
    random = Random(key)
    return sorted(items, key=lambda _: random.random())
