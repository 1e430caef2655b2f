"""The question log and its audit: runs of real rollouts with a coordinator of the test, killed, resumed and tampered with."""

import json
import re
from pathlib import Path

import pytest
from test_supply import FakeCoordinator, Prompts

from alphamed import cli
from alphamed.config.loading import build_config, dump_config
from alphamed.data.sources import load_questions
from alphamed.data.stream import QuestionStream
from alphamed.files import append_json, read_json_lines, replace_json_lines
from alphamed.megatron import checkpoint_folder
from alphamed.records import DropReason
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.supply import AsyncRollouts, SyncRollouts
from alphamed.rundir import provenance, question_log
from alphamed.rundir.directory import RunDirectory
from alphamed.rundir.rollout_files import rollout_path, write_rollouts

QUESTIONS = 7


class SmallRun:
    """A run directory with everything that the audit reads, written as `Run` writes it; three questions a step."""

    def __init__(self, root, max_staleness=0, coordinator=FakeCoordinator, **sections):
        self.data = root / "train.jsonl"
        rows = [
            {"id": f"q{i}", "question": f"Which is {i}?", "options": {"A": "x", "B": "y"}, "answer": "A", "level": 1 + i % 2}
            for i in range(QUESTIONS)
        ]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tree = {
            "model": {"path": "m"},
            "data": {"train": [str(self.data)], **sections.pop("data", {})},
            "run": {"root": str(root), "name": "r", "steps": 100},
            "prompt": {"max_tokens": 16},
            "rollout": {
                "questions_per_step": 3,
                "samples_per_question": 2,
                "max_response_tokens": 8,
                "max_staleness": max_staleness,
                **sections.pop("rollout", {}),
            },
        }
        self.config = build_config(tree | sections)
        self.run_dir: Path = self.config.run_dir
        self.run_dir.mkdir()
        (self.run_dir / "config.yaml").write_text(dump_config(self.config))
        self.coordinator = coordinator

    def start(self, last_step, checkpoints=(), saved=None, prepare=lambda coordinator: None):
        """Do the steps up to `last_step` after the state `saved`; returns the state of the last checkpoint written."""
        c, r = self.config, self.config.rollout
        state = saved or {"step": 0}
        RunDirectory(self.run_dir, {}).drop_after(state["step"])
        record = provenance.record_start(self.run_dir, ["x"], c.data.train, None, {"continued_after_step": state["step"]})
        stream = QuestionStream(load_questions(c.data.train).questions, c.run.seed, c.data.shuffle_options)
        sampler = QuestionSampler(c.dynamic_sampling, stream, 2, 3, c.data.levels, c.run.seed)
        coordinator = self.coordinator()
        prepare(coordinator)
        supply = (AsyncRollouts if r.max_staleness else SyncRollouts)(c, sampler, Prompts(), coordinator, None)
        if "cursor" in state:
            supply.load_state(state["cursor"])
        for step in range(state["step"] + 1, last_step + 1):
            gathered = supply.gather(step)
            coordinator.version += 1
            cursor = json.loads(json.dumps(supply.state()))
            write_rollouts(rollout_path(self.run_dir, step), step, gathered.groups)
            question_log.append(self.run_dir, step, len(record["starts"]), cursor["stream"], gathered.questions)
            append_json(self.run_dir / "metrics.jsonl", {"step": step})
            if step in checkpoints:
                saved = {"step": step, "cursor": cursor}
                directory = self.run_dir / "checkpoints"
                checkpoint_folder.publish(checkpoint_folder.begin(directory, step, 1), step, {"state": saved}, 99, {})
        return saved

    def change_log(self, step, change):
        rows = read_json_lines(self.run_dir / "questions.jsonl")
        for row in rows:
            if row["step"] == step:
                change(row)
        replace_json_lines(self.run_dir / "questions.jsonl", rows)


def audit(run, capsys):
    capsys.readouterr()
    code = cli.main(["audit", str(run.run_dir)])
    return code, capsys.readouterr().out.splitlines()


def violations(run, capsys):
    code, lines = audit(run, capsys)
    named = [line.removeprefix("violation: ") for line in lines if line.startswith("violation: ")]
    assert code == (1 if named else 0)
    return named


def counts(lines):
    """Epoch -> column -> cell of the printed table."""
    head = next(line.split() for line in lines if line.startswith("epoch"))
    rows = [line.split() for line in lines if line.split()[0].isdecimal()]
    return {int(row[0]): dict(zip(head[1:], map(int, row[1:]), strict=True)) for row in rows}


