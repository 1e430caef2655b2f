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
    PoolItem,
    balanced,
    commonest_answer,
    conflicting,
    drawn,
    filtered,
    mixed,
    relettered,
    shuffled,
)
from alphamed.lab.datasets.read_sources import QuestionPool, read, resolve_shared_ids, source_of
from alphamed.lab.datasets.recipe import BalanceRecipe, BuildRecipe, Conflicts, Overlap
from alphamed.records import Question


def check(recipe: BuildRecipe, out: Path, config: Path | None = None, overwrite: bool = False) -> None:
    """Refuse mistakes that can be seen before any question is read; `config`: the recipe's file. Raises ConfigError and
    DataError."""
    check_places(
        {"--out": out, "the card": card_path(out), "the card for people": beside(out, ".card.md")},
        _places_read(recipe) | {"--config": [config]},
        overwrite,
    )
    check_suffix(out)


def build(recipe: BuildRecipe) -> QuestionPool:
    """Everything except writing. Raises ConfigError and DataError."""
    from alphamed.evaluation.benchmarks import check_names

    check_names(recipe.against)
    for source in recipe.sources:
        source_of(source)
    pool = QuestionPool([])
    for source in recipe.sources:
        read(pool, source, recipe.bad_rows)
    resolve_shared_ids(pool, recipe.drop_repeats)
    _decide(pool, recipe)
    _resolve_conflicts(pool, recipe.conflicts)
    if count := sum(is_unspaced(item.question.question) for item in pool.items):
        pool.steps.append(
            f"words: {counted(count, 'question')} in a script without spaces between words; there characters "
            f"are counted as words"
        )
    items, dropped = filtered(pool.items, recipe.filter)
    pool.keep("filter", items)
    pool.steps += [f"filter: {count:,} left out by {reason}" for reason, count in sorted(dropped.items())]
    if recipe.drop_repeats:
        _drop_repeats(pool)
    benchmarks = _benchmarks(pool, recipe)
    if benchmarks and recipe.overlap == Overlap.DROP:
        _drop_overlap(pool, find_hits([item.question for item in pool.items], benchmarks, recipe.similarity))
    _draw(pool, recipe)
    if not pool.items:
        raise DataError(
            f"no question is left ({'; '.join(pool.steps) or 'the sources hold none'}); loosen the filter or the quotas"
        )
    if benchmarks and recipe.overlap != Overlap.DROP:
        _check_overlap(
            pool, find_hits([item.question for item in pool.items], benchmarks, recipe.similarity), recipe.overlap
        )
    if recipe.shuffle:
        pool.items = shuffled(pool.items, recipe.seed)
    if recipe.shuffle_options:
        pool.items, unchanged = relettered(pool.items, recipe.seed)
        referring = f"; {unchanged:,} left as they were, their options refer to one another" if unchanged else ""
        pool.steps.append(f"letters: options put in a new order{referring}")
    return pool


def write(pool: QuestionPool, recipe: BuildRecipe, out: Path, command: str) -> dict[str, Any]:
    """Write the set to `out` (.jsonl or .parquet), and its card next to it as NAME.card.json and NAME.card.md. Returns the
    card."""
    questions = [item.question for item in pool.items]
    extras = [
        {"licence": item.licence}
        | ({"overlaps": pool.overlaps[item.question.id]} if item.question.id in pool.overlaps else {})
        for item in pool.items
    ]
    card = _card(pool, recipe, out, command)
    write_set = question_writer(out, questions, extras)

    def write_and_hash(path: Path) -> None:
        write_set(path)
        card["file_sha256"] = file_sha256(path)

    writers = (write_and_hash, lambda path: json_writer(card)(path), lambda path: text_writer(markdown(card))(path))
    write_all(dict(zip(files_of(out), writers, strict=True)))
    return card


def files_of(out: Path) -> tuple[Path, ...]:
    """The files that `write` writes, in this order: the set and its two cards."""
    return out, card_path(out), beside(out, ".card.md")


def card_path(out: Path) -> Path:
    return beside(out, ".card.json")


