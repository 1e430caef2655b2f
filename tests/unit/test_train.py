"""The loop on real parts: a tiny policy trained on recorded rollouts in this process. What goes wrong in a step is on the disk
before the run ends, and no checkpoint holds it."""

import gzip
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from tiny import tiny_hf

from alphamed import train
from alphamed.cluster.failure import request_stop
from alphamed.config.loading import build_config
from alphamed.errors import RunFailed
from alphamed.files import read_json_lines
from alphamed.megatron import checkpoint
from alphamed.megatron.checkpoint_folder import latest
from alphamed.megatron.policy import UpdateError
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rollout.pipeline import ReplayedRollouts
from alphamed.rundir.directory import finished_step
from alphamed.rundir.profiling import StepProfiler
from alphamed.rundir.rollout_files import rollout_path, write_rollouts
from alphamed.session import open_session

STEPS = 3
UNIFORM = -math.log(509)
"""About what a random model of 509 tokens gives any of them."""


def group(step, place, logprob=UNIFORM):
    """Two responses of random-looking tokens, a right and a wrong one."""
    name, question = f"{step}:{place}", Question(f"q{place}", "?", {"A": "a", "B": "b"}, "A")
    rollouts = tuple(
        Rollout(name, question.id, j, (5 + j, 6 + step, 7), (logprob,) * 3, "text", FinishReason.STOP, step)
        for j in range(2)
    )
    outcomes = (Outcome.CORRECT, Outcome.WRONG)
    return ScoredGroup(
        RolloutGroup(name, question, (3, 4, 8 + place), rollouts), outcomes, (1.0, 0.0), (1.0, -1.0), ("A", "B")
    )


@pytest.fixture
def start(tmp_path):
    """A function: the configuration of a run on the recorded rollouts of three steps, with further sections."""
    model = tiny_hf(tmp_path / "model", layers=1)
    (tmp_path / "train.jsonl").touch()
    for step in range(1, STEPS + 1):
        write_rollouts(rollout_path(tmp_path / "recorded", step), step, [group(step, place) for place in range(2)])

    def config(**sections):
        tree = {
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"train": [str(tmp_path / "train.jsonl")]},
            "run": {"root": str(tmp_path), "name": "r", "steps": STEPS},
            "prompt": {"max_tokens": 16},
            "rollout": {
                "questions_per_step": 2,
                "samples_per_question": 2,
                "max_response_tokens": 8,
                "dtype": "fp32",
                "replay": str(tmp_path / "recorded"),
            },
            "parallel": {"micro_batch_tokens": 64},
            "checkpoint": {"every": 1},
            "logging": {"wandb": "off", "report": False, "export_hf": False},
            "cluster": {"device": "cpu"},
        }
        return build_config({name: tree.get(name, {}) | sections.get(name, {}) for name in tree | sections})

    return config


def recorded(config):
    return {row["step"]: row for row in read_json_lines(config.run_dir / "metrics.jsonl")}


def test_every_step_is_recorded_and_becomes_a_checkpoint(start):
    config = start()
    train.main(config)
    rows = recorded(config)
    assert list(rows) == [1, 2, 3] and finished_step(config.run_dir) == STEPS
    assert latest(config.run_dir / "checkpoints").name == "step_000003"
    assert all(row["reward/mean"] == 0.5 and math.isfinite(row["policy/loss"]) for row in rows.values())
    assert {"time/logprobs_s", "time/update_s", "time/sync_s", "time/evaluate_s"} <= rows[1].keys()
    assert rows[3]["policy/grad_norm"] > 0


def flip_middle(folder):
    (file,) = folder.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "__0_0.distcp has another digest than when it was written"


def truncate(folder):
    (file,) = folder.glob("*.distcp")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:1000])
    return f"__0_0.distcp has 1000 bytes, not {size}"


def lose_file(folder):
    (folder / "common.pt").unlink()
    return "common.pt is gone"


def break_manifest(folder):
    (folder / "manifest.json").write_text('{"format": 1, "sta')
    return "manifest.json: JSONDecodeError: Unterminated string starting at: line 1 column 15 (char 14)"


def lose_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json: FileNotFoundError: "


@pytest.mark.parametrize("damage", [flip_middle, truncate, lose_file, break_manifest, lose_manifest])
def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(start, capsys, damage):
    """Three steps, damage to the checkpoint of the third: it is done again from the second, to the same numbers."""
    config = start(checkpoint={"every": 1, "keep": 3})
    train.main(config)
    before, checkpoints = recorded(config), config.run_dir / "checkpoints"
    problem = damage(checkpoints / "step_000003")
    capsys.readouterr()
    train.main(config)
    printed = capsys.readouterr().out
    assert f"checkpoint step_000003 is damaged ({problem}" in printed
    assert "continuing from step_000002, what was trained after step 2 is lost and done again" in printed
    after = recorded(config)
    assert list(after) == [1, 2, 3] and after[3]["policy/loss"] == pytest.approx(before[3]["policy/loss"], rel=1e-5)
    assert after[3]["policy/lr"] == before[3]["policy/lr"] and after[3]["time/wall_s"] != before[3]["time/wall_s"]
    assert latest(checkpoints).name == "step_000003" and (checkpoints / "step_000003" / "manifest.json").is_file()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(start):
    config = start(checkpoint={"every": 1, "keep": 2})
    train.main(config)
    flip_middle(config.run_dir / "checkpoints" / "step_000002")
    truncate(config.run_dir / "checkpoints" / "step_000003")
    with pytest.raises(RunFailed) as refused:
        train.main(config)
    text = str(refused.value)
    assert "step_000003: is damaged, and so is every other: step_000003 (__0_0.distcp has 1000 bytes" in text
    assert "step_000002 (__0_0.distcp has another digest" in text and "the run starts again" in text and "\n" not in text
    assert list(recorded(config)) == [1, 2, 3]  # nothing was dropped


