"""A set of runs compared, as plain values: accuracy before and after, by size and source mix, level and informativeness.

Every gain is reported together with the controls: runs whose reward or keys carry no medical knowledge, and which may raise
accuracy all the same ("Spurious Rewards", 2506.10947). Pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import percent, points
from alphamed.files import finite
from alphamed.lab.reports.divergence import SIGNIFICANT, divergence_sentences, divergences
from alphamed.lab.reports.evaluations import AnsweredSet, Paired, holm, pair
from alphamed.lab.reports.runs import ComparedRun
from alphamed.lab.reports.watch import collapse, collapse_sentence

QUOTED_FLIPS = 6
"""Flipped questions quoted per pair and direction; the ids of all of them are in the numbers."""


def comparison(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Everything the page shows, as values that JSON can hold. `sets` has one entry per evaluation set; shares are fractions
    of 1."""
    names = list(dict.fromkeys(name for run in runs for name in (*run.after, *run.before)))
    sets = [
        {
            "name": name,
            "chance": _chance(runs, name),
            "runs": [_run_on_set(run, name) for run in runs if name in run.after or name in run.before],
        }
        for name in names
    ]
    pairs = _pairs(runs, names)
    run_rows = {run.number: _run_row(run) for run in runs}
    diverging = divergences(sets, pairs, run_rows)
    return finite(
        {
            "runs": list(run_rows.values()),
            "sets": sets,
            "pairs": pairs,
            "divergences": diverging,
            "verdict": verdict(runs, names, divergence_sentences(diverging, run_rows)),
            "warnings": _warnings(runs),
        }
    )


# ------------------------------------------------------------------------------------------------------------------ rows
def _run_row(run: ComparedRun) -> dict[str, Any]:
    training = run.training
    return {
        "number": run.number,
        "name": run.name,
        "path": str(run.path),
        "control": run.control,
        "model": run.model,
        "reward": run.reward,
        "steps": run.steps,
        "evaluated_after_step": run.after_step,
        "not_compared": run.reason,
        "training": training
        and {
            "questions": training.questions,
            "seen_only": training.seen_only,
            "sources": dict(training.sources),
            **training.counts,
            **{f"mean_{attribute.field}": training.mean(attribute.axis) for attribute in ATTRIBUTES},
        },
    }


def _run_on_set(run: ComparedRun, name: str) -> dict[str, Any]:
    before, after, change = run.before.get(name), run.after.get(name), _change(run, name)
    return {
        "run": run.number,
        "before": before and _answered(before),
        "after": after and _answered(after),
        "before_from": run.before_from.get(name),
        "change": change and _paired(change),
        **{f"by_{attribute.field}": _parts(after, attribute.field) for attribute in ATTRIBUTES},
    }


def _parts(after: AnsweredSet | None, attribute: str) -> dict[str, Any]:
    """Answers after training by the value of an attribute; {} without an evaluation."""
    parts = after.parts(attribute) if after else {}
    return {"none" if value is None else str(value): _answered(part) for value, part in parts.items()}


def _answered(answers: AnsweredSet) -> dict[str, Any]:
    return {
        "n": answers.n,
        "samples": answers.samples,
        "accuracy": answers.accuracy,
        "interval": list(answers.interval),
        "boxed": answers.boxed,
        "boxed_interval": list(answers.boxed_interval),
        "among_boxed": answers.among_boxed,
        "among_boxed_interval": list(answers.among_interval),
        "tokens_mean": answers.tokens_mean,
    }


def _paired(paired: Paired) -> dict[str, Any]:
    return {
        "n": paired.n,
        "left_out": paired.left_out,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "p": paired.p,
        "gain": paired.split.gain,
        "from_boxed": paired.split.from_boxed,
        "from_among_boxed": paired.split.from_accuracy_among_boxed,
        "gained": list(paired.gained),
        "lost": list(paired.lost),
    }


def _chance(runs: Sequence[ComparedRun], name: str) -> float:
    return next((sets[name].chance for run in runs for sets in (run.after, run.before) if name in sets), math.nan)


