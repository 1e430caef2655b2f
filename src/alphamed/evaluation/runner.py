"""Evaluate question files greedily, graded by whether the letter is right, write the results, read them again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.data.attributes import values_of
from alphamed.errors import ConfigError
from alphamed.evaluation.choices import choices_of_groups, line
from alphamed.evaluation.score import Score, Share, percent, score
from alphamed.files import read_json_lines, replace_json, replace_json_lines
from alphamed.records import GenerationTask, Question, Sampling, ScoredGroup

Begin = Callable[[str, Sequence[GenerationTask]], Callable[[], Sequence[ScoredGroup]]]
"""Has the tasks of a named set answered and graded; what it returns waits for them: one group a task, in any order."""

TRIAL = 24
"""Questions of a set that are answered first where time is limited: one batch of a laptop's engine."""
LEAST_ASKED = 2 * TRIAL
"""Of a set, however slow the machine is: fewer say nothing about a model."""
SHARES = ("boxed", "accuracy", "accuracy_among_boxed", "truncated", "failed")
ITEM_KEYS = {"set", "id", "question", "options", "answer", "letter", "outcome", "text"}
"""What readers of graded answers rely on."""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one evaluation file, or a part chosen by seed; `available` counts those in the file that decisions
    leave. `decisions` are the files of decisions with their versions and what they changed."""

    name: str
    file: Path
    questions: tuple[Question, ...]
    available: int
    decisions: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SetResult:
    """The graded answers to a question set, in the order of its questions."""

    questions: QuestionSet
    groups: tuple[ScoredGroup, ...]
    score: Score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one version of the weights answered to all sets."""

    policy_version: int
    results: tuple[SetResult, ...]
    seconds: float
    """From its beginning until it was asked for and done; in the background the step beside it is in them."""
    max_tokens: int | None = None
    """Limit of a response."""


def load_sets(
    files: Sequence[Path], limit: int | None, seed: int, bad_rows: BadRows, decisions: Sequence[Path] = ()
) -> tuple[QuestionSet, ...]:
    """Load evaluation files; of each at most `limit` questions, chosen by seed and id. DataError as for training data,
    ConfigError for `decisions` that cannot be applied.

    Whether a question is chosen does not depend on its place in the file, and the choice for a lower limit is part of
    that for a higher one.
    """
    from alphamed.data.sources import load_questions
    from alphamed.data.tables import bare_name

    sets: list[QuestionSet] = []
    for file in files:
        chosen, available, applied = choose(load_questions([file], bad_rows).questions, limit, seed, decisions)
        name = bare_name(file)
        if any(other.name == name for other in sets):
            name = str(file)
        sets.append(QuestionSet(name, file, chosen, available, applied))
    return tuple(sets)


def choose(
    questions: Sequence[Question], limit: int | None, seed: int, decisions: Sequence[Path]
) -> tuple[tuple[Question, ...], int, tuple[Mapping[str, Any], ...]]:
    """The questions of a file that are asked, how many decisions leave, and what each file of decisions changed."""
    from alphamed.data.decisions import apply_files
    from alphamed.hashing import draw

    left, applied = apply_files(questions, decisions)
    ids = {question.id for question in sorted(left, key=lambda question: draw(seed, question.id))[:limit]}
    return tuple(question for question in left if question.id in ids), len(left), applied


def begin_evaluation(
    sets: Sequence[QuestionSet],
    render: Callable[[Question], Sequence[int]],
    begin: Begin,
    max_tokens: int,
    policy_version: int,
) -> Callable[[], Evaluation]:
    """Have every question answered once, greedily. `render` makes a question's prompt token ids: the training prompt.

    What is returned waits for the answers and scores them; ValueError when some are missing.
    """
    began = time.monotonic()
    sampling = Sampling(n=1, temperature=0.0, top_p=1.0, top_k=-1, max_tokens=max_tokens)
    asked = [
        (
            questions,
            [
                GenerationTask(f"evaluation/{questions.name}/{q.id}", q, tuple(render(q)), sampling, evaluation=True)
                for q in questions.questions
            ],
        )
        for questions in sets
    ]
    under_way = [(questions, tasks, begin(questions.name, tasks)) for questions, tasks in asked]

    def finish() -> Evaluation:
        results = tuple(_result(questions, tasks, answers()) for questions, tasks, answers in under_way)
        return Evaluation(policy_version, results, time.monotonic() - began, max_tokens)

    return finish


