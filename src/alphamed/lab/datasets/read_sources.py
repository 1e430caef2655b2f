"""Reads the sources of a training set: rows of public sets and files into one pool, with their licences and annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.data import adapters
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.mcq import RawRow, RowProblem, check_questions, short
from alphamed.data.reading import interpret
from alphamed.data.sources import read_rows
from alphamed.data.tables import rows
from alphamed.data.text import counted, fingerprint
from alphamed.data.upstream import QuestionSource, read_upstream
from alphamed.errors import ConfigError, DataError
from alphamed.hashing import file_sha256
from alphamed.lab.datasets.catalogue import SOURCES
from alphamed.lab.datasets.mixture import PoolItem
from alphamed.lab.datasets.recipe import SourceRecipe
from alphamed.records import Question

SHOWN_PROBLEMS = 20


@dataclass
class QuestionPool:
    """A set while it is built: the remaining items, and in `steps` a line for each thing done. Only `keep` removes items."""

    items: list[PoolItem]
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    """Step -> how many questions it left out. Together with `items` they make up what was read."""
    overlaps: dict[str, str] = field(default_factory=dict)
    """Question id -> benchmark questions it repeats, where `overlap: flag` keeps it."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, step: str, items: list[PoolItem]) -> int:
        """Continue with these of the items; returns how many were left out."""
        count = len(self.items) - len(items)
        self.left_out[step] = self.left_out.get(step, 0) + count
        self.items = items
        return count


def source_of(recipe: SourceRecipe) -> QuestionSource:
    """The row of the catalogue with the recipe's changes, or a set in the schema under the user's own name."""
    known = SOURCES.get(recipe.name)
    if known is not None:
        return replace(
            known,
            hub=recipe.hub or known.hub,
            config=recipe.config or known.config,
            split=recipe.split or known.split,
            revision=recipe.revision or (None if recipe.hub else known.revision),
            expected=None if recipe.split or recipe.hub else known.expected,
            answer=None if recipe.hub or recipe.revision else known.answer,
        )
    if recipe.path is None and recipe.hub is None:
        raise ConfigError(
            f"sources: {recipe.name!r} is not known and has neither path nor hub; choose from "
            f"{', '.join(SOURCES)}, or give one of the two"
        )
    return QuestionSource(
        recipe.name,
        recipe.hub or "",
        recipe.revision,
        recipe.config,
        recipe.split or "train",
        adapters.schema,
        recipe.licence or "not stated",
        letters="",
    )


def read(pool: QuestionPool, recipe: SourceRecipe, bad_rows: BadRows) -> None:
    """Add the questions of one source to the pool."""
    source = source_of(recipe)
    annotations = annotations_of(recipe.levels) if recipe.levels else None
    rows, reading = interpret(_rows(source, recipe), recipe.answer or (source.answer if recipe.path is None else None))
    questions, problems = check_questions(rows)
    if problems and bad_rows == BadRows.REFUSE:
        raise DataError(_refusal(problems), problems)
    if not questions:
        bad = f", all {len(problems)} rows are bad (the first: {problems[0]})" if problems else ""
        raise DataError(f"{recipe.name}: no usable question{bad}; fix the data")
    if annotations is not None:
        pool.steps += _counted(annotations, questions, recipe)
        questions = [replace(q, **annotations.get(q.id, {})) for q in questions]
    licence, own_licences = recipe.licence or source.licence, _licences(rows)
    pool.items += [PoolItem(q, recipe.name, own_licences.get(q.id, licence)) for q in questions]
    place = str(recipe.path) if recipe.path else f"{source.hub}@{source.revision or 'newest'}, split {source.split}"
    pool.sources[recipe.name] = {
        "place": place,
        "read": len(questions),
        "bad_rows": len(problems),
        "note": _note(source, len(questions)),
        "reading": reading.plain(),
        "sha256": file_sha256(recipe.path) if recipe.path and recipe.path.is_file() else None,
        "problems": [str(problem) for problem in problems[:SHOWN_PROBLEMS]],
    }
    pool.steps += [f"reading {recipe.name}: {note}" for note in reading.notes()]
    if problems:
        pool.steps.append(f"bad rows: {len(problems):,} of {recipe.name} left out (the first: {problems[0]})")


