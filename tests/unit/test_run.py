"""A run directory through fresh start, steps, kills and resumes, driven by the loop on one rank without engines or a model."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from alphamed.cluster.failure import StopRequested, request_stop
from alphamed.config.loading import build_config, changed_config, dump_config, load_config
from alphamed.errors import ConfigError
from alphamed.evaluation.runner import Evaluation, QuestionSet, SetResult
from alphamed.evaluation.score import score
from alphamed.files import append_json, read_json_lines, replace_text
from alphamed.lab.hooks import HOOKS
from alphamed.megatron.policy import NoReference
from alphamed.records import (
    Batch,
    DropReason,
    FinishReason,
    Layout,
    MiniBatch,
    Outcome,
    Question,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    StepQuestions,
    StepRollouts,
    TokenGroup,
)
from alphamed.rollout.coordinator import Progress
from alphamed.run import Run
from alphamed.rundir.directory import check_resume, check_same_model, finished_step, is_finished
from alphamed.rundir.metrics import undeclared
from alphamed.rundir.profiling import StepProfiler
from alphamed.rundir.provenance import record_start
from alphamed.rundir.rollout_files import read_rollouts, recorded_steps
from alphamed.rundir.sinks import Console, JsonLines, Wandb, spoken_time
from alphamed.session import NoSync, Session
from alphamed.train import train as train_loop


class Alone:
    """The control of a world of one rank."""

    rank = 0

    def from_rank0(self, what, function):
        return function()

    everywhere = on_rank0 = from_rank0


class Follower:
    """The control of rank 1: never runs rank 0's function, gets what rank 0 is said to have found."""

    rank = 1

    def __init__(self, answers=(), told=None):
        self.answers, self.told = dict(answers), [] if told is None else told

    def from_rank0(self, what, function):
        self.told.append(what)
        return self.answers.get(what)

    def on_rank0(self, what, function):
        self.told.append(what)

    def everywhere(self, what, function):
        return function()


def config_of(root, **sections):
    (root / "train.jsonl").touch()
    tree = {
        "model": {"path": "model"},
        "data": {"train": [str(root / "train.jsonl")]},
        "run": {"root": str(root), "name": "r", "steps": 4},
        "rollout": {"questions_per_step": 1, "samples_per_question": 2, "max_response_tokens": 8},
        "logging": {"wandb": "off", "report": False, "export_hf": False},
        "checkpoint": {"every": 2},
    }
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    return build_config(tree)


def rollouts_of(step):
    """Two responses to one question, as the step's rollouts."""
    question = Question("q", "?", {"A": "a", "B": "b"}, "A")
    samples = tuple(Rollout("g", "q", j, (1, 2, 3), (-0.5,) * 3, "\\boxed{A}", FinishReason.STOP, step) for j in range(2))
    scored = ScoredGroup(
        RolloutGroup("g", question, (8, 9), samples),
        (Outcome.CORRECT, Outcome.WRONG),
        (1.0, 0.0),
        (1.0, -1.0),
        ("A", "A"),
        0.125,
    )
    tokens = TokenGroup(
        torch.tensor([8, 9]),
        (torch.tensor([1, 2, 3]),) * 2,
        (torch.full((3,), -0.5),) * 2,
        torch.tensor([1.0, -1.0]),
        policy_version=step,
    )
    return StepRollouts(step, (tokens,), (scored,), {"time/generate_s": 2.0})


STATS = {"policy/loss": 0.5, "policy/grad_norm": 1.0, "policy/logprob_diff_mean": 0.01, "time/update_s": 2.0}


class Killed(Exception):
    """What ends a run between two steps."""


class Rollouts:
    """The rollouts of `rollouts_of`, until the run is killed."""

    def __init__(self, kill_after):
        self._kill_after, self._step = kill_after, 0

    def next(self, step):
        if step > self._kill_after:
            raise Killed
        self._step = step
        return rollouts_of(step)

    def state(self):
        return {"taken": self._step}


class StillPolicy:
    """A policy without weights, whose updates all give STATS."""

    layout = Layout()

    def update(self, batch):
        assert batch.mini_batches[0].sequences == 2
        return dict(STATS)

    def require_finite(self):
        pass


