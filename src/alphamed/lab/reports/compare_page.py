"""`alphamed compare`: a set of runs as one HTML page, with its numbers as JSON and CSV.

Like report.html the page has no scripts and requests nothing; texts are escaped by the template.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphamed.data.attributes import ATTRIBUTES, Attribute
from alphamed.data.output import json_writer, text_writer, write_all
from alphamed.errors import ConfigError
from alphamed.evaluation.score import percent, points
from alphamed.lab.reports.comparison import comparison, mix
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure
from alphamed.lab.reports.page import render_page
from alphamed.lab.reports.plots import Series, gain_rows, line_chart, scatter
from alphamed.lab.reports.runs import UNCHANGED, ComparedRun, read_runs
from alphamed.rundir.metrics import step_of

MOST_CURVES = 12
MOST_PAIRS = 60
MOST_DRAWN = 5
"""Runs drawn side by side at each level or bin of the evaluation questions; the table has all."""
CURVES = (
    (
        "reward/mean",
        "Reward",
        "Mean reward of a step's responses. Runs with different reward functions cannot be compared here.",
        "",
        None,
    ),
    ("reward/correct", "Accuracy in training", "Share of correct responses of a step.", "share", 1.0),
    ("response/tokens_mean", "Response length", "Tokens per response.", "", None),
)
MEANS = tuple(f"mean_{attribute.field}" for attribute in ATTRIBUTES)
CSV_COLUMNS = (
    "set",
    "run",
    "control",
    "training_questions",
    *MEANS,
    "n",
    "before",
    "before_low",
    "before_high",
    "after",
    "after_low",
    "after_high",
    "difference",
    "difference_low",
    "difference_high",
    "p_mcnemar",
    "from_boxed",
    "from_among_boxed",
    "boxed_before",
    "boxed_after",
    "among_boxed_before",
    "among_boxed_after",
    "not_compared",
)
PARTS_COLUMNS = (
    "set",
    "run",
    "control",
    "attribute",
    "value",
    "n",
    "after",
    "after_low",
    "after_high",
    "boxed_after",
    "among_boxed_after",
)


def main(paths: Sequence[Path], out: Path, as_json: bool) -> int:
    """Write the page and its numbers; print where, or the numbers. ConfigError for what cannot be compared.

    FILE.csv has one line per run and evaluation set, FILE.parts.csv one per run, set and level or bin of its questions."""
    if out.suffix != ".html":
        raise ConfigError(f"--out: {str(out)!r} does not end in .html; name such a file")
    numbers_file, table_file, parts_file = files = [out.with_suffix(suffix) for suffix in (".json", ".csv", ".parts.csv")]
    if not out.exists() and (existing := next((file for file in files if file.exists()), None)):
        raise ConfigError(
            f"--out: {existing} exists already, without the page of an earlier comparison; choose another name, or remove it"
        )
    runs = read_runs(paths)
    numbers = comparison(runs)
    write_all(
        {
            out: text_writer(render(runs, numbers)),
            numbers_file: json_writer(numbers),
            table_file: text_writer(table_csv(numbers)),
            parts_file: text_writer(parts_csv(numbers)),
        }
    )
    print(json.dumps(numbers, ensure_ascii=False, indent=2) if as_json else "\n".join([*console_lines(numbers), str(out)]))
    return 0


def console_lines(numbers: dict[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    lines = [f"{run['name']} is not compared: {run['not_compared']}" for run in numbers["runs"] if run["not_compared"]]
    return [*numbers["verdict"], *numbers["warnings"], *lines]


def render(runs: Sequence[ComparedRun], numbers: dict[str, Any]) -> str:
    """The HTML page; `numbers` is the comparison of `runs`."""
    pairs = sorted(numbers["pairs"], key=lambda row: row["p"])[:MOST_PAIRS]
    return render_page(
        Path(__file__).with_name("compare.html.j2"),
        {"points": points, "share": _share, "mix": mix, "interval": _interval},
        numbers=numbers,
        runs={run["number"]: run for run in numbers["runs"]},
        curves=training_curves(runs),
        gains={evaluation_set["name"]: _gains(evaluation_set, numbers) for evaluation_set in numbers["sets"]},
        sizes=_accuracy_against(numbers, "questions", "size"),
        attributes=[_by_attribute(attribute, numbers) for attribute in ATTRIBUTES],
        most_drawn=MOST_DRAWN,
        pairs=pairs,
        more_pairs=len(numbers["pairs"]) - len(pairs),
    )


def table_csv(numbers: dict[str, Any]) -> str:
    """One line per run and evaluation set; runs without any evaluation have one line with the reason."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    with_sets = set()
    for evaluation_set in numbers["sets"]:
        for row in evaluation_set["runs"]:
            with_sets.add(row["run"])
            writer.writerow({"set": evaluation_set["name"], **_run_cells(_run_of(row, numbers)), **_result_cells(row)})
    for run in numbers["runs"]:
        if run["number"] not in with_sets:
            writer.writerow(_run_cells(run))
    return file.getvalue()


