"""The shipped sample: seeded multiple-choice questions made from the table of medical facts (`medfacts.yaml`).

Questions come in six levels of rising difficulty (`LEVELS`) and three sets (`build`): for training, held out by wording
(facts seen in training, sentences not) and held out by fact (facts whose subjects occur nowhere in training). Wrong
options are of the same category and never true or arguable (`Fact.allows`), so that exactly one option is right.

Plain and reversed questions come in closed groups (medfacts_groups.py): wrong options are right answers of other facts of
the set, each as often right as any other, so that whoever does not read the question gains nothing over chance. In the
negated forms, EXCEPT and PAIRS, the options are statements of their own, one of them false: that shows without the question.

A seed gives the same bytes on every Python version and platform: choices use only `Random(text).random()`, the sequence
that Python guarantees (that of `shuffle` and `sample` it does not).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import TypeVar

from alphamed.files import replace_json_lines
from alphamed.hashing import draw as draw_key
from alphamed.lab.datasets.medfacts_groups import Groups, Reach, choose, other_answers, shuffled, split_facts
from alphamed.lab.datasets.medfacts_table import FEWEST_OPTIONS, Category, Fact, Form, table
from alphamed.records import Question

T = TypeVar("T")
LETTERS = "ABCDEFGHIJ"
CLOSED = (Form.ASK, Form.REVERSE)
"""Forms that are asked in closed groups."""
ARRANGEMENTS = 40  # of a group's options that are tried for one that makes new questions


# -------------------------------------------------------------------------------------------------------- the questions
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
    asked: tuple[Fact, ...]  # whose answers and subjects are the wrong options of closed groups, too
    offered: tuple[Fact, ...]  # whose answers may make a false pair


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

    `levels` and `categories` choose among the questions of the full sets and change none of them. `facts` is the number
    of facts to train on, dealt evenly to the categories, at least 4 each (`heldout_wording` asks about the same ones):
    wrong options come from these alone, and no fact is held out that shares its answer with one of them, which would be known
    by what it has in common with it. `copies` is the number of questions of a fact in each level, instead of that in
    LEVELS; some facts may be asked more often, to complete a group, and fewer are made once none is new. Raises
    ValueError where a level or category does not exist, or where there are not so many facts, or none are left to hold out.
    """
    check(levels, categories, facts)
    parts = {
        name: split_facts(category.facts, f"{seed}/hold out/{name}")
        for name, category in table().items()
        if categories is None or name in categories
    }
    trained = {name: trained for name, (_, trained) in parts.items()}
    if facts is not None:
        trained = choose(trained, facts, f"{seed}/facts")
    answers = {fact.answer for chosen in trained.values() for fact in chosen}
    splits: dict[str, list[Question]] = {field.name: [] for field in fields(Splits)}
    for name, (held_out, _) in parts.items():
        asked, offered = trained.get(name, ()), table()[name].facts
        if facts is not None:
            held_out = offered = other_answers(offered, held_out, asked, answers, f"{seed}/other answers/{name}")
        for material in (
            _Material("train", asked, asked),
            _Material("heldout_wording", asked, asked),
            _Material("heldout_fact", held_out, offered),
        ):
            made = _Made(seed, table()[name], material)
            for number in range(1, 1 + max(levels or LEVELS)):  # what one level asks depends on those before it
                splits[material.split] += [
                    question for question in made.level(number, copies) if levels is None or number in levels
                ]
    if facts is not None and not splits["heldout_fact"]:
        raise ValueError(
            f"medfacts: facts: {facts} leave none to hold out whose answer is not one of theirs; ask for fewer facts or more "
            f"categories"
        )
    return Splits(
        **{
            split: tuple(sorted(questions, key=lambda question: _digest(f"{seed}/{question.id}")))
            for split, questions in splits.items()
        }
    )


