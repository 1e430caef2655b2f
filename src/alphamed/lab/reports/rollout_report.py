"""The part of a run's report that comes from its recorded responses: levels, sources, letters, response patterns, question histories.

A run without rollout files (logging.rollout_files: false) has none of it; one sentence says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import percent
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure
from alphamed.lab.reports.history import History, history
from alphamed.lab.reports.plots import Series, Value, line_chart
from alphamed.lab.reports.rollout_stats import Part, Quote, RolloutStats, StepStats, together
from alphamed.lab.reports.watch import PATTERNS, SPOKEN, collapse, ends, warnings, words
from alphamed.rundir.rollout_files import read_answers, recorded_steps, rollout_path

ABSENT = (
    "No responses are recorded (logging.rollout_files: false, or the files were removed), so there are no numbers by "
    "level, source and question here, and nothing that would show rewards earned without reasoning."
)
MOST_CURVES = 6
KINDS = {one.axis: (one.field, one.scale) for one in ATTRIBUTES} | {"sources": ("source", "")}
"""What responses are told by (`tally.PARTS`) -> its name, and what its numbers mean."""
QUESTION_COLUMNS = (
    "id",
    "source",
    *(one.field for one in ATTRIBUTES),
    "times_asked",
    "first_step",
    "last_step",
    "first_share_right",
    "last_share_right",
    "first_solved_step",
    "forgotten",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: its name, then cells as people read them."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    told: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Watched:
    """Examples of one thing to watch."""

    title: str
    told: str
    quotes: tuple[Quote, ...]


@dataclass(frozen=True, slots=True)
class RolloutReport:
    warnings: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    watched: tuple[Watched, ...]
    history: History
    numbers: dict[str, Any]  # for report.json
    questions_csv: str


def run_stats(run_dir: Path) -> RolloutStats:
    """All recorded responses of a run, counted; one file is in memory at a time. RolloutFileError for a damaged file."""
    found = RolloutStats()
    for step in recorded_steps(run_dir):
        found.add(step, read_answers(rollout_path(run_dir, step)))
    return found


def rollout_report(run_dir: Path) -> RolloutReport | None:
    """What the report says of recorded responses; None where none are."""
    found = run_stats(run_dir)
    if not found.steps:
        return None
    past = history(found.questions.values())
    said = tuple(warnings(found.steps))
    return RolloutReport(
        said,
        tuple(rollout_figures(found.steps, past)),
        tuple(_tables(found)),
        tuple(_watched(found)),
        past,
        numbers(found, past) | {"warnings": list(said)},
        questions_csv(found),
    )


# -------------------------------------------------------------------------------------------------------------- figures
def rollout_figures(steps: Sequence[StepStats], past: History) -> list[Figure]:
    """Curves over the recorded steps; those that would show one thing only are left out."""
    x, smooth = [one.step for one in steps], SMOOTH if len(steps) >= SMOOTH_FROM else 1
    found = []

    def add(
        key: str,
        title: str,
        caption: str,
        series: Sequence[Series],
        unit: str = "share",
        top: Value = 1.0,
        smooth: int = smooth,
    ) -> None:
        found.append(Figure(key, title, caption, line_chart(x, series, unit=unit, smooth=smooth, top=top)))

    blind = [one.chance / one.whole.responses if one.whole.responses else None for one in steps]
    add(
        "among_boxed",
        "Right among boxed answers",
        "What the boxes are worth. Grey: picking letters blindly.",
        [Series("right", [one.whole.among_boxed.share for one in steps]), Series("blind", blind, colour=4)],
    )
    for kind, (word, scale) in KINDS.items():
        parts = [one.parts[kind] for one in steps]
        if len({name for part in parts for name in part}) > 1:
            add(
                kind,
                f"Accuracy by {word}",
                f"Correct responses to questions of one {word}{scale and f' ({scale})'}.",
                _curves(parts),
            )
    letters = sorted({letter for one in steps for letter in one.answers})
    if letters:
        add(
            "letters",
            "Letters answered",
            "Share of each letter among the boxed answers. The keys are spread " + _spread(together(steps)) + ".",
            _letter_curves(steps, letters),
        )
    shares = [Series(str(pattern), [one.response_patterns[pattern].share for one in steps]) for pattern in SPOKEN]
    if any(value for one in shares for value in one.values):
        add(
            "response_patterns",
            "Response patterns",
            "Share of responses that reason after their answer, have several boxes, repeat themselves.",
            shares,
            top=None,
        )
    if past.asked:
        add(
            "history",
            "Questions solved",
            "Questions asked so far and those of them solved at least once: more than half of a group's responses right.",
            _history_curves(steps, past),
            unit="",
            top=None,
            smooth=1,
        )
    return found


def _curves(parts: Sequence[Mapping[str, Part]]) -> list[Series]:
    """Accuracy of each name over the steps, the MOST_CURVES - 1 commonest and the others together where there are more."""
    sizes: dict[str, int] = {}
    for part in parts:
        for name, one in part.items():
            sizes[name] = sizes.get(name, 0) + one.responses
    names = sorted(sizes)
    if len(names) > MOST_CURVES:
        names = sorted(sorted(sizes, key=lambda name: (-sizes[name], name))[: MOST_CURVES - 1])
    series = [
        Series(
            name.rpartition("/")[2],
            [part[name].correct.share if name in part else None for part in parts],
            colour=_colour(k),
        )
        for k, name in enumerate(names)
    ]
    if len(names) < len(sizes):
        rest = [[one.correct for name, one in part.items() if name not in names] for part in parts]
        series.append(
            Series(
                "others",
                [
                    sum(c.hits for c in counts) / total if (total := sum(c.cases for c in counts)) else None
                    for counts in rest
                ],
                colour=4,
            )
        )
    return series


def _colour(place: int) -> int:
    """Grey, the fifth, is kept for what stands back."""
    return place if place < 4 else 5 if place == 4 else 4


def _letter_curves(steps: Sequence[StepStats], letters: Sequence[str]) -> list[Series]:
    shown = letters if len(letters) <= MOST_CURVES else letters[: MOST_CURVES - 1]

    def share(one: StepStats, chosen: Sequence[str]) -> Value:
        return sum(one.answers[letter] for letter in chosen) / one.answers.total() if one.answers else None

    series = [Series(letter, [share(one, [letter]) for one in steps], colour=_colour(k)) for k, letter in enumerate(shown)]
    rest = letters[len(shown) :]
    return [*series, Series(f"{rest[0]}-{rest[-1]}", [share(one, rest) for one in steps], colour=4)] if rest else series


def _spread(whole: StepStats) -> str:
    return ", ".join(f"{letter} {percent(whole.keys[letter] / whole.keys.total())}" for letter in sorted(whole.keys))


def _history_curves(steps: Sequence[StepStats], past: History) -> list[Series]:
    asked, solved, asked_so_far, solved_so_far = past.first_asked, past.first_solved, 0, 0
    rows = []
    for one in steps:
        asked_so_far, solved_so_far = asked_so_far + asked.get(one.step, 0), solved_so_far + solved.get(one.step, 0)
        rows.append((float(asked_so_far), float(solved_so_far)))
    return [Series("asked", [a for a, _ in rows], colour=4), Series("solved", [b for _, b in rows], colour=0)]


# --------------------------------------------------------------------------------------------------------------- tables
def _tables(found: RolloutStats) -> list[Table]:
    edge, whole = ends(found.steps), together(found.steps)
    title = f"first {edge.steps} → last {edge.steps} steps" if edge.first else "all recorded steps"
    tables = []
    for kind, (word, _) in KINDS.items():
        parts = whole.parts[kind]
        if len(parts) > 1:
            first, last = (edge.first.parts[kind] if edge.first else None), edge.last.parts[kind]
            tables.append(
                Table(
                    f"By {word}",
                    f"{title}; 95% intervals count the questions, for responses to one question are alike.",
                    ("", "responses", "reward", "correct", "right among boxed", "tokens"),
                    tuple(_part_row(part, parts, first, last) for part in sorted(parts)),
                )
            )
    tables.append(
        Table(
            "Letters",
            "Share among boxed answers and among the keys of the same questions.",
            ("", "keys", *(("first answers", "last answers") if edge.first else ("answers",))),
            tuple(_letter_row(letter, whole, edge.first, edge.last) for letter in sorted(whole.answers | whole.keys)),
        )
    )
    return tables


def _part_row(name: str, whole: Mapping[str, Part], first: Mapping[str, Part] | None, last: Mapping[str, Part]) -> Row:
    ends_of_it = [part.get(name, Part()) for part in (first, last)] if first is not None else [whole[name]]

    def cell(show: Callable[[Part], str]) -> str:
        return " → ".join(show(part) for part in ends_of_it)

    return Row(
        name,
        (
            f"{whole[name].responses:,}",
            cell(lambda part: _mean(part.reward, part, "{:.2f}")),
            cell(lambda part: words(part.correct)),
            cell(lambda part: words(part.among_boxed)),
            cell(lambda part: _mean(part.tokens, part, "{:.0f}")),
        ),
    )


def _mean(total: float, part: Part, form: str) -> str:
    return form.format(total / part.responses) if part.responses else "-"


def _letter_row(letter: str, whole: StepStats, first: StepStats | None, last: StepStats) -> Row:
    def share(step: StepStats) -> str:
        return percent(step.answers[letter] / step.answers.total()) if step.answers else "-"

    keys = percent(whole.keys[letter] / whole.keys.total()) if whole.keys else "-"
    return Row(letter, (keys, *([share(first), share(last)] if first else [share(whole)])))


def _watched(found: RolloutStats) -> list[Watched]:
    """Each pattern with its share at both ends and examples; the collapsed letter where there is one."""
    edge = ends(found.steps)
    shown = []
    if (one := collapse(edge.last.answers, edge.last.keys)) is not None:
        shown.append(
            Watched(
                f"One letter: {one.letter}",
                f"{percent(one.share)} of the last answers; wrong ones among them:",
                tuple(found.quotes.get(one.letter, ())),
            )
        )
    for pattern, (title, what) in PATTERNS.items():
        if quotes := found.quotes.get(pattern):
            before = f"{percent(edge.first.response_patterns[pattern].share or 0.0)} at first, " if edge.first else ""
            shown.append(
                Watched(
                    title,
                    f"{before}{percent(edge.last.response_patterns[pattern].share or 0.0)} at last {what}. From step {quotes[0].step}:",
                    tuple(quotes),
                )
            )
    return shown


# -------------------------------------------------------------------------------------------------------------- numbers
def numbers(found: RolloutStats, past: History) -> dict[str, Any]:
    """The counts as plain values, for report.json."""
    return {
        "recorded_steps": [
            {
                "step": one.step,
                **_part_json(one.whole),
                "chance": one.chance / one.whole.responses,
                "answers": dict(sorted(one.answers.items())),
                "keys": dict(sorted(one.keys.items())),
                "response_patterns": {str(pattern): count.share for pattern, count in one.response_patterns.items()},
                **{
                    kind: {name: _part_json(part) for name, part in sorted(parts.items())}
                    for kind, parts in one.parts.items()
                },
            }
            for one in found.steps
            if one.whole.responses
        ],
        "questions": {
            "asked": past.asked,
            "asked_again": past.again,
            "solved_at_once": past.at_once,
            "solved_later": past.later,
            "never_solved": past.never,
            "could_be_forgotten": past.tested,
            "forgotten": past.forgotten,
            "sources": _counted(one.source or "unknown" for one in found.questions.values()),
            **{
                one.axis: _counted(str(past.attributes[one.field] or "none") for past in found.questions.values())
                for one in ATTRIBUTES
            },
        },
    }


def _part_json(part: Part) -> dict[str, Any]:
    return {
        "responses": part.responses,
        "reward": part.reward / part.responses,
        "tokens": part.tokens / part.responses,
        "boxed": part.boxed.hits,
        "correct": part.correct.hits,
        "groups": part.correct.groups,
        "correct_interval": list(part.correct.interval),
    }


def _counted(values) -> dict[str, int]:
    found: dict[str, int] = {}
    for value in values:
        found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items()))


def questions_csv(found: RolloutStats) -> str:
    """One line a question, in the order of first visits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(QUESTION_COLUMNS)
    for name, past in found.questions.items():
        (first, right, of), (last, last_right, last_of) = past.visits[0], past.visits[-1]
        writer.writerow(
            [
                name,
                past.source,
                *past.attributes.values(),
                len(past.visits),
                first,
                last,
                f"{right / of:.4f}",
                f"{last_right / last_of:.4f}",
                past.first_solved,
                int(past.forgotten),
            ]
        )
    return file.getvalue()
