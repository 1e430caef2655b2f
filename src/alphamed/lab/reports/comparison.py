"""The paper's three questions over a set of runs, as plain values: before and after, size and source mix, level and
informativeness of the questions.

Every claim of a gain stands beside the controls: runs whose reward or keys teach no medicine, and yet may lift a model
("Spurious Rewards", 2506.10947). Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import percent, points
from alphamed.files import finite
from alphamed.lab.reports.divergence import SIGNIFICANT, apart, told as told_apart
from alphamed.lab.reports.evaluations import AnsweredSet, Paired, holm, pair
from alphamed.lab.reports.runs import ComparedRun
from alphamed.lab.reports.watch import collapse, collapse_words

QUOTED_FLIPS = 6
"""Flipped questions quoted a pair and direction; all of their ids are in the numbers."""


def comparison(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Everything the page shows, JSON-able. `sets` has one entry an evaluation set; shares are fractions of 1."""
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
    about = {run.number: _about(run) for run in runs}
    moved = apart(sets, pairs, about)
    return finite(
        {
            "runs": list(about.values()),
            "sets": sets,
            "pairs": pairs,
            "apart": moved,
            "verdict": verdict(runs, names, told_apart(moved, about)),
            "warnings": _warnings(runs),
        }
    )


# ------------------------------------------------------------------------------------------------------- what each run is
def _about(run: ComparedRun) -> dict[str, Any]:
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
            **{f"mean_{one.field}": training.mean(one.axis) for one in ATTRIBUTES},
        },
    }


def _run_on_set(run: ComparedRun, name: str) -> dict[str, Any]:
    before, after = run.before.get(name), run.after.get(name)
    paired = pair(before, after) if before and after and before is not after else None
    return {
        "run": run.number,
        "before": before and _answered(before),
        "after": after and _answered(after),
        "before_from": run.lent.get(name),
        "change": paired and _paired(paired),
        **{f"by_{one.field}": _parts(after, one.field) for one in ATTRIBUTES},
    }


def _parts(after: AnsweredSet | None, attribute: str) -> dict[str, Any]:
    return (
        {}
        if after is None
        else {"none" if value is None else str(value): _answered(part) for value, part in after.parts(attribute).items()}
    )


def _answered(one: AnsweredSet) -> dict[str, Any]:
    return {
        "n": one.n,
        "samples": one.samples,
        "accuracy": one.accuracy,
        "interval": list(one.interval),
        "boxed": one.boxed,
        "boxed_interval": list(one.boxed_interval),
        "among_boxed": one.among_boxed,
        "among_boxed_interval": list(one.among_interval),
        "tokens_mean": one.tokens_mean,
    }


def _paired(one: Paired) -> dict[str, Any]:
    return {
        "n": one.n,
        "left_out": one.left_out,
        "difference": one.difference,
        "interval": list(one.interval),
        "p": one.p,
        "gain": one.split.gain,
        "from_boxed": one.split.from_boxed,
        "from_among_boxed": one.split.from_accuracy_among_boxed,
        "gained": list(one.gained),
        "lost": list(one.lost),
    }


def _chance(runs: Sequence[ComparedRun], name: str) -> float:
    return next((found[name].chance for run in runs for found in (run.after, run.before) if name in found), math.nan)


# ------------------------------------------------------------------------------------------------- one run against another
def _pairs(runs: Sequence[ComparedRun], names: Sequence[str]) -> list[dict[str, Any]]:
    """After-evaluations of every two runs that share questions; p also adjusted for the number of pairs (Holm)."""
    found = []
    for name in names:
        have = [run for run in runs if name in run.after]
        for place, one in enumerate(have):
            for other in have[place + 1 :]:
                if (paired := pair(one.after[name], other.after[name])) is not None:
                    found.append(
                        {
                            "set": name,
                            "first": one.number,
                            "second": other.number,
                            **_paired(paired),
                            "alike": not one.asked_how or not other.asked_how or one.asked_how == other.asked_how,
                            "quoted": _quoted(paired, one.after[name], other.after[name]),
                        }
                    )
    for row, p in zip(found, holm([row["p"] for row in found])):
        row["p_adjusted"] = p
    return found


