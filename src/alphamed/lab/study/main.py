"""`alphamed study FILE`: plan the runs, build their sets, train them in turn, compare; or write Slurm scripts."""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alphamed.cluster.ledger import Lock
from alphamed.config.loading import dump_config
from alphamed.config.schema import Config
from alphamed.data.output import json_writer, text_writer, write_all
from alphamed.evaluation.runner import read_scores
from alphamed.lab.study import child, data, slurm
from alphamed.lab.study.grid import PlannedRun, plan_runs
from alphamed.lab.study.progress import RunProgress, RunStatus, progress_or_error, read_progress
from alphamed.lab.study.spec import Study, load_study
from alphamed.reward.rules import check_rule
from alphamed.rundir.sinks import spoken_time

COMPARE_DEADLINE_S = 1800.0
Failures = dict[str, str]
"""Name of a run -> why it is not finished."""


def main(options: argparse.Namespace) -> int:
    """0 where every run is finished, 1 where a run is not, 128 + N where signal N stopped the study. Raises ConfigError and
    DataError before any run starts. `--collect` starts none and counts a directory that cannot be used as an unfinished
    run."""
    study = load_study(options.file)
    runs = plan_runs(study)
    data.check_sources(study, runs)
    for name, signature in {(run.config.reward.name, run.config.reward.signature) for run in runs}:
        check_rule(name, signature)
    progress = {run.name: (progress_or_error if options.collect else read_progress)(run) for run in runs}
    print(*table(runs, progress), sep="\n")
    if options.dry_run:
        return 0
    if options.collect:
        return _collect(study, options.file, runs, {})
    study.folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(study.folder)
    lock.take()
    try:
        return _execute(study, runs, progress, options)
    finally:
        lock.release()


def _execute(
    study: Study, runs: Sequence[PlannedRun], progress: Mapping[str, RunProgress], options: argparse.Namespace
) -> int:
    for file in data.make_sets(study, runs, options.command):
        print(f"wrote {file}")
    configs = _write_configs(study, runs)
    unfinished = [run for run in runs if progress[run.name].status != RunStatus.FINISHED]
    if options.slurm:
        return _write_scripts(study, options.file, unfinished, configs)
    failures: Failures = {}
    for run in unfinished:
        label = f"[{runs.index(run) + 1}/{len(runs)}] {run.name}"
        ended = _train(study, run, configs[run.name], progress[run.name], label)
        if ended.stopped_by:
            print("stopped; the same command continues from here", file=sys.stderr)
            return 128 + ended.stopped_by
        if ended.error:
            failures[run.name] = ended.error
    return _collect(study, options.file, runs, failures)


# ----------------------------------------------------------------------------------------------------------------- table
def table(runs: Sequence[PlannedRun], progress: Mapping[str, RunProgress]) -> list[str]:
    """One line per run: its size, its reward, and how far it is."""
    width = max(len(run.name) for run in runs)
    lines = [f"{len(runs)} runs"]
    for run in runs:
        control = f", {run.control} control" if run.control else ""
        lines.append(f"  {run.name:<{width}}  {_training(run.config)}{control}: {_status_text(progress[run.name])}")
    return lines


def _training(config: Config) -> str:
    """How long a run trains, and on what signal."""
    if config.sft is not None and config.run.last_step:
        length = f"{config.run.last_step} steps" if config.sft.epochs is None else f"{config.sft.epochs:g} epochs"
        return f"{length} of {config.sft.prompts_per_step} prompts, supervised"
    steps = f"{config.run.last_step} steps of {config.rollout.questions_per_step} x {config.rollout.samples_per_question}"
    return f"{steps if config.run.last_step else 'evaluation only'}, reward {config.reward.name}"


def _status_text(progress: RunProgress) -> str:
    if progress.status != RunStatus.INTERRUPTED:
        return str(progress.status)
    return f"interrupted after step {progress.steps}" + (f" ({progress.error})" if progress.error else "")


# ------------------------------------------------------------------------------------------------------------------ runs
def _write_configs(study: Study, runs: Sequence[PlannedRun]) -> dict[str, Path]:
    """Write a configuration file for each run, and study.json with its axes into its directory."""
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


