"""`alphamed compare`: a set of runs as one HTML page, with its numbers beside as JSON and CSV.

Like report.html the page asks for nothing and runs nothing; texts are escaped by the template.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alphamed.data.attributes import ATTRIBUTES, Attribute
from alphamed.data.output import json_writer, text_writer, write_all
from alphamed.errors import ConfigError
from alphamed.evaluation.score import percent, points
from alphamed.lab.reports.comparison import comparison, mix
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure
from alphamed.lab.reports.plots import PAGE_STYLE, STYLE, Series, gain_rows, line_chart, scatter
from alphamed.lab.reports.runs import UNCHANGED, ComparedRun, read_runs

MOST_CURVES = 12
MOST_PAIRS = 60
MOST_BESIDE = 5
"""Runs drawn side by side at each level or bin of the evaluation questions; the table has all."""
CURVES = (
    (
        "reward/mean",
        "Reward",
        "Mean reward of a step's responses. Runs with different rewards cannot be compared here.",
        "",
        None,
    ),
    ("reward/correct", "Accuracy in training", "Correct responses of a step.", "share", 1.0),
    ("response/tokens_mean", "Response length", "Tokens per response.", "", None),
)
MEANS = tuple(f"mean_{one.field}" for one in ATTRIBUTES)
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

    FILE.csv has a line a run and evaluation set, FILE.parts.csv one a run, set and level or bin of its questions."""
    if out.suffix != ".html":
        raise ConfigError(f"--out: {str(out)!r} does not end in .html; name such a file")
    numbers, table, parts = (out.with_suffix(suffix) for suffix in (".json", ".csv", ".parts.csv"))
    if not out.exists() and (there := next((file for file in (numbers, table, parts) if file.exists()), None)):
        raise ConfigError(
            f"--out: {there} is there already, without the page of an earlier comparison; choose another name, or remove it"
        )
    runs = read_runs(paths)
    found = comparison(runs)
    write_all(
        {
            out: text_writer(render(runs, found)),
            numbers: json_writer(found),
            table: text_writer(table_csv(found)),
            parts: text_writer(parts_csv(found)),
        }
    )
    print(json.dumps(found, ensure_ascii=False, indent=2) if as_json else "\n".join([*told(found), str(out)]))
    return 0


def told(found: dict[str, Any]) -> list[str]:
    """The comparison for a terminal."""
    lines = [
        f"{run['name']} has no before and after to compare: {run['not_compared']}"
        for run in found["runs"]
        if run["not_compared"]
    ]
    return [*found["verdict"], *found["warnings"], *lines]


def render(runs: Sequence[ComparedRun], found: dict[str, Any]) -> str:
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"points": points, "share": _share, "mix": mix, "interval": _interval}
    shown = sorted(found["pairs"], key=lambda row: row["p"])[:MOST_PAIRS]
    return environment.get_template("compare.html.j2").render(
        found=found,
        runs={run["number"]: run for run in found["runs"]},
        curves=training_curves(runs),
        gains={one["name"]: _gains(one, found) for one in found["sets"]},
        sizes=_against(found, "questions", "size"),
        attributes=[_of_attribute(one, found) for one in ATTRIBUTES],
        most_beside=MOST_BESIDE,
        pairs=shown,
        more_pairs=len(found["pairs"]) - len(shown),
        chart_style=STYLE,
        style=PAGE_STYLE.read_text(encoding="utf-8"),
    )


