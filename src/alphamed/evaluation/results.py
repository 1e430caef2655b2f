"""results.json: what the items of an evaluation add up to. Pure.

Per set (a benchmark, or `benchmark+variant`): `n` questions, `accuracy` with its 95% Wilson interval (`ci_low`, `ci_high`),
shares of `unparseable`, `truncated` (cut by the token limit, whatever they were graded) and `boxed` responses, accuracy
among boxed ones, response lengths, how the options are chosen (`choices`), the same by source, level and informativeness; with
several samples a question also the majority vote, pass@k, and the accuracy of each run (run j: sample j of every question).
Shares are fractions of 1, lengths tokens; None where there is nothing to divide by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.text import counted
from alphamed.evaluation.choices import Response, choices
from alphamed.evaluation.items import Item
from alphamed.evaluation.sampling import bootstrap_mean, bootstrap_mean_of_means, pass_at_k, shown_ks, vote
from alphamed.evaluation.score import wilson
from alphamed.records import Outcome

Answers = Sequence[Sequence[Item]]
"""Per question of a set its items in the order of samples; as many of each."""


def set_result(answers: Answers) -> dict[str, Any]:
    """The result of one set. ValueError without questions or with unequal numbers of samples."""
    samples = _samples(answers)
    found = _shares(answers) | {"samples": samples, "tokens": _lengths(answers), "choices": _choices(answers)}
    if samples > 1:
        found |= _of_samples(answers, samples)
    found["by_source"] = _parts(answers, lambda item: item.asked.question.source)
    for one in ATTRIBUTES:
        found[f"by_{one.field}"] = _parts(answers, lambda item, one=one: one.of(item.asked.question))
    return found


def mean_result(sets: Mapping[str, Answers], seed: int = 0) -> dict[str, Any] | None:
    """The mean accuracy over benchmarks, each with the same weight; None for fewer than two. Two intervals (bootstrap, 95%):
    `questions` says how it would move with other questions, `runs` (None for single samples) with other samples of these."""
    if len(sets) < 2:
        return None
    means = [[_mean(items) for items in answers] for answers in sets.values()]
    runs = [_run_accuracies(answers) for answers in sets.values()]
    low, high = bootstrap_mean_of_means(means, seed)
    several = any(len(of_set) > 1 for of_set in runs)
    return {
        "benchmarks": list(sets),
        "accuracy": statistics.fmean(map(statistics.fmean, means)),
        "questions": {"ci_low": low, "ci_high": high},
        "runs": dict(zip(("ci_low", "ci_high"), bootstrap_mean_of_means(runs, seed))) if several else None,
    }


def line(name: str, found: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    left_out = len(found.get("bad_rows") or ())
    rows = f" ({counted(left_out, 'bad row')} left out)" if left_out else ""
    told = (
        f"{name}: accuracy {_percent(found['accuracy'])} [{_percent(found['ci_low'])}, {_percent(found['ci_high'])}], "
        f"n = {found['n']:,}{rows}, boxed {_percent(found['boxed'])}, right among boxed "
        f"{_percent(found['accuracy_among_boxed'])}, unparseable {_percent(found['unparseable'])}, truncated "
        f"{_percent(found['truncated'])}, {found['tokens']['mean']:.0f} tokens"
    )
    if found["samples"] > 1:
        last = found["samples"]
        told += (
            f"; {last} samples: majority {_percent(found['majority']['accuracy'])}, pass@{last} "
            f"{_percent(found['pass_at_k'][str(last)])}"
        )
    return told


# --------------------------------------------------------------------------------------------------------------- parts
def _samples(answers: Answers) -> int:
    counts = {len(items) for items in answers}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"a result needs questions with the same number of samples each, not {sorted(counts)}")
    return counts.pop()


def _shares(answers: Answers) -> dict[str, Any]:
    items = [item for of_question in answers for item in of_question]
    n, right = len(answers), sum(item.right for item in items)
    boxed = sum(item.boxed for item in items)
    accuracy = right / len(items)
    low, high = wilson(accuracy, n)
    share = {kind: sum(item.outcome == kind for item in items) / len(items) for kind in Outcome}
    return {
        "n": n,
        "accuracy": accuracy,
        "ci_low": low,
        "ci_high": high,
        "unparseable": share[Outcome.UNPARSEABLE],
        "truncated": sum(item.cut for item in items) / len(items),
        "boxed": boxed / len(items),
        "accuracy_among_boxed": right / boxed if boxed else None,
        "chance": _chance(answers),
    }


def _choices(answers: Answers) -> dict[str, Any] | None:
    """How the responses choose among the options that are shown; None where none are."""
    items = [item for of_question in answers for item in of_question]
    chosen = choices(
        [
            Response(
                item.asked.question.id,
                item.asked.shown.options,
                item.asked.question.answer,
                item.text,
                item.letter if item.boxed else None,
            )
            for item in items
        ]
    )
    return chosen.plain() if chosen else None


def _chance(answers: Answers) -> float | None:
    """What picking letters blindly gives; None where no options are shown."""
    asked = [of_question[0].asked for of_question in answers]
    if not all(one.shown.options for one in asked):
        return None
    return statistics.fmean(1 / len(one.question.options) for one in asked)


def _lengths(answers: Answers) -> dict[str, float]:
    tokens = sorted(item.tokens for of_question in answers for item in of_question)
    return {
        "mean": statistics.fmean(tokens),
        "median": statistics.median(tokens),
        "p90": tokens[math.ceil(0.9 * len(tokens)) - 1],
        "max": tokens[-1],
    }


def _of_samples(answers: Answers, samples: int) -> dict[str, Any]:
    voted = statistics.fmean(vote([item.vote for item in items], items[0].asked.question.answer) for items in answers)
    low, high = wilson(voted, len(answers))
    right = [sum(item.right for item in items) for items in answers]
    runs = _run_accuracies(answers)
    run_low, run_high = bootstrap_mean(runs)
    return {
        "majority": {"accuracy": voted, "ci_low": low, "ci_high": high},
        "pass_at_k": {str(k): pass_at_k(right, samples, k) for k in shown_ks(samples)},
        "runs": {"accuracy": runs, "mean": statistics.fmean(runs), "ci_low": run_low, "ci_high": run_high},
    }


def _run_accuracies(answers: Answers) -> list[float]:
    return [statistics.fmean(items[j].right for items in answers) for j in range(_samples(answers))]


def _mean(items: Sequence[Item]) -> float:
    return statistics.fmean(item.right for item in items)


def _parts(answers: Answers, part: Callable[[Item], Any]) -> dict[str, dict[str, Any]]:
    """Shares of each source or level; {} where no question has one."""
    groups: dict[Any, list[Sequence[Item]]] = {}
    for items in answers:
        groups.setdefault(part(items[0]), []).append(items)
    if set(groups) == {None}:
        return {}
    ordered = sorted(groups.items(), key=lambda one: (one[0] is None, str(one[0])))
    return {"none" if name is None else str(name): _shares(of_part) for name, of_part in ordered}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