def _train(study: Study, run: PlannedRun, config: Path, progress: RunProgress, label: str) -> child.ChildExit:
    resumed = f", from step {progress.steps}" if progress.status == RunStatus.INTERRUPTED else ""
    log = study.folder / "logs" / f"{run.name}.log"
    print(f"{label}{resumed}; its output is in {log}", flush=True)
    verb = "sft" if run.config.sft else "train"
    ended = child.run_child(child.alphamed(verb, "--config", str(config)), log, study.deadline_s)
    after = progress_or_error(run)
    if not ended.error and after.status != RunStatus.FINISHED:
        ended = replace(ended, error=after.error or "exited with status 0 before its last step")
    print(f"{label}: {ended.error or 'finished'}, {spoken_time(ended.seconds)}", flush=True)
    return ended


def _write_scripts(study: Study, study_file: Path, runs: Sequence[PlannedRun], configs: Mapping[str, Path]) -> int:
    if not runs:
        print("every run is finished: nothing to submit")
        return 0
    scripts = slurm.scripts(study, study_file, runs, configs)
    write_all({path: text_writer(text) for path, text in scripts.items()})
    (study.folder / "logs").mkdir(exist_ok=True)  # Slurm does not create the folder of its log files
    print(f"{len(runs)} scripts; submit them with: bash {study.folder / 'slurm' / 'submit.sh'}")
    return 0


# --------------------------------------------------------------------------------------------------------------- results
def _collect(study: Study, study_file: Path, runs: Sequence[PlannedRun], failures: Failures) -> int:
    """Write results.json and results.csv, compare the finished runs, and print the others with the command that continues
    them."""
    progress = {run.name: progress_or_error(run) for run in runs}
    rows = [_result(run, progress[run.name]) for run in runs]
    write_all({study.folder / "results.json": json_writer(rows), study.folder / "results.csv": text_writer(_csv(rows))})
    print(f"{study.folder / 'results.csv'} and .json: {len(rows)} runs")
    finished = [run for run in runs if progress[run.name].status == RunStatus.FINISHED]
    compared = _compare(study, finished) if finished else True
    unfinished = [run for run in runs if progress[run.name].status != RunStatus.FINISHED]
    for run in unfinished:
        if error := failures.get(run.name) or progress[run.name].error:
            line = f"run {run.name} failed: {error}"
        elif progress[run.name].status == RunStatus.NEW:
            line = f"run {run.name} is not finished: it has not started"
        else:
            line = f"run {run.name} is not finished: {progress[run.name].steps} steps so far"
        print(line, file=sys.stderr)
    if unfinished:
        command = shlex.join(["alphamed", "study", str(study_file)])
        print(
            f"study {study.name}: {len(unfinished)} of {len(runs)} runs are not finished; `{command}` continues them here, "
            f"`{command} --slurm` writes their scripts",
            file=sys.stderr,
        )
    return 0 if compared and not unfinished else 1


def _compare(study: Study, finished: Sequence[PlannedRun]) -> bool:
    """Write the comparison page of the finished runs. False where that failed."""
    page, log = study.folder / "comparison.html", study.folder / "logs" / "compare.log"
    folders = [str(run.config.run_dir) for run in finished]
    ended = child.run_child(child.alphamed("compare", *folders, "--out", str(page)), log, COMPARE_DEADLINE_S)
    print(f"{page}: the comparison" if not ended.error else f"comparison failed: {ended.error}", flush=True)
    return not ended.error


def _result(run: PlannedRun, progress: RunProgress) -> dict[str, Any]:
    """One run as a row: its axes, and the last scores of every evaluation set."""
    row: dict[str, Any] = {
        "run": run.name,
        "control": run.control and str(run.control),
        "status": str(progress.status),
        "steps": progress.steps,
    } | {f"axis:{name}": value for name, value in run.axes.items()}
    scores = sorted((run.config.run_dir / "evaluations").glob("step_*.json")) if progress.usable else []
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