def _refusal(problems: Sequence[RowProblem]) -> str:
    more = f"; {counted(len(problems) - 1, 'more bad row')}" if len(problems) > 1 else ""
    return f"{problems[0]}{more}; fix the data, or leave bad rows out with bad_rows=skip"


def _note(source: QuestionSource, count: int) -> str:
    if source.expected is not None and count != source.expected:
        return f"{count:,} usable questions, {source.expected:,} were expected. {source.note}".strip()
    return source.note


def _rows(source: QuestionSource, recipe: SourceRecipe) -> Iterator[RawRow]:
    """The rows, unchanged; a file under the user's own name is in the schema."""
    if recipe.name not in SOURCES and recipe.path is not None and not recipe.path.is_dir():
        return read_rows(recipe.path)
    return read_upstream(source, recipe.path)


def _licences(rows: Sequence[RawRow]) -> dict[str, str]:
    """Id -> licence of the rows that have their own."""
    values = [row.value for row in rows if isinstance(row.value, Mapping)]
    return {str(value.get("id")).strip(): value["licence"] for value in values if isinstance(value.get("licence"), str)}


def annotations_of(path: Path) -> dict[str, dict[str, int]]:
    """id -> field -> value of the attributes in a file of rows; ids without any are left out. Raises DataError."""
    try:
        annotations = {
            row["id"]: {
                attribute.field: attribute.checked(row[attribute.field])
                for attribute in ATTRIBUTES
                if (attribute.field in row or attribute.field == "level") and row[attribute.field] is not None
            }
            for row in _annotated_rows(path)
        }
    except DataError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: rows need id and level ({type(error).__name__}: {error}); annotate again") from None
    annotations = {i: values for i, values in annotations.items() if values}
    if not annotations:
        raise DataError(
            f"{path}: holds no {' and no '.join(attribute.field for attribute in ATTRIBUTES)} of any question; annotate "
            f"again, or name no levels"
        )
    return annotations


def _annotated_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for row in rows(path):
        if row.problem or not isinstance(row.value, Mapping):
            problem = row.problem or f"{short(row.value)} is no row with id and level"
            raise DataError(f"{row.where}: {problem}; annotate again")
        yield row.value


def _counted(annotations: Mapping[str, Mapping[str, int]], questions: Sequence[Question], recipe: SourceRecipe) -> list[str]:
    """A line for each attribute: how many questions get it. Raises DataError where the annotations are of another set."""
    if not any(q.id in annotations for q in questions):
        raise DataError(
            f"{recipe.levels}: has no id of {recipe.name} (the first there: {next(iter(annotations), 'none')}, "
            f"here: {questions[0].id}); annotate this set"
        )
    counts = {
        attribute.axis: sum(attribute.field in annotations.get(q.id, {}) for q in questions) for attribute in ATTRIBUTES
    }
    return [
        f"{axis}: {count:,} of {len(questions):,} questions of {recipe.name} from {recipe.levels}"
        for axis, count in counts.items()
        if count or axis == "levels"
    ]


def resolve_shared_ids(pool: QuestionPool, drop_repeats: bool) -> None:
    """Refuse ids that two sources have. Of the same question, which has one made id, `drop_repeats` keeps the first."""
    first: dict[str, PoolItem] = {}
    unique = []
    for item in pool.items:
        other = first.setdefault(item.question.id, item)
        if other is item:
            unique.append(item)
        elif fingerprint(other.question) != fingerprint(item.question):
            raise DataError(
                f"id {item.question.id!r} is in {other.origin} and in {item.origin}; give the questions ids of their own"
            )
        elif not drop_repeats:
            raise DataError(
                f"question {item.question.id!r} is in {other.origin} and in {item.origin}; keep one of the "
                f"two with drop_repeats=true, or give them ids of their own"
            )
    if len(unique) < len(pool.items):
        pool.keep("repeats", unique)