def _card(pool: QuestionPool, recipe: BuildRecipe, out: Path, command: str) -> dict[str, Any]:
    by_source = licences(pool.items)
    for name, source in pool.sources.items():
        source |= {"kept": sum(by_source.get(name, {}).values()), "licences": by_source.get(name, {})}
    counts = {
        "read": sum(source["read"] for source in pool.sources.values()),
        "left_out": pool.left_out,
        "kept": len(pool.items),
    }
    return {
        "name": out.stem,
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "alphamed": _version(),
        "command": command,
        "file": out.name,
        "set": describe([item.question for item in pool.items]),
        "sources": pool.sources,
        "counts": counts,
        "steps": pool.steps,
        "decisions": pool.decisions,
        "benchmarks": pool.benchmarks,
        "files": files_read(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def files_read(recipe: BuildRecipe) -> dict[str, str]:
    """Every local file that a recipe reads -> its SHA-256; of a folder all files in it. OSError where one is missing."""
    places = [place for part in _places_read(recipe).values() for place in part if place is not None]
    files = [file for place in places for file in (sorted(place.rglob("*")) if place.is_dir() else [place])]
    return {str(file): file_sha256(file) for file in files if not file.is_dir()}


def _places_read(recipe: BuildRecipe) -> dict[str, list[Path | None]]:
    """Part of the recipe -> the local files and folders it reads."""
    from alphamed.evaluation.benchmarks import local_copy

    return {
        "a source": [source.path for source in recipe.sources],
        "levels": [source.levels for source in recipe.sources],
        "decisions": list(recipe.decisions),
        "against": [local_copy(name) for name in recipe.against],
    }


def _version() -> str:
    try:
        return version("alphamed")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


# ---------------------------------------------------------------------------------------------------------------- steps
def _resolve_conflicts(pool: QuestionPool, conflicts: Conflicts) -> None:
    """Refuse or leave out questions that have two keys. Raises DataError."""
    groups = conflicting(pool.items)
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
    count = pool.keep("conflicts", [item for item in pool.items if item.question.id not in gone])
    pool.steps.append(
        f"conflicts: {count:,} left out that are {counted(len(groups), 'question')} with different keys (the first: {both})"
    )


def _decide(pool: QuestionPool, recipe: BuildRecipe) -> None:
    questions, summaries = apply_files([item.question for item in pool.items], recipe.decisions, recipe.decisions_version)
    after = {question.id: question for question in questions}
    pool.keep(
        "decisions", [replace(item, question=after[item.question.id]) for item in pool.items if item.question.id in after]
    )
    pool.decisions = list(summaries)
    pool.steps += [
        f"decisions: {summary['file']} version {summary['version']}: {summary['fixed']:,} fixed, {summary['quarantined']:,} "
        f"quarantined and left out, {summary['stale']:,} stale, {summary['open']:,} open"
        + (f", {summary['absent']:,} on ids that no question has" if summary["absent"] else "")
        for summary in summaries
    ]


def _drop_repeats(pool: QuestionPool) -> None:
    seen: set[tuple] = set()
    unique = []
    for item in pool.items:
        q = item.question
        key = (normalised(q.question), normalised(q.context or ""), option_set(q.options), normalised(q.options[q.answer]))
        if key not in seen:
            seen.add(key)
            unique.append(item)
    pool.keep("repeats", unique)
    pool.steps.append(f"repeats: {pool.left_out['repeats']:,} left out")


def _draw(pool: QuestionPool, recipe: BuildRecipe) -> None:
    """Balance, quotas and size. Quotas and size may draw a less balanced set than they draw from, so that the balance is
    reported as counted at the end."""
    cut = [pool.keep("balance", balanced(pool.items, rule, recipe.seed)[0]) for rule in recipe.balance]
    place = len(pool.steps)
    items, missing = mixed(pool.items, recipe.quotas, recipe.seed, recipe.short)
    count = pool.keep("quotas", items)
    if recipe.quotas:
        pool.steps.append(f"quotas: {count:,} left out that no quota took")
    pool.steps += [f"quotas: {text}" for text in missing]
    count = pool.keep("size", drawn(pool.items, recipe.size, recipe.seed))
    if recipe.size is not None:
        pool.steps.append(f"size: {count:,} left out over {recipe.size:,} in all")
    pool.steps[place:place] = [_balance_step(pool.items, rule, count) for rule, count in zip(recipe.balance, cut)]


def _balance_step(items: Sequence[PoolItem], rule: BalanceRecipe, cut: int) -> str:
    commonest = commonest_answer(items, rule.source)
    step = f"balance: {cut:,} questions of {rule.source} left out"
    if commonest is None:
        return f"{step}; none of it is in the set"
    text, share = commonest
    comparison = "at most" if share <= rule.max_share * (1 + 1e-12) else "which is more than"
    reason = "" if comparison == "at most" else "; quotas and size draw after balance"
    return (
        f"{step}; in the set its commonest answer, {short(text, 40)}, makes up {share:.1%}, {comparison} the "
        f"{rule.max_share:.1%} asked for{reason}"
    )


def _benchmarks(pool: QuestionPool, recipe: BuildRecipe) -> dict[str, Sequence[Question]]:
    from alphamed.evaluation.benchmarks import load_benchmarks

    loaded = load_benchmarks(recipe.against, recipe.bad_rows)
    pool.benchmarks = [
        {
            "name": benchmark.name,
            "place": benchmark.place,
            "questions": len(benchmark.questions),
            "complaint": benchmark.complaint,
            "bad_rows": len(benchmark.problems),
            "reading": benchmark.reading.plain(),
        }
        for benchmark in loaded
    ]
    pool.steps += [
        f"reading {benchmark.name} (against): {note}" for benchmark in loaded for note in benchmark.reading.notes()
    ]
    return {benchmark.name: benchmark.questions for benchmark in loaded}


def _drop_overlap(pool: QuestionPool, hits: Sequence[Hit]) -> None:
    overlapping = {hit.train.id for hit in hits}
    count = pool.keep("overlap", [item for item in pool.items if item.question.id not in overlapping])
    pool.steps.append(f"overlap: {count:,} questions left out that {_named(hits) or 'no benchmark'} hold too")


def _check_overlap(pool: QuestionPool, hits: Sequence[Hit], overlap: Overlap) -> None:
    if not hits:
        pool.steps.append("overlap: none with the benchmarks")
        return
    if overlap == Overlap.REFUSE:
        first = f"{hits[0].train.id} is {hits[0].against.id}, {hits[0].rule}"
        raise DataError(
            f"{len({hit.train.id for hit in hits}):,} questions of the set are in {_named(hits)} too (the "
            f"first: {first}); leave them out with overlap=drop, or keep and mark them with overlap=flag"
        )
    for hit in hits:
        evidence = f"{hit.benchmark}:{hit.against.id} ({hit.rule})"
        pool.overlaps[hit.train.id] = "; ".join(filter(None, [pool.overlaps.get(hit.train.id), evidence]))
    pool.steps.append(f"overlap: {len(pool.overlaps):,} questions kept and marked that {_named(hits)} hold too")


def _named(hits: Sequence[Hit]) -> str:
    return ", ".join(dict.fromkeys(hit.benchmark for hit in hits))
