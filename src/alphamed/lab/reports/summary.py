"""The last lines on the console: what a run learnt, in the words of its report, and where everything lies."""

from __future__ import annotations

from pathlib import Path

from alphamed.evaluation.score import verdict
from alphamed.lab.reports.choices import blind_sentences
from alphamed.lab.reports.report import ROWS, evaluations, training_sentences
from alphamed.rundir.metrics import read_rows

PLACES = {
    "report.html": "the report, for a browser",
    "report.json": "its numbers",
    "metrics.jsonl": "one line of numbers a step",
    "rollouts": "every response with its reward, a Parquet file a step",
    "evaluations": "answers to the held-out questions",
    "hf": "the trained model, for transformers and vLLM",
    "checkpoints": "to continue from",
}


def summary(run_dir: Path) -> list[str]:
    """Reward over training, each evaluation set before -> after with 95% intervals, and the paths that exist."""
    rows = read_rows(run_dir / "metrics.jsonl")
    lines = [
        "",
        "What was learnt",
        *(f"  {text}" for text in training_sentences(rows)),
        *(f"  Warning. {text}" for text in _warnings(run_dir)),
    ]
    found = list(evaluations(run_dir).values())
    for name in found[-1] if found else ():
        lines += _set_lines(name, [scores[name] for scores in found if name in scores])
        lines += [f"  {text}" for text in _blind_lines(run_dir, name)]
    lines += ["", f"Output files: {run_dir}"]
    return lines + [f"  {place:<14} {text}" for place, text in PLACES.items() if (run_dir / place).exists()]


def _blind_lines(run_dir: Path, name: str) -> list[str]:
    """What the set's questions give without being read, where there is a before and an after."""
    scores = {step: sets[name] for step, sets in evaluations(run_dir).items() if name in sets}
    return blind_sentences(run_dir, name, max(scores), scores[max(scores)]) if len(scores) > 1 else []


def _warnings(run_dir: Path) -> list[str]:
    """What the report just written warns of; [] where none was asked for."""
    import json

    file = run_dir / "report.json"
    return json.loads(file.read_text(encoding="utf-8"))["warnings"] if file.exists() else []


def _set_lines(name: str, scores: list) -> list[str]:
    before, after = scores[0], scores[-1]
    lines = ["", f"{name}: {after.n} questions, {'before -> after' if len(scores) > 1 else 'once'} (95% intervals)"]
    for label, key in ROWS.items():
        values = [str(getattr(score, key)) for score in ((before, after) if len(scores) > 1 else (after,))]
        lines.append(f"  {label:<22} {' -> '.join(values)}")
    return lines + [f"  {text}" for text in (verdict(before, after) if len(scores) > 1 else ())]