def test_a_run_in_one_piece(tmp_path, capsys):
    """Five steps of three questions are fifteen of the stream: two epochs of seven and one question."""
    run = SmallRun(tmp_path)
    run.start(5, checkpoints=(2, 4))
    code, lines = audit(run, capsys)
    assert code == 0
    assert counts(lines) == {
        0: {"questions": 7, "trained": 7, "under_way": 0, "not_drawn": 0},
        1: {"questions": 7, "trained": 7, "under_way": 0, "not_drawn": 0},
        2: {"questions": 7, "trained": 1, "under_way": 0, "not_drawn": 6},
    }
    text = "\n".join(lines)
    assert "not running; start 1: steps 1-5" in text and "unchanged, 7 questions" in text
    assert "5 of 5 steps agree" in text and "step_000002, step_000004 agree" in text
    assert lines[-1].startswith("no violation: every question of 2 whole epochs")
    row = read_json_lines(run.run_dir / "questions.jsonl")[2]
    assert row["stream"] == {"epoch": 1, "position": 2} and {k: len(v) for k, v in row["asked"].items()} == {"0": 1, "1": 2}


def test_a_killed_and_resumed_run(tmp_path, capsys):
    """Killed after step 5 with a checkpoint of step 2; after another kill, before any checkpoint, from there again."""
    run = SmallRun(tmp_path)
    saved = run.start(5, checkpoints=(2,))
    run.start(3, saved=saved)
    run.start(6, saved=saved, checkpoints=(6,))
    code, lines = audit(run, capsys)
    assert code == 0 and "start 1: steps 1-2, start 3: steps 3-6" in lines[0]
    assert sum(row["trained"] for row in counts(lines).values()) == 18


def test_rollouts_ahead_that_are_resumed_ask_again_what_was_under_way(tmp_path, capsys):
    run = SmallRun(tmp_path, max_staleness=1)
    saved = run.start(4, checkpoints=(3,))
    assert len(saved["cursor"]["under_way"]) == 3
    code, lines = audit(run, capsys)
    assert code == 0 and counts(lines)[2] == {"questions": 7, "trained": 0, "under_way": 1, "not_drawn": 6}
    run.start(5, saved=saved, checkpoints=(5,))
    code, lines = audit(run, capsys)
    assert code == 0 and sum(row["trained"] for row in counts(lines).values()) == 15
    assert sum(row["under_way"] for row in counts(lines).values()) == 3
    asked = [group for row in read_json_lines(run.run_dir / "questions.jsonl") for group in sum(row["asked"].values(), [])]
    assert len(asked) == 21 and len(set(asked)) == 21  # 18 of the stream, 3 asked again


def test_groups_too_old_are_counted_as_such(tmp_path, capsys):
    """With `drop` a group that no step waits for is dropped two steps later."""

    def hold_first(coordinator):
        feed = coordinator.feed

        def hold(key, tasks):
            coordinator.held |= {tasks[0].question.id} if not coordinator.asked else set()
            feed(key, tasks)

        coordinator.feed = hold

    class Releases(FakeCoordinator):
        def deliver(self, key, left_s, wait):
            if self.version >= 3:
                self.held, self.idle = set(), True
            return super().deliver(key, left_s, wait)

    run = SmallRun(tmp_path, max_staleness=1, coordinator=Releases, rollout={"stragglers": "drop"})
    run.start(3, checkpoints=(3,), prepare=hold_first)
    code, lines = audit(run, capsys)
    assert code == 0 and counts(lines)[0] == {"questions": 7, "trained": 6, "too_stale": 1, "under_way": 0, "not_drawn": 0}


def test_replaced_and_skipped_questions_have_their_reasons(tmp_path, capsys):
    """Questions with an even number have level 1, whose weight is 0, so that they are never asked; the group of q1 carries no
    signal, and with q3 and q5 the stream is walked until three places hold one."""
    schedule = [{"step": 1, "weights": [0, 1, 1, 1, 1, 1]}]
    levels = {"schedule": schedule, "by": "annotated"}
    run = SmallRun(tmp_path, data={"levels": levels}, dynamic_sampling={"refills": 9})
    run.start(1, checkpoints=(1,), prepare=lambda coordinator: coordinator.useless.add("q1"))
    code, lines = audit(run, capsys)
    assert code == 0
    rows = counts(lines)
    assert rows[0] == {"questions": 7, "trained": 2, "no_signal": 1, "level": 4, "under_way": 0, "not_drawn": 0}
    (logged,) = question_log.read(run.run_dir)
    assert [question_log.question_of(group) for group in logged.questions.dropped[DropReason.NO_SIGNAL]][0] == "q1"
    assert {name for epoch, name in logged.questions.skipped[DropReason.LEVEL] if epoch == 0} == {"q0", "q2", "q4", "q6"}


