"""Benchmarks that move apart: comparisons in which one evaluation set rises and another falls, each beyond chance. Pure.

A comparison is a run after training against itself before, or one run after training against another. On each evaluation
set it has a paired difference with a 95% interval and McNemar's exact p. A set *rose* (*fell*) where its whole interval lies
above (below) 0 and p, adjusted for the number of evaluation sets of this comparison (Holm), is below 0.05. Where nothing
truly moves, fewer than 1 in 1,000 comparisons show both a set that rose and one that fell: both must pass, in opposite
directions. Where gains are true and losses are not, up to 1 in 40 shows a loss by chance. Pairs of runs that were asked
otherwise (prompt, token limit) move apart for other reasons and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import points
from alphamed.lab.reports.evaluations import holm
from alphamed.lab.reports.runs import UNCHANGED

SIGNIFICANT = 0.05
MOST_TOLD = 6
"""Pairs of runs told one by one in the verdict; the page has a table of all."""

Runs = Mapping[int, Mapping[str, Any]]
"""Number -> name, control and training set, as in the numbers of a comparison."""
Change = Mapping[str, Any]
"""`difference`, `interval`, `p`, `n` of one evaluation set, as the numbers of a comparison have them."""


def moved_apart(changes: Mapping[str, Change]) -> dict[str, list[dict[str, Any]]] | None:
    """The sets of one comparison that rose and that fell; None where not both are there."""
    found: dict[str, list[dict[str, Any]]] = {"rose": [], "fell": []}
    for (name, change), p in zip(changes.items(), holm([change["p"] for change in changes.values()])):
        low, high = change["interval"]
        way = "rose" if low > 0 else "fell" if high < 0 else None
        if way and p < SIGNIFICANT:
            found[way].append(
                {
                    "set": name,
                    "n": change["n"],
                    "difference": change["difference"],
                    "interval": [low, high],
                    "p": change["p"],
                    "p_adjusted": p,
                }
            )
    return found if found["rose"] and found["fell"] else None


def apart(sets: Sequence[Mapping[str, Any]], pairs: Iterable[Mapping[str, Any]], runs: Runs) -> list[dict[str, Any]]:
    """All comparisons that moved apart: those of runs with themselves in the order of runs, then those of two runs, the
    clearest first. `first` is None for a run against itself before training, else the number of the run that `second` is
    held against."""
    of_one: dict[int, dict[str, Change]] = {}
    told_already = set()  # the unchanged model lent its answers to a run without a before: that pair is the same
    for one in sets:
        for row in one["runs"]:
            if row["change"] is not None:
                of_one.setdefault(row["run"], {})[one["name"]] = row["change"]
                told_already |= {
                    (row["run"], number)
                    for number, run in runs.items()
                    if run["control"] == UNCHANGED and run["name"] == row["before_from"]
                }
    of_two: dict[tuple[int, int], dict[str, Change]] = {}
    for row in pairs:
        pair = row["first"], row["second"]
        if row["alike"] and not {pair, pair[::-1]} & told_already:
            of_two.setdefault(pair, {})[row["set"]] = row
    found = [
        {"first": None, "second": run, **moved}
        for run, changes in sorted(of_one.items())
        if (moved := moved_apart(changes)) is not None
    ]
    two = [
        {"first": first, "second": second, **moved}
        for (first, second), changes in of_two.items()
        if (moved := moved_apart(changes)) is not None
    ]
    return found + sorted(two, key=_weakest)


def told(found: Sequence[Mapping[str, Any]], runs: Runs) -> list[str]:
    """`apart` in sentences."""
    alone, pairs = [one for one in found if one["first"] is None], [one for one in found if one["first"] is not None]
    sentences = [
        f"{runs[one['second']]['name']} moves its benchmarks apart: it gains on {_sets(one['rose'])} and loses on "
        f"{_sets(one['fell'])}."
        for one in alone
    ]
    for one in pairs[:MOST_TOLD]:
        first, second = runs[one["first"]], runs[one["second"]]
        sentences.append(
            f"{second['name']} and {first['name']} move benchmarks apart: after training {second['name']} is "
            f"better on {_sets(one['rose'])} and worse on {_sets(one['fell'])}{_trained(first, second)}."
        )
    if len(pairs) > MOST_TOLD:
        sentences.append(f"{len(pairs) - MOST_TOLD} more pairs of runs move benchmarks apart; the page lists them.")
    return sentences


def _weakest(one: Mapping[str, Any]) -> float:
    """The p of the less certain of the two directions."""
    return max(min(row["p_adjusted"] for row in one[way]) for way in ("rose", "fell"))


def _sets(rows: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{row['set']} ({points(row['difference'])} points [{points(row['interval'][0])}, "
        f"{points(row['interval'][1])}], n = {row['n']:,})"
        for row in rows
    )


def _trained(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """What their training questions differ in on average, so far as it is known."""
    one, other = first["training"] or {}, second["training"] or {}
    said = [
        f"mean {attribute.field} {new:.2f} against {old:.2f}"
        for attribute in ATTRIBUTES
        if (old := one.get(f"mean_{attribute.field}")) is not None
        and (new := other.get(f"mean_{attribute.field}")) is not None
        and f"{old:.2f}" != f"{new:.2f}"
    ]
    return f"; its training questions have {', '.join(said)}" if said else ""
