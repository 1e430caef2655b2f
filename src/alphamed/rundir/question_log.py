"""questions.jsonl of a run, a line a step: which questions were asked, trained on or dropped, and why.

    {"step": 7, "attempt": 2, "stream": {"epoch": 1, "position": 12}, "asked": {"1": ["7:0:q4", ...]},
     "trained": ["7:0:q4", ...], "dropped": {"no_signal": ["7:1:q9"]}, "skipped": {"level": {"1": ["q5"]}}}

Groups are named as in the rollout files (step, place and question id); what was asked or skipped is listed by epoch. `stream` is
the place in the questions after the step: of the epoch, `position` have been drawn, and each of these is asked or skipped.
`attempt` counts the starts of the run, from 1: a step that was recorded and lost to a kill has only the line of the start that
did it again. Rank 0 writes the line with the step's other records; a resume cuts the file back as it does those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.errors import ConfigError
from alphamed.files import append_json, read_json_lines, replace_json_lines
from alphamed.records import DropReason, StepQuestions

QUESTIONS = "questions.jsonl"


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One line."""

    step: int
    attempt: int
    epoch: int  # the stream's, after the step
    position: int
    questions: StepQuestions


def append(run_dir: Path, step: int, attempt: int, stream: Mapping[str, Any], questions: StepQuestions) -> None:
    """Log a step. `stream`: the state of the question stream after it."""
    append_json(
        run_dir / QUESTIONS,
        {
            "step": step,
            "attempt": attempt,
            "stream": {"epoch": stream["epoch"], "position": stream["position"]},
            "asked": _by_epoch((epoch, group) for group, epoch in questions.asked.items()),
            "trained": questions.trained,
            "dropped": questions.dropped,
            "skipped": {reason: _by_epoch(skipped) for reason, skipped in questions.skipped.items()},
        },
    )


def read(run_dir: Path) -> list[LoggedStep]:
    """The lines in order; [] where there is no log. Raises ConfigError naming a line that is none of a question log."""
    steps = []
    for number, row in enumerate(read_json_lines(run_dir / QUESTIONS), start=1):
        try:
            steps.append(_logged_step(row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{run_dir / QUESTIONS}: line {number} is none of a question log ({type(error).__name__}: {error}); restore it"
            ) from None
    return steps


def drop_after(run_dir: Path, step: int) -> None:
    """Forget the steps after `step`. Raises ConfigError as `read` does."""
    path = run_dir / QUESTIONS
    if read(run_dir) or path.exists():  # also without lines: half a first one goes
        replace_json_lines(path, [row for row in read_json_lines(path) if row["step"] <= step])


def question_of(group: str) -> str:
    """The question id in a group's id."""
    return group.split(":", 2)[2]


def _by_epoch(items: Iterable[tuple[int, str]]) -> dict[str, list[str]]:
    epochs: dict[str, list[str]] = {}
    for epoch, name in items:
        epochs.setdefault(str(epoch), []).append(name)
    return epochs


def _logged_step(row: Mapping[str, Any]) -> LoggedStep:
    return LoggedStep(
        int(row["step"]),
        int(row["attempt"]),
        int(row["stream"]["epoch"]),
        int(row["stream"]["position"]),
        StepQuestions(
            asked={group: int(epoch) for epoch, groups in row["asked"].items() for group in groups},
            trained=tuple(row["trained"]),
            dropped={DropReason(reason): tuple(groups) for reason, groups in row["dropped"].items()},
            skipped={
                DropReason(reason): tuple((int(epoch), name) for epoch, names in epochs.items() for name in names)
                for reason, epochs in row["skipped"].items()
            },
        ),
    )
