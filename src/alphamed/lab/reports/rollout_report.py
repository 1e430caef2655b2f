"""The part of a report that comes from recorded responses: levels, sources, letters, response patterns, question histories.

For a run without rollout files (logging.rollout_files: false) one sentence replaces it.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.data.attributes import ATTRIBUTES
from alphamed.evaluation.score import percent
from alphamed.lab.reports.figures import SMOOTH, SMOOTH_FROM, Figure
from alphamed.lab.reports.history import QuestionCounts, count_questions
from alphamed.lab.reports.plots import Series, Value, line_chart
from alphamed.lab.reports.rollout_stats import Quote, ResponseCounts, RolloutStats, StepStats, merged
from alphamed.lab.reports.watch import PATTERNS, WARNED, collapse, ends, response_warnings, share_text
from alphamed.rundir.rollout_files import read_answers, recorded_steps, rollout_path

ABSENT = (
    "No responses are recorded (logging.rollout_files: false, or the files were removed), so there are no numbers by "
    "level, source and question here, and no check for rewards earned without reasoning."
)
MOST_CURVES = 6
KINDS = {attribute.axis: (attribute.field, attribute.scale) for attribute in ATTRIBUTES} | {"sources": ("source", "")}
"""Kind of `rollout_stats.GROUPINGS` -> its name, and what its numbers mean."""
QUESTION_COLUMNS = (
    "id",
    "source",
    *(attribute.field for attribute in ATTRIBUTES),
    "times_visited",
    "first_step",
    "last_step",
    "first_share_correct",
    "last_share_correct",
    "first_solved_step",
    "forgotten",
)


@dataclass(frozen=True, slots=True)
class TableRow:
    """A line of a table: its name, then cells as text."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[TableRow, ...]


@dataclass(frozen=True, slots=True)
class PatternExamples:
    """Responses that show one pattern, or the one letter of a collapsed run."""

    title: str
    caption: str
    quotes: tuple[Quote, ...]


@dataclass(frozen=True, slots=True)
class RolloutReport:
    warnings: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    examples: tuple[PatternExamples, ...]
    questions: QuestionCounts
    numbers: dict[str, Any]  # for report.json
    questions_csv: str


def run_stats(run_dir: Path) -> RolloutStats:
    """All recorded responses of a run, counted; one file is in memory at a time. RolloutFileError for a damaged file."""
    stats = RolloutStats()
    for step in recorded_steps(run_dir):
        stats.add(step, read_answers(rollout_path(run_dir, step)))
    return stats


def rollout_report(run_dir: Path) -> RolloutReport | None:
    """The report on recorded responses; None where there are none."""
    stats = run_stats(run_dir)
    if not stats.steps:
        return None
    questions = count_questions(stats.questions.values())
    warnings = tuple(response_warnings(stats.steps))
    return RolloutReport(
        warnings,
        tuple(rollout_figures(stats.steps, questions)),
        tuple(_tables(stats)),
        tuple(_examples(stats)),
        questions,
        numbers(stats, questions) | {"warnings": list(warnings)},
        questions_csv(stats),
    )


# -------------------------------------------------------------------------------------------------------------- figures
def rollout_figures(steps: Sequence[StepStats], questions: QuestionCounts) -> list[Figure]:
    """Curves over the recorded steps; a chart by level or source is left out where there is only one."""
    x, smooth = [step.step for step in steps], SMOOTH if len(steps) >= SMOOTH_FROM else 1
    figures = []

    def add(
        key: str,
        title: str,
        caption: str,
        series: Sequence[Series],
        unit: str = "share",
        top: Value = 1.0,
        smooth: int = smooth,
    ) -> None:
        figures.append(Figure(key, title, caption, line_chart(x, series, unit=unit, smooth=smooth, top=top)))

    chance = [step.chance / step.whole.responses if step.whole.responses else None for step in steps]
    add(
        "among_boxed",
        "Accuracy among boxed answers",
        "Correct answers as a share of boxed ones. Grey: picking letters at random.",
        [Series("correct", [step.whole.among_boxed.share for step in steps]), Series("chance", chance, colour=4)],
    )
    for kind, (word, scale) in KINDS.items():
        parts = [step.parts[kind] for step in steps]
        if len({name for part in parts for name in part}) > 1:
            add(
                kind,
                f"Accuracy by {word}",
                f"Share of correct responses by {word} of the question{scale and f' ({scale})'}.",
                _curves(parts),
            )
    letters = sorted({letter for step in steps for letter in step.answers})
    if letters:
        add(
            "letters",
            "Letters answered",
            "Share of each letter among the boxed answers. Among the keys: " + _key_shares(merged(steps)) + ".",
            _letter_curves(steps, letters),
        )
    shares = [Series(str(pattern), [step.response_patterns[pattern].share for step in steps]) for pattern in WARNED]
    if any(value for series in shares for value in series.values):
        add(
            "response_patterns",
            "Response patterns",
            "Share of responses that reason after their answer, have several boxes, or repeat themselves.",
            shares,
            top=None,
        )
    if questions.visited:
        add(
            "questions",
            "Questions solved",
            "Questions trained on so far and those solved at least once: more than half of a group's responses correct.",
            _question_curves(steps, questions),
            unit="",
            top=None,
            smooth=1,
        )
    return figures