def test_a_file_system_that_hangs_is_named(start, monkeypatch):
    """`latest` of the second checkpoint is a named pipe that nobody reads; what it holds back is named, and nothing waits for it."""
    config = start(run={"stop_after": 1})
    train.main(config)
    pipe = config.run_dir / "checkpoints" / ".latest"
    os.mkfifo(pipe)
    monkeypatch.setattr(checkpoint, "transfer_deadline_s", lambda size: 3.0)
    with pytest.raises(RunFailed, match=r"completing checkpoint 2: the file system gave no answer for 3 s.*r/checkpoints'"):
        train.main(start())
    assert latest(config.run_dir / "checkpoints").name == "step_000001"
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def spoil(config, step):
    """Record rollouts of the step whose log-probs are no numbers."""
    path = rollout_path(config.rollout.replay, step)
    write_rollouts(path, step, [group(step, place, math.nan) for place in range(2)])


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({}, RunFailed, r"step 2: log-probs of its responses are not finite"),
        (
            {"algorithm": {"correction": "tis"}, "optimizer": {"max_skipped_steps": 0}},
            UpdateError,
            r"training step 2: the gradient was not finite in 1 updates in a row",
        ),
    ],
)
def test_a_bad_step_is_recorded_and_makes_no_checkpoint(start, settings, error, words):
    """Log-probs that are no numbers show in their difference; a correction by them spoils the gradient, too."""
    config = start(**settings)
    spoil(config, 2)
    with pytest.raises(error, match=words):
        train.main(config)
    rows = recorded(config)
    assert list(rows) == [1, 2] and rows[2]["policy/logprob_diff_mean"] is None
    assert latest(config.run_dir / "checkpoints").name == "step_000001"
    assert finished_step(config.run_dir) is None


def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_is_not_finished(start, monkeypatch):
    """Asked while the rollouts of step 2 are on their way, which are then given up; the next start goes on with that step."""
    config = start(checkpoint={"every": 0})
    next_of = ReplayedRollouts.next

    def stopped(rollouts, step):
        if step == 2:
            request_stop(config.run_dir)
            return None
        return next_of(rollouts, step)

    monkeypatch.setattr(ReplayedRollouts, "next", stopped)
    train.main(config)
    assert list(recorded(config)) == [1] and finished_step(config.run_dir) is None
    assert latest(config.run_dir / "checkpoints").name == "step_000001"


@pytest.mark.parametrize(
    "difference, component, words",
    [
        (0.2, "rollout engines", "the limit is 0.15"),
        (float("inf"), "rollout engines", "inf"),
        (float("nan"), "policy", "not finite"),  # which is no news of the engines
    ],
)
def test_log_probs_that_differ_stop_the_run(start, difference, component, words):
    with open_session(start()) as session:
        live = start(rollout={"replay": None, "dtype": "bf16"})
        session = replace(session, config=live)
        with pytest.raises(RunFailed, match=words) as stopped:
            session.require_agreement(3, {"policy/logprob_diff_mean": difference})
        assert stopped.value.component == component
        session.require_agreement(3, {"policy/logprob_diff_mean": 0.15})


def test_a_profiled_step_leaves_a_trace_of_its_stages(start):
    config = start(profile={"steps": [2]})
    train.main(config)
    files = sorted(path.name for path in (config.run_dir / "profile").iterdir())
    assert files == ["step_000002_rank_0.json.gz"]
    events = json.loads(gzip.decompress((config.run_dir / "profile" / files[0]).read_bytes()))["traceEvents"]
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("ph") == "X"}
    stages = ["step 2", "update", "forward_backward", "optimizer", "record", "checkpoint"]
    assert spans.keys() >= {*stages, "aten::mm"} and "step 1" not in spans
    begin, end = spans["step 2"]
    assert all(begin <= spans[name][0] and spans[name][1] <= end for name in stages)
    update = spans["update"]
    assert update[0] <= spans["forward_backward"][0] < spans["optimizer"][0] and spans["optimizer"][1] <= update[1]
    assert list(recorded(config)) == [1, 2, 3]


def test_a_rank_that_is_not_named_and_a_step_that_is_not_reached_leave_no_trace(start):
    profiler = StepProfiler(start(profile={"steps": [2, 3]}), rank=1)
    assert list(profiler.steps(iter([1, 2, 3]))) == [1, 2, 3]
    for step in StepProfiler(start(profile={"steps": [3]}), rank=0).steps(iter([2, 3])):
        break
    assert not (start().run_dir / "profile").exists()


def test_a_trace_that_cannot_be_written_does_not_end_the_run(start, capsys):
    config = start(profile={"steps": [1]})
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "profile").touch()
    assert list(StepProfiler(config, rank=0).steps(iter([1]))) == [1]
    assert "step_000001_rank_0.json.gz: the trace is not written" in capsys.readouterr().err


def test_nsight_records_from_the_first_to_the_last_stage_of_a_step(start, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    live = start(profile={"steps": [2], "kind": "nsys"}, cluster={"device": "auto"})
    for step in StepProfiler(live, rank=0).steps(iter([1, 2])):
        calls.append(f"body {step}")
    assert calls == ["body 1", "wait", "start", "step 2", "body 2", "pop", "wait", "stop"]
