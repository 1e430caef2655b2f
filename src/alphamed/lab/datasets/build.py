"""Builds a training set from a recipe: read, decide, filter, check against benchmarks, balance, mix, order; then write it
with its card, all files or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alphamed.data.decisions import apply_files
from alphamed.data.describe import describe
from alphamed.data.mcq import short
from alphamed.data.output import beside, check_places, check_suffix, json_writer, question_writer, text_writer, write_all
from alphamed.data.text import counted, is_unspaced, normalised, normalised_option, option_set
from alphamed.errors import DataError
from alphamed.hashing import file_sha256
from alphamed.lab.datasets.card import licences, markdown
from alphamed.lab.datasets.decontaminate import Hit, find_hits
from alphamed.lab.datasets.mixture import (
    Item,
    balanced,
    commonest_answer,
    conflicting,
    drawn,
    filtered,
    mixed,
    relettered,
    shuffled,
)
from alphamed.lab.datasets.read_sources import Built, read, resolve_shared_ids, source_of
from alphamed.lab.datasets.recipe import BalanceRecipe, BuildRecipe, Conflicts, Overlap
from alphamed.records import Question


def check(recipe: BuildRecipe, out: Path, config: Path | None = None, overwrite: bool = False) -> None:
    """Refuse what shows before any question is read; `config` is the file that the recipe came from. Raises ConfigError and
    DataError."""
    check_places(
        {"--out": out, "the card": card_path(out), "the card for people": beside(out, ".card.md")},
        _places_read(recipe) | {"--config": [config]},
        overwrite,
    )
    check_suffix(out)


def build(recipe: BuildRecipe) -> Built:
    """Everything but writing. Raises ConfigError and DataError."""
    from alphamed.evaluation.benchmarks import check_names

    check_names(recipe.against)
    for wanted in recipe.sources:
        source_of(wanted)
    built = Built([])
    for wanted in recipe.sources:
        read(built, wanted, recipe.bad_rows)
    resolve_shared_ids(built, recipe.drop_repeats)
    _decide(built, recipe)
    _resolve_conflicts(built, recipe.conflicts)
    if count := sum(is_unspaced(item.question.question) for item in built.items):
        built.steps.append(
            f"words: {counted(count, 'question')} in a script without blanks between words; there characters "
            f"are counted as words"
        )
    items, dropped = filtered(built.items, recipe.filter)
    built.keep("filter", items)
    built.steps += [f"filter: {count:,} left out by {reason}" for reason, count in sorted(dropped.items())]
    if recipe.drop_repeats:
        _drop_repeats(built)
    benchmarks = _benchmarks(built, recipe)
    if benchmarks and recipe.overlap == Overlap.DROP:
        _drop_overlap(built, find_hits([item.question for item in built.items], benchmarks, recipe.similarity))
    _draw(built, recipe)
    if not built.items:
        raise DataError(
            f"no question is left ({'; '.join(built.steps) or 'the sources hold none'}); loosen the filter or the quotas"
        )
    if benchmarks and recipe.overlap != Overlap.DROP:
        _check_overlap(
            built, find_hits([item.question for item in built.items], benchmarks, recipe.similarity), recipe.overlap
        )
    if recipe.shuffle:
        built.items = shuffled(built.items, recipe.seed)
    if recipe.shuffle_options:
        built.items, as_they_were = relettered(built.items, recipe.seed)
        referring = f"; {as_they_were:,} left as they were, their options refer to one another" if as_they_were else ""
        built.steps.append(f"letters: options put in a new order{referring}")
    return built


def write(built: Built, recipe: BuildRecipe, out: Path, command: str) -> dict[str, Any]:
    """Write the set to `out` (.jsonl or .parquet), and its card beside it as NAME.card.json and NAME.card.md. Returns the
    card."""
    questions = [item.question for item in built.items]
    extras = [
        {"licence": item.licence}
        | ({"overlaps": built.overlaps[item.question.id]} if item.question.id in built.overlaps else {})
        for item in built.items
    ]
    card = _card(built, recipe, out, command)
    write_set = question_writer(out, questions, extras)

    def write_and_hash(path: Path) -> None:
        write_set(path)
        card["file_sha256"] = file_sha256(path)

    writers = (write_and_hash, lambda path: json_writer(card)(path), lambda path: text_writer(markdown(card))(path))
    write_all(dict(zip(files_of(out), writers, strict=True)))
    return card


def files_of(out: Path) -> tuple[Path, ...]:
    """All that `write` writes, in this order: the set and its two cards."""
    return out, card_path(out), beside(out, ".card.md")


def card_path(out: Path) -> Path:
    return beside(out, ".card.json")


def _card(built: Built, recipe: BuildRecipe, out: Path, command: str) -> dict[str, Any]:
    kept = licences(built.items)
    for name, source in built.sources.items():
        source |= {"kept": sum(kept.get(name, {}).values()), "licences": kept.get(name, {})}
    counts = {
        "read": sum(source["read"] for source in built.sources.values()),
        "left_out": built.left_out,
        "kept": len(built.items),
    }
    return {
        "name": out.stem,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "alphamed": _version(),
        "command": command,
        "file": out.name,
        "set": describe([item.question for item in built.items]),
        "sources": built.sources,
        "counts": counts,
        "steps": built.steps,
        "decisions": built.decisions,
        "benchmarks": built.benchmarks,
        "files": files_read(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def files_read(recipe: BuildRecipe) -> dict[str, str]:
    """Every local file that a recipe reads -> its SHA-256; of a folder all files in it. OSError where one is gone."""
    places = [place for part in _places_read(recipe).values() for place in part if place is not None]
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return {str(file): file_sha256(file) for file in files if not file.is_dir()}


def _places_read(recipe: BuildRecipe) -> dict[str, list[Path | None]]:
    """Part of the recipe -> the local files and folders it reads."""
    from alphamed.evaluation.benchmarks import local_copy

    return {
        "a source": [wanted.path for wanted in recipe.sources],
        "levels": [wanted.levels for wanted in recipe.sources],
        "decisions": list(recipe.decisions),
        "against": [local_copy(name) for name in recipe.against],
    }


def _version() -> str:
    try:
        return version("alphamed")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


# ---------------------------------------------------------------------------------------------------------------- steps
def _resolve_conflicts(built: Built, conflicts: Conflicts) -> None:
    """Refuse or leave out questions that have two keys. Raises DataError."""
    groups = conflicting(built.items)
    if not groups:
        return
    first = groups[0][0].question
    other = next(
        item.question
        for item in groups[0]
        if normalised_option(item.question.options[item.question.answer]) != normalised_option(first.options[first.answer])
    )
    both = f"{first.id} ({short(first.options[first.answer], 40)}) and {other.id} ({short(other.options[other.answer], 40)})"
    if conflicts == Conflicts.REFUSE:
        more = f"; {counted(len(groups) - 1, 'more such question')}" if len(groups) > 1 else ""
        raise DataError(
            f"{both} are one question with different keys{more}; decide which is right (alphamed data suspects, "
            f"--decisions), or leave all versions out with conflicts=drop"
        )
    gone = {item.question.id for group in groups for item in group}
    count = built.keep("conflicts", [item for item in built.items if item.question.id not in gone])
    built.steps.append(
        f"conflicts: {count:,} left out that are {counted(len(groups), 'question')} with different keys (the first: {both})"
    )


def _decide(built: Built, recipe: BuildRecipe) -> None:
    questions, told = apply_files([item.question for item in built.items], recipe.decisions, recipe.decisions_version)
    after = {question.id: question for question in questions}
    built.keep(
        "decisions", [replace(item, question=after[item.question.id]) for item in built.items if item.question.id in after]
    )
    built.decisions = list(told)
    built.steps += [
        f"decisions: {one['file']} version {one['version']}: {one['fixed']:,} fixed, {one['quarantined']:,} "
        f"quarantined and left out, {one['stale']:,} stale, {one['open']:,} open"
        + (f", {one['absent']:,} on ids that no question has" if one["absent"] else "")
        for one in told
    ]


def _drop_repeats(built: Built) -> None:
    seen: set[tuple] = set()
    kept = []
    for item in built.items:
        q = item.question
        key = (normalised(q.question), normalised(q.context or ""), option_set(q.options), normalised(q.options[q.answer]))
        if key not in seen:
            seen.add(key)
            kept.append(item)
    built.keep("repeats", kept)
    built.steps.append(f"repeats: {built.left_out['repeats']:,} left out")


def _draw(built: Built, recipe: BuildRecipe) -> None:
    """Balance, quotas and size. What quotas and size draw may be less balanced than what they draw from, so that what is
    told of balance is counted at the end."""
    cut = [built.keep("balance", balanced(built.items, wanted, recipe.seed)[0]) for wanted in recipe.balance]
    place = len(built.steps)
    items, missing = mixed(built.items, recipe.quotas, recipe.seed, recipe.short)
    count = built.keep("quotas", items)
    if recipe.quotas:
        built.steps.append(f"quotas: {count:,} left out that no quota took")
    built.steps += [f"quotas: {text}" for text in missing]
    count = built.keep("size", drawn(built.items, recipe.size, recipe.seed))
    if recipe.size is not None:
        built.steps.append(f"size: {count:,} left out over {recipe.size:,} in all")
    built.steps[place:place] = [_balance_told(built.items, *one) for one in zip(recipe.balance, cut)]


def _balance_told(items: Sequence[Item], wanted: BalanceRecipe, cut: int) -> str:
    found = commonest_answer(items, wanted.source)
    told = f"balance: {cut:,} questions of {wanted.source} left out"
    if found is None:
        return f"{told}; none of it is in the set"
    text, share = found
    held = "at most" if share <= wanted.max_share * (1 + 1e-12) else "which is more than"
    why = "" if held == "at most" else "; quotas and size draw after balance"
    return (
        f"{told}; in the set its commonest answer, {short(text, 40)}, makes up {share:.1%}, {held} the "
        f"{wanted.max_share:.1%} asked for{why}"
    )


def _benchmarks(built: Built, recipe: BuildRecipe) -> dict[str, Sequence[Question]]:
    from alphamed.evaluation.benchmarks import load_benchmarks

    loaded = load_benchmarks(recipe.against, recipe.bad_rows)
    built.benchmarks = [
        {
            "name": one.name,
            "place": one.place,
            "questions": len(one.questions),
            "complaint": one.complaint,
            "bad_rows": len(one.problems),
            "reading": one.reading.plain(),
        }
        for one in loaded
    ]
    built.steps += [f"reading {one.name} (against): {note}" for one in loaded for note in one.reading.notes()]
    return {one.name: one.questions for one in loaded}


def _drop_overlap(built: Built, hits: Sequence[Hit]) -> None:
    found = {hit.train.id for hit in hits}
    count = built.keep("overlap", [item for item in built.items if item.question.id not in found])
    built.steps.append(f"overlap: {count:,} questions left out that {_named(hits) or 'no benchmark'} hold too")


def _check_overlap(built: Built, hits: Sequence[Hit], overlap: Overlap) -> None:
    if not hits:
        built.steps.append("overlap: none with the benchmarks")
        return
    if overlap == Overlap.REFUSE:
        first = f"{hits[0].train.id} is {hits[0].against.id}, {hits[0].rule}"
        raise DataError(
            f"{len({hit.train.id for hit in hits}):,} questions of the set are in {_named(hits)} too (the "
            f"first: {first}); leave them out with overlap=drop, or keep and mark them with overlap=flag"
        )
    for hit in hits:
        told = f"{hit.benchmark}:{hit.against.id} ({hit.rule})"
        built.overlaps[hit.train.id] = "; ".join(filter(None, [built.overlaps.get(hit.train.id), told]))
    built.steps.append(f"overlap: {len(built.overlaps):,} questions kept and marked that {_named(hits)} hold too")


def _named(hits: Sequence[Hit]) -> str:
    return ", ".join(dict.fromkeys(hit.benchmark for hit in hits))
