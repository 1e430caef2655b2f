"""`alphamed audit RUN`: whether every question of an epoch was trained on exactly once, or dropped for a stated reason.

Compares what a run directory says of it in four places: the question log, line by line; the rollout files, which hold what was
trained on; the checkpoints, which hold the place in the questions and those under way; the training files. It reads only, so it
works on a live run, a dead one and a resumed one. Exit code: 0 proven, 1 violations (a line each), 2 nothing to audit.

What is read first was written last: of a live run the log may be further on than the rest, never behind.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alphamed.config.schema import Config
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError, DataError
from alphamed.megatron import checkpoint_folder
from alphamed.records import DropReason
from alphamed.rundir import provenance, question_log, rollout_files
from alphamed.rundir.directory import config_of_run, finished_step
from alphamed.rundir.metrics import read_rows, step_of
from alphamed.rundir.question_log import LoggedStep, question_of
from alphamed.rundir.status import is_running, read_pulse

MOST_NAMED = 3
"""Questions that a line names."""
Draw = tuple[int, str]
"""(epoch, question id): what must be trained on or dropped once."""


@dataclass(slots=True)
class Fate:
    """What has become of a question of an epoch."""

    group: str = ""  # that it was asked in last
    asked_step: int = 0
    attempt: int = 0  # that asked it
    end: str = ""  # "trained" or a DropReason; "" while it is under way
    end_step: int = 0


@dataclass(slots=True)
class History:
    """The log, taken together."""

    fates: dict[Draw, Fate] = field(default_factory=dict)
    under_way: dict[int, frozenset[Draw]] = field(default_factory=dict)
    """After the steps that were asked for."""
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class AuditRecords:
    """What the run directory and the training files hold."""

    config: Config
    checkpoints: Mapping[str, Mapping[str, Any] | str]  # name -> the run's state, or why it cannot be read
    metric_steps: Sequence[int]
    rollout_steps: Sequence[int]
    starts: Sequence[Mapping[str, Any]]
    log: Sequence[LoggedStep]
    questions: int | None  # how many an epoch holds, where the run has recorded it
    ids: frozenset[str] | None  # of the training files, where they are what the run began with


def main(run_dir: Path) -> int:
    """Print the audit. Raises ConfigError where there is nothing to audit."""
    config = config_of_run(run_dir)
    if config.rollout.replay is not None:
        raise ConfigError(f"run directory {run_dir}: replays the rollouts of {config.rollout.replay}; audit that run")
    data_notes, data_violations, ids = _training_files(run_dir, config)
    evidence = _gather(run_dir, config, ids)
    if not evidence.log:
        raise ConfigError(
            f"run directory {run_dir}: holds no {question_log.QUESTIONS} with a step; let the run record one "
            f"(versions before the question log recorded none)"
        )
    history = replay_log(evidence, {state["step"] for state in evidence.checkpoints.values() if not isinstance(state, str)})
    rollout_notes, rollout_violations = _check_rollouts(run_dir, evidence)
    checkpoint_notes, checkpoint_violations = _check_checkpoints(evidence, history)
    violations = [
        *data_violations,
        *_check_starts(evidence),
        *history.violations,
        *_check_ids(evidence, history),
        *_check_steps(evidence),
        *rollout_violations,
        *checkpoint_violations,
    ]
    print(_headline(run_dir, evidence))
    print(*_table(evidence, history), *data_notes, *rollout_notes, *checkpoint_notes, sep="\n")
    print(*_verdict(evidence, violations), sep="\n")
    return 1 if violations else 0


# ----------------------------------------------------------------------------------------------------------- what is read
def _gather(run_dir: Path, config: Config, ids: frozenset[str] | None) -> AuditRecords:
    checkpoints = {}
    for folder in checkpoint_folder.complete(run_dir / "checkpoints"):
        try:
            checkpoints[folder.name] = json.loads((folder / checkpoint_folder.MANIFEST).read_text(encoding="utf-8"))["state"]
        except FileNotFoundError:  # of a live run: deleted meanwhile
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            checkpoints[folder.name] = f"its manifest cannot be read ({type(error).__name__}: {error})"
    record = provenance.read(run_dir) or {"starts": []}
    metric_steps = [step_of(row) for row in read_rows(run_dir / "metrics.jsonl")]
    rollout_steps = rollout_files.recorded_steps(run_dir)
    return AuditRecords(
        config,
        checkpoints,
        metric_steps,
        rollout_steps,
        record["starts"],
        question_log.read(run_dir),
        (record.get("train") or {}).get("questions"),
        ids,
    )


def _training_files(run_dir: Path, config: Config) -> tuple[list[str], list[str], frozenset[str] | None]:
    """Notes, violations and the ids of the questions where all files are what the run began with."""
    changed = set(provenance.changed_files(run_dir, config.data.train))
    absent = sorted(file for file in changed if not Path(file).exists())
    violations = [f"data.train: {file} has changed since the run began" for file in sorted(changed.difference(absent))]
    if changed:
        return [f"data         {file} is not there: its ids are not compared" for file in absent], violations, None
    try:
        questions = load_questions(config.data.train, config.data.bad_rows).questions
    except DataError as error:
        return [f"data         not compared: {error}"], [], None
    files = ", ".join(str(file) for file in config.data.train)
    return [f"data         {files}: unchanged, {len(questions)} questions"], [], frozenset(q.id for q in questions)


# ---------------------------------------------------------------------------------------------------------------- the log
def replay_log(evidence: AuditRecords, wanted_steps: Iterable[int] = ()) -> History:
    """Follow the questions through the log; what was under way after each of `wanted_steps` is kept."""
    history, wanted, drawn = History(), set(wanted_steps), Counter[int]()
    groups: dict[str, Draw] = {}
    off: set[int] = set()  # epochs whose count deviates, named once
    for line in evidence.log:
        _follow_asked(line, history, groups, drawn)
        _follow_ends(line, history, groups)
        for epoch, expected in _expected_draws(line, evidence.questions, drawn):
            if drawn[epoch] != expected and epoch not in off:
                off.add(epoch)
                history.violations.append(
                    f"step {line.step}: {drawn[epoch]} questions of epoch {epoch} have been asked or skipped, the place in "
                    f"the questions is after {expected}"
                )
        if line.step in wanted:
            history.under_way[line.step] = frozenset(draw for draw, fate in history.fates.items() if not fate.end)
    return history


def _follow_asked(line: LoggedStep, history: History, groups: dict[str, Draw], drawn: Counter[int]) -> None:
    for group, epoch in line.questions.asked.items():
        draw = epoch, question_of(group)
        fate = history.fates.get(draw)
        if group in groups:
            history.violations.append(f"step {line.step}: group {group} was asked before")
        elif fate is None:
            drawn[epoch] += 1
            fate = history.fates[draw] = Fate()
        elif fate.end or fate.attempt == line.attempt:  # a later start asks again what was under way
            before = f"{_past(fate.end)} in step {fate.end_step}" if fate.end else f"asked in step {fate.asked_step}"
            history.violations.append(f"step {line.step}: {_name(draw)} is asked again, it was {before}")
            continue
        groups[group] = draw
        if fate:
            fate.group, fate.asked_step, fate.attempt = group, line.step, line.attempt
    for reason, skipped in line.questions.skipped.items():
        for draw in skipped:
            if draw in history.fates:
                history.violations.append(f"step {line.step}: {_name(draw)} is skipped ({reason}), it was drawn before")
                continue
            drawn[draw[0]] += 1
            history.fates[draw] = Fate(end=reason, end_step=line.step)


def _follow_ends(line: LoggedStep, history: History, groups: Mapping[str, Draw]) -> None:
    ends = [("trained", line.questions.trained), *line.questions.dropped.items()]
    for end, group in ((end, group) for end, members in ends for group in members):
        if group not in groups:
            history.violations.append(f"step {line.step}: group {group} is {_past(end)}, no step asked it")
            continue
        fate = history.fates[groups[group]]
        if fate.end:
            history.violations.append(
                f"step {line.step}: {_name(groups[group])} is {_past(end)}, it was {_past(fate.end)} in step {fate.end_step}"
            )
        elif fate.group != group:
            history.violations.append(f"step {line.step}: group {group} is {_past(end)}, {fate.group} has replaced it")
        else:
            fate.end, fate.end_step = end, line.step


def _expected_draws(line: LoggedStep, questions: int | None, drawn: Counter[int]) -> Iterator[tuple[int, int]]:
    """How many questions of each epoch have been drawn when the stream is where the line says. Finished epochs without a
    recorded number of questions are as long as the first."""
    whole = questions if questions is not None else drawn[0]
    yield from ((epoch, whole) for epoch in range(line.epoch))
    yield line.epoch, line.position
    yield from ((epoch, 0) for epoch in sorted(drawn) if epoch > line.epoch)


def _check_steps(evidence: AuditRecords) -> Iterator[str]:
    """Steps 1, 2, 3, ... are in the log once each, and so are those of the metrics."""
    expected = 1
    for line in evidence.log:
        if line.step != expected:
            yield f"the log goes from step {expected - 1} to step {line.step}"
        expected = line.step + 1
    logged = {line.step for line in evidence.log}
    if missing := [step for step in evidence.metric_steps if step not in logged]:
        yield f"metrics.jsonl holds {_steps(missing)}, the log does not"
    ahead = [step for step in logged if evidence.metric_steps and step > max(evidence.metric_steps) + 1]
    if ahead:
        yield f"the log holds {_steps(sorted(ahead))}, metrics.jsonl ends at step {max(evidence.metric_steps)}"


def _check_starts(evidence: AuditRecords) -> Iterator[str]:
    """The steps of each start begin where provenance.json says that it continued."""
    before = 0
    for line in evidence.log:
        if line.attempt < before or line.attempt > len(evidence.starts):
            yield (
                f"step {line.step} was recorded by start {line.attempt}, after steps of start {before}; "
                f"provenance.json holds {len(evidence.starts)} starts"
            )
        elif line.attempt > before:
            continued = evidence.starts[line.attempt - 1].get("continued_after_step")
            if continued != line.step - 1:
                yield f"start {line.attempt} continued after step {continued}, the first step that it logged is {line.step}"
        before = max(before, line.attempt)


def _check_ids(evidence: AuditRecords, history: History) -> Iterator[str]:
    """Each finished epoch had every question of the training files, the current one none but these."""
    if evidence.ids is None:
        return
    current = evidence.log[-1].epoch
    by_epoch: dict[int, set[str]] = {epoch: set() for epoch in range(current)}
    for epoch, question in history.fates:
        by_epoch.setdefault(epoch, set()).add(question)
    for epoch, questions in sorted(by_epoch.items()):
        if unknown := sorted(questions - evidence.ids):
            yield f"epoch {epoch}: {_named(unknown)} of the log are not in data.train"
        if epoch < current and (missing := sorted(evidence.ids - questions)):
            yield f"epoch {epoch}: {_named(missing)} of data.train were neither asked nor skipped"


# ---------------------------------------------------------------------------------------------- rollout files, checkpoints
def _check_rollouts(run_dir: Path, evidence: AuditRecords) -> tuple[list[str], list[str]]:
    """Whether each step's rollout file holds the groups that the log says were trained on. Notes and violations."""
    violations, agreed, present = [], 0, set(evidence.rollout_steps)
    wanted = evidence.config.logging.rollout_files and not any(
        "logging.rollout_files" in start.get("changed", {}) for start in evidence.starts
    )
    epochs: dict[str, int] = {}
    for line in evidence.log:
        epochs |= line.questions.asked
        path = rollout_files.rollout_path(run_dir, line.step)
        if not path.exists():
            if wanted:
                violations.append(f"step {line.step}: its rollout file {path.name} is gone")
            continue
        try:
            groups = rollout_files.read_group_ids(path)
        except ConfigError as error:
            violations.append(str(error))
            continue
        expected = {group: (question_of(group), epochs.get(group)) for group in line.questions.trained}
        if list(groups.items()) == list(expected.items()):
            agreed += 1
            continue
        differing = [group for group in [*groups, *expected] if groups.get(group) != expected.get(group)]
        violations.append(f"step {line.step}: {path.name} and the log differ in what was trained on: {_named(differing)}")
    last = evidence.log[-1].step
    if beyond := sorted(step for step in present if step > last + 1):
        violations.append(f"there are rollout files of {_steps(beyond)}, the log ends at step {last}")
    notes = [f"rollouts     {agreed} of {len(evidence.log)} steps agree with their rollout file"]
    if last + 1 in present:
        notes.append(f"             step {last + 1} was being recorded; a resume does it again")
    return notes, violations


