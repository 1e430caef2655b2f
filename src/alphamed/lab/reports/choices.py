"""What the report says beside a gain: scores of policies that do not read the question, and how the model itself chooses.

    python -m alphamed.lab.reports.choices runs/lesson/evaluations/step_000000.items.jsonl

prints of a file of graded answers, of a run or of `alphamed eval`, the four facts that hold after a lesson in form: it boxes
always, its text names the option that it boxes, it chooses evenly, and it knows no more than chance. Exit code 1 where one
of them does not hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.config.choices import BadRows
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError, DataError
from alphamed.evaluation.blind import BlindScore, blind_scores
from alphamed.evaluation.choices import Choices, Response, choices
from alphamed.evaluation.score import Score, percent
from alphamed.evaluation.variants import VARIANTS
from alphamed.files import read_json_lines
from alphamed.records import Outcome, Question
from alphamed.rundir import provenance
from alphamed.rundir.directory import config_of_run

if TYPE_CHECKING:
    from alphamed.lab.reports.report import SetReport

ItemRow = Mapping[str, Any]
"""A line of an items file: a graded answer with its question."""
ALWAYS = 0.95
"""Share of answers from which on something is called so for all of them."""
EVEN = 0.98
"""Of the entropy of an even choice: letters at 31%, 23%, 23%, 23% have 0.99, at 40%, 20%, 20%, 20% 0.96."""
ALIKE = 1.5
"""Times as many pairs of alike answers to a question as even choice gives, at most: of four options chosen at 46%, 18%, 18%, 18%
they are 31%, at 55%, 15%, 15%, 15% 37%."""


# -------------------------------------------------------------------------------------------------------- of the report
def with_choices(run_dir: Path, report: SetReport, after: Score) -> SetReport:
    """The report on an evaluation set with the scores of blind policies among its sentences and how the model chooses in its
    table. `after`: the score of its last evaluation."""
    first, last = (_answers(run_dir, report.steps[place], report.name) for place in (0, -1))
    sentences = report.sentences and (*report.sentences, *blind_sentences(run_dir, report.name, report.steps[-1], after))
    return replace(
        report, sentences=sentences, table=(*report.table, *_table(first, last if len(report.steps) > 1 else None))
    )


def blind_sentences(run_dir: Path, name: str, step: int, after: Score) -> list[str]:
    """What policies that do not read the question score on an evaluation set as it was asked after `step`, and whether the
    model, which then had the score `after`, is above them all."""
    scores = _blind_scores(run_dir, name, step)
    if not scores:
        return []
    best = max(scores, key=lambda score: score.value)
    above = after.accuracy.interval[0] > best.value
    verdict = (
        "The share of correct answers is above all of them, outside its interval."
        if above
        else f"The share of correct answers ({after.accuracy}) is not shown to be above the best of them, so that it shows no "
        f"knowledge."
    )
    listed = ", ".join(f"{score.policy}{_detail(score)} {_score(score)}" for score in scores)
    return [f"Without reading the question: {listed}; chance {percent(best.chance)}. {verdict}"]


def best_blind(run_dir: Path, name: str, step: int) -> float:
    """The best score of a policy that does not read the question on an evaluation set as it was asked after `step`; 0 where
    there is none."""
    return max((score.value for score in _blind_scores(run_dir, name, step)), default=0.0)


def _blind_scores(run_dir: Path, name: str, step: int) -> list[BlindScore]:
    return blind_scores(_questions(_answers(run_dir, step, name)), trained_on(run_dir))


def numbers(run_dir: Path, steps: Mapping[str, int]) -> dict[str, Any]:
    """The same as plain values, by set; `steps` says after which step each was evaluated."""
    plain = {}
    for name, step in steps.items():
        rows = _answers(run_dir, step, name)
        chosen = choices_of(rows)
        plain[name] = {
            "blind_policies": {score.policy: score.plain() for score in blind_scores(_questions(rows), trained_on(run_dir))},
            "choices": chosen.plain() if chosen else None,
        }
    return plain


def _answers(run_dir: Path, step: int, name: str) -> list[ItemRow]:
    path = run_dir / "evaluations" / f"step_{step:06d}.items.jsonl"
    return [row for row in read_json_lines(path) if row["set"] == name]


def trained_on(run_dir: Path) -> Sequence[Question] | None:
    """The training questions of a run; None where their files are gone or changed, or hold no questions."""
    config = config_of_run(run_dir)
    try:
        if provenance.changed_files(run_dir, config.data.train):
            return None
        return _loaded(tuple((file, file.stat().st_mtime_ns) for file in config.data.train))
    except (ConfigError, DataError, OSError):
        return None


@lru_cache(maxsize=1)
def _loaded(files: tuple[tuple[Path, int], ...]) -> Sequence[Question]:
    """The questions of files that are as old as this; asked for once for every evaluation set."""
    return load_questions([file for file, _ in files], BadRows.SKIP).questions


def _table(first: Sequence[ItemRow], last: Sequence[ItemRow] | None) -> list[tuple[str, str, str]]:
    columns = [choices_of(rows) for rows in (first, last) if rows is not None]
    if not all(columns):
        return []
    rows = {
        "Text and letter agree": [str(column.agree) for column in columns if column],
        "Entropy of letters": [f"{column.letter_entropy.share:.0%} of an even choice's" for column in columns if column],
    }
    return [(label, cells[0], cells[1] if len(cells) > 1 else "") for label, cells in rows.items()]


def _questions(rows: Iterable[ItemRow]) -> list[Question]:
    return list({row["id"]: Question(row["id"], row["question"], row["options"], row["answer"]) for row in rows}.values())


def _detail(score: BlindScore) -> str:
    return f" ({score.detail})" if score.detail else ""


def _score(score: BlindScore) -> str:
    low, high = score.interval
    return f"{percent(score.value)} [{percent(low)}, {percent(high)}]"


def choices_of(rows: Iterable[ItemRow]) -> Choices | None:
    """The statistics of graded answers; None where one was asked without its options."""
    return choices(
        [
            Response(
                row["id"],
                {} if row.get("variant") and VARIANTS[row["variant"]].hides_options else row["options"],
                row["answer"],
                row["text"],
                row["letter"] if row["outcome"] in (Outcome.CORRECT, Outcome.WRONG) else None,
            )
            for row in rows
        ]
    )


# ------------------------------------------------------------------------------------------- after a lesson in form
@dataclass(frozen=True, slots=True)
class FormFact:
    """One of the four facts, whether it holds, and the numbers it follows from."""

    name: str
    holds: bool
    detail: str


def form_facts(chosen: Choices) -> list[FormFact]:
    """What a lesson in form is to bring about, and what it must not."""
    letters = ", ".join(f"{letter} {percent(share)}" for letter, (share, _) in chosen.letters.items())
    same, even = chosen.same, chosen.same_chance
    pairs = (
        f"two answers to a question are alike in {percent(same)} of pairs, even choice {percent(even)}"
        if same is not None and even is not None
        else "one answer to each question, so that small likings decide if it is greedy (--samples 4 shows how small)"
    )
    low, high = chosen.right.interval
    return [
        FormFact("boxes always", chosen.boxed.value >= ALWAYS, str(chosen.boxed)),
        FormFact(
            "text names the boxed option",
            bool(chosen.agree.total) and chosen.agree.value >= ALWAYS and chosen.agree.total >= ALWAYS * chosen.boxed.count,
            f"{chosen.agree} of {chosen.agree.total} answers that name one",
        ),
        FormFact(
            "chooses evenly",
            chosen.letter_entropy.share >= EVEN and (same is None or even is None or same <= ALIKE * even),
            f"letters {letters or 'none'}; entropy {chosen.letter_entropy.share:.1%} of an even choice's, of option texts "
            f"{chosen.text_entropy.share:.1%}; {pairs}",
        ),
        FormFact(
            "knows no more than chance",
            low <= chosen.chance <= high,
            f"right {chosen.right}, chance {percent(chosen.chance)}",
        ),
    ]


def main(path: Path) -> int:
    """Print the facts of each set of an items file; 1 where one does not hold."""
    by_set: dict[str, list[ItemRow]] = {}
    for row in read_json_lines(path):
        by_set.setdefault(row["set"], []).append(row)
    if not by_set:
        raise ConfigError(
            f"{path}: holds no graded answer; give an items file of a run's evaluations/ or of `alphamed eval`"
        )
    holding = True
    for name, rows in by_set.items():
        chosen = choices_of(rows)
        for fact in form_facts(chosen) if chosen else ():
            print(f"{name}: {fact.name}: {'yes' if fact.holds else 'NO'}: {fact.detail}")
            holding &= fact.holds
    return 0 if holding else 1


if __name__ == "__main__":
    try:
        sys.exit(
            main(Path(sys.argv[1])) if len(sys.argv) == 2 else "usage: python -m alphamed.lab.reports.choices ITEMS.jsonl"
        )
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
