"""Reads what a comparison needs of each run: training set, evaluations before and after, whether it is a control, and why it
cannot be compared, if so.

The configuration is read without validation, so that runs of other versions of this program can be compared too.
"""

from __future__ import annotations

import json
from collections import Counter
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
from alphamed.lab.reports.history import count_questions
from alphamed.lab.reports.rollout_report import numbers, run_stats
from alphamed.rundir import provenance
from alphamed.rundir.metrics import last_step, read_rows

ITEMS = "items.jsonl"
"""The graded answers in a folder that `alphamed eval` wrote."""
UNCHANGED = "unchanged model"
CONTROL_REWARDS = {"random": "random reward", "format_only": "format-only reward"}


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """Counts over the distinct questions of the training files, or, with `seen_only`, over those with recorded responses: a
    lower bound."""

    questions: int
    sources: Mapping[str, int]
    counts: Mapping[str, Mapping[str, int]]  # axis of an attribute -> value ("1", "2", ..., "none") -> questions
    seen_only: bool = False

    def mean(self, axis: str) -> float | None:
        """The mean of an attribute over the questions that have it; None where no question has it or it was not counted."""
        counts = {int(value): count for value, count in self.counts[axis].items() if value.isdecimal()}
        return sum(value * count for value, count in counts.items()) / sum(counts.values()) if counts else None


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run of a comparison. `before` and `after` map set names to answers; `before_from` maps a set to the name of the run
    that its `before` was taken from. Evaluations are comparable where `protocol` (prompt, token limit) is equal."""

    number: int  # 1, 2, ... in the order given
    name: str
    path: Path
    control: str | None
    model: str
    reward: str
    steps: int
    protocol: str  # "" where it is not known
    training: TrainingSet | None
    before: Mapping[str, AnsweredSet]
    after: Mapping[str, AnsweredSet]
    after_step: int | None
    rows: Sequence[Mapping[str, float | None]]
    warnings: tuple[str, ...]
    reason: str | None  # why it has no before and after
    before_from: Mapping[str, str] = field(default_factory=dict)


def read_runs(paths: Sequence[Path]) -> list[ComparedRun]:
    """All runs, in the order given. ConfigError for a folder that is neither a run nor an evaluation."""
    names = _names(paths)
    runs = [
        _read_run(path, number, name) if (path / "config.yaml").is_file() else _read_evaluation(path, number, name)
        for number, (path, name) in enumerate(zip(paths, names), start=1)
    ]
    return [_with_shared_before(run, runs) for run in runs]


def control_of(tree: Mapping[str, Any]) -> str | None:
    """What a run is a control for, by its configuration; None for a run that is not a control."""
    controls = []
    reward = _get(tree, "reward", "name")
    if reward in CONTROL_REWARDS:
        controls.append(CONTROL_REWARDS[reward])
    if _get(tree, "data", "answer_keys") == "shuffled":
        controls.append("shuffled keys")
    if _get(tree, "run", "stop_after") == 0:
        controls.append(UNCHANGED)
    return ", ".join(controls) or None


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, each preceded by as many parent folders as make it unique. ConfigError for a folder given twice."""
    full = [path.resolve() for path in paths]
    for k, path in enumerate(full):
        if path in full[:k]:
            raise ConfigError(f"compare {paths[k]}: is given twice; name each run once")
    endings = [["/".join(path.parts[-n:]) for n in range(1, len(path.parts) + 1)] for path in full]
    counts = Counter(ending for endings_of_path in endings for ending in endings_of_path)
    return [
        next((ending for ending in endings_of_path if counts[ending] == 1), endings_of_path[-1])
        for endings_of_path in endings
    ]


def _read_run(path: Path, number: int, name: str) -> ComparedRun:
    tree = load_config_tree(path / "config.yaml")
    rows = read_rows(path / "metrics.jsonl")
    evaluations = _evaluations(path)
    steps = last_step(rows)
    before = evaluations.get(0, {})
    last = max(evaluations, default=0)
    after = evaluations[last] if last > 0 else {}
    if control_of(tree) == UNCHANGED:
        after = before
    responses, warnings = _responses(path, steps)
    limit = _get(tree, "evaluation", "max_response_tokens") or _get(tree, "rollout", "max_response_tokens")
    return ComparedRun(
        number=number,
        name=name,
        path=path,
        control=control_of(tree),
        model=str(_get(tree, "model", "path")),
        reward=str(_get(tree, "reward", "name") or "correct"),
        steps=steps,
        protocol=json.dumps([settings.recorded_prompt(_get(tree, "prompt") or {}), limit], sort_keys=True),
        training=_training_set(path, responses),
        before=before,
        after=after,
        after_step=last if after else None,
        rows=rows,
        warnings=tuple(warnings),
        reason=_reason(tree, before, after, steps),
    )


def _read_evaluation(path: Path, number: int, name: str) -> ComparedRun:
    """A folder that `alphamed eval` wrote: one evaluation of one model."""
    sets = read_answered(path / ITEMS)
    if not sets and (path / ITEMS).is_file():
        raise ConfigError(f"compare {path}: its {ITEMS} holds no answer; evaluate again, or leave it out")
    if not sets:
        raise ConfigError(
            f"compare {path}: holds neither config.yaml (a run) nor {ITEMS} (an evaluation); give a folder that does"
        )
    return ComparedRun(
        number=number,
        name=name,
        path=path,
        control=None,
        model="",
        reward="",
        steps=0,
        protocol=_protocol(path),
        training=None,
        before={},
        after=sets,
        after_step=None,
        rows=(),
        warnings=(),
        reason="an evaluation of one model, not a run: it has no evaluation before training",
    )