def check(levels: Collection[int] | None, categories: Collection[str] | None, facts: int | None) -> None:
    """Raises ValueError where a level or category does not exist, or where the facts make no question."""
    _check("level", levels, LEVELS)
    _check("category", categories, table())
    if facts is not None and facts < FEWEST_OPTIONS:
        raise ValueError(
            f"medfacts: facts: {facts} make no question with {FEWEST_OPTIONS} options; give {FEWEST_OPTIONS} or more"
        )


def _check(field: str, chosen: Collection | None, known: Iterable) -> None:
    if unknown := set(chosen or ()) - set(known):
        raise ValueError(f"medfacts: {field} {sorted(unknown)} unknown; choose from {list(known)}")


class _Made:
    """Makes the questions of one set and category, level by level; none comes twice."""

    def __init__(self, seed: int, category: Category, material: _Material):
        self._seed, self._category, self._material = seed, category, material
        self._ids: set[str] = set()

    def level(self, number: int, copies: int | None) -> Iterator[Question]:
        level = LEVELS[number]
        stream = f"{self._seed}/{self._material.split}/{self._category.name}/{number}"
        wanted: dict[Form, Counter[Fact]] = {form: Counter() for form in CLOSED}
        letters: dict[int, list[int]] = {}  # per number of options, a shuffled deck of positions
        for copy in range(level.copies if copies is None else copies):
            for turn, fact in enumerate(self._material.asked):
                draw = self._first_draw(fact, level, turn, f"{stream}/{copy}/{fact.subject}")
                if isinstance(draw, Form):
                    wanted[draw][fact] += 1
                    continue
                size = 1 + len(draw.wrong)
                if not letters.get(size):
                    letters[size] = shuffled(range(size), f"{stream}/{copy}/letters/{size}/{turn}")
                texts = list(draw.wrong)
                texts.insert(letters[size].pop(), draw.right)
                yield from self._new([self._question(fact, draw.form, draw.answer, draw.right, texts, copy, number)])
        for form in CLOSED:
            yield from self._closed(form, wanted[form], number, f"{stream}/{form}")

    def _first_draw(self, fact: Fact, level: Level, turn: int, key: str) -> _Draw | Form:
        """The question of the first form that the fact allows; for those that are made in groups the form alone."""
        first = turn % len(level.forms)
        for form in (*level.forms[first:], *level.forms[:first]):
            if form in CLOSED:
                return form
            draw = _DRAWS[form](fact, self._material, level, key)
            if draw is not None and 1 + len(draw.wrong) >= FEWEST_OPTIONS:
                return draw
        return Form.ASK

    def _closed(self, form: Form, wanted: Counter[Fact], number: int, stream: str) -> Iterator[Question]:
        """Each fact at least as often as wanted, in groups: the facts of a group are asked one after the other with the
        same options in the same order, so that each option is right once."""
        times: Counter[Fact] = Counter()
        groups = Groups(self._material.asked)
        for turn in count():
            missing = [fact for fact in wanted if times[fact] < wanted[fact]]
            if not missing:
                return
            ahead = {fact: times[fact] - wanted[fact] for fact in self._material.asked}
            first = min(missing, key=lambda fact: (ahead[fact], draw_key(f"{stream}/{turn}", fact.subject)))
            group = groups.around(first, LEVELS[number].options, LEVELS[number].reach, ahead, f"{stream}/{turn}")
            for order in range(ARRANGEMENTS):
                arranged = shuffled(group, f"{stream}/{turn}/{order}")
                texts = [fact.answer if form == Form.ASK else fact.subject for fact in arranged]
                asked = [
                    self._question(fact, form, fact.answer, text, texts, times[fact], number)
                    for fact, text in zip(arranged, texts, strict=True)
                ]
                if new := self._new(asked):
                    yield from new
                    break
            else:  # no new question is left of these facts
                wanted = Counter({fact: wanted[fact] for fact in wanted if fact not in group})
            times.update(group)

    def _new(self, questions: list[Question]) -> list[Question]:
        """The questions, where none of them was made before; else none."""
        if any(question.id in self._ids for question in questions):
            return []
        self._ids.update(question.id for question in questions)
        return questions

    def _question(
        self, fact: Fact, form: Form, answer: str, right: str, texts: Sequence[str], copy: int, number: int
    ) -> Question:
        category, split = self._category, self._material.split
        wordings = category.wordings[form]
        choices = wordings.heldout if split == "heldout_wording" else wordings.train
        order = shuffled(choices, f"{self._seed}/{split}/{category.name}/{number}/{fact.subject}")
        stem = order[copy % len(order)].format(
            subject=fact.subject,
            answer=answer,
            subjects=category.subjects,
            pair=category.pair,
            predicate=category.predicate.format(answer=answer),
        )
        content = json.dumps([stem, list(texts)], ensure_ascii=False)
        return Question(
            id=f"medfacts-{category.name}-{_digest(content)[:12]}",
            question=stem,
            options=dict(zip(LETTERS, texts, strict=False)),
            answer=LETTERS[texts.index(right)],
            source=f"medfacts/{category.name}",
            level=number,
        )