def test_questions_passed_over_have_their_reason(tmp_path, capsys):
    run = SmallRun(tmp_path, dynamic_sampling={"choose": True, "refills": 2})
    run.start(12, checkpoints=(12,), prepare=lambda coordinator: coordinator.useless.update({"q1", "q2"}))
    code, lines = audit(run, capsys)
    assert code == 0 and sum(row.get("unlikely_signal", 0) for row in counts(lines).values()) > 0


def lose_question(row):
    row["trained"] = row["trained"][1:]


def train_twice(row):
    row["trained"].append(row["trained"][0])


def forget_asking(row):
    group = row["asked"]["0"].pop()
    row["trained"].remove(group)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lose_question,
            [r"step 2: step_000002.parquet and the log differ in what was trained on: 2:0:", "would lose question"],
        ),
        (train_twice, [r"step 2: question q\d of epoch 0 is trained on, it was trained on in step 2"]),
        (
            forget_asking,
            [r"step 2: 5 questions of epoch 0 have been asked or skipped, the place in the questions is after 6"]
            + [r"epoch 0: q\d of data.train were neither asked nor skipped"]
            + [r"step 2: step_000002.parquet and the log differ"],
        ),
        (
            lambda row: row["stream"].update(position=5),
            ["after 5", "checkpoint step_000002: goes on after question 6 of epoch 0"],
        ),
        (lambda row: row.update(attempt=2), ["step 2 was recorded by start 2, .* holds 1 starts", "step 3 was recorded by"]),
        (
            lambda row: row.update(step=7),
            ["goes from step 1 to step 7", "from step 7 to step 3", "metrics.jsonl holds step 2"],
        ),
    ],
)
def test_a_changed_log_is_noticed(tmp_path, capsys, change, expected):
    run = SmallRun(tmp_path)
    run.start(5, checkpoints=(2,))
    assert violations(run, capsys) == []
    run.change_log(2, change)
    text = "\n".join(violations(run, capsys))
    for pattern in expected:
        assert re.search(pattern, text), text


def test_a_question_asked_twice_is_noticed(tmp_path, capsys):
    """A resume that forgets its place asks the first questions again: the checkpoint's cursor was that of another step."""
    run = SmallRun(tmp_path)
    saved = run.start(3, checkpoints=(1, 2))
    run.start(3, saved=saved | {"cursor": {"stream": saved["cursor"]["stream"] | {"position": 3}}})
    named = violations(run, capsys)
    assert sum("is asked again, it was trained on in step 2" in line for line in named) == 3


def test_a_rollout_file_that_is_gone_or_holds_other_groups(tmp_path, capsys):
    run = SmallRun(tmp_path)
    run.start(3)
    rollout_path(run.run_dir, 2).write_bytes(rollout_path(run.run_dir, 3).read_bytes())
    rollout_path(run.run_dir, 1).unlink()
    assert [line.split(" differ")[0] for line in violations(run, capsys)] == [
        "step 1: its rollout file step_000001.parquet is gone",
        "step 2: step_000002.parquet and the log",
    ]


def test_a_changed_training_file_is_named(tmp_path, capsys):
    run = SmallRun(tmp_path)
    run.start(3)
    text = run.data.read_text()
    run.data.write_text(text.replace("Which is 3?", "Which is 4?"))
    assert violations(run, capsys) == [f"data.train: {run.data} has changed since the run began"]
    run.data.unlink()
    code, lines = audit(run, capsys)
    assert code == 0 and f"data         {run.data} is not there: its ids are not compared" in lines


def test_a_kill_between_two_records_of_a_step_is_no_violation(tmp_path, capsys):
    """Rank 0 writes the rollout file, the log, the metrics; a kill may come after each of them."""
    run = SmallRun(tmp_path)
    run.start(3, checkpoints=(2,))
    replace_json_lines(run.run_dir / "metrics.jsonl", [{"step": 1}, {"step": 2}])
    assert violations(run, capsys) == []
    replace_json_lines(run.run_dir / "questions.jsonl", read_json_lines(run.run_dir / "questions.jsonl")[:2])
    with (run.run_dir / "questions.jsonl").open("a") as file:
        file.write('{"step": 3, "att')
    code, lines = audit(run, capsys)
    assert code == 0 and any("step 3 was being recorded" in line for line in lines)


def test_what_cannot_be_audited_is_one_line(tmp_path, capsys):
    run = SmallRun(tmp_path)
    assert cli.main(["audit", str(tmp_path / "none")]) == 2 and cli.main(["audit", str(run.run_dir)]) == 2
    assert "holds no questions.jsonl with a step" in capsys.readouterr().err.splitlines()[-1]
    (run.run_dir / "questions.jsonl").write_text('{"step": 1}\n')
    assert cli.main(["audit", str(run.run_dir)]) == 2
    assert "questions.jsonl: line 1 is none of a question log" in capsys.readouterr().err