def _protocol(path: Path) -> str:
    """Prompt and token limit of an evaluation in the form of `_read_run`, with the sampling if that is not greedy; "" where not
    known."""
    record = settings.read(path)
    if record is None:
        return ""
    prompt, sampling = record["asked"]["prompt"], record["asked"]["sampling"]
    greedy = sampling["samples"] == 1 and sampling["temperature"] == 0
    protocol = [prompt, sampling["max_tokens"]]
    return json.dumps(protocol if greedy else [*protocol, sampling], sort_keys=True)


def _evaluations(path: Path) -> dict[int, dict[str, AnsweredSet]]:
    """Step -> set name -> answers, of the first and the last whole evaluation; without sets whose questions or settings were
    changed before their last evaluation."""
    files = {
        int(file.stem.removeprefix("step_")): file
        for file in sorted((path / "evaluations").glob("step_*.json"))
        if file.stem.removeprefix("step_").isdecimal()
    }
    digests = {step: _digests(file) for step, file in files.items()}
    last = {name: digest for step in sorted(digests) for name, digest in digests[step].items()}
    return {
        step: {
            name: answers
            for name, answers in read_answered(path / "evaluations" / f"step_{step:06d}.{ITEMS}").items()
            if digests[step].get(name) == last.get(name)
        }
        for step in sorted({min(files), max(files)} if files else ())
    }


def _digests(file: Path) -> dict[str, str | None]:
    """Set name -> digest of its questions and settings; evaluations with different ones cannot be compared."""
    try:
        return read_asked(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"evaluation {file}: not readable ({type(error).__name__}: {error}); evaluate again") from None


def _reason(
    tree: Mapping[str, Any], before: Mapping[str, AnsweredSet], after: Mapping[str, AnsweredSet], steps: int
) -> str | None:
    """Why no set has both a before and an after; None where one has."""
    if before.keys() & after.keys():
        return None
    if not _get(tree, "evaluation", "files"):
        return "it was not evaluated: evaluation.files is empty"
    if not before and not after:
        return (
            f"it was not evaluated: no evaluation is recorded by step {steps} (evaluation.before, after and every set "
            f"when one is due)"
        )
    if not before:
        return "it has no evaluation before training of the same questions (evaluation.before)"
    return f"it has no evaluation after training (evaluation.after); its last step is {steps}"


def _with_shared_before(run: ComparedRun, runs: Sequence[ComparedRun]) -> ComparedRun:
    """The run with the `before` of another run of the same model, for sets that it was evaluated on only after training: the
    same questions, prompt and token limit."""
    before, before_from = dict(run.before), dict[str, str]()
    for name, after in run.after.items():
        identities = {i: answer.identity for i, answer in after.answers.items()}
        for other in runs:
            first = other.before.get(name)
            if (
                name not in before
                and first is not None
                and other.number != run.number
                and other.model == run.model
                and other.protocol == run.protocol
                and {i: answer.identity for i, answer in first.answers.items()} == identities
            ):
                before[name], before_from[name] = first, other.name
    return replace(run, before=before, before_from=before_from, reason=None) if before_from else run


# --------------------------------------------------------------------------------------------------------- training sets
def _responses(path: Path, steps: int) -> tuple[Mapping[str, Any] | None, list[str]]:
    """The numbers of recorded responses and the warnings, from report.json; counted again if it is missing or out of date."""
    from alphamed.lab.reports.watch import response_warnings

    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        responses, warnings = report["responses"], report["warnings"]
        current = report["last_step"] == steps and isinstance(warnings, list)
        if current and (responses is None or "visited" in responses["questions"]):
            return responses, warnings
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged or of another version
        pass
    stats = run_stats(path)
    responses = numbers(stats, count_questions(stats.questions.values())) if stats.steps else None
    return responses, response_warnings(stats.steps)


def _training_set(path: Path, responses: Mapping[str, Any] | None) -> TrainingSet | None:
    """From provenance.json, else from the recorded responses; None where neither has it."""
    record = (provenance.read(path) or {}).get("train")
    if record:
        try:
            return TrainingSet(record["questions"], record["sources"], _counts(record))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path / 'provenance.json'}: train is not readable ({type(error).__name__}: {error}); move the file "
                f"away, and the training set is counted from the recorded responses"
            ) from None
    seen = responses and responses["questions"]
    return TrainingSet(seen["visited"], seen["sources"], _counts(seen), seen_only=True) if seen else None


def _counts(record: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Axis -> value -> questions. Records of older versions have levels only."""
    return {
        attribute.axis: dict(record["levels"] if attribute.axis == "levels" else record.get(attribute.axis, {}))
        for attribute in ATTRIBUTES
    }


def _get(tree: Mapping[str, Any], section: str, key: str | None = None) -> Any:
    value = tree.get(section)
    if key is None:
        return value
    return value.get(key) if isinstance(value, Mapping) else None
