"""The last lines on the console: the results of a run, in the sentences of its report, and its output files."""

from __future__ import annotations

import json
from pathlib import Path

from alphamed.evaluation.score import verdict
from alphamed.lab.reports.choices import best_blind, blind_sentences
from alphamed.lab.reports.report import SHARES, evaluations, training_sentences
from alphamed.rundir.metrics import read_rows

OUTPUT_FILES = {
    "report.html": "the report, for a browser",
    "report.json": "its numbers",
    "metrics.jsonl": "the metrics, one line per step",
    "rollouts": "every response with its reward, one Parquet file per step",
    "evaluations": "answers to the held-out questions",
    "hf": "the trained model, for transformers and vLLM",
    "checkpoints": "to resume from",
}


def summary(run_dir: Path) -> list[str]:
    """Reward over training, each evaluation set before -> after with 95% intervals, and the paths that exist."""
    rows = read_rows(run_dir / "metrics.jsonl")
    lines = [
        "",
        "Results",
        *(f"  {text}" for text in training_sentences(rows)),
        *(f"  Warning. {text}" for text in _warnings(run_dir)),
    ]
    scores_by_step = list(evaluations(run_dir).values())
    for set_name in scores_by_step[-1] if scores_by_step else ():
        lines += _set_lines(run_dir, set_name)
    lines += ["", f"Output files: {run_dir}"]
    return lines + [f"  {name:<14} {text}" for name, text in OUTPUT_FILES.items() if (run_dir / name).exists()]


def _warnings(run_dir: Path) -> list[str]:
    """The warnings of the report that was just written; [] where the configuration asks for none."""
    file = run_dir / "report.json"
    return json.loads(file.read_text(encoding="utf-8"))["warnings"] if file.exists() else []


def _set_lines(run_dir: Path, name: str) -> list[str]:
    by_step = {step: sets[name] for step, sets in evaluations(run_dir).items() if name in sets}
    last, scores = max(by_step), list(by_step.values())
    before, after, several = scores[0], scores[-1], len(scores) > 1
    lines = ["", f"{name}: {after.n} questions, {'before -> after' if several else 'evaluated once'} (95% intervals)"]
    for label, key in SHARES.items():
        values = [str(getattr(score, key)) for score in ((before, after) if several else (after,))]
        lines.append(f"  {label:<22} {' -> '.join(values)}")
    if not several:
        return lines
    sentences = verdict(before, after, best_blind(run_dir, name, last)) + blind_sentences(run_dir, name, last, after)
    return lines + [f"  {text}" for text in sentences]