def table_csv(found: dict[str, Any]) -> str:
    """One line a run and evaluation set; runs without any evaluation have one line that says why."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    with_sets = set()
    for one in found["sets"]:
        for row in one["runs"]:
            with_sets.add(row["run"])
            writer.writerow({"set": one["name"], **_run_cells(found, row["run"]), **_result_cells(row)})
    for run in found["runs"]:
        if run["number"] not in with_sets:
            writer.writerow(_run_cells(found, run["number"]))
    return file.getvalue()


def _run_cells(found: dict[str, Any], number: int) -> dict[str, Any]:
    run = found["runs"][number - 1]
    training = run["training"] or {}
    return {
        "run": run["name"],
        "control": run["control"],
        "training_questions": training.get("questions"),
        **{mean: training.get(mean) for mean in MEANS},
        "not_compared": run["not_compared"],
    }


def _result_cells(row: dict[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for when in ("before", "after"):
        if (one := row[when]) is not None:
            low, high = one["interval"]
            cells |= {
                "n": one["n"],
                when: one["accuracy"],
                f"{when}_low": low,
                f"{when}_high": high,
                f"boxed_{when}": one["boxed"],
                f"among_boxed_{when}": one["among_boxed"],
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


def parts_csv(found: dict[str, Any]) -> str:
    """Accuracy after training by attribute of the evaluation questions: one line a set, run, attribute and value."""
    file = io.StringIO()
    writer = csv.DictWriter(file, PARTS_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for one in found["sets"]:
        for row in one["runs"]:
            run = found["runs"][row["run"] - 1]
            for attribute in ATTRIBUTES:
                parts = row[f"by_{attribute.field}"]
                for value, part in parts.items() if parts.keys() != {"none"} else ():
                    low, high = part["interval"]
                    writer.writerow(
                        {
                            "set": one["name"],
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
    """Reward, accuracy and length over steps, a curve a run (the first MOST_CURVES), named by its number."""
    trained = [run for run in runs if run.rows][:MOST_CURVES]
    steps = sorted({int(row["step"]) for run in trained for row in run.rows})
    found = []
    for metric, title, caption, unit, top in CURVES:
        series = []
        for k, run in enumerate(trained):
            values = {int(row["step"]): row.get(metric) for row in run.rows}
            series.append(
                Series(
                    str(run.number),
                    [values.get(step) for step in steps],
                    colour=4 if run.control else (0, 1, 2, 3, 5)[k % 5],
                )
            )
        series = [one for one in series if any(value is not None for value in one.values)]
        if series:
            found.append(
                Figure(
                    metric,
                    title,
                    caption,
                    line_chart(steps, series, unit=unit, top=top, smooth=SMOOTH if len(steps) >= SMOOTH_FROM else 1),
                )
            )
    return found


def _gains(one: dict[str, Any], found: dict[str, Any]) -> str | None:
    rows = []
    for row in one["runs"]:
        if (change := row["change"]) is not None:
            run = found["runs"][row["run"] - 1]
            rows.append((f"{run['number']} {run['name']}", change["difference"], *change["interval"], bool(run["control"])))
    return gain_rows(rows) if rows else None


def _of_attribute(attribute: Attribute, found: dict[str, Any]) -> dict[str, Any]:
    """What the page says of an attribute: accuracy against its mean over the training questions, and by its values among
    the evaluation questions: (set, values, rows, chart) for each set whose questions have several."""
    by, parts = f"by_{attribute.field}", []
    for one in found["sets"]:
        rows = [row for row in one["runs"] if row[by]]
        values = sorted({value for row in rows for value in row[by]}, key=lambda value: (value == "none", value.zfill(9)))
        if len(values) > 1:
            parts.append(
                {
                    "set": one["name"],
                    "values": values,
                    "rows": rows,
                    "chart": _by_value(rows, by, found, attribute, one["chance"]),
                }
            )
    return {
        "attribute": attribute,
        "charts": _against(found, f"mean_{attribute.field}", attribute.unit),
        "parts": parts,
        "by": by,
    }


def _by_value(
    rows: Sequence[dict[str, Any]], by: str, found: dict[str, Any], attribute: Attribute, chance: float | None
) -> str | None:
    """Accuracy after training of the first runs over the values of an attribute; None for a single value."""
    marks = [
        (str(row["run"]), float(value), part["accuracy"], *part["interval"], bool(found["runs"][row["run"] - 1]["control"]))
        for row in rows[:MOST_BESIDE]
        for value, part in row[by].items()
        if value != "none"
    ]
    return scatter(marks, attribute.unit, chance) if len({x for _, x, *_ in marks}) > 1 else None


def _against(found: dict[str, Any], key: str, x_title: str) -> list[Figure]:
    """Accuracy after training against a number of the training set, a figure an evaluation set; those in which all runs have
    the same number are left out."""
    return [figure for one in found["sets"] if (figure := _one_against(one, found, key, x_title)) is not None]


def _one_against(one: dict[str, Any], found: dict[str, Any], key: str, x_title: str) -> Figure | None:
    marks = []
    for row in one["runs"]:
        run = found["runs"][row["run"] - 1]
        training = run["training"] or {}
        if row["after"] and training.get(key) is not None and run["control"] != UNCHANGED:
            marks.append(
                (
                    str(run["number"]),
                    float(training[key]),
                    row["after"]["accuracy"],
                    *row["after"]["interval"],
                    bool(run["control"]),
                )
            )
    if len({x for _, x, *_ in marks}) < 2:
        return None
    least = (
        " Sizes may be larger: some were not recorded."
        if any(run["training"] and run["training"]["seen_only"] for run in found["runs"]) and key == "questions"
        else ""
    )
    dotted = "" if one["chance"] is None else " Dotted: picking letters blindly."
    return Figure(
        one["name"],
        one["name"],
        f"Accuracy after training, n = {_n(one)}, with 95% intervals; numbers are runs.{dotted}{least}",
        scatter(marks, x_title, one["chance"]),
    )


def _n(one: dict[str, Any]) -> str:
    counts = sorted({row["after"]["n"] for row in one["runs"] if row["after"]})
    return " to ".join(f"{n:,}" for n in (counts if len(counts) == 1 else (counts[0], counts[-1])))


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def _interval(pair: Sequence[float], show: Callable[[float], str] = _share) -> str:
    return f"[{show(pair[0])}, {show(pair[1])}]"
