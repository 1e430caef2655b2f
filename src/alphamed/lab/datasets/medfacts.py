"""The shipped sample: seeded multiple-choice questions made from the table of medical facts (`medfacts.yaml`).

Questions come in six levels of rising difficulty (`LEVELS`) and three sets (`build`): for training, held out by wording
(facts seen in training, sentences not) and held out by fact (facts whose subjects occur nowhere in training). Wrong
options are of the same category and never true or arguable (`Fact.allows`), so that exactly one option is right.

A seed gives the same bytes on every Python version and platform: choices use only `Random(text).random()`, the sequence
that Python guarantees (that of `shuffle` and `sample` it does not).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import TypeVar

from alphamed.files import replace_json_lines
from alphamed.lab.datasets.medfacts_table import FEWEST_OPTIONS, Category, Fact, Form, table
from alphamed.records import Question

T = TypeVar("T")
LETTERS = "ABCDEFGHIJ"
HELD_OUT_SHARE = 0.2  # of the facts of each category, at least FEWEST_OPTIONS of them


# -------------------------------------------------------------------------------------------------------- the questions
class Reach(StrEnum):
    """Where wrong options come from first: other sections of the category, anywhere in it, the fact's own section."""

    FAR = "far"
    ANY = "any"
    NEAR = "near"


@dataclass(frozen=True, slots=True)
class Level:
    """`forms` are tried in an order that differs from fact to fact; a fact that allows none is asked plainly."""

    options: int  # at most; FEWEST_OPTIONS where a category or the held-out part of it is small
    forms: tuple[Form, ...]
    reach: Reach
    copies: int = 1  # questions of a fact, with other options and, while they last, other wordings


LEVELS = {
    1: Level(4, (Form.ASK,), Reach.FAR, copies=2),
    2: Level(5, (Form.ASK,), Reach.ANY),
    3: Level(6, (Form.REVERSE,), Reach.ANY),
    4: Level(7, (Form.EXCEPT, Form.REVERSE), Reach.NEAR),
    5: Level(8, (Form.PAIRS,), Reach.ANY),
    6: Level(10, (Form.PAIRS, Form.ASK), Reach.NEAR),
}


@dataclass(frozen=True, slots=True)
class Splits:
    train: tuple[Question, ...]
    heldout_wording: tuple[Question, ...]
    heldout_fact: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class _Material:
    """What one set may use of one category."""

    split: str
    asked: tuple[Fact, ...]
    offered: tuple[Fact, ...]  # whose subjects and answers may be wrong options
    stated: tuple[Fact, ...]  # which may be stated as true beside the asked one


@dataclass(frozen=True, slots=True)
class _Draw:
    form: Form
    answer: str  # what {answer} in the wording stands for
    right: str
    wrong: tuple[str, ...]


def build(
    seed: int,
    *,
    levels: Collection[int] | None = None,
    categories: Collection[str] | None = None,
    facts: int | None = None,
    copies: int | None = None,
) -> Splits:
    """The three sets of a seed.

    `levels`, `categories` and `facts` (the number of facts to train on; `heldout_wording` asks about the same ones)
    choose among the questions of the full sets and change none of them. `copies` is the number of questions of a fact
    in each level, instead of that in LEVELS. Raises ValueError where a level or category does not exist.
    """
    check(levels, categories)
    parts = {
        name: _hold_out(category, seed) for name, category in table().items() if categories is None or name in categories
    }
    seen = [fact for _, kept in parts.values() for fact in kept]
    chosen = frozenset(_shuffled(seen, f"{seed}/facts")[:facts])
    found: dict[str, dict[str, Question]] = {field.name: {} for field in fields(Splits)}
    for name, (held, kept) in parts.items():
        for material in (
            _Material("train", kept, kept, kept),
            _Material("heldout_wording", kept, kept, kept),
            _Material("heldout_fact", held, table()[name].facts, held),
        ):
            for number in sorted(LEVELS if levels is None else set(levels)):
                for fact, question in _level(seed, table()[name], material, number, copies):
                    if fact in chosen or material.asked is held:
                        found[material.split][question.id] = question  # an id is of the content: none comes twice
    return Splits(
        **{
            split: tuple(by_id[key] for key in sorted(by_id, key=lambda key: _digest(f"{seed}/{key}")))
            for split, by_id in found.items()
        }
    )