def _curves(parts: Sequence[Mapping[str, ResponseCounts]]) -> list[Series]:
    """Accuracy of each part over the steps; where there are more than MOST_CURVES, of the MOST_CURVES - 1 largest and of the
    others together."""
    sizes: dict[str, int] = {}
    for part in parts:
        for name, counts in part.items():
            sizes[name] = sizes.get(name, 0) + counts.responses
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
        rest = [[counts.correct for name, counts in part.items() if name not in names] for part in parts]
        series.append(
            Series(
                "others",
                [
                    sum(count.hits for count in counts) / cases if (cases := sum(count.cases for count in counts)) else None
                    for counts in rest
                ],
                colour=4,
            )
        )
    return series


def _colour(index: int) -> int:
    """Colour 4, grey, is used last: it marks what is in the background."""
    return index if index < 4 else 5 if index == 4 else 4


def _letter_curves(steps: Sequence[StepStats], letters: Sequence[str]) -> list[Series]:
    shown = letters if len(letters) <= MOST_CURVES else letters[: MOST_CURVES - 1]

    def share(step: StepStats, chosen: Sequence[str]) -> Value:
        return sum(step.answers[letter] for letter in chosen) / step.answers.total() if step.answers else None

    series = [Series(letter, [share(step, [letter]) for step in steps], colour=_colour(k)) for k, letter in enumerate(shown)]
    rest = letters[len(shown) :]
    return [*series, Series(f"{rest[0]}-{rest[-1]}", [share(step, rest) for step in steps], colour=4)] if rest else series


def _key_shares(whole: StepStats) -> str:
    return ", ".join(f"{letter} {percent(whole.keys[letter] / whole.keys.total())}" for letter in sorted(whole.keys))


def _question_curves(steps: Sequence[StepStats], questions: QuestionCounts) -> list[Series]:
    visited = itertools.accumulate(float(questions.new_at.get(step.step, 0)) for step in steps)
    solved = itertools.accumulate(float(questions.first_solved_at.get(step.step, 0)) for step in steps)
    return [Series("trained on", list(visited), colour=4), Series("solved", list(solved), colour=0)]


# --------------------------------------------------------------------------------------------------------------- tables
def _tables(stats: RolloutStats) -> list[Table]:
    compared, whole = ends(stats.steps), merged(stats.steps)
    title = f"first {compared.steps} → last {compared.steps} steps" if compared.first else "all recorded steps"
    tables = []
    for kind, (word, _) in KINDS.items():
        parts = whole.parts[kind]
        if len(parts) > 1:
            first, last = (compared.first.parts[kind] if compared.first else None), compared.last.parts[kind]
            tables.append(
                Table(
                    f"By {word}",
                    f"{title}; 95% intervals allow for the correlation of responses to the same question.",
                    ("", "responses", "reward", "correct", "correct among boxed", "tokens"),
                    tuple(_part_row(part, parts, first, last) for part in sorted(parts)),
                )
            )
    tables.append(
        Table(
            "Letters",
            "Share among boxed answers and among the keys of the same questions.",
            ("", "keys", *(("first answers", "last answers") if compared.first else ("answers",))),
            tuple(
                _letter_row(letter, whole, compared.first, compared.last) for letter in sorted(whole.answers | whole.keys)
            ),
        )
    )
    return tables


