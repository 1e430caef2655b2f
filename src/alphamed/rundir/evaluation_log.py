"""evaluations.jsonl of a run: a line each time a set of evaluation questions was evaluated, in training or of the exported model.

Choosing by a test set is training on it. The log is never cut back: what a resume does again is recorded twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from alphamed.errors import ConfigError
from alphamed.files import append_json_lines, read_json_lines

EVALUATIONS = "evaluations.jsonl"
DEVELOPMENT, TEST = "development", "test"


def record(run_dir: Path, step: int | None, by: str, sets: Iterable[tuple[str, str, int]]) -> None:
    """Note that `by` ("training", "alphamed eval") evaluated sets, (name, role, questions), after `step`; None where
    the step is not known."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_json_lines(
        run_dir / EVALUATIONS,
        [{"time": now, "step": step, "by": by, "set": name, "role": role, "questions": n} for name, role, n in sets],
    )


def sentences(run_dir: Path) -> list[str]:
    """One sentence a set: how often it was evaluated and at which steps. ConfigError names a line that is no evaluation."""
    rows_of_set: dict[str, list[dict]] = {}
    for number, row in enumerate(read_json_lines(run_dir / EVALUATIONS), start=1):
        if not {"set", "step", "role"} <= row.keys():
            raise ConfigError(f"{run_dir / EVALUATIONS}: line {number} records no evaluation (set, step, role); remove it")
        rows_of_set.setdefault(row["set"], []).append(row)
    return [_sentence(name, rows) for name, rows in rows_of_set.items()]


def _sentence(name: str, rows: list[dict]) -> str:
    times = "once" if len(rows) == 1 else f"{len(rows)} times"
    word = "step" if len(rows) == 1 else "steps"
    steps = ", ".join("after export" if row["step"] is None else str(row["step"]) for row in rows[:12])
    more = ", ..." if len(rows) > 12 else ""
    kind = "Development set" if rows[-1]["role"] == DEVELOPMENT else "Test set"
    return f"{kind} {name} was evaluated {times} ({word} {steps}{more})."
