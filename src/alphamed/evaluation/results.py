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
from alphamed.evaluation.items import GradedAnswer, stats_of
from alphamed.evaluation.sampling import bootstrap_mean, bootstrap_mean_of_means, pass_at_k, shown_ks, vote
from alphamed.evaluation.score import wilson

Answers = Sequence[Sequence[GradedAnswer]]
"""Per question of a set its graded answers in the order of samples; as many of each."""


def set_result(answers: Answers) -> dict[str, Any]:
    """The result of one set. ValueError without questions or with unequal numbers of samples."""
    samples = _samples(answers)
    result = _shares(answers) | {"samples": samples, "tokens": _lengths(answers), "choices": _choices(answers)}
    if samples > 1:
        result |= _of_samples(answers, samples)
    result["by_source"] = _parts(answers, lambda item: item.asked.question.source)
    for attribute in ATTRIBUTES:
        result[f"by_{attribute.field}"] = _parts(
            answers, lambda item, attribute=attribute: attribute.of(item.asked.question)
        )
    return result


def mean_result(sets: Mapping[str, Answers], seed: int = 0) -> dict[str, Any] | None:
    """The mean accuracy over benchmarks, each with the same weight; None for fewer than two. Two intervals (bootstrap, 95%):
    `questions` shows how it would move with other questions, `runs` (None for single samples) with other samples of these."""
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


def line(name: str, result: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    left_out = len(result.get("bad_rows") or ())
    rows = f" ({counted(left_out, 'bad row')} left out)" if left_out else ""
    text = (
        f"{name}: accuracy {_percent(result['accuracy'])} [{_percent(result['ci_low'])}, {_percent(result['ci_high'])}], "
        f"n = {result['n']:,}{rows}, boxed {_percent(result['boxed'])}, right among boxed "
        f"{_percent(result['accuracy_among_boxed'])}, unparseable {_percent(result['unparseable'])}, truncated "
        f"{_percent(result['truncated'])}, {result['tokens']['mean']:.0f} tokens"
    )
    if result["samples"] > 1:
        last = result["samples"]
        text += (
            f"; {last} samples: majority {_percent(result['majority']['accuracy'])}, pass@{last} "
            f"{_percent(result['pass_at_k'][str(last)])}"
        )
    return text


# --------------------------------------------------------------------------------------------------------------- parts
def _samples(answers: Answers) -> int:
    counts = {len(items) for items in answers}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(f"a result needs questions with the same number of samples each, not {sorted(counts)}")
    return counts.pop()


def _shares(answers: Answers) -> dict[str, Any]:
    stats = stats_of(answer for of_question in answers for answer in of_question)
    low, high = wilson(stats.accuracy, len(answers))
    return {
        "n": len(answers),
        "accuracy": stats.accuracy,
        "ci_low": low,
        "ci_high": high,
        "unparseable": stats.share(stats.unparseable),
        "truncated": stats.share(stats.truncated),
        "boxed": stats.share(stats.boxed),
        "accuracy_among_boxed": stats.accuracy_among_boxed,
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
                item.letter if item.outcome.boxed else None,
            )
            for item in items
        ]
    )
    return chosen.plain() if chosen else None


def _chance(answers: Answers) -> float | None:
    """What picking letters blindly gives; None where no options are shown."""
    asked = [of_question[0].asked for of_question in answers]
    if not all(item.shown.options for item in asked):
        return None
    return statistics.fmean(1 / len(item.question.options) for item in asked)


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


def _mean(items: Sequence[GradedAnswer]) -> float:
    return statistics.fmean(item.right for item in items)


def _parts(answers: Answers, part: Callable[[GradedAnswer], Any]) -> dict[str, dict[str, Any]]:
    """Shares of each source or level; {} where no question has one."""
    groups: dict[Any, list[Sequence[GradedAnswer]]] = {}
    for items in answers:
        groups.setdefault(part(items[0]), []).append(items)
    if set(groups) == {None}:
        return {}
    ordered = sorted(groups.items(), key=lambda group: (group[0] is None, str(group[0])))
    return {"none" if name is None else str(name): _shares(of_part) for name, of_part in ordered}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
