"""`alphamed study FILE`: plan the runs, make their sets, train one after the other, compare; or write Slurm scripts."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed.cluster.ledger import Lock
from alphamed.config.loading import dump_config
from alphamed.data.output import json_writer, text_writer, write_all
from alphamed.evaluation.runner import read_scores
from alphamed.lab.study import child, data, slurm
from alphamed.lab.study.grid import PlannedRun, plan_runs
from alphamed.lab.study.spec import Study, load_study
from alphamed.lab.study.state import Stand, State, found_state, state_of
from alphamed.reward.rules import check_rule
from alphamed.rundir.sinks import spoken_time

COMPARE_DEADLINE_S = 1800.0
Failures = dict[str, str]
"""Run -> why it is not finished."""


def main(options: argparse.Namespace) -> int:
    """0 where every run is finished, 1 where one is not, 128 + N where signal N stopped the study. Raises ConfigError and
    DataError before anything is started. With `--collect` nothing is, and a directory that is no run of this study is a run
    that is missing."""
    study = load_study(options.file)
    runs = plan_runs(study)
    data.check_sources(study, runs)
    for name, signature in {(run.config.reward.name, run.config.reward.signature) for run in runs}:
        check_rule(name, signature)
    states = {run.name: (found_state if options.collect else state_of)(run) for run in runs}
    print(*table(runs, states), sep="\n")
    if options.dry_run:
        return 0
    if options.collect:
        return _collect(study, options.file, runs, {})
    study.folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(study.folder)
    lock.take()
    try:
        return _carry_out(study, runs, states, options)
    finally:
        lock.release()


def _carry_out(study: Study, runs: Sequence[PlannedRun], states: Mapping[str, State], options: argparse.Namespace) -> int:
    for file in data.make_sets(study, runs, options.command):
        print(f"made {file}")
    configs = _write_configs(study, runs)
    left = [run for run in runs if states[run.name].stand != Stand.FINISHED]
    if options.slurm:
        return _write_scripts(study, options.file, left, configs)
    failures: Failures = {}
    for run in left:
        ended = _train(study, run, configs[run.name], states[run.name], f"{runs.index(run) + 1}/{len(runs)}")
        if ended.stopped_by:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 128 + ended.stopped_by
        if ended.why:
            failures[run.name] = ended.why
    return _collect(study, options.file, runs, failures)


# ----------------------------------------------------------------------------------------------------------------- table
def table(runs: Sequence[PlannedRun], states: Mapping[str, State]) -> list[str]:
    """One line a run: what is trained, and where it stands."""
    width = max(len(run.name) for run in runs)
    lines = [f"{len(runs)} runs"]
    for run in runs:
        state = states[run.name]
        stand = f"broken after step {state.steps}" if state.stand == Stand.BROKEN else str(state.stand)
        said = f", {run.control} control" if run.control else ""
        why = f" ({state.why})" if state.why and state.stand == Stand.BROKEN else ""
        lines.append(f"  {run.name:<{width}}  {_training(run)}{said}: {stand}{why}")
    return lines


def _training(run: PlannedRun) -> str:
    """How long a run trains, and on what signal."""
    c = run.config
    if c.sft is not None and c.run.last_step:
        length = f"{c.run.last_step} steps" if c.sft.epochs is None else f"{c.sft.epochs:g} epochs"
        return f"{length} of {c.sft.prompts_per_step} prompts, supervised"
    steps = f"{c.run.last_step} steps of {c.rollout.questions_per_step} x {c.rollout.samples_per_question}"
    return f"{steps if c.run.last_step else 'evaluation only'}, reward {c.reward.name}"


# ------------------------------------------------------------------------------------------------------------------ runs
def _write_configs(study: Study, runs: Sequence[PlannedRun]) -> dict[str, Path]:
    """A configuration file a run, and study.json in its directory: what a comparison puts on its axes."""
    files = {run.name: study.folder / "configs" / f"{run.name}.yaml" for run in runs}
    writers = {files[run.name]: text_writer(dump_config(run.config)) for run in runs}
    writers |= {
        run.config.run_dir / "study.json": json_writer(
            {"study": study.name, "grids": run.grids, "axes": run.axes, "control": run.control and str(run.control)}
        )
        for run in runs
    }
    write_all(writers)
    return files


def _train(study: Study, run: PlannedRun, config: Path, state: State, place: str) -> child.Ended:
    goes_on = f", from step {state.steps}" if state.stand == Stand.BROKEN else ""
    log = study.folder / "logs" / f"{run.name}.log"
    print(f"[{place}] {run.name}{goes_on}; its output is in {log}", flush=True)
    ended = child.run_child(
        child.alphamed("sft" if run.config.sft else "train", "--config", str(config)), log, study.deadline_s
    )
    now = found_state(run)
    if not ended.why and now.stand != Stand.FINISHED:
        ended = child.Ended(ended.status, ended.seconds, now.why or "ended well, but before its last step")
    print(f"[{place}] {run.name}: {ended.why or 'finished'}, {spoken_time(ended.seconds)}", flush=True)
    return ended


def _write_scripts(study: Study, study_file: Path, left: Sequence[PlannedRun], configs: Mapping[str, Path]) -> int:
    if not left:
        print("every run is finished: nothing to submit")
        return 0
    found = slurm.scripts(study, study_file, left, configs)
    write_all({path: text_writer(text) for path, text in found.items()})
    (study.folder / "logs").mkdir(exist_ok=True)  # Slurm makes no folder for its output
    print(f"{len(left)} scripts; submit them with: bash {study.folder / 'slurm' / 'submit.sh'}")
    return 0


# --------------------------------------------------------------------------------------------------------------- results
def _collect(study: Study, study_file: Path, runs: Sequence[PlannedRun], failures: Failures) -> int:
    """Write results.json and results.csv, have the finished runs compared, name those that are missing and the command that
    runs them."""
    states = {run.name: found_state(run) for run in runs}
    rows = [_result(run, states[run.name]) for run in runs]
    write_all({study.folder / "results.json": json_writer(rows), study.folder / "results.csv": text_writer(_csv(rows))})
    print(f"{study.folder / 'results.csv'} and .json: {len(rows)} runs")
    finished = [run for run in runs if states[run.name].stand == Stand.FINISHED]
    compared = _compare(study, finished) if finished else True
    missing = [run for run in runs if states[run.name].stand != Stand.FINISHED]
    for run in missing:
        why = failures.get(run.name) or states[run.name].why
        print(
            f"run {run.name} failed: {why}" if why else f"run {run.name} is not finished: {_progress(states[run.name])}",
            file=sys.stderr,
        )
    if missing:
        again = shlex.join(["alphamed", "study", str(study_file)])
        print(
            f"study {study.name}: {len(missing)} of {len(runs)} runs are not finished; `{again}` continues them here, "
            f"`{again} --slurm` writes their scripts",
            file=sys.stderr,
        )
    return 0 if compared and not missing else 1


def _progress(state: State) -> str:
    return f"{state.steps} steps so far" if state.stand == Stand.BROKEN else "it has not begun"


def _compare(study: Study, finished: Sequence[PlannedRun]) -> bool:
    """The comparison page of the finished runs. False where it failed."""
    page, log = study.folder / "comparison.html", study.folder / "logs" / "compare.log"
    folders = [str(run.config.run_dir) for run in finished]
    ended = child.run_child(child.alphamed("compare", *folders, "--out", str(page)), log, COMPARE_DEADLINE_S)
    print(f"{page}: the comparison" if not ended.why else f"comparison failed: {ended.why}", flush=True)
    return not ended.why


def _result(run: PlannedRun, state: State) -> dict[str, Any]:
    """One run as a row: its axes, and the last scores of every evaluation set."""
    row: dict[str, Any] = {
        "run": run.name,
        "control": run.control and str(run.control),
        "stand": str(state.stand),
        "steps": state.steps,
    } | {f"axis:{name}": value for name, value in run.axes.items()}
    scores = sorted((run.config.run_dir / "evaluations").glob("step_*.json")) if state.usable else []
    for name, score in (read_scores(scores[-1]) if scores else {}).items():
        low, high = score.accuracy.interval
        row |= {
            f"{name}:n": score.n,
            f"{name}:accuracy": score.accuracy.value,
            f"{name}:low": low,
            f"{name}:high": high,
            f"{name}:boxed": score.boxed.value,
        }
    return row


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: json.dumps(value) if isinstance(value, list | tuple) else value for name, value in row.items()}
        )
    return text.getvalue()
