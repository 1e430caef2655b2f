"""A set of questions becomes one HTML page: lengths, answers, sources, levels, problems, examples; and its numbers as JSON.

Like report.html it asks for nothing and runs nothing; question texts are escaped by the template.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.data.describe import describe, length_words
from alphamed.data.output import beside, check_places, json_writer, text_writer, write_all
from alphamed.data.sources import load_questions
from alphamed.data.text import normalised_option
from alphamed.errors import ConfigError
from alphamed.evaluation.blind import BlindScore
from alphamed.evaluation.score import percent
from alphamed.hashing import draw, file_sha256
from alphamed.lab.datasets import inspect_blind
from alphamed.lab.datasets.checks import Finding, check_set
from alphamed.lab.reports.figures import Figure
from alphamed.lab.reports.plots import PAGE_STYLE, STYLE, histogram, nice_ticks, ranked_bars
from alphamed.records import Question

EXAMPLES = 10
MOST_BARS = 14


def main(file: Path, out: Path | None, overwrite: bool = False, train: Sequence[Path] = ()) -> int:
    """`alphamed data inspect FILE`: write the page and its numbers, print where they are. `train`: files of questions that
    blind policies are fitted on."""
    out = out or beside(file, ".html")
    numbers_file = beside(out, ".json")
    check_places({"--out": out, "the numbers": numbers_file}, {"FILE": [file], "--train": train}, overwrite)
    if out.suffix != ".html":
        raise ConfigError(f"--out: {out} is to be a page; give a name that ends in .html")
    if numbers_file.exists() and not _is_ours(numbers_file):
        raise ConfigError(f"--out: the numbers would replace {numbers_file}, which is of no inspection; give another --out")
    loaded = load_questions([file], BadRows.SKIP)
    (reading,) = loaded.readings
    blind = inspect_blind.scores_of_file(loaded.questions, train)
    findings = [*inspect_blind.findings(blind), *check_set(loaded.questions, loaded.skipped, reading)]
    about = {"file": str(file), "sha256": file_sha256(file), "reading": reading.plain()} | describe(loaded.questions)
    numbers = about | {
        "blind_policies": {score.policy: score.plain() for score in blind},
        "findings": [_plain(finding) for finding in findings],
    }
    page = render(file.name, about, loaded.questions, findings, blind)
    write_all({out: text_writer(page), numbers_file: json_writer(numbers)})
    print(out)
    inspect_blind.print_scores(blind)
    return 0


def _is_ours(numbers_file: Path) -> bool:
    try:
        numbers = json.loads(numbers_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(numbers, dict) and {"sha256", "findings"} <= numbers.keys()


def render(
    name: str,
    about: dict[str, Any],
    questions: Sequence[Question],
    findings: Sequence[Finding],
    blind: Sequence[BlindScore] = (),
) -> str:
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("dataset.html.j2").render(
        name=name,
        about=about,
        figures=set_figures(questions),
        findings=findings,
        blind=[(score, percent(score.value), *map(percent, score.interval), percent(score.chance)) for score in blind],
        examples=examples(questions),
        chart_style=STYLE,
        style=PAGE_STYLE.read_text(encoding="utf-8"),
    )


def set_figures(questions: Sequence[Question]) -> list[Figure]:
    """Figures of a set in reading order; what is the same everywhere is left out."""
    lengths = [length_words(q) for q in questions]
    caption = (
        "Words of context, question and options together (characters in scripts without blanks); the last bar holds "
        "longer ones."
    )
    found = [Figure("words", "Length", caption, _lengths(lengths))]
    for key, title, caption, values in (
        ("sources", "Sources", "As the questions name them.", [q.source or "unknown" for q in questions]),
        ("levels", "Levels", "1 easy to 6 hard.", [f"level {q.level}" if q.level else "none" for q in questions]),
        ("options", "Number of options", "", [f"{len(q.options)} options" for q in questions]),
        (
            "answers",
            "Right letters",
            "Even unless the set is skewed; fewer questions have the later letters.",
            [q.answer for q in questions],
        ),
        (
            "answer_texts",
            "Commonest right answers",
            "By text: what a constant answer would earn.",
            [normalised_option(q.options[q.answer]) for q in questions],
        ),
    ):
        counts = Counter(values)
        if key == "answer_texts":
            rows = [(text, count) for text, count in counts.most_common(8) if count > 1]
        else:
            rows = _rows(counts)
        if len(rows) > 1 and (key != "levels" or set(counts) != {"none"}):
            found.append(Figure(key, title, caption, ranked_bars(rows, len(questions))))
    return found


def _lengths(lengths: Sequence[int]) -> str:
    top = sorted(lengths)[min(len(lengths) - 1, math.ceil(0.99 * len(lengths)))]
    edges = nice_ticks(0, max(top, 10), 24)
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[min(int((length - edges[0]) / (edges[1] - edges[0])), len(counts) - 1)] += 1
    return histogram(edges, counts, "words")


def _rows(counts: Counter[str]) -> list[tuple[str, int]]:
    """In order of names; beyond MOST_BARS the rarest are put together."""
    if len(counts) <= MOST_BARS:
        return sorted(counts.items())
    common = counts.most_common(MOST_BARS - 1)
    return [*common, (f"{len(counts) - len(common)} others", counts.total() - sum(count for _, count in common))]


def examples(questions: Sequence[Question]) -> list[Question]:
    """Questions to read, chosen by a hash of their ids: one of each source in turn."""
    by_source: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda q: draw("example", q.id)):
        by_source.setdefault(question.source or "unknown", []).append(question)
    turns = [group[k] for k in range(EXAMPLES) for _, group in sorted(by_source.items()) if k < len(group)]
    return turns[:EXAMPLES]


def _plain(finding: Finding) -> dict[str, Any]:
    return {
        "title": finding.title,
        "told": finding.told,
        "count": finding.count,
        "examples": list(finding.examples),
        "serious": finding.serious,
    }
