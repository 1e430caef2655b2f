"""The figures of a run's metrics, each left out where nothing was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphamed.lab.reports.plots import Series, Value, line_chart, stacked_bars
from alphamed.rundir.metrics import step_of

MetricsRow = Mapping[str, Value]
SMOOTH = 5
SMOOTH_FROM = 16
"""Curves of runs with fewer steps are not smoothed."""
TIME_PARTS = {
    "generate": ("time/generate_s", 0),
    "grade": ("time/reward_s", 5),
    "log-probs": ("time/logprobs_s", 1),
    "update": ("time/update_s", 2),
    "sync": ("time/sync_s", 3),
}
"""Name -> metric, colour."""


@dataclass(frozen=True, slots=True)
class Figure:
    key: str
    title: str
    caption: str
    svg: str
    wide: bool = False


def figures(rows: Sequence[MetricsRow]) -> list[Figure]:
    """All figures of a run, in reading order; `rows` as in metrics.jsonl. Empty without steps."""
    if not rows:
        return []
    curves = [_lines(rows, *spec) for spec in _CURVES]
    return [figure for figure in [*curves, _time(rows)] if figure is not None]


# key, title, caption, {curve name: metric}, unit, top of the axis, logarithmic
_CURVES: tuple[tuple[str, str, str, dict[str, str], str, Value, bool], ...] = (
    ("reward", "Reward", "Mean reward of a step's responses.", {"": "reward/mean"}, "", None, False),
    (
        "outcomes",
        "Outcomes",
        "Shares of a step's responses; correct answers are part of the boxed ones.",
        {
            "boxed": "reward/boxed",
            "correct": "reward/correct",
            "unparseable": "reward/unparseable",
            "truncated": "reward/truncated",
        },
        "share",
        1.0,
        False,
    ),
    (
        "length",
        "Response length",
        "Tokens per response, the end-of-text token included.",
        {"mean": "response/tokens_mean", "longest": "response/tokens_max"},
        "",
        None,
        False,
    ),
    (
        "signal",
        "Questions with reward variance",
        "Share of questions whose responses have different rewards: only these have a training signal.",
        {"": "reward/effective_groups"},
        "share",
        1.0,
        False,
    ),
    (
        "refill",
        "Groups graded per group used",
        "Groups graded for each one with reward variance: the cost of replacing the others.",
        {"": "sampling/groups_per_kept"},
        "",
        None,
        False,
    ),
    (
        "staleness",
        "Staleness",
        "Weight updates between the sampling of a step's groups and their training.",
        {"mean": "staleness/mean", "largest": "staleness/max"},
        "",
        None,
        False,
    ),
    (
        "bare_box",
        "Bare boxes",
        "Share of boxed responses with fewer than 5 words before the box: answers without reasoning.",
        {"": "reward/bare_box"},
        "share",
        1.0,
        False,
    ),
    (
        "entropy",
        "Entropy",
        "Nats per response token; near 0 the policy always gives the same response.",
        {"": "policy/entropy"},
        "",
        None,
        False,
    ),
    ("kl", "KL to the reference", "Nats per response token.", {"": "policy/kl"}, "", None, False),
    (
        "loss",
        "Policy loss",
        "Near 0 by construction: advantages cancel within a question.",
        {"": "policy/loss"},
        "",
        None,
        False,
    ),
    ("grad_norm", "Gradient norm", "Before clipping.", {"": "policy/grad_norm"}, "", None, False),
    (
        "clip",
        "Clipped tokens",
        "Share of response tokens whose probability ratio was clipped.",
        {"": "policy/clip_fraction"},
        "share",
        None,
        False,
    ),
    (
        "logprob_diff",
        "Trainer and engine log-probs",
        "|log-prob of the trainer - log-prob of the engine|, nats per response token.",
        {"mean": "policy/logprob_diff_mean", "max": "policy/logprob_diff_max"},
        "",
        None,
        True,
    ),
    ("lr", "Learning rate", "Of each update.", {"": "policy/lr"}, "", None, False),
    (
        "throughput",
        "Throughput",
        "Response tokens per second while generating and while training.",
        {"generated": "throughput/generated_tokens_per_s", "trained": "throughput/trained_tokens_per_s"},
        "",
        None,
        False,
    ),
    ("memory", "Memory", "Resident memory of rank 0, in GiB.", {"": "memory/rss_bytes"}, "GiB", None, False),
)
_OMITTED_WHEN_ZERO = {"kl", "clip"}
"""Omitted where every value is 0: no reference model, or one update per batch."""


def _lines(
    rows: Sequence[MetricsRow],
    key: str,
    title: str,
    caption: str,
    curves: Mapping[str, str],
    unit: str,
    top: Value,
    log: bool,
) -> Figure | None:
    scale = 2.0**-30 if unit == "GiB" else 1.0
    series = [Series(name, [_scaled(row.get(metric), scale) for row in rows]) for name, metric in curves.items()]
    series = [curve for curve in series if any(value is not None for value in curve.values)]
    all_zero = key in _OMITTED_WHEN_ZERO and not any(value for curve in series for value in curve.values)
    if not series or all_zero:
        return None
    smooth = SMOOTH if len(rows) >= SMOOTH_FROM and key not in ("lr", "memory") else 1
    return Figure(
        key, title, caption, line_chart([step_of(row) for row in rows], series, unit=unit, smooth=smooth, top=top, log=log)
    )


def _scaled(value: Value, scale: float) -> Value:
    return None if value is None else value * scale


def _time(rows: Sequence[MetricsRow]) -> Figure | None:
    parts = [Series(name, [row.get(metric) for row in rows], colour=colour) for name, (metric, colour) in TIME_PARTS.items()]
    if not any(row.get("time/step_s") for row in rows):
        return None
    measured = [sum(row.get(metric) or 0.0 for metric, _ in TIME_PARTS.values()) for row in rows]
    rest = [max(0.0, (row.get("time/step_s") or 0.0) - known) for row, known in zip(rows, measured)]
    parts = [part for part in parts if any(part.values)]
    return Figure(
        "time",
        "Time per step",
        "Seconds by part; grading counts only where generation does not overlap it.",
        stacked_bars([step_of(row) for row in rows], [*parts, Series("other", rest, colour=4)]),
        wide=True,
    )