def _check_checkpoints(evidence: AuditRecords, history: History) -> tuple[list[str], list[str]]:
    """Whether each checkpoint goes on where the log stands after its step. Notes and violations."""
    violations, agreed, lines = [], [], {line.step: line for line in evidence.log}
    for name, state in evidence.checkpoints.items():
        if isinstance(state, str):
            violations.append(f"checkpoint {name}: {state}")
        elif problem := _differs(state, lines.get(state["step"]), history):
            violations.append(f"checkpoint {name}: {problem}")
        else:
            agreed.append(name)
    return [f"checkpoints  {', '.join(agreed) or 'none'}" + (" agree" if agreed else "")], violations


def _differs(state: Mapping[str, Any], line: LoggedStep | None, history: History) -> str | None:
    if line is None:
        return "the log has no line of its step"
    stream = state["cursor"].get("stream", {})
    if (stream.get("epoch"), stream.get("position")) != (line.epoch, line.position):
        return (
            f"goes on after question {stream.get('position')} of epoch {stream.get('epoch')}, "
            f"the log after {line.position} of {line.epoch}"
        )
    asked = [rollout_files.question_from_json(text) for text in state["cursor"].get("under_way", ())]
    asks_again = Counter((question.epoch or 0, question.id) for question in asked)
    under_way = history.under_way[line.step]
    if repeated := [_name(draw) for draw, count in asks_again.items() if count > 1 or draw not in under_way]:
        return f"would ask {_named(repeated)} again, which the log does not have under way"
    if lost := [_name(draw) for draw in sorted(under_way - asks_again.keys())]:
        return f"would lose {_named(lost)}, under way after step {line.step}"
    return None