def check(levels: Collection[int] | None, categories: Collection[str] | None) -> None:
    """Raises ValueError where a level or category does not exist."""
    _check("level", levels, LEVELS)
    _check("category", categories, table())


def _check(what: str, chosen: Collection | None, known: Iterable) -> None:
    if unknown := set(chosen or ()) - set(known):
        raise ValueError(f"medfacts: {what} {sorted(unknown)} unknown; choose from {list(known)}")


def _hold_out(category: Category, seed: int) -> tuple[tuple[Fact, ...], tuple[Fact, ...]]:
    """The facts (held out, kept)."""
    facts = _shuffled(category.facts, f"{seed}/hold out/{category.name}")
    count = max(FEWEST_OPTIONS, round(HELD_OUT_SHARE * len(facts)))
    return tuple(facts[:count]), tuple(facts[count:])


def _level(
    seed: int, category: Category, material: _Material, number: int, copies: int | None
) -> Iterator[tuple[Fact, Question]]:
    level = LEVELS[number]
    for copy in range(level.copies if copies is None else copies):
        stream = f"{seed}/{material.split}/{category.name}/{number}/{copy}"
        letters: dict[int, list[int]] = {}  # per number of options, a shuffled deck of positions
        for turn, fact in enumerate(material.asked):
            draw = _first_draw(fact, material, level, turn, f"{stream}/{fact.subject}")
            size = 1 + len(draw.wrong)
            if not letters.get(size):
                letters[size] = _shuffled(range(size), f"{stream}/letters/{size}/{turn}")
            wordings = category.wordings[draw.form]
            choices = wordings.heldout if material.split == "heldout_wording" else wordings.train
            order = _shuffled(choices, f"{seed}/{material.split}/{category.name}/{number}/{fact.subject}")
            yield fact, _question(category, fact, draw, order[copy % len(order)], letters[size].pop(), number)


def _first_draw(fact: Fact, material: _Material, level: Level, turn: int, key: str) -> _Draw:
    first = turn % len(level.forms)
    for form in (*level.forms[first:], *level.forms[:first], Form.ASK):
        draw = _DRAWS[form](fact, material, level, key)
        if draw is not None and 1 + len(draw.wrong) >= FEWEST_OPTIONS:
            return draw
    raise ValueError(
        f"medfacts.yaml: {fact.category}: {fact.subject}: fewer than {FEWEST_OPTIONS - 1} wrong answers; "
        f"add answers to the category"
    )


def _draw_ask(fact: Fact, material: _Material, level: Level, key: str) -> _Draw:
    wrong = _wrong_answers(fact, material.offered, level.reach, key)
    return _Draw(Form.ASK, fact.answer, fact.answer, tuple(wrong[: level.options - 1]))


def _draw_reverse(fact: Fact, material: _Material, level: Level, key: str) -> _Draw:
    possible = (other for other in material.offered if not other.allows(fact.answer))
    others = _other_facts(fact, possible, level.reach, key)
    return _Draw(Form.REVERSE, fact.answer, fact.subject, tuple(o.subject for o in others[: level.options - 1]))


def _draw_except(fact: Fact, material: _Material, level: Level, key: str) -> _Draw | None:
    """The asked fact is the exception; the others, of its own section, share an answer that cannot be true of it."""
    for answer in _wrong_answers(fact, material.stated, level.reach, key):
        sharing = [other.subject for other in material.stated if other.answer == answer and other.section == fact.section]
        if len(sharing) >= FEWEST_OPTIONS - 1:
            return _Draw(Form.EXCEPT, answer, fact.subject, tuple(_shuffled(sharing, key)[: level.options - 1]))
    return None