def within(one: QuestionSet, count: int, seed: int) -> QuestionSet:
    """The set with `count` of its questions at most, by seed: a part of any larger choice."""
    return replace(one, questions=choose(one.questions, count, seed, ())[0])


def affordable(wanted: int, tried: int, seconds: float, limit_s: float) -> int:
    """How many of a set's `wanted` questions are asked within `limit_s` seconds, where the first `tried` took `seconds`."""
    fitting = int(tried * limit_s / max(seconds, 1e-9))
    return min(wanted, max(fitting, LEAST_ASKED, tried))


def evaluate_within(
    sets: Sequence[QuestionSet],
    evaluate: Callable[[QuestionSet], Evaluation],
    limit_s: float,
    seed: int,
    note: Callable[[str], None],
) -> Evaluation:
    """Evaluate as many questions as there is time for. The first TRIAL of each set show how long they take; each set has a part
    of `limit_s` by its size. `note` says what is left out. The results hold the questions that were asked."""
    results, seconds, total = [], 0.0, sum(len(one.questions) for one in sets)
    for one in sets:
        trial = within(one, TRIAL, seed)
        first = evaluate(trial)
        wanted, tried = len(one.questions), len(trial.questions)
        chosen = within(one, affordable(wanted, tried, first.seconds, limit_s * wanted / total), seed)
        left_out = wanted - len(chosen.questions)
        if left_out:
            note(
                f"evaluation.time_limit_s: {tried} questions of {one.name} took {first.seconds:.0f} s; {len(chosen.questions)} of "
                f"{wanted} are asked in this run, {left_out} are left out"
            )
        known = {question.id for question in trial.questions}
        rest = replace(one, questions=tuple(question for question in chosen.questions if question.id not in known))
        parts = [first, *([evaluate(rest)] if rest.questions else [])]
        groups = {group.group.question.id: group for part in parts for result in part.results for group in result.groups}
        ordered = tuple(groups[question.id] for question in chosen.questions)
        results.append(SetResult(chosen, ordered, score(ordered)))
        seconds += sum(part.seconds for part in parts)
    return Evaluation(first.policy_version, tuple(results), seconds, first.max_tokens)


def _result(questions: QuestionSet, tasks: Sequence[GenerationTask], answers: Sequence[ScoredGroup]) -> SetResult:
    answered = {group.group.group_id: group for group in answers}
    missing = [task.group_id for task in tasks if task.group_id not in answered]
    if missing:
        raise ValueError(
            f"evaluation of {questions.name}: {len(missing)} of {len(tasks)} questions came back "
            f"without an answer, the first is {missing[0]}"
        )
    groups = tuple(answered[task.group_id] for task in tasks)
    return SetResult(questions, groups, score(groups))


def summary(evaluation: Evaluation) -> list[str]:
    """Two lines a set for the console: scores, and how the responses choose among the options."""
    lines = []
    for result in evaluation.results:
        lines.append(_score_line(result))
        if chosen := choices_of_groups(result.groups):
            lines.append(f"  {line(chosen.plain())}")
    return lines


def _score_line(result: SetResult) -> str:
    return (
        f"evaluation of {result.questions.name} (n = {result.score.n}): accuracy {result.score.accuracy}, "
        f"boxed {result.score.boxed}, right among boxed {result.score.accuracy_among_boxed}, "
        f"truncated {percent(result.score.truncated.value)}, {result.score.tokens_mean:.0f} tokens"
    )