# --------------------------------------------------------------------------------------------------------------- printing
def _headline(run_dir: Path, evidence: AuditRecords) -> str:
    runs = is_running(run_dir, read_pulse(run_dir), time.time())
    state = "running" if runs else "finished" if finished_step(run_dir) is not None else "not running"
    by_attempt: dict[int, list[int]] = {}
    for line in evidence.log:
        by_attempt.setdefault(line.attempt, []).append(line.step)
    recorded = ", ".join(f"start {attempt}: {_steps(steps)}" for attempt, steps in by_attempt.items())
    return f"{run_dir}: {state}; {recorded}"


def _table(evidence: AuditRecords, history: History) -> Iterator[str]:
    last = evidence.log[-1]
    whole = evidence.questions if evidence.questions is not None else len(evidence.ids) if evidence.ids else None
    by_epoch: dict[int, Counter[str]] = {epoch: Counter() for epoch in range(last.epoch)}
    for (epoch, _), fate in history.fates.items():
        by_epoch.setdefault(epoch, Counter())[fate.end or "under_way"] += 1
    reasons = [reason for reason in DropReason if any(counts[reason] for counts in by_epoch.values())]
    columns = ["trained", *reasons, "under_way", "not_drawn"]
    yield "  ".join(["epoch", "questions", *columns])
    for epoch, counts in sorted(by_epoch.items()):
        not_drawn = "?" if whole is None else str(whole - counts.total())
        cells = [*(str(counts[column]) for column in columns[:-1]), not_drawn]
        yield "  ".join(
            [f"{epoch:>5}", f"{'?' if whole is None else whole:>9}"]
            + [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        )


def _verdict(evidence: AuditRecords, violations: Sequence[str]) -> Iterator[str]:
    if violations:
        yield from (f"violation: {violation}" for violation in violations)
        yield f"{len(violations)} violation{'s' * (len(violations) > 1)}"
        return
    epochs = evidence.log[-1].epoch
    whole = f"every question of {epochs} whole epoch{'s' * (epochs > 1)}, and " if epochs else ""
    yield (
        f"no violation: {whole}every question drawn of epoch {epochs}, was trained on exactly once, was dropped for the reason "
        f"counted above, or is under way"
    )


def _past(end: str) -> str:
    return "trained on" if end == "trained" else f"dropped ({end})"


def _name(draw: Draw) -> str:
    return f"question {draw[1]} of epoch {draw[0]}"


def _named(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - MOST_NAMED} more" if len(unique) > MOST_NAMED else ""
    return ", ".join(unique[:MOST_NAMED]) + more


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return (
        f"steps {steps[0]}-{steps[-1]}" if steps[-1] - steps[0] == len(steps) - 1 else f"steps {', '.join(map(str, steps))}"
    )
