"""A step's graded groups as one Parquet file, and back: what replay trains on and what the report quotes.

One row per response, in the order of the groups. Values come back bit for bit: ids as int32, log-probs as float32 (what
engines compute in; a Python float that is none is rounded to it), rewards and advantages as float64. A penalty on lengths is
part of the advantages, not of the rewards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.errors import ConfigError
from alphamed.files import replace_file
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.response_stats import ResponseStats

if TYPE_CHECKING:
    import pyarrow

SCHEMA_VERSION = 1
ANSWER_COLUMNS = (
    "group_index",
    "group_id",
    "question",
    "text",
    "finish_reason",
    "outcome",
    "letter",
    "reward",
    "response_token_ids",
)


@dataclass(frozen=True, slots=True)
class Answers:
    """The graded responses to one question of a step, without tokens and log-probs: what statistics need of a group."""

    group_id: str
    question: Question
    texts: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    letters: tuple[str | None, ...]
    rewards: tuple[float, ...]
    tokens: tuple[int, ...]  # length of each response
    truncated: tuple[bool, ...]  # whether the token limit cut it

    @property
    def stats(self) -> ResponseStats:
        return ResponseStats.of(zip(self.outcomes, self.tokens, self.truncated, strict=True))


class RolloutFileError(ConfigError):
    """A rollout file that is absent or cannot be read: one line naming file, what is wrong and fix."""


def rollout_path(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step_{step:06d}.parquet"


def recorded_steps(run_dir: Path) -> list[int]:
    """Steps of which the run directory holds rollouts, in order."""
    names = (path.stem.removeprefix("step_") for path in (run_dir / "rollouts").glob("step_*.parquet"))
    return sorted(int(name) for name in names if name.isdecimal())


def write_rollouts(path: Path, step: int, groups: Sequence[ScoredGroup]) -> None:
    """Write all responses of a step; the file appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row for index, group in enumerate(groups) for row in _rows(index, group)]
    schema = _schema().with_metadata(
        {b"alphamed.rollouts": str(SCHEMA_VERSION).encode(), b"alphamed.step": str(step).encode()}
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    replace_file(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def read_rollouts(path: Path) -> tuple[ScoredGroup, ...]:
    """The groups that `write_rollouts` was given. RolloutFileError where the file is absent, no rollout file, or of
    another schema version."""
    table = _read(path, None)
    rows = table.to_pylist()
    return tuple(_group(list(members)) for _, members in groupby(rows, key=lambda row: row["group_index"]))


def read_answers(path: Path) -> tuple[Answers, ...]:
    """What `read_rollouts` reads, but for tokens and log-probs: several times faster. RolloutFileError as there."""
    import pyarrow.compute as pc

    table = _read(path, ANSWER_COLUMNS)
    lengths = pc.call_function("list_value_length", [table["response_token_ids"]]).to_pylist()
    rows = zip(table.drop_columns(["response_token_ids"]).to_pylist(), lengths)
    answers = []
    for _, members in groupby(rows, key=lambda row: row[0]["group_index"]):
        group, tokens = zip(*members)
        answers.append(
            Answers(
                group[0]["group_id"],
                question_from_json(group[0]["question"]),
                tuple(row["text"] for row in group),
                tuple(Outcome(row["outcome"]) for row in group),
                tuple(row["letter"] for row in group),
                tuple(row["reward"] for row in group),
                tokens,
                tuple(FinishReason(row["finish_reason"]).truncated for row in group),
            )
        )
    return tuple(answers)


def read_group_ids(path: Path) -> dict[str, tuple[str, int | None]]:
    """Of each group, in order: id -> (question id, epoch; None where a version before the question log recorded it).
    RolloutFileError as in `read_rollouts`, and where two groups share an id."""
    rows = _read(path, ("group_index", "group_id", "question_id", "question")).to_pylist()
    groups: dict[str, tuple[str, int | None]] = {}
    for _, members in groupby(rows, key=lambda row: row["group_index"]):
        first = next(members)
        if first["group_id"] in groups:
            raise RolloutFileError(f"rollouts {path}: group {first['group_id']} is there twice; record the step again")
        groups[first["group_id"]] = first["question_id"], question_from_json(first["question"]).epoch
    return groups


def _read(path: Path, columns: Sequence[str] | None) -> pyarrow.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise RolloutFileError(
            f"rollouts {path}: no such file; give a run directory recorded with "
            f"logging.rollout_files true and a step it holds"
        )
    try:
        file = pq.ParquetFile(path)
        _check_schema(path, file.schema_arrow)
        return file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise RolloutFileError(
            f"rollouts {path}: not readable as Parquet ({_one_line(error)}); record the step again"
        ) from None


def _schema() -> pyarrow.Schema:
    import pyarrow as pa

    def required(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, kind, nullable=False)

    return pa.schema(
        [
            required("group_index", pa.int32()),
            required("group_id", pa.string()),
            required("question_id", pa.string()),
            required("question", pa.string()),  # JSON of the Question: enough to grade again
            required("sample_index", pa.int32()),
            required("policy_version", pa.int32()),
            required("prompt_token_ids", pa.list_(pa.int32())),
            required("response_token_ids", pa.list_(pa.int32())),
            required("logprobs", pa.list_(pa.float32())),
            required("text", pa.string()),
            required("finish_reason", pa.string()),
            required("outcome", pa.string()),
            required("reward", pa.float64()),
            required("advantage", pa.float64()),
            pa.field("letter", pa.string()),  # null where no letter was found
            required("grading_s", pa.float64()),  # of the group
        ]
    )


def _check_schema(path: Path, schema: pyarrow.Schema) -> None:
    version = (schema.metadata or {}).get(b"alphamed.rollouts")
    if version is None:
        raise RolloutFileError(f"rollouts {path}: a Parquet file without rollouts of alphamed; give another file")
    if version != str(SCHEMA_VERSION).encode():
        raise RolloutFileError(
            f"rollouts {path}: schema version {version.decode()}, this program reads "
            f"{SCHEMA_VERSION}; read it with the version that wrote it (provenance.json)"
        )
    missing = [name for name in _schema().names if name not in schema.names]
    if missing:
        raise RolloutFileError(f"rollouts {path}: columns {', '.join(missing)} are missing; record the step again")


def _rows(index: int, scored: ScoredGroup) -> list[dict[str, Any]]:
    group = scored.group
    graded = zip(group.rollouts, scored.outcomes, scored.rewards, scored.advantages, scored.letters, strict=True)
    return [
        {
            "group_index": index,
            "group_id": group.group_id,
            "question_id": group.question.id,
            "question": question_json(group.question),
            "sample_index": rollout.sample_index,
            "policy_version": rollout.policy_version,
            "prompt_token_ids": group.prompt_token_ids,
            "response_token_ids": rollout.response_token_ids,
            "logprobs": rollout.logprobs,
            "text": rollout.text.encode(errors="replace").decode(),  # half a surrogate pair has no UTF-8
            "finish_reason": str(rollout.finish_reason),
            "outcome": str(outcome),
            "reward": reward,
            "advantage": advantage,
            "letter": letter,
            "grading_s": scored.grading_s,
        }
        for rollout, outcome, reward, advantage, letter in graded
    ]


def _group(rows: list[dict[str, Any]]) -> ScoredGroup:
    first = rows[0]
    question = question_from_json(first["question"])
    rollouts = tuple(
        Rollout(
            row["group_id"],
            row["question_id"],
            row["sample_index"],
            tuple(row["response_token_ids"]),
            tuple(row["logprobs"]),
            row["text"],
            FinishReason(row["finish_reason"]),
            row["policy_version"],
        )
        for row in rows
    )
    return ScoredGroup(
        RolloutGroup(first["group_id"], question, tuple(first["prompt_token_ids"]), rollouts),
        tuple(Outcome(row["outcome"]) for row in rows),
        tuple(row["reward"] for row in rows),
        tuple(row["advantage"] for row in rows),
        tuple(row["letter"] for row in rows),
        first["grading_s"],
    )


def question_json(question: Question) -> str:
    """A question as JSON text; the options keep their order. Plain ASCII, so that any text survives."""
    values = {field.name: getattr(question, field.name) for field in fields(question)} | {"options": dict(question.options)}
    if question.epoch is None:
        del values["epoch"]
    return json.dumps(values, ensure_ascii=True)


def question_from_json(text: str) -> Question:
    return Question(**json.loads(text))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
