"""What `alphamed data inspect` says of policies that do not read the questions: a table, lines for the terminal, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alphamed.config.choices import BadRows
from alphamed.data.sources import load_questions
from alphamed.evaluation.blind import EXCESS, BlindScore, blind_scores
from alphamed.evaluation.score import percent
from alphamed.lab.datasets.checks import Finding
from alphamed.records import Question

TITLE = "A blind policy beats chance"


def scores_of_file(questions: Sequence[Question], train: Sequence[Path]) -> list[BlindScore]:
    """The scores on a set, fitted on the questions of the files `train` where any are named."""
    return blind_scores(questions, load_questions(train, BadRows.SKIP).questions if train else None)


def findings(scores: Sequence[BlindScore]) -> list[Finding]:
    """A serious finding for every policy that beats chance by more than EXCESS beyond its interval."""
    return [
        Finding(
            TITLE,
            f"{line(score)}: more than {100 * EXCESS:.0f} points above chance beyond its interval, without reading the "
            f"question. A model can learn that in place of medicine, and a gain up to there is none in knowledge.",
            round(score.value * score.n),
            (),
            True,
        )
        for score in scores
        if score.beats_chance
    ]


def line(score: BlindScore) -> str:
    """The score in one line, with its interval and chance."""
    low, high = score.interval
    detail = f" ({score.detail})" if score.detail else ""
    return (
        f"{score.policy}{detail} {percent(score.value)} [{percent(low)}, {percent(high)}], chance {percent(score.chance)}, "
        f"n = {score.n:,}"
    )


def print_scores(scores: Sequence[BlindScore]) -> None:
    """A line a policy on standard output, with a mark at those that beat chance."""
    for score in scores:
        print(f"{'warning: ' if score.beats_chance else ''}without reading the question: {line(score)}")