def _draw_except(fact: Fact, material: _Material, level: Level, key: str) -> _Draw | None:
    """The asked fact is the exception; the others, of its own section, share an answer that cannot be true of it."""
    for answer in _wrong_answers(fact, material.asked, level.reach, key):
        sharing = [other.subject for other in material.asked if other.answer == answer and other.section == fact.section]
        if len(sharing) >= FEWEST_OPTIONS - 1:
            return _Draw(Form.EXCEPT, answer, fact.subject, tuple(shuffled(sharing, key)[: level.options - 1]))
    return None


def _draw_pairs(fact: Fact, material: _Material, level: Level, key: str) -> _Draw:
    """The asked fact makes the false pair, with one of at least two wrong answers."""
    others = _by_reach(
        (other for other in material.asked if other is not fact),
        lambda other: other.section == fact.section,
        level.reach,
        key,
    )
    wrong = _wrong_answers(fact, material.offered, level.reach, key)
    # training and held-out wordings have no false pair in common: nothing else would be needed to know it again
    halves = sorted(wrong, key=lambda answer: draw_key(fact.subject, answer))
    swapped = min(halves[material.split == "heldout_wording" :: 2], key=wrong.index)
    return _Draw(
        Form.PAIRS,
        fact.answer,
        f"{fact.subject} - {swapped}",
        tuple(f"{o.subject} - {o.answer}" for o in others[: level.options - 1]),
    )


_DRAWS = {Form.EXCEPT: _draw_except, Form.PAIRS: _draw_pairs}


def _wrong_answers(fact: Fact, offered: Iterable[Fact], reach: Reach, key: str) -> list[str]:
    """The distinct answers of `offered` that cannot be true of the fact's subject, in the order of preference."""
    near: dict[str, bool] = {}
    for other in offered:
        if not fact.allows(other.answer):
            near[other.answer] = near.get(other.answer, False) or other.section == fact.section
    return _by_reach(near, near.__getitem__, reach, key)


def _by_reach(items: Iterable[T], near: Callable[[T], bool], reach: Reach, key: str) -> list[T]:
    """Shuffled, then the near ones first or last as the reach has it."""
    late = {Reach.FAR: near, Reach.ANY: lambda _: False, Reach.NEAR: lambda item: not near(item)}[reach]
    return sorted(shuffled(items, key), key=late)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
    parser.add_argument("--facts", type=int, metavar="N", help="number of facts to train on (default: all)")
    parser.add_argument("--copies", type=int, metavar="N", help="minimum number of questions per fact in each level")
    filters = vars(parser.parse_args(arguments))
    try:
        paths = write(filters.pop("folder"), filters.pop("seed"), **filters)
    except ValueError as error:
        parser.error(str(error))
    for split, path in paths.items():
        print(f"{split}: {sum(1 for _ in path.open(encoding='utf-8'))} questions in {path}")


if __name__ == "__main__":
    main()