# ------------------------------------------------------------------------------------------------- one run against another
def _pairs(runs: Sequence[ComparedRun], names: Sequence[str]) -> list[dict[str, Any]]:
    """After-evaluations of every two runs that share questions; p also adjusted for the number of pairs (Holm)."""
    rows = []
    for name in names:
        for first, second in itertools.combinations([run for run in runs if name in run.after], 2):
            if (paired := pair(first.after[name], second.after[name])) is not None:
                protocols = {run.protocol for run in (first, second) if run.protocol}  # "" where it is not known
                rows.append(
                    {
                        "set": name,
                        "first": first.number,
                        "second": second.number,
                        **_paired(paired),
                        "same_protocol": len(protocols) < 2,
                        "quoted": _quoted(paired, first.after[name], second.after[name]),
                    }
                )
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p_adjusted"] = p
    return rows


def _quoted(paired: Paired, first: AnsweredSet, second: AnsweredSet) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "direction": direction,
            "question": first.answers[i].question,
            "key": first.answers[i].key,
            "first": first.answers[i].letters[0],
            "second": second.answers[i].letters[0],
        }
        for direction, ids in (("gained", paired.gained), ("lost", paired.lost))
        for i in ids[:QUOTED_FLIPS]
    ]


# -------------------------------------------------------------------------------------------------------------- sentences
def verdict(runs: Sequence[ComparedRun], names: Sequence[str], divergence: Sequence[str]) -> list[str]:
    """The conclusions: every change with its two parts, how it compares with the controls, and the gains that come with a
    loss elsewhere (`divergence`, in sentences)."""
    claims = [
        sentence
        for run in runs
        if run.control is None
        for name in names
        if (sentence := _claim(run, name, runs)) is not None
    ]
    if not claims:
        return [
            "No run other than a control was evaluated before and after training, so there is no gain to report.",
            *divergence,
        ]
    if any(run.control for run in runs):
        return [*claims, *divergence]
    return [
        *claims,
        *divergence,
        "No control is among these runs: rewards without medical knowledge (random, format_only, "
        "shuffled keys) raise the accuracy of some models too, so no gain here is shown to come from the questions.",
    ]


def _claim(run: ComparedRun, name: str, runs: Sequence[ComparedRun]) -> str | None:
    change = _change(run, name)
    if change is None:
        return None
    low, high = change.interval
    claim = (
        f"{run.name} on {name}: {points(change.difference)} points [{points(low)}, {points(high)}], n = {change.n:,}, "
        f"McNemar p = {change.p:.2g}; {points(change.split.from_boxed)} by boxing more answers, "
        f"{points(change.split.from_accuracy_among_boxed)} by being correct more often when boxed."
    )
    if not _significant(change):
        return f"{claim} No change is shown."
    if change.difference < 0:
        return f"{claim} Accuracy fell."
    against_controls = [text for other in runs if other.control and (text := _against_control(run, other, name)) is not None]
    return " ".join([claim, *against_controls])


def _against_control(run: ComparedRun, control: ComparedRun, name: str) -> str | None:
    """A sentence that compares the run's answers after training with the control's."""
    if name not in control.after or (paired := pair(control.after[name], run.after[name])) is None:
        return None
    beyond = _significant(paired) and paired.difference > 0
    return (
        f"{'More than' if beyond else 'Not shown to be more than'} the control {control.name} ({control.control}): "
        f"difference {points(paired.difference)} points, p = {paired.p:.2g}."
    )


def _significant(change: Paired) -> bool:
    """Whether the flips are split more unevenly than by chance."""
    return change.p < SIGNIFICANT


def _change(run: ComparedRun, name: str) -> Paired | None:
    """The answers after training paired with those before; None without both, as for the unchanged model."""
    before, after = run.before.get(name), run.after.get(name)
    return pair(before, after) if before and after and before is not after else None


def _warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Runs whose answers after training are nearly all one letter, and the warnings of each run's own report."""
    warnings = []
    for run in runs:
        collapses = [
            collapse_sentence(collapsed, f"on {name} after training")
            for name, answers in run.after.items()
            if (collapsed := collapse(*answers.letters)) is not None
        ]
        # a run's report has the same warning about its evaluations
        others = [text for text in run.warnings if not text.startswith("One letter for all questions: on ")]
        warnings += [f"{run.name}: {text}" for text in (*collapses, *others)]
    return warnings


def mix(counts: dict[str, int], most: int = 6) -> str:
    """Shares of sources or levels in words, the most common first."""
    total, ordered = sum(counts.values()), sorted(counts.items(), key=lambda item: -item[1])
    shares = [f"{name} {percent(count / total)}" for name, count in ordered[:most]]
    return ", ".join(shares) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
