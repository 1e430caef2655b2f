"""Rollout files give back every bit they were given, and say plainly what is wrong with others."""

import math
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rundir.rollout_files import (
    RolloutFileError,
    read_answers,
    read_rollouts,
    recorded_steps,
    rollout_path,
    write_rollouts,
)


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def scored_group(name: str, count: int, **question) -> ScoredGroup:
    asked = Question(
        **({"id": f"q-{name}", "question": "Which vitamin?", "options": {"A": "B12", "B": "C"}, "answer": "B"} | question)
    )
    rollouts = tuple(
        Rollout(
            name,
            asked.id,
            j,
            tuple(range(100_000, 100_000 + j)),
            tuple(float32(-0.1 * k) for k in range(j)),
            f"text {j} \\boxed{{B}}",
            FinishReason.STOP if j else FinishReason.LENGTH,
            11 + j,
        )
        for j in range(count)
    )
    outcomes = tuple(list(Outcome)[j % 6] for j in range(count))
    return ScoredGroup(
        RolloutGroup(name, asked, (1, 2, 49151), rollouts),
        outcomes,
        tuple(0.1 * j for j in range(count)),
        tuple(math.pi * (j - 1) for j in range(count)),
        tuple("B" if j % 2 else None for j in range(count)),
        0.1 + 0.2,
    )


GROUPS = (
    scored_group("g0", 3),
    scored_group(
        "g1",
        8,
        question="Größe «µ» \N{MICROBE}\nline\ttab \\boxed{}",
        context="an abstract",
        source="s",
        level=6,
        options={"C": "third first", "A": "", "B": "…"},
        answer="C",
    ),
    scored_group("g0", 2),  # neighbours or not, groups are told apart by place, never by name
)


def test_groups_come_back_equal_and_in_order(tmp_path):
    path = rollout_path(tmp_path, 12)
    assert path == tmp_path / "rollouts" / "step_000012.parquet"
    write_rollouts(path, 12, GROUPS)
    read = read_rollouts(path)
    assert read == GROUPS
    assert [list(group.group.question.options) for group in read] == [["A", "B"], ["C", "A", "B"], ["A", "B"]]
    assert pq.read_schema(path).metadata[b"alphamed.step"] == b"12" and recorded_steps(tmp_path) == [12]
    assert isinstance(read[0].outcomes[0], Outcome)
    assert isinstance(read[0].group.rollouts[0].finish_reason, FinishReason)
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_neighbouring_groups_of_the_same_question_stay_two(tmp_path):
    path = tmp_path / "r.parquet"
    write_rollouts(path, 1, (GROUPS[0], GROUPS[2]))
    assert [len(group.outcomes) for group in read_rollouts(path)] == [3, 2]


def test_numbers_keep_their_bits_also_the_odd_ones(tmp_path):
    odd = (0.1, -0.0, 5e-324, 1.7976931348623157e308, math.nan)
    logprobs = (float32(-1e-45), -0.0, -math.inf, float32(-17.3), math.nan)
    rollouts = tuple(Rollout("g", "q", j, (7,), (logprob,), "", FinishReason.ABORT, 0) for j, logprob in enumerate(logprobs))
    group = ScoredGroup(
        RolloutGroup("g", GROUPS[0].group.question, (1,), rollouts), (Outcome.TIMEOUT,) * 5, odd, odd, (None,) * 5
    )
    write_rollouts(tmp_path / "r.parquet", 1, [group])
    read = read_rollouts(tmp_path / "r.parquet")[0]

    def bits(values):
        return [struct.pack("d", value) for value in values]

    assert bits(read.rewards) == bits(odd) and bits(read.advantages) == bits(odd)
    assert bits(r.logprobs[0] for r in read.group.rollouts) == bits(logprobs)


def test_logprobs_of_more_precision_are_rounded_to_float32(tmp_path):
    rollout = Rollout("g", "q", 0, (7,), (-0.1,), "", FinishReason.STOP, 0)
    group = ScoredGroup(
        RolloutGroup("g", GROUPS[0].group.question, (1,), (rollout,)), (Outcome.WRONG,), (0.0,), (0.0,), ("A",)
    )
    write_rollouts(tmp_path / "r.parquet", 1, [group])
    assert read_rollouts(tmp_path / "r.parquet")[0].group.rollouts[0].logprobs == (-0.10000000149011612,)


def test_columns_are_typed_and_carry_what_the_issue_lists(tmp_path):
    write_rollouts(tmp_path / "r.parquet", 1, GROUPS)
    schema = pq.read_schema(tmp_path / "r.parquet")
    kinds = {field.name: str(field.type) for field in schema}
    assert {
        "question_id",
        "group_id",
        "prompt_token_ids",
        "response_token_ids",
        "logprobs",
        "text",
        "outcome",
        "reward",
        "advantage",
        "finish_reason",
        "policy_version",
        "question",
        "letter",
        "sample_index",
    } <= kinds.keys()
    assert "float" in kinds["logprobs"] and kinds["reward"] == kinds["advantage"] == "double"


def write_other_schema(path):
    table = pa.table({"a": [1]}).replace_schema_metadata({b"alphamed.rollouts": b"99"})
    pq.write_table(table, path)


def write_without_columns(path):
    write_rollouts(path, 1, GROUPS)
    pq.write_table(pq.read_table(path).drop(["logprobs", "letter"]), path)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file; give a run directory"),
        (lambda path: path.write_bytes(b"PAR1 no"), "not readable as Parquet"),
        (lambda path: path.write_bytes(b""), "not readable as Parquet"),
        (lambda path: pq.write_table(pa.table({"a": [1]}), path), "without rollouts of alphamed"),
        (write_other_schema, "schema version 99, this program reads 1"),
        (write_without_columns, "columns logprobs, letter are missing"),
    ],
)
def test_a_file_that_is_no_rollout_file_is_one_clear_error(tmp_path, write, message):
    path = tmp_path / "r.parquet"
    write(path)
    with pytest.raises(RolloutFileError, match=message) as caught:
        read_rollouts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.parquet"
    write_rollouts(path, 1, GROUPS[:1])
    bad = scored_group("bad", 1)
    object.__setattr__(bad, "rewards", ("no number",))
    with pytest.raises((pa.ArrowException, TypeError)):
        write_rollouts(path, 1, [bad])
    assert read_rollouts(path) == GROUPS[:1]
    assert [file.name for file in tmp_path.iterdir()] == ["r.parquet"]


def test_answers_are_the_same_groups_without_tokens(tmp_path):
    groups = (scored_group("a", 3), scored_group("b", 6, level=4, source="medqa"))
    write_rollouts(tmp_path / "s.parquet", 7, groups)
    for answers, group in zip(read_answers(tmp_path / "s.parquet"), groups, strict=True):
        assert (answers.group_id, answers.question) == (group.group.group_id, group.group.question)
        assert answers.texts == tuple(rollout.text for rollout in group.group.rollouts)
        assert (answers.outcomes, answers.letters, answers.rewards) == (group.outcomes, group.letters, group.rewards)
        assert answers.tokens == tuple(len(rollout.response_token_ids) for rollout in group.group.rollouts)
        assert answers.truncated == tuple(rollout.finish_reason != "stop" for rollout in group.group.rollouts)
    with pytest.raises(RolloutFileError, match="no such file"):
        read_answers(tmp_path / "absent.parquet")