def _part_row(
    name: str,
    whole: Mapping[str, ResponseCounts],
    first: Mapping[str, ResponseCounts] | None,
    last: Mapping[str, ResponseCounts],
) -> TableRow:
    sides = [part.get(name, ResponseCounts()) for part in (first, last)] if first is not None else [whole[name]]

    def cell(show: Callable[[ResponseCounts], str]) -> str:
        return " → ".join(show(part) for part in sides)

    return TableRow(
        name,
        (
            f"{whole[name].responses:,}",
            cell(lambda part: _mean(part.reward, part, "{:.2f}")),
            cell(lambda part: share_text(part.correct)),
            cell(lambda part: share_text(part.among_boxed)),
            cell(lambda part: _mean(part.tokens, part, "{:.0f}")),
        ),
    )


def _mean(total: float, part: ResponseCounts, form: str) -> str:
    return form.format(total / part.responses) if part.responses else "-"


def _letter_row(letter: str, whole: StepStats, first: StepStats | None, last: StepStats) -> TableRow:
    def share(step: StepStats) -> str:
        return percent(step.answers[letter] / step.answers.total()) if step.answers else "-"

    keys = percent(whole.keys[letter] / whole.keys.total()) if whole.keys else "-"
    return TableRow(letter, (keys, *([share(first), share(last)] if first else [share(whole)])))


def _examples(stats: RolloutStats) -> list[PatternExamples]:
    """Each pattern with its share at both ends and examples; the collapsed letter where there is one."""
    compared = ends(stats.steps)
    examples = []
    if (collapsed := collapse(compared.last.answers, compared.last.keys)) is not None:
        examples.append(
            PatternExamples(
                f"One letter: {collapsed.letter}",
                f"{percent(collapsed.share)} of the answers in the last steps. Wrong answers among them:",
                tuple(stats.quotes.get(collapsed.letter, ())),
            )
        )
    for pattern, (title, meaning) in PATTERNS.items():
        if quotes := stats.quotes.get(pattern):
            caption = f"In the last steps {percent(compared.last.response_patterns[pattern].share or 0.0)} {meaning}"
            if compared.first:
                caption += f"; in the first {percent(compared.first.response_patterns[pattern].share or 0.0)}"
            examples.append(PatternExamples(title, f"{caption}. Examples from step {quotes[0].step}:", tuple(quotes)))
    return examples


# -------------------------------------------------------------------------------------------------------------- numbers
def numbers(stats: RolloutStats, questions: QuestionCounts) -> dict[str, Any]:
    """The counts as plain values, for report.json."""
    histories = stats.questions.values()
    return {
        "recorded_steps": [
            {
                "step": step.step,
                **_part_json(step.whole),
                "chance": step.chance / step.whole.responses,
                "answers": dict(sorted(step.answers.items())),
                "keys": dict(sorted(step.keys.items())),
                "response_patterns": {str(pattern): count.share for pattern, count in step.response_patterns.items()},
                **{
                    kind: {name: _part_json(part) for name, part in sorted(parts.items())}
                    for kind, parts in step.parts.items()
                },
            }
            for step in stats.steps
            if step.whole.responses
        ],
        "questions": {
            "visited": questions.visited,
            "revisited": questions.revisited,
            "solved_first": questions.solved_first,
            "solved_later": questions.solved_later,
            "never_solved": questions.never_solved,
            "could_be_forgotten": questions.could_be_forgotten,
            "forgotten": questions.forgotten,
            "sources": _frequencies(history.source or "unknown" for history in histories),
            **{
                attribute.axis: _frequencies(str(history.attributes[attribute.field] or "none") for history in histories)
                for attribute in ATTRIBUTES
            },
        },
    }


def _part_json(part: ResponseCounts) -> dict[str, Any]:
    return {
        "responses": part.responses,
        "reward": part.reward / part.responses,
        "tokens": part.tokens / part.responses,
        "boxed": part.boxed.hits,
        "correct": part.correct.hits,
        "groups": part.correct.groups,
        "correct_interval": list(part.correct.interval),
    }


def _frequencies(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def questions_csv(stats: RolloutStats) -> str:
    """One line per question, in the order of first visits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(QUESTION_COLUMNS)
    for name, history in stats.questions.items():
        first_step, first_correct, first_total = history.visits[0]
        last_step, last_correct, last_total = history.visits[-1]
        writer.writerow(
            [
                name,
                history.source,
                *history.attributes.values(),
                len(history.visits),
                first_step,
                last_step,
                f"{first_correct / first_total:.4f}",
                f"{last_correct / last_total:.4f}",
                history.first_solved,
                int(history.forgotten),
            ]
        )
    return file.getvalue()