# ---------------------------------------------------------------------------------------------------------------- files
def write_evaluation(folder: Path, name: str, step: int, evaluation: Evaluation) -> Path:
    """Write NAME.items.jsonl (one object an answer), then NAME.json (the scores), and return the latter's path: where
    it is, the evaluation is whole."""
    replace_json_lines(
        folder / f"{name}.items.jsonl",
        [_item(result.questions.name, group) for result in evaluation.results for group in result.groups],
    )
    path = folder / f"{name}.json"
    replace_json(
        path,
        {
            "step": step,
            "policy_version": evaluation.policy_version,
            "seconds": evaluation.seconds,
            "sets": {
                result.questions.name: {
                    "file": str(result.questions.file),
                    "available": result.questions.available,
                    "decisions": list(result.questions.decisions),
                    "asked": asked_hash(result.questions, evaluation.max_tokens),
                }
                | score_json(result.score)
                for result in evaluation.results
            },
        },
    )
    return path


def read_scores(path: Path) -> dict[str, Score]:
    """Set name -> score from a step_N.json. ConfigError where it is none."""
    import json

    try:
        sets = json.loads(path.read_text(encoding="utf-8"))["sets"]
        return {
            name: Score(
                n=row["n"],
                tokens_mean=row["tokens_mean"],
                tokens_max=row["tokens_max"],
                chance=row["chance"],
                **{key: Share(row[key]["count"], row[key]["total"]) for key in SHARES},
            )
            for name, row in sets.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"evaluation {path}: not readable ({type(error).__name__}: {error}); evaluate again") from None


def read_asked(path: Path) -> dict[str, str | None]:
    """Set name -> what was asked and how, as a hash, from a readable step_N.json: scores with different ones cannot be
    compared. None where it was not written down."""
    import json

    return {name: row.get("asked") for name, row in json.loads(path.read_text(encoding="utf-8"))["sets"].items()}


def asked_before(run_dir: Path) -> dict[str, int]:
    """Set name -> how many questions the last evaluation in a run directory asked; {} where there is none."""
    files = sorted((run_dir / "evaluations").glob("step_*.json"))
    files = [file for file in files if file.stem.removeprefix("step_").isdecimal()]
    return {name: found.n for name, found in read_scores(files[-1]).items()} if files else {}


def read_items(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(set name, question id) -> item from a step_N.items.jsonl; {} where there is none. ConfigError names a line that is no
    item."""
    found = {}
    for number, row in enumerate(read_json_lines(path), start=1):
        if missing := ITEM_KEYS - row.keys():
            raise ConfigError(
                f"{path}: line {number} is no graded answer ({', '.join(sorted(missing))} missing); evaluate again"
            )
        found[row["set"], row["id"]] = row
    return found


def _item(name: str, scored: ScoredGroup) -> dict[str, Any]:
    question, rollout = scored.group.question, scored.group.rollouts[0]
    return {
        "set": name,
        "id": question.id,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
        **values_of(question),
        "letter": scored.letters[0],
        "outcome": str(scored.outcomes[0]),
        "finish_reason": str(rollout.finish_reason),
        "tokens": len(rollout.response_token_ids),
        "text": rollout.text,
    }


def score_json(found: Score) -> dict[str, Any]:
    """A score as it is written: each share with its counts and interval."""
    return {"n": found.n, "tokens_mean": found.tokens_mean, "tokens_max": found.tokens_max, "chance": found.chance} | {
        key: _share_json(getattr(found, key)) for key in SHARES
    }


def _share_json(share: Share) -> Mapping[str, float]:
    low, high = share.interval
    return {"count": share.count, "total": share.total, "value": share.value, "low": low, "high": high}


def asked_hash(questions: QuestionSet, max_tokens: int | None) -> str:
    """What is asked, and in how many tokens: scores with different ones cannot be compared."""
    import json

    told = [[q.id, q.question, q.context, dict(q.options), q.answer] for q in questions.questions]
    return hashlib.sha256(json.dumps([max_tokens, told]).encode()).hexdigest()