@dataclass(frozen=True)
class RecordedSession(Session):
    """A session that notes the states that checkpoints are given, and has `begin` evaluate."""

    begin: Callable[..., Any] = None
    states: list[dict] = field(default_factory=list)

    def save_checkpoint(self, state):
        self.states.append(state)

    def evaluate(self, background):
        return self.begin(background)


def train(config, stop_after=99, saved=None, begin=None):
    """The loop of train.py over a run without engines or a model; returns the states that checkpoints were given."""
    run = Run.open(config, Alone(), HOOKS)
    try:
        run.begin(saved)
        session = RecordedSession(
            config,
            Alone(),
            run,
            StillPolicy(),
            NoReference(),
            Rollouts(stop_after),
            NoSync(max(0, run.state.policy_version - 1)),
            Path(config.model.path),
            None,
            HOOKS,
            StepProfiler(config, 0),
            begin and partial(begin, run),
        )
        with contextlib.suppress(Killed):
            train_loop(session)
    finally:
        run.close()
    return session.states


def lines(config):
    return read_json_lines(config.run_dir / "metrics.jsonl")


def test_a_run_is_finished_when_nothing_is_left_to_do(tmp_path):
    config = config_of(tmp_path)
    assert finished_step(config.run_dir) is None
    states = train(config, stop_after=2)  # killed
    assert finished_step(config.run_dir) is None and not is_finished(config)
    train(config, saved=states[-1])
    assert finished_step(config.run_dir) == 4 and is_finished(config)
    longer = changed_config(config, ["run.steps=6"])
    assert not is_finished(longer)
    assert is_finished(changed_config(longer, ["run.time_limit_s=60"]))  # its time was up
    train(longer, stop_after=5, saved={"step": 4})
    assert finished_step(config.run_dir) is None  # begun again, and killed


def test_a_run_of_no_steps_evaluates_and_is_finished(tmp_path):
    config = config_of(tmp_path, run={"stop_after": 0}, evaluation={"files": ["e.jsonl"], "before": True, "after": True})
    run = Run.open(config, Alone())
    run.begin(None)
    assert run.evaluate(lambda background: evaluation)
    assert list(run.steps()) == [] and not run.checkpoint(lambda state: None, last=True)
    assert not run.evaluate(lambda background: evaluation, last=True)  # the same weights: once is enough
    run.finish()
    assert is_finished(config) and finished_step(config.run_dir) == 0
    assert [path.name for path in (config.run_dir / "evaluations").iterdir() if path.suffix == ".json"] == [
        "step_000000.json"
    ]


