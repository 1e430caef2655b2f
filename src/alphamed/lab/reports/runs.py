"""What a comparison knows of each run, read from its directory: training set, evaluations before and after, whether it is a
control, and, where it cannot be compared, why.

The configuration is read without validation, so that runs of other versions of this program can be compared too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alphamed.config.loading import load_config_tree
from alphamed.data.attributes import ATTRIBUTES
from alphamed.errors import ConfigError
from alphamed.evaluation import settings
from alphamed.evaluation.runner import read_asked
from alphamed.lab.reports.evaluations import AnsweredSet, read_answered
from alphamed.lab.reports.history import history
from alphamed.lab.reports.rollout_report import numbers, run_stats
from alphamed.rundir import provenance
from alphamed.rundir.metrics import read_rows

ITEMS = "items.jsonl"
"""In a folder that `alphamed eval` wrote."""
UNCHANGED = "unchanged model"
CONTROL_REWARDS = {"random": "random reward", "format_only": "format-only reward"}


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Counts over the distinct questions of the training files, or, with `seen_only`, over those that the run's recorded
    responses answer: at least so many."""

    questions: int
    sources: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]  # axis of an attribute -> value ("1", "2", ..., "none") -> questions
    seen_only: bool = False

    def mean(self, axis: str) -> float | None:
        """The mean of an attribute over the questions that have it; None where no question has, or nobody counted."""
        counts = {int(value): count for value, count in self.counts[axis].items() if value.isdecimal()}
        return sum(value * count for value, count in counts.items()) / sum(counts.values()) if counts else None


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison. `before` and `after` map set names to answers; `lent` names the run that a set's `before` was
    taken from. `asked_how` holds what makes evaluations comparable: prompt and token limit."""

    number: int  # 1, 2, ... in the order given
    name: str
    path: Path
    control: str | None
    model: str
    reward: str
    steps: int
    asked_how: str
    training: TrainingSet | None
    before: Mapping[str, AnsweredSet]
    after: Mapping[str, AnsweredSet]
    after_step: int | None
    rows: Sequence[Mapping[str, float | None]]
    warnings: tuple[str, ...]
    reason: str | None  # why it has no before and after
    lent: Mapping[str, str] = field(default_factory=dict)


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """All runs, in the order given. ConfigError for a folder that is neither a run nor an evaluation."""
    names = _names(paths)
    runs = [
        _read_run(path, number, name) if (path / "config.yaml").is_file() else _read_evaluation(path, number, name)
        for number, (path, name) in enumerate(zip(paths, names), start=1)
    ]
    return [_with_lent(run, runs) for run in runs]


def control_of(tree: Mapping[str, Any]) -> str | None:
    """What a run controls for, by its configuration; None for a run that means to teach."""
    found = []
    reward = _get(tree, "reward", "name")
    if reward in CONTROL_REWARDS:
        found.append(CONTROL_REWARDS[reward])
    if _get(tree, "data", "answer_keys") == "shuffled":
        found.append("shuffled keys")
    if _get(tree, "run", "stop_after") == 0:
        found.append(UNCHANGED)
    return ", ".join(found) or None


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as many of their parents' as tell them apart. ConfigError for a folder given twice."""
    full = [path.resolve() for path in paths]
    for place, path in enumerate(full):
        if path in full[:place]:
            raise ConfigError(f"compare {paths[place]}: is given twice; name each run once")
    ends = [["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in full]
    others = [{end for j, one in enumerate(ends) if j != i for end in one} for i in range(len(full))]
    return [next((end for end in mine if end not in theirs), mine[-1]) for mine, theirs in zip(ends, others)]


def _read_run(path: Path, number: int, name: str) -> ComparedRun:
    tree = load_config_tree(path / "config.yaml")
    rows = read_rows(path / "metrics.jsonl")
    found = _evaluations(path)
    steps = max((int(row["step"]) for row in rows), default=0)
    before = {name: sets for step in found if step == 0 for name, sets in found[step].items()}
    last = max(found, default=0)
    after = found[last] if last > 0 else {}
    if control_of(tree) == UNCHANGED:
        after = before
    responses, warned = _responses(path, steps)
    limit = _get(tree, "evaluation", "max_response_tokens") or _get(tree, "rollout", "max_response_tokens")
    return ComparedRun(
        number,
        name,
        path,
        control_of(tree),
        str(_get(tree, "model", "path")),
        str(_get(tree, "reward", "name") or "correct"),
        steps,
        json.dumps([settings.recorded_prompt(_get(tree, "prompt") or {}), limit], sort_keys=True),
        _training_set(path, responses),
        before,
        after,
        last if after else None,
        rows,
        tuple(warned),
        _reason(tree, before, after, steps),
    )


def _read_evaluation(path: Path, number: int, name: str) -> ComparedRun:
    """A folder that `alphamed eval` wrote: one model, asked once."""
    sets = read_answered(path / ITEMS)
    if not sets and (path / ITEMS).is_file():
        raise ConfigError(f"compare {path}: its {ITEMS} holds no answer; evaluate again, or leave it out")
    if not sets:
        raise ConfigError(
            f"compare {path}: holds neither config.yaml (a run) nor {ITEMS} (an evaluation); give such a folder"
        )
    return ComparedRun(
        number,
        name,
        path,
        None,
        "",
        "",
        0,
        _asked_how(path),
        None,
        {},
        sets,
        None,
        (),
        (),
        "an evaluation of one model, not a run: it has no before",
    )


def _asked_how(path: Path) -> str:
    """Prompt and limit of an evaluation as runs have them, and its sampling where that is not theirs; "" where not known."""
    about = settings.read(path)
    if about is None:
        return ""
    sampling = about["asked"]["sampling"]
    greedy = sampling["samples"] == 1 and sampling["temperature"] == 0
    how = [about["asked"]["prompt"], sampling["max_tokens"]]
    return json.dumps(how if greedy else [*how, sampling], sort_keys=True)


def _evaluations(path: Path) -> dict[int, dict[str, AnsweredSet]]:
    """Step -> set name -> answers, of the first and the last whole evaluation; of each set those asked like its last."""
    files = {
        int(file.stem.removeprefix("step_")): file
        for file in sorted((path / "evaluations").glob("step_*.json"))
        if file.stem.removeprefix("step_").isdecimal()
    }
    asked = {step: _asked(file) for step, file in files.items()}
    last = {name: how for step in sorted(asked) for name, how in asked[step].items()}
    return {
        step: {
            name: one
            for name, one in read_answered(path / "evaluations" / f"step_{step:06d}.{ITEMS}").items()
            if asked[step].get(name) == last.get(name)
        }
        for step in sorted({min(files), max(files)} if files else ())
    }


def _asked(file: Path) -> dict[str, str | None]:
    try:
        return read_asked(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"evaluation {file}: not readable ({type(error).__name__}: {error}); evaluate again") from None


def _reason(
    tree: Mapping[str, Any], before: Mapping[str, AnsweredSet], after: Mapping[str, AnsweredSet], steps: int
) -> str | None:
    """Why a run has no before and after of any set; None where it has."""
    if before.keys() & after.keys():
        return None
    if not _get(tree, "evaluation", "files"):
        return "it was not evaluated: evaluation.files is empty"
    if not before and not after:
        return (
            f"it was not evaluated: no evaluation is recorded by step {steps} (evaluation.before, after and every say "
            f"when one is due)"
        )
    if not before:
        return "it has no evaluation before training of the same questions (evaluation.before)"
    return f"it has no evaluation after training (evaluation.after); it stands at step {steps}"


def _with_lent(run: ComparedRun, runs: Sequence[ComparedRun]) -> ComparedRun:
    """The run with the `before` of another one for sets it was asked only later: same model, prompt, limit and questions."""
    lent, before = {}, dict(run.before)
    for name, after in run.after.items():
        for other in runs:
            first = other.before.get(name)
            if (
                name not in before
                and first is not None
                and other.number != run.number
                and other.model == run.model
                and other.asked_how == run.asked_how
                and {i: one.identity for i, one in first.answers.items()}
                == {i: one.identity for i, one in after.answers.items()}
            ):
                before[name], lent[name] = first, other.name
    return replace(run, before=before, lent=lent, reason=None if lent else run.reason) if lent else run


# ----------------------------------------------------------------------------------------------------------- the training
def _responses(path: Path, steps: int) -> tuple[Mapping[str, Any] | None, list[str]]:
    """What report.json says of the recorded responses, and its warnings; counted again where it is absent or old."""
    from alphamed.lab.reports.watch import warnings

    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        responses, warned = report["responses"], report["warnings"]
        if report["last_step"] == steps and isinstance(warned, list) and (responses is None or "questions" in responses):
            return responses, warned
    except (OSError, ValueError, KeyError, TypeError):  # absent or of another version
        pass
    tally = run_stats(path)
    return (numbers(tally, history(tally.questions.values())) if tally.steps else None), warnings(tally.steps)


def _training_set(path: Path, responses: Mapping[str, Any] | None) -> TrainingSet | None:
    """From provenance.json, else from the recorded responses; None where neither says."""
    told = (provenance.read(path) or {}).get("train")
    if told:
        try:
            return TrainingSet(told["questions"], told["sources"], _counts(told))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path / 'provenance.json'}: train is not readable ({type(error).__name__}: {error}); move "
                f"it away, and the training set is counted by its answers"
            ) from None
    seen = responses and responses["questions"]
    return TrainingSet(seen["asked"], seen["sources"], _counts(seen), seen_only=True) if seen else None


def _counts(told: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Axis -> counts. Older versions counted levels only."""
    return {one.axis: dict(told["levels"] if one.axis == "levels" else told.get(one.axis, {})) for one in ATTRIBUTES}


def _get(tree: Mapping[str, Any], section: str, key: str | None = None) -> Any:
    found = tree.get(section)
    if key is None:
        return found
    return found.get(key) if isinstance(found, Mapping) else None
