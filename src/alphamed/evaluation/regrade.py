"""From items.jsonl to results.json: grade the answers of a folder (again), add them up, compare them, say what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.errors import ConfigError
from alphamed.evaluation import choices, paired, results, settings
from alphamed.evaluation.items import ITEMS, Grading, Item, read_items, regraded, row
from alphamed.files import replace_json, replace_json_lines

RESULTS, COMPARISON = "results.json", "comparison.json"


def remove(folder: Path) -> None:
    """Take an evaluation away that another one is to replace; other files of the folder stay."""
    for name in (ITEMS, RESULTS, COMPARISON, settings.SETTINGS):
        (folder / name).unlink(missing_ok=True)


def require_evaluation(option: str, folder: Path) -> None:
    """Raises ConfigError where `folder` holds no evaluation."""
    if not (folder / ITEMS).is_file() or settings.read(folder) is None:
        raise ConfigError(
            f"{option}: {folder} holds no evaluation ({ITEMS} and {settings.SETTINGS}); give the --out of `alphamed eval`"
        )


def regrade(folder: Path) -> None:
    """Grade all answers in `folder` with today's grader and write items.jsonl again. Says how many outcomes changed."""
    items, grading = read_items(folder), Grading.of_json(_settings(folder)["grading"])
    again = {key: [regraded(item, grading) for item in of_question] for key, of_question in items.items()}
    changed = [
        item
        for key, of_question in items.items()
        for item, new in zip(of_question, again[key])
        if (item.letter, item.outcome) != (new.letter, new.outcome)
    ]
    replace_json_lines(folder / ITEMS, [row(item) for of_question in again.values() for item in of_question])
    total = sum(map(len, items.values()))
    print(
        f"{folder}: {total:,} answers graded again, {len(changed):,} changed"
        + (f" (the first: {changed[0].asked.set}/{changed[0].asked.question.id})" if changed else "")
    )


def told(folder: Path, against: Path | None) -> int:
    """Write results.json (and comparison.json where there is something to compare with) and print both; returns the exit
    code."""
    found = write_results(folder)
    for name, one in found["benchmarks"].items():
        print(results.line(name, one))
        if one["choices"]:
            print(f"  {name}: {choices.line(one['choices'])}")
        if one["complaint"]:
            print(f"  warning: {name}: {one['complaint']}")
        for note in one.get("notes", ()):
            print(f"  {name}: {note}")
        if one["change"]:
            print(f"  against the questions as they are: {paired.line(one['benchmark'], one['change'])}")
    if found["mean"]:
        mean = found["mean"]
        print(
            f"mean of {len(mean['benchmarks'])} benchmarks: {100 * mean['accuracy']:.1f}% "
            f"[{100 * mean['questions']['ci_low']:.1f}%, {100 * mean['questions']['ci_high']:.1f}%]"
        )
    print(folder / RESULTS)
    if against:
        _tell_comparison(folder, against)
    return 0


def write_results(folder: Path) -> dict[str, Any]:
    """results.json of the items in `folder`, also returned. Of each set the questions count that were asked last and have
    all their samples; how many have not is part of its complaint."""
    about, answered = _settings(folder), _answered(folder)
    found: dict[str, Any] = {}
    for name, of_set in about["sets"].items():
        if not answered[name]:
            print(f"warning: {name}: none of its {len(of_set['ids']):,} questions has an answer yet")
            continue
        found[name] = results.set_result(list(answered[name].values())) | _told(of_set, len(answered[name]))
        plain = answered.get(of_set["benchmark"]) if of_set["variant"] else None
        change = paired.compare_sets(plain, answered[name]) if plain and plain.keys() & answered[name].keys() else None
        found[name]["change"] = change and {key: value for key, value in change.items() if key != "flipped"}
    mean = results.mean_result({name: list(answered[name].values()) for name, one in found.items() if not one["variant"]})
    told = {
        "format": settings.FORMAT,
        "model": about["model"],
        "asked": about["asked"],
        "grading": about["grading"],
        "benchmarks": found,
        "mean": mean,
    }
    replace_json(folder / RESULTS, told)
    return told


def _answered(folder: Path) -> dict[str, dict[str, Sequence[Item]]]:
    """Set -> question id -> its items, of the questions that were asked last and have all their samples."""
    items, about = read_items(folder), _settings(folder)
    samples = about["asked"]["sampling"]["samples"]
    return {
        name: {i: items[name, i] for i in of_set["ids"] if len(items.get((name, i), ())) == samples}
        for name, of_set in about["sets"].items()
    }


def _told(of_set: Mapping[str, Any], answered: int) -> dict[str, Any]:
    """What was written down of a set, with unanswered questions in its complaint."""
    missing = len(of_set["ids"]) - answered
    unanswered = f"{missing:,} of {len(of_set['ids']):,} questions have no answer yet" if missing else None
    complaint = "; ".join(filter(None, [of_set["complaint"], unanswered])) or None
    return {key: value for key, value in of_set.items() if key != "ids"} | {"complaint": complaint}


def _tell_comparison(folder: Path, against: Path) -> None:
    found = paired.compare(_answered(against), _answered(folder))
    if not found:
        raise ConfigError(
            f"--against: {against} has no question in common with {folder}; give an evaluation of the same benchmarks"
        )
    prompts = settings.prompt_difference(_settings(against), _settings(folder))
    replace_json(
        folder / COMPARISON, {"before": str(against), "after": str(folder), "prompts_differ": prompts, "benchmarks": found}
    )
    print(f"compared with {against}:")
    if prompts:
        print(f"  warning: the two were asked with different prompts ({prompts}): not the model alone is compared")
    for name, one in found.items():
        print(f"  {paired.line(name, one)}")
    print(folder / COMPARISON)


def _settings(folder: Path) -> dict[str, Any]:
    about = settings.read(folder)
    assert about is not None, f"{folder} has answers without {settings.SETTINGS}"
    return about