# ---------------------------------------------------------------------------------------------------------- fresh start
def test_a_run_writes_its_directory(tmp_path, capsys):
    config = config_of(tmp_path)
    states = train(config)
    assert [state["step"] for state in states] == [2, 4] and states[-1]["cursor"] == {"taken": 4}
    assert json.loads(json.dumps(states[-1])) == states[-1] and states[-1]["policy_version"] == 5

    rows = lines(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    first = rows[0]
    assert list(first)[:2] == ["step", "policy_version"] and undeclared(first) == []
    assert first["policy_version"] == 1  # what generated the rollouts, not what was pushed after
    assert first["reward/mean"] == 0.5
    assert first["throughput/generated_tokens_per_s"] == 3.0  # 6 tokens in 2 s
    assert first["throughput/trained_tokens_per_s"] == 3.0  # 6 tokens in 2 s
    assert first["memory/rss_bytes"] > 1 << 20 and rows[-1]["time/wall_s"] >= rows[0]["time/wall_s"] >= 0

    assert load_config(config.run_dir / "config.yaml") == config
    assert recorded_steps(config.run_dir) == [1, 2, 3, 4]
    assert read_rollouts(config.run_dir / "rollouts" / "step_000003.parquet") == rollouts_of(3).scored
    assert len(json.loads((config.run_dir / "provenance.json").read_text())["starts"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[3].startswith("step    4/4  reward 0.500  correct  50%  boxed 100%")
    assert "Results" in printed[4:6] and printed[-1].split()[0] in ("rollouts", "checkpoints")
    assert not list(config.run_dir.rglob("*.partial"))


def test_a_step_logs_its_questions_and_a_resume_cuts_the_log_back(tmp_path):
    config = config_of(tmp_path)
    for start in (1, 2):
        run = Run.open(config, Alone())
        run.begin({"step": 1} if start == 2 else None)
        for step in (1, 2, 3)[start - 1 :]:
            questions = StepQuestions({f"{step}:0:q": 0}, (f"{step}:0:q",), {}, {DropReason.LEVEL: ((0, "p"),)})
            cursor = {"stream": {"epoch": 0, "position": 2 * step, "seed": 0}}
            run.record(replace(rollouts_of(step), questions=questions), STATS, version=step, cursor=cursor)
        run.close()
    assert read_json_lines(config.run_dir / "questions.jsonl") == [
        {
            "step": step,
            "attempt": attempt,
            "stream": {"epoch": 0, "position": 2 * step},
            "asked": {"0": [f"{step}:0:q"]},
            "trained": [f"{step}:0:q"],
            "dropped": {},
            "skipped": {"level": {"0": ["p"]}},
        }
        for step, attempt in ((1, 1), (2, 2), (3, 2))
    ]


def test_other_ranks_touch_no_file(tmp_path):
    config = config_of(tmp_path, evaluation={"files": ["e.jsonl"], "every": 3, "background": True})
    told: list[str] = []
    run = Run.open(config, Follower({"beginning the evaluation after step 3": True}, told))
    run.begin(None)
    seen = []
    for step in run.steps():
        run.finish_evaluation()
        run.record(rollouts_of(step), STATS, version=step + 1)
        seen.append((step, run.checkpoint(lambda state: None)))
        assert run.evaluate(lambda background: None) is (step == 3)
    run.finish()
    assert (
        told.index("beginning the evaluation after step 3")
        < told.index("the evaluation after step 3")
        < told.index("recording step 4")
    )
    assert seen == [(1, False), (2, True), (3, False), (4, True)]  # the same decisions as on rank 0
    assert not config.run_dir.exists()


def test_a_step_that_was_not_recorded_is_noticed(tmp_path):
    run = Run.open(config_of(tmp_path), Alone())
    run.begin(None)
    with pytest.raises(AssertionError, match="step 1 was not recorded"):
        list(run.steps())
    run.close()


# --------------------------------------------------------------------------------------------------------------- resume
def test_a_kill_and_a_resume_leave_the_same_record_as_one_run(tmp_path, capsys):
    config = config_of(tmp_path)
    states = train(config, stop_after=3)  # killed in step 4, the checkpoint is of step 2
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # amid a line
    (config.run_dir / "rollouts" / ".step_000004.parquet.123.partial").touch()
    train(config, saved=json.loads(json.dumps(states[-1])))
    assert [row["step"] for row in lines(config)] == [1, 2, 3, 4]
    assert recorded_steps(config.run_dir) == [1, 2, 3, 4]
    assert "the records of steps 3 to 3 are dropped" in capsys.readouterr().out
    starts = json.loads((config.run_dir / "provenance.json").read_text())["starts"]
    assert [start["continued_after_step"] for start in starts] == [0, 2]
    assert lines(config)[2]["time/wall_s"] >= states[-1]["wall_s"]


def test_without_a_checkpoint_a_run_starts_over(tmp_path):
    config = config_of(tmp_path, checkpoint={"every": 0})
    assert train(config, stop_after=3) == []
    train(config, stop_after=1)
    assert [row["step"] for row in lines(config)] == [1] and recorded_steps(config.run_dir) == [1]


def test_a_finished_run_does_nothing_more_until_steps_are_added(tmp_path):
    config = config_of(tmp_path)
    last = train(config)[-1]
    assert train(config, saved=last) == [] and len(lines(config)) == 4
    longer = config_of(tmp_path, run={"root": str(tmp_path), "name": "r", "steps": 6})
    assert [state["step"] for state in train(longer, saved=last)] == [6] and len(lines(config)) == 6
    start = json.loads((config.run_dir / "provenance.json").read_text())["starts"][-1]
    assert start["changed"] == {"run.steps": {"old": 4, "new": 6}}


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"optimizer": {"lr": 3e-5}}, "optimizer.lr: 3e-05 but the run in .*r was started with 1e-06; set it back or"),
        ({"model": {"path": "other"}}, "model.path: 'other' but"),
        (
            {"rollout": {"questions_per_step": 1, "samples_per_question": 4, "max_response_tokens": 8}},
            "rollout.samples_per_question: 4 but",
        ),
        ({"prompt": {"system": "Be brief."}}, "prompt.system: 'Be brief.' but"),
    ],
)
def test_a_resume_that_would_compute_something_else_is_refused(tmp_path, sections, message):
    config = config_of(tmp_path)
    train(config, stop_after=2)
    before = (config.run_dir / "config.yaml").read_text()
    changed = config_of(tmp_path, **sections)
    with pytest.raises(ConfigError, match=message):
        Run.open(changed, Alone())
    assert (config.run_dir / "config.yaml").read_text() == before