def _run_cells(run: dict[str, Any]) -> dict[str, Any]:
    training = run["training"] or {}
    return {
        "run": run["name"],
        "control": run["control"],
        "training_questions": training.get("questions"),
        **{column: training.get(column) for column in MEANS},
        "not_compared": run["not_compared"],
    }


def _result_cells(row: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for when in ("before", "after"):
        if (answers := row[when]) is not None:
            low, high = answers["interval"]
            cells |= {
                "n": answers["n"],
                when: answers["accuracy"],
                f"{when}_low": low,
                f"{when}_high": high,
                f"boxed_{when}": answers["boxed"],
                f"among_boxed_{when}": answers["among_boxed"],
            }
    if (change := row["change"]) is not None:
        low, high = change["interval"]
        cells |= {
            "difference": change["difference"],
            "difference_low": low,
            "difference_high": high,
            "p_mcnemar": change["p"],
            "from_boxed": change["from_boxed"],
            "from_among_boxed": change["from_among_boxed"],
        }
    return cells


def parts_csv(numbers: dict[str, Any]) -> str:
    """Accuracy after training by attribute of the evaluation questions: one line per set, run, attribute and value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, PARTS_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for evaluation_set in numbers["sets"]:
        for row in evaluation_set["runs"]:
            run = _run_of(row, numbers)
            for attribute in ATTRIBUTES:
                parts = row[f"by_{attribute.field}"]
                for value, part in parts.items() if parts.keys() != {"none"} else ():
                    low, high = part["interval"]
                    writer.writerow(
                        {
                            "set": evaluation_set["name"],
                            "run": run["name"],
                            "control": run["control"],
                            "attribute": attribute.field,
                            "value": value,
                            "n": part["n"],
                            "after": part["accuracy"],
                            "after_low": low,
                            "after_high": high,
                            "boxed_after": part["boxed"],
                            "among_boxed_after": part["among_boxed"],
                        }
                    )
    return file.getvalue()


# --------------------------------------------------------------------------------------------------------------- charts
def training_curves(runs: Sequence[ComparedRun]) -> list[Figure]:
    """Reward, accuracy and length over steps, one curve per run (the first MOST_CURVES), labelled with its number."""
    trained = [run for run in runs if run.rows][:MOST_CURVES]
    steps = sorted({step_of(row) for run in trained for row in run.rows})
    charts = []
    for metric, title, caption, unit, top in CURVES:
        series = []
        for k, run in enumerate(trained):
            values = {step_of(row): row.get(metric) for row in run.rows}
            series.append(
                Series(
                    str(run.number),
                    [values.get(step) for step in steps],
                    colour=4 if run.control else (0, 1, 2, 3, 5)[k % 5],
                )
            )
        series = [curve for curve in series if any(value is not None for value in curve.values)]
        if series:
            charts.append(
                Figure(
                    metric,
                    title,
                    caption,
                    line_chart(steps, series, unit=unit, top=top, smooth=SMOOTH if len(steps) >= SMOOTH_FROM else 1),
                )
            )
    return charts


def _gains(evaluation_set: dict[str, Any], numbers: dict[str, Any]) -> str | None:
    rows = []
    for row in evaluation_set["runs"]:
        if (change := row["change"]) is not None:
            run = _run_of(row, numbers)
            rows.append((f"{run['number']} {run['name']}", change["difference"], *change["interval"], bool(run["control"])))
    return gain_rows(rows) if rows else None


def _by_attribute(attribute: Attribute, numbers: dict[str, Any]) -> dict[str, Any]:
    """The section on an attribute: accuracy against its mean over the training questions, and by its values among the
    evaluation questions: (set, values, rows, chart) for each set whose questions have several."""
    by, parts = f"by_{attribute.field}", []
    for evaluation_set in numbers["sets"]:
        rows = [row for row in evaluation_set["runs"] if row[by]]
        values = sorted({value for row in rows for value in row[by]}, key=lambda value: (value == "none", value.zfill(9)))
        if len(values) > 1:
            parts.append(
                {
                    "set": evaluation_set["name"],
                    "values": values,
                    "rows": rows,
                    "chart": _by_value(rows, by, numbers, attribute, evaluation_set["chance"]),
                }
            )
    return {
        "attribute": attribute,
        "charts": _accuracy_against(numbers, f"mean_{attribute.field}", attribute.unit),
        "parts": parts,
        "by": by,
    }


def _by_value(
    rows: Sequence[dict[str, Any]], by: str, numbers: dict[str, Any], attribute: Attribute, chance: float | None
) -> str | None:
    """Accuracy after training of the first runs, by the values of an attribute; None for a single value."""
    drawn = [
        _point(_run_of(row, numbers), float(value), part)
        for row in rows[:MOST_DRAWN]
        for value, part in row[by].items()
        if value != "none"
    ]
    return scatter(drawn, attribute.unit, chance) if len({x for _, x, *_ in drawn}) > 1 else None


def _accuracy_against(numbers: dict[str, Any], key: str, x_title: str) -> list[Figure]:
    """Accuracy after training against a number of the training set, one figure per evaluation set; sets for which all runs
    have the same number are left out."""
    return [
        figure
        for evaluation_set in numbers["sets"]
        if (figure := _set_against(evaluation_set, numbers, key, x_title)) is not None
    ]


def _set_against(evaluation_set: dict[str, Any], numbers: dict[str, Any], key: str, x_title: str) -> Figure | None:
    drawn = []
    for row in evaluation_set["runs"]:
        run = _run_of(row, numbers)
        training = run["training"] or {}
        if row["after"] and training.get(key) is not None and run["control"] != UNCHANGED:
            drawn.append(_point(run, float(training[key]), row["after"]))
    if len({x for _, x, *_ in drawn}) < 2:
        return None
    lower_bound = (
        " Sizes may be larger: some were not recorded."
        if any(run["training"] and run["training"]["seen_only"] for run in numbers["runs"]) and key == "questions"
        else ""
    )
    chance = "" if evaluation_set["chance"] is None else " Dotted: picking letters at random."
    return Figure(
        evaluation_set["name"],
        evaluation_set["name"],
        f"Accuracy after training, n = {_n(evaluation_set)}, with 95% intervals; labels are run numbers.{chance}{lower_bound}",
        scatter(drawn, x_title, evaluation_set["chance"]),
    )


def _point(run: dict[str, Any], x: float, answers: dict[str, Any]) -> tuple[str, float, float, float, float, bool]:
    """A point of a `scatter` chart: a run's accuracy at x."""
    low, high = answers["interval"]
    return str(run["number"]), x, answers["accuracy"], low, high, bool(run["control"])


def _run_of(row: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers["runs"][row["run"] - 1]


def _n(evaluation_set: dict[str, Any]) -> str:
    counts = sorted({row["after"]["n"] for row in evaluation_set["runs"] if row["after"]})
    return " to ".join(f"{n:,}" for n in (counts if len(counts) == 1 else (counts[0], counts[-1])))


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _interval(interval: Sequence[float]) -> str:
    return f"[{_share(interval[0])}, {_share(interval[1])}]"