def _draw_pairs(fact: Fact, material: _Material, level: Level, key: str) -> _Draw:
    """The asked fact makes the false pair."""
    others = _other_facts(fact, (other for other in material.stated if other is not fact), level.reach, key)
    swapped = _wrong_answers(fact, material.offered, level.reach, key)[0]
    return _Draw(
        Form.PAIRS,
        fact.answer,
        f"{fact.subject} - {swapped}",
        tuple(f"{o.subject} - {o.answer}" for o in others[: level.options - 1]),
    )


_DRAWS = {Form.ASK: _draw_ask, Form.REVERSE: _draw_reverse, Form.EXCEPT: _draw_except, Form.PAIRS: _draw_pairs}


def _wrong_answers(fact: Fact, offered: Iterable[Fact], reach: Reach, key: str) -> list[str]:
    """The distinct answers of `offered` that cannot be true of the fact's subject, in the order of preference."""
    near: dict[str, bool] = {}
    for other in offered:
        if not fact.allows(other.answer):
            near[other.answer] = near.get(other.answer, False) or other.section == fact.section
    return _by_reach(near, near.__getitem__, reach, key)


def _other_facts(fact: Fact, others: Iterable[Fact], reach: Reach, key: str) -> list[Fact]:
    """The other facts in the order of preference."""
    return _by_reach(others, lambda other: other.section == fact.section, reach, key)


def _by_reach(items: Iterable[T], near: Callable[[T], bool], reach: Reach, key: str) -> list[T]:
    """Shuffled, then the near ones first or last as the reach has it."""
    late = {Reach.FAR: near, Reach.ANY: lambda _: False, Reach.NEAR: lambda item: not near(item)}[reach]
    return sorted(_shuffled(items, key), key=late)


def _question(category: Category, fact: Fact, draw: _Draw, wording: str, position: int, level: int) -> Question:
    stem = wording.format(
        subject=fact.subject,
        answer=draw.answer,
        subjects=category.subjects,
        pair=category.pair,
        predicate=category.predicate.format(answer=draw.answer),
    )
    texts = list(draw.wrong)
    texts.insert(position, draw.right)
    options = dict(zip(LETTERS, texts, strict=False))
    content = json.dumps([stem, texts], ensure_ascii=False)
    return Question(
        id=f"medfacts-{category.name}-{_digest(content)[:12]}",
        question=stem,
        options=options,
        answer=LETTERS[position],
        source=f"medfacts/{category.name}",
        level=level,
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shuffled(items: Iterable[T], key: str) -> list[T]:
    random = Random(key)
    return sorted(items, key=lambda _: random.random())


# ------------------------------------------------------------------------------------------------------------ the files
def write(folder: Path, seed: int, **filters) -> dict[str, Path]:
    """Write train.jsonl, heldout_wording.jsonl and heldout_fact.jsonl, each replaced in one move; returns split -> path.

    `filters` are those of `build`.
    """
    splits = build(seed, **filters)
    paths = files_of(folder)
    for split, path in paths.items():
        replace_json_lines(path, map(_row, getattr(splits, split)))
    return paths


def files_of(folder: Path) -> dict[str, Path]:
    """Split -> the file that `write` writes it to."""
    return {field.name: folder / f"{field.name}.jsonl" for field in fields(Splits)}


def _row(question: Question) -> dict[str, object]:
    keys = ("id", "question", "options", "answer", "source", "level")
    return {key: getattr(question, key) for key in keys}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphamed.lab.datasets.medfacts", description="Write the sample questions."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", type=int, nargs="+", metavar="N", choices=LEVELS)
    parser.add_argument("--categories", nargs="+", metavar="NAME", choices=table())
    parser.add_argument("--facts", type=int, metavar="N", help="train on N facts (default: all)")
    parser.add_argument("--copies", type=int, metavar="N", help="questions of a fact in each level")
    filters = vars(parser.parse_args(arguments))
    for split, path in write(filters.pop("folder"), filters.pop("seed"), **filters).items():
        print(f"{split}: {sum(1 for _ in path.open(encoding='utf-8'))} questions in {path}")


if __name__ == "__main__":
    main()