def test_what_a_resume_may_change(tmp_path):
    train(config_of(tmp_path), stop_after=2)
    changed = config_of(
        tmp_path,
        parallel={"tensor": 2, "micro_batch_tokens": 4096},
        cluster={"trainer_threads": 1},
        checkpoint={"every": 1, "keep": 5},
        logging={"wandb": "offline"},
        sync={"probe": False},
        rollout={"questions_per_step": 1, "samples_per_question": 2, "max_response_tokens": 8, "engines": 2},
    )
    assert set(check_resume(changed)) == {
        "parallel.tensor",
        "parallel.micro_batch_tokens",
        "cluster.trainer_threads",
        "checkpoint.every",
        "checkpoint.keep",
        "logging.wandb",
        "sync.probe",
        "rollout.engines",
    }


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run that stands at step 2, and a function: the fields that differ when it is continued with other places."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"layers": 2}')
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    config = config_of(tmp_path, data={"train": ["train.jsonl", "more.jsonl"]})
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "more.jsonl").write_text("{}\n{}\n")
    Run.open(config, Alone()).close()
    record_start(config.run_dir, ["alphamed"], config.data.train, tmp_path / "model", {})

    def differing(path="model", train=("train.jsonl", "more.jsonl"), **model):
        text = (tmp_path / "train.jsonl").read_bytes()
        config = config_of(tmp_path, model={"path": path} | model, data={"train": list(train)})
        (tmp_path / "train.jsonl").write_bytes(text)
        return set(check_resume(config))

    return differing


def test_another_spelling_of_a_place_is_the_same_place(tmp_path, moved):
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "data").symlink_to(".")
    for path in ("model/", "./model", str(tmp_path / "model"), "link", "data/model"):
        assert moved(path) == set()
    assert moved(train=[str(tmp_path / "train.jsonl"), "data/more.jsonl"]) == set()
    assert moved(cache=str(tmp_path / ".cache" / "models")) == set()  # the default, as a whole path


def test_another_place_with_the_same_content_is_noted(tmp_path, moved):
    shutil.copytree(tmp_path / "model", tmp_path / "mount" / "renamed")
    shutil.copy(tmp_path / "more.jsonl", tmp_path / "mount" / "m.jsonl")
    assert moved("mount/renamed", train=["train.jsonl", "mount/m.jsonl"]) == {"model.path", "data.train"}
    assert moved(cache="elsewhere") == {"model.cache"}
    shutil.rmtree(tmp_path / "model")  # the first place may be gone
    (tmp_path / "more.jsonl").unlink()
    assert moved("mount/renamed", train=["train.jsonl", "mount/m.jsonl"]) == {"model.path", "data.train"}


def test_another_place_with_other_content_is_refused(tmp_path, moved):
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        ConfigError,
        match="model.path: 'other' but the run in .* was started with 'model', which held something else; set it back or",
    ):
        moved("other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"weights")
    assert moved("other") == {"model.path"}
    (tmp_path / "other" / "added_tokens.json").write_text("{}")  # a file more can change what the model says
    with pytest.raises(ConfigError, match="model.path: 'other' but"):
        moved("other")
    with pytest.raises(ConfigError, match="data.train: .* was started with"):
        moved(train=["more.jsonl", "train.jsonl"])  # the order decides who is asked when
    with pytest.raises(ConfigError, match="data.train: .* was started with"):
        moved(train=["train.jsonl"])


def test_a_model_that_changed_in_its_place_is_refused(tmp_path, moved):
    check_same_model(tmp_path / "r", tmp_path / "model")
    check_same_model(tmp_path / "no-run", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(ConfigError, match="model.path: .*model.safetensors is not what the run in .*r was started with"):
        check_same_model(tmp_path / "r", tmp_path / "model")


def test_changed_training_data_is_refused(tmp_path):
    config = config_of(tmp_path)
    train(config, stop_after=2)
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="data.train: .*train.jsonl has changed since the run"):
        Run.open(config, Alone())
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(ConfigError, match="data.train: .*train.jsonl has gone since the run"):
        Run.open(config, Alone())


def test_a_place_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path, run={"root": str(tmp_path / "file"), "name": "r", "steps": 4})
    with pytest.raises(ConfigError, match="run.root: .*file/r cannot be written \\(Not a directory\\); choose another"):
        Run.open(config, Alone())