def _quoted(paired: Paired, first: AnsweredSet, second: AnsweredSet) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "way": way,
            "question": first.answers[i].question,
            "key": first.answers[i].key,
            "first": first.answers[i].letters[0],
            "second": second.answers[i].letters[0],
        }
        for way, ids in (("gained", paired.gained), ("lost", paired.lost))
        for i in ids[:QUOTED_FLIPS]
    ]


# ---------------------------------------------------------------------------------------------------------------- in words
def verdict(runs: Sequence[ComparedRun], names: Sequence[str], moved_apart: Sequence[str]) -> list[str]:
    """What the comparison allows one to say: every gain, what it is made of, how it stands to the controls, and what is
    bought with a loss elsewhere (`moved_apart`, in sentences)."""
    claims = [
        sentence
        for run in runs
        if run.control is None
        for name in names
        if (sentence := _claim(run, name, runs)) is not None
    ]
    if not claims:
        return ["No run that means to teach has an evaluation before and after; nothing can be said of gains.", *moved_apart]
    if any(run.control for run in runs):
        return [*claims, *moved_apart]
    return [
        *claims,
        *moved_apart,
        "No control is among these runs: rewards that teach no medicine (random, format_only, "
        "shuffled keys) lift some models too, so no gain here is shown to come from the questions.",
    ]


def _claim(run: ComparedRun, name: str, runs: Sequence[ComparedRun]) -> str | None:
    change = _change(run, name)
    if change is None:
        return None
    low, high = change.interval
    told = (
        f"{run.name} on {name}: {points(change.difference)} points [{points(low)}, {points(high)}], n = {change.n:,}, "
        f"McNemar p = {change.p:.2g}; {points(change.split.from_boxed)} by boxing more answers, "
        f"{points(change.split.from_accuracy_among_boxed)} by being right more often when boxed."
    )
    if not _moved(change):
        return f"{told} No change is shown."
    if change.difference < 0:
        return f"{told} It got worse."
    beside = [text for other in runs if other.control and (text := _beside(run, other, name)) is not None]
    return " ".join([told, *beside])


def _beside(run: ComparedRun, control: ComparedRun, name: str) -> str | None:
    """The run's answers after training against the control's."""
    if name not in control.after or (paired := pair(control.after[name], run.after[name])) is None:
        return None
    beyond = _moved(paired) and paired.difference > 0
    return (
        f"{'More than' if beyond else 'Not shown to be more than'} the control {control.name} ({control.control}): "
        f"{points(paired.difference)} points between them, p = {paired.p:.2g}."
    )


def _moved(change: Paired) -> bool:
    """Whether the flips are split more unevenly than chance would have it."""
    return change.p < SIGNIFICANT


def _change(run: ComparedRun, name: str) -> Paired | None:
    before, after = run.before.get(name), run.after.get(name)
    return pair(before, after) if before and after and before is not after else None


def _warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Letters that stand for all answers after training, and what each run's own report warns of."""
    found = []
    for run in runs:
        own = [
            text
            for name, one in run.after.items()
            if (one_letter := collapse(*one.letters)) is not None
            for text in [collapse_words(one_letter, f"on {name} after training")]
        ]
        # the report of a run says the same of its evaluations
        others = [text for text in run.warnings if not text.startswith("One letter for all questions: on ")]
        found += [f"{run.name}: {text}" for text in (*own, *others)]
    return found


def mix(counts: dict[str, int], most: int = 6) -> str:
    """A source or level mix in words: the commonest first."""
    total, ordered = sum(counts.values()), sorted(counts.items(), key=lambda item: -item[1])
    told = [f"{name} {percent(count / total)}" for name, count in ordered[:most]]
    return ", ".join(told) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
