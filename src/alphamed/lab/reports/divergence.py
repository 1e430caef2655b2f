"""Benchmarks that diverge: comparisons in which one evaluation set rises and another falls, each beyond chance. Pure.

A comparison is a run after training against itself before, or one run after training against another. On each evaluation
set it has a paired difference with a 95% interval and McNemar's exact p. A set *rose* (*fell*) where its whole interval is
above (below) 0 and p, adjusted for the number of evaluation sets of this comparison (Holm), is below 0.05. Without any true
change, fewer than 1 in 1,000 comparisons show both a set that rose and one that fell: both must pass, in opposite
directions. With true gains and no true loss, up to 1 in 40 shows a loss by chance. Pairs of runs that were evaluated with
different prompts or token limits diverge for other reasons and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import points
from alphamed.lab.reports.evaluations import holm
from alphamed.lab.reports.runs import UNCHANGED

SIGNIFICANT = 0.05
MOST_SENTENCES = 6
"""Pairs of runs with a sentence each in the verdict; the page has a table of all."""

Runs = Mapping[int, Mapping[str, Any]]
"""Number -> name, control and training set, as in the numbers of a comparison."""
SetChange = Mapping[str, Any]
"""`difference`, `interval`, `p`, `n` of one evaluation set, as the numbers of a comparison have them."""


def diverging_sets(changes: Mapping[str, SetChange]) -> dict[str, list[dict[str, Any]]] | None:
    """The sets of one comparison that rose and that fell; None unless there are both."""
    sets: dict[str, list[dict[str, Any]]] = {"rose": [], "fell": []}
    for (name, change), p in zip(changes.items(), holm([change["p"] for change in changes.values()])):
        low, high = change["interval"]
        direction = "rose" if low > 0 else "fell" if high < 0 else None
        if direction and p < SIGNIFICANT:
            sets[direction].append(
                {
                    "set": name,
                    "n": change["n"],
                    "difference": change["difference"],
                    "interval": [low, high],
                    "p": change["p"],
                    "p_adjusted": p,
                }
            )
    return sets if sets["rose"] and sets["fell"] else None


def divergences(sets: Sequence[Mapping[str, Any]], pairs: Iterable[Mapping[str, Any]], runs: Runs) -> list[dict[str, Any]]:
    """All comparisons that diverge: first those of runs with themselves, in the order of runs, then those of two runs, the
    most certain first. `first` is None for a run against itself before training, else the number of the run that `second`
    is compared with."""
    run_changes: dict[int, dict[str, SetChange]] = {}
    covered = set()  # a run that borrowed its `before` from the unchanged model: that pair is the same comparison
    for evaluation_set in sets:
        for row in evaluation_set["runs"]:
            if row["change"] is not None:
                run_changes.setdefault(row["run"], {})[evaluation_set["name"]] = row["change"]
                covered |= {
                    (row["run"], number)
                    for number, run in runs.items()
                    if run["control"] == UNCHANGED and run["name"] == row["before_from"]
                }
    pair_changes: dict[tuple[int, int], dict[str, SetChange]] = {}
    for row in pairs:
        pair = row["first"], row["second"]
        if row["same_protocol"] and not {pair, pair[::-1]} & covered:
            pair_changes.setdefault(pair, {})[row["set"]] = row
    alone = [
        {"first": None, "second": run, **diverging}
        for run, changes in sorted(run_changes.items())
        if (diverging := diverging_sets(changes)) is not None
    ]
    between_runs = [
        {"first": first, "second": second, **diverging}
        for (first, second), changes in pair_changes.items()
        if (diverging := diverging_sets(changes)) is not None
    ]
    return alone + sorted(between_runs, key=_larger_p)


def divergence_sentences(diverging: Sequence[Mapping[str, Any]], runs: Runs) -> list[str]:
    """The result of `divergences` in sentences."""
    alone = [row for row in diverging if row["first"] is None]
    between_runs = [row for row in diverging if row["first"] is not None]
    sentences = [
        f"The benchmarks of {runs[row['second']]['name']} diverge: it gains on {_sets(row['rose'])} and loses on "
        f"{_sets(row['fell'])}."
        for row in alone
    ]
    for row in between_runs[:MOST_SENTENCES]:
        first, second = runs[row["first"]], runs[row["second"]]
        sentences.append(
            f"{second['name']} and {first['name']} diverge: after training {second['name']} is "
            f"better on {_sets(row['rose'])} and worse on {_sets(row['fell'])}{_training_difference(first, second)}."
        )
    if len(between_runs) > MOST_SENTENCES:
        sentences.append(f"{len(between_runs) - MOST_SENTENCES} more pairs of runs diverge; the page lists them.")
    return sentences


def _larger_p(row: Mapping[str, Any]) -> float:
    """The p of the less certain of the two directions."""
    return max(min(change["p_adjusted"] for change in row[direction]) for direction in ("rose", "fell"))


def _sets(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{row['set']} ({points(row['difference'])} points [{points(row['interval'][0])}, "
        f"{points(row['interval'][1])}], n = {row['n']:,})"
        for row in rows
    )


def _training_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The attributes whose recorded means differ between the training questions of the two runs."""
    old_training, new_training = first["training"] or {}, second["training"] or {}
    differences = [
        f"mean {attribute.field} {new:.2f} against {old:.2f}"
        for attribute in ATTRIBUTES
        if (old := old_training.get(f"mean_{attribute.field}")) is not None
        and (new := new_training.get(f"mean_{attribute.field}")) is not None
        and f"{old:.2f}" != f"{new:.2f}"
    ]
    return f"; its training questions have {', '.join(differences)}" if differences else ""