def test_a_config_of_another_version_is_told(tmp_path):
    config = config_of(tmp_path)
    replace_text(config.run_dir / "config.yaml", "model: {path: m}\ndata: {train: [a]}\nflux: 1\n")
    with pytest.raises(ConfigError, match="flux: unknown key.*cannot be continued by this version"):
        Run.open(config, Alone())


# ------------------------------------------------------------------------------------------------ time limit, intervals
def test_no_step_begins_after_the_time_limit(tmp_path, capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("alphamed.run.time.monotonic", lambda: now[0])
    config = config_of(tmp_path, run={"root": str(tmp_path), "name": "r", "steps": 50, "time_limit_s": 100})
    run = Run.open(config, Alone())
    run.begin(None)
    states = []
    for step in run.steps():
        now[0] += 30.0  # steps begin at 0, 30, 60 and 90 s; the fifth would at 120
        run.record(rollouts_of(step), STATS, version=step)
    assert run.state.step == 4
    assert run.checkpoint(states.append, last=True) and states[0]["step"] == 4 and states[0]["wall_s"] == 120.0
    assert not run.checkpoint(states.append, last=True)
    run.close()
    assert "run.time_limit_s: 100 s are over after step 4 of 50" in capsys.readouterr().out


def test_all_ranks_stop_where_rank_0_says_so(tmp_path):
    config = config_of(tmp_path, run={"root": str(tmp_path), "name": "r", "steps": 50, "time_limit_s": 1e9})
    run = Run.open(config, Follower({"the time limit": True}))
    run.begin(None)
    assert list(run.steps()) == []


def test_all_ranks_stop_where_rank_0_was_asked_to(tmp_path):
    run = Run.open(config_of(tmp_path), Follower({"requests to stop": True}))
    run.begin(None)
    assert list(run.steps()) == [] and run.stopped


def test_a_run_that_is_asked_to_stop_ends_its_step_and_begins_no_other(tmp_path):
    run = Run.open(config_of(tmp_path), Alone())
    run.begin(None)
    progress = Progress(done=1, total=2, generated=1, response_tokens=3, generate_s=1.0, reward_s=0.0)
    for step in run.steps():
        run.show_generation(progress)
        assert run.activity == f"step {step}, generating, 1 of 2 questions"
        run.record(rollouts_of(step), STATS, version=step + 1, cursor={"taken": step})
        request_stop(run.dir)
    with pytest.raises(StopRequested):
        run.show_generation(progress)
    states = []
    assert step == 1 and run.checkpoint(states.append, last=True) and states[0]["step"] == 1 and run.stop_asked()
    run.close()
    assert finished_step(run.dir) is None


def evaluation():
    groups = rollouts_of(1).scored
    return Evaluation(
        0, (SetResult(QuestionSet("s", Path("s.jsonl"), (groups[0].group.question,), 1), groups, score(groups)),), 1.0
    )


def test_evaluations_run_when_due_and_only_once(tmp_path):
    config = config_of(
        tmp_path, evaluation={"files": ["e.jsonl"], "before": True, "after": True, "every": 3, "background": True}
    )
    ran, ended = [], []

    def begin(run, background):
        ran.append((run.state.step, background))
        return lambda: ended.append(run.state.step) or evaluation()

    states = train(config, begin=begin)
    assert ran == [(0, False), (3, True), (4, False)] and ended == [0, 3, 4]  # 3's while step 4 was made, not recorded
    names = sorted(path.name for path in (config.run_dir / "evaluations").iterdir())
    assert names == [f"step_00000{step}.{end}" for step in (0, 3, 4) for end in ("items.jsonl", "json")]
    train(config, saved=states[0], begin=begin)  # again from step 2: 3 and 4 are new, 0 stays
    assert [step for step, _ in ran] == [0, 3, 4, 3, 4]


@pytest.mark.parametrize(
    "settings",
    [{"evaluation": {"background": False}}, {"rollout": {"deterministic": True}, "evaluation": {"background": True}}, {}],
)
def test_an_evaluation_in_the_foreground_ends_before_the_next_step(tmp_path, settings):
    wanted = {"files": ["e.jsonl"], "every": 1} | settings.get("evaluation", {})
    run = Run.open(config_of(tmp_path, evaluation=wanted, rollout=settings.get("rollout", {})), Alone())
    run.begin(None)
    ended = []
    for step in run.steps():
        run.record(rollouts_of(step), STATS, version=step)
        run.evaluate(lambda background: lambda: ended.append((run.state.step, background)) or evaluation())
        assert ended[-1] == (step, False)
    run.close()


def test_a_run_that_ends_early_leaves_no_evaluation_behind(tmp_path):
    config = config_of(tmp_path, evaluation={"files": ["e.jsonl"], "every": 2, "background": True})
    run = Run.open(config, Alone())
    run.begin(None)
    for step in run.steps():
        run.finish_evaluation()
        run.record(rollouts_of(step), STATS, version=step)
        run.evaluate(lambda background: evaluation)
        if step == 2:  # begun, and no further step: as at a time limit
            break
    run.evaluate(lambda background: evaluation, last=True)
    run.close()
    assert (config.run_dir / "evaluations" / "step_000002.json").is_file()


# -------------------------------------------------------------------------------------------------------- bad updates
def test_a_loss_that_is_not_finite_dumps_the_batch_and_is_null_in_the_metrics(tmp_path, capsys):
    config = config_of(tmp_path)
    run = Run.open(config, Alone())
    run.begin(None)
    for step in run.steps():
        loss = math.nan if step == 2 else 0.5
        run.record(
            rollouts_of(step),
            STATS | {"policy/loss": loss},
            version=step,
            batch=Batch((MiniBatch((), 6, 2),), {"batch/dp_imbalance": 0.25}),
        )
    run.close()
    dumps = list((config.run_dir / "dumps").rglob("*.pt"))
    assert [str(path.relative_to(config.run_dir)) for path in dumps] == ["dumps/step_000002/rank_0.pt"]
    assert lines(config)[1]["policy/loss"] is None and lines(config)[1]["batch/dp_imbalance"] == 0.25
    assert "step 2: policy/loss is not finite; its batch is kept" in capsys.readouterr().out
    assert torch.load(dumps[0], weights_only=True)["batch"]["mini_batches"][0]["response_tokens"] == 6


def test_every_rank_dumps_its_own_part(tmp_path):
    config = config_of(tmp_path)
    run = Run.open(config, Follower({"recording step 1": "policy/loss is not finite"}))
    run.begin(None)
    next(iter(run.steps()))
    run.record(rollouts_of(1), STATS, version=1, batch=Batch((MiniBatch((), 6, 2),)))
    assert (config.run_dir / "dumps" / "step_000001" / "rank_1.pt").exists()


# ---------------------------------------------------------------------------------------------------------------- sinks
def test_half_a_line_is_left_out_when_read_and_cut_off_by_the_next_append(tmp_path):
    path = tmp_path / "m.jsonl"
    append_json(path, {"step": 1, "x": math.inf})
    with path.open("a") as file:
        file.write('{"step": 2, "x"')
    assert read_json_lines(path) == [{"step": 1, "x": None}]
    append_json(path, {"step": 2})
    assert path.read_text() == '{"step": 1, "x": null}\n{"step": 2}\n'
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_json_lines(path)


def test_the_console_tells_the_time_left_by_the_median_step():
    stream = io.StringIO()
    console = Console(steps=10, stream=stream)
    for step, seconds in enumerate((60.0, 10.0, 12.0), start=1):
        console.write(
            {
                "step": step,
                "reward/mean": 0.25,
                "reward/correct": 0.2,
                "reward/boxed": 0.5,
                "throughput/generated_tokens_per_s": 211.6,
                "time/step_s": seconds,
            }
        )
    assert stream.getvalue().splitlines()[-1] == (  # 7 x 12 s are left
        "step    3/10  reward 0.250  correct  20%  boxed  50%     212 tokens/s    12.0 s/step  1 min left"
    )
    console.show(4, "generating")  # no terminal: nothing is overwritten
    assert "generating" not in stream.getvalue() and "\x1b" not in stream.getvalue()
    assert [spoken_time(s) for s in (44.6, 84, 3540, 7500)] == ["45 s", "1 min", "59 min", "2 h 5 min"]


def test_without_a_terminal_a_long_step_shows_in_lines_of_its_own():
    now, stream = 0.0, io.StringIO()
    console = Console(steps=10, stream=stream, clock=lambda: now)
    for now, done in ((10.0, 1), (29.0, 2), (31.0, 3), (40.0, 4), (62.0, 5)):
        console.show(4, f"generating, {done}/8 questions")
    console.note("evaluating after 4 steps ...")
    now = 90.0  # 28 s after the last line
    console.show(5, "running")
    assert stream.getvalue().splitlines() == [
        "step    4/10  generating, 3/8 questions ...",
        "step    4/10  generating, 5/8 questions ...",
        "evaluating after 4 steps ...",
    ]


def test_on_a_terminal_the_running_step_is_overwritten_by_its_result():
    stream = io.StringIO()
    stream.isatty = lambda: True
    console = Console(steps=10, stream=stream)
    console.show(1, "generating, 3/8 questions")
    console.write({"step": 1, "reward/mean": 0.5, "reward/correct": 0.2, "reward/boxed": 0.5, "time/step_s": 1.0})
    console.close()
    kept = [line.rpartition("\x1b[2K")[2] for line in stream.getvalue().split("\n")]
    assert stream.getvalue().startswith("\r\x1b[2Kstep    1/10  generating, 3/8 questions ...\r\x1b[2Kstep")
    assert len(kept) == 2 and "reward 0.500" in kept[0] and "  - tokens/s" in kept[0] and kept[1] == ""
    assert kept[0].count("━") == Console.BAR and "\x1b[36m━━━━━━\x1b[90m" in kept[0]


def test_wandb_offline_writes_into_the_run_directory_and_tries_no_connection(tmp_path):
    """In a process of its own, since wandb starts a service; the network modules are watched, not blocked."""
    config = config_of(tmp_path, logging={"wandb": "offline"})
    program = f"""
import socket, sys
from alphamed.config.loading import build_config, load_config
from alphamed.rundir.sinks import Wandb
tried = []
def audit(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX: tried.append(args[1])
    if event == "socket.getaddrinfo": tried.append(args[0])
sys.addaudithook(audit)
notes = []
Wandb.CLOSE_DEADLINE_S = 500             # busy machines
sink = Wandb(load_config({str(tmp_path / "c.yaml")!r}), "abc123", notes.append)
for step in (1, 2): sink.write({{"step": step, "reward/mean": 0.5}})
sink.close()
print("tried", [t for t in tried if not str(t).startswith(("127.", "('127.", "localhost"))], "notes", notes)
"""
    config.run_dir.mkdir()
    (tmp_path / "c.yaml").write_text(dump_config(config))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1] == "tried [] notes []", done.stdout + done.stderr
    logs = list((config.run_dir / "wandb").rglob("*.wandb"))
    assert len(logs) == 1 and "offline" in str(logs[0]) and b"reward/mean" in logs[0].read_bytes()


def test_wandb_that_fails_is_told_and_stops_nothing(tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(Wandb, "_start", lambda self: 1 / 0)
    sink = Wandb(config_of(tmp_path), "abc", notes.append)
    sink.write({"step": 1})
    sink.close()
    assert notes == ["wandb stopped (division by zero); metrics.jsonl is complete, set logging.wandb to off to silence this"]


def test_wandb_that_hangs_is_left_behind(tmp_path, monkeypatch):
    notes, forever = [], threading.Event()
    monkeypatch.setattr(Wandb, "_start", lambda self: forever.wait())
    monkeypatch.setattr(Wandb, "CLOSE_DEADLINE_S", 0.1)
    sink = Wandb(config_of(tmp_path), "abc", notes.append)
    sink.close()
    assert "did not finish within" in notes[0]
    forever.set()


def test_json_lines_sink_appends(tmp_path):
    sink = JsonLines(tmp_path / "new" / "m.jsonl")
    sink.write({"step": 1})
    sink.write({"step": 2})
    assert [row["step"] for row in read_json_lines(sink.path)] == [1, 2]
