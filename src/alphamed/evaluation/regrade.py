"""From items.jsonl to results.json: grade the answers of a folder (again), add them up, compare them, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.errors import ConfigError
from alphamed.evaluation import choices, paired, results, settings
from alphamed.evaluation.items import ITEMS, GradedAnswer, Grading, read_items, regraded, write_items
from alphamed.files import replace_json

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
    """Grade all answers in `folder` with today's grader and write items.jsonl again. Prints how many outcomes changed."""
    items, grading = read_items(folder / ITEMS), Grading.of_json(_settings(folder)["grading"])
    again = {key: [regraded(item, grading) for item in of_question] for key, of_question in items.items()}
    changed = [
        item
        for key, of_question in items.items()
        for item, new in zip(of_question, again[key])
        if (item.letter, item.outcome) != (new.letter, new.outcome)
    ]
    write_items(folder / ITEMS, [answer for of_question in again.values() for answer in of_question])
    total = sum(map(len, items.values()))
    print(
        f"{folder}: {total:,} answers graded again, {len(changed):,} changed"
        + (f" (the first: {changed[0].asked.set}/{changed[0].asked.question.id})" if changed else "")
    )


def report(folder: Path, against: Path | None) -> int:
    """Write results.json (and comparison.json where there is something to compare with) and print both; returns the exit
    code."""
    result = write_results(folder)
    for name, of_set in result["benchmarks"].items():
        print(results.line(name, of_set))
        if of_set["choices"]:
            print(f"  {name}: {choices.line(of_set['choices'])}")
        if of_set["complaint"]:
            print(f"  warning: {name}: {of_set['complaint']}")
        for note in of_set.get("notes", ()):
            print(f"  {name}: {note}")
        if of_set["change"]:
            print(f"  against the questions as they are: {paired.line(of_set['benchmark'], of_set['change'])}")
    if result["mean"]:
        mean = result["mean"]
        print(
            f"mean of {len(mean['benchmarks'])} benchmarks: {100 * mean['accuracy']:.1f}% "
            f"[{100 * mean['questions']['ci_low']:.1f}%, {100 * mean['questions']['ci_high']:.1f}%]"
        )
    print(folder / RESULTS)
    if against:
        _report_comparison(folder, against)
    return 0


def write_results(folder: Path) -> dict[str, Any]:
    """results.json of the items in `folder`, also returned. Of each set the questions count that were asked last and have
    all their samples; how many have not is part of its complaint."""
    evaluation, answered = _settings(folder), _answered(folder)
    benchmarks: dict[str, Any] = {}
    for name, of_set in evaluation["sets"].items():
        if not answered[name]:
            print(f"warning: {name}: none of its {len(of_set['ids']):,} questions has an answer yet")
            continue
        benchmarks[name] = results.set_result(list(answered[name].values())) | _origin(of_set, len(answered[name]))
        plain = answered.get(of_set["benchmark"]) if of_set["variant"] else None
        change = paired.compare_sets(plain, answered[name]) if plain and plain.keys() & answered[name].keys() else None
        benchmarks[name]["change"] = change and {key: value for key, value in change.items() if key != "flipped"}
    mean = results.mean_result(
        {name: list(answered[name].values()) for name, of_set in benchmarks.items() if not of_set["variant"]}
    )
    result = {
        "format": settings.FORMAT,
        "model": evaluation["model"],
        "asked": evaluation["asked"],
        "grading": evaluation["grading"],
        "benchmarks": benchmarks,
        "mean": mean,
    }
    replace_json(folder / RESULTS, result)
    return result


def _answered(folder: Path) -> dict[str, dict[str, Sequence[GradedAnswer]]]:
    """Set -> question id -> its items, of the questions that were asked last and have all their samples."""
    items, evaluation = read_items(folder / ITEMS), _settings(folder)
    samples = evaluation["asked"]["sampling"]["samples"]
    return {
        name: {i: items[name, i] for i in of_set["ids"] if len(items.get((name, i), ())) == samples}
        for name, of_set in evaluation["sets"].items()
    }


def _origin(of_set: Mapping[str, Any], answered: int) -> dict[str, Any]:
    """What was written down of a set, with unanswered questions in its complaint."""
    missing = len(of_set["ids"]) - answered
    unanswered = f"{missing:,} of {len(of_set['ids']):,} questions have no answer yet" if missing else None
    complaint = "; ".join(filter(None, [of_set["complaint"], unanswered])) or None
    return {key: value for key, value in of_set.items() if key != "ids"} | {"complaint": complaint}


def _report_comparison(folder: Path, against: Path) -> None:
    comparisons = paired.compare(_answered(against), _answered(folder))
    if not comparisons:
        raise ConfigError(
            f"--against: {against} has no question in common with {folder}; give an evaluation of the same benchmarks"
        )
    prompts = settings.prompt_difference(_settings(against), _settings(folder))
    replace_json(
        folder / COMPARISON,
        {"before": str(against), "after": str(folder), "prompts_differ": prompts, "benchmarks": comparisons},
    )
    print(f"compared with {against}:")
    if prompts:
        print(f"  warning: the two were asked with different prompts ({prompts}): not the model alone is compared")
    for name, comparison in comparisons.items():
        print(f"  {paired.line(name, comparison)}")
    print(folder / COMPARISON)


def _settings(folder: Path) -> dict[str, Any]:
    evaluation = settings.read(folder)
    assert evaluation is not None, f"{folder} has answers without {settings.SETTINGS}"
    return evaluation
