"""From questions to tasks, and from graded groups to the tensors that all ranks get."""

from dataclasses import replace

import pytest
import torch

from alphamed.cluster.control import Control
from alphamed.cluster.failure import StopRequested
from alphamed.config.loading import build_config, changed_config
from alphamed.errors import RunFailed
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, Sampling, ScoredGroup
from alphamed.rollout.coordinator import Progress
from alphamed.rollout.pipeline import LiveRollouts, ReplayedRollouts, flatten, unflatten
from alphamed.rollout.tasks import training_tasks
from alphamed.rundir.rollout_files import rollout_path, write_rollouts


def config(advantage="grpo", **rollout):
    return build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["d.jsonl"]},
            "run": {"name": "r"},
            "prompt": {"max_tokens": 16},
            "algorithm": {"advantage": advantage},
            "rollout": {"questions_per_step": 2, "samples_per_question": 2, "max_response_tokens": 8} | rollout,
        }
    )


def question(name):
    return Question(name, "?", {"A": "x", "B": "y"}, "A")


def scored(name, responses, version=4):
    """A group with one-token-per-letter responses."""
    rollouts = tuple(
        Rollout(
            f"g{name}",
            name,
            i,
            tuple(map(ord, text)),
            tuple(-0.5 * k for k in range(len(text))),
            text,
            FinishReason.STOP,
            version,
        )
        for i, text in enumerate(responses)
    )
    n = len(responses)
    return ScoredGroup(
        RolloutGroup(f"g{name}", question(name), tuple(map(ord, name)), rollouts),
        (Outcome.WRONG,) * n,
        (0.0,) * n,
        tuple(float(i) - 0.5 for i in range(n)),
        (None,) * n,
    )


class Prompts:
    def render(self, question):
        return tuple(map(ord, question.id))


class Stream:
    def __init__(self):
        self.at = 0

    def take(self, n):
        self.at += n
        return [question(f"q{i}") for i in range(self.at - n, self.at)]

    def state(self):
        return {"at": self.at}

    def load_state(self, state):
        self.at = state["at"]


@pytest.fixture
def control(tmp_path):
    return Control(None, 0, 1, [], tmp_path, 30.0, 15.0)


def test_tensors_hold_ragged_groups_exactly():
    groups = [scored("q1", ["abc", "d"]), scored("question", ["", "xy", "z"], version=5)]
    one, two = unflatten(flatten(groups))
    assert one.prompt.tolist() == [ord("q"), ord("1")] and two.prompt.tolist() == list(b"question")
    assert [r.tolist() for r in one.responses] == [[97, 98, 99], [100]]
    assert [r.tolist() for r in two.responses] == [[], [120, 121], [122]]
    assert [r.tolist() for r in one.rollout_logprobs] == [[0.0, -0.5, -1.0], [0.0]]
    assert one.advantages.tolist() == [-0.5, 0.5] and two.advantages.tolist() == [-0.5, 0.5, 1.5]
    assert (one.policy_version, two.policy_version) == (4, 5)
    assert (one.prompt.dtype, one.responses[0].dtype) == (torch.int64, torch.int64)
    assert (one.rollout_logprobs[0].dtype, one.advantages.dtype) == (torch.float32, torch.float32)


def test_one_group_alone():
    (group,) = unflatten(flatten([scored("q", ["ab", "c"])]))
    assert [r.tolist() for r in group.responses] == [[97, 98], [99]]


def test_training_tasks_carry_the_configured_sampling_and_unique_ids():
    tasks = training_tasks(config(temperature=0.7), 3, [question("q1"), question("q1")], Prompts())
    assert [task.group_id for task in tasks] == ["3:0:q1", "3:1:q1"]
    assert tasks[0].sampling == Sampling(n=2, temperature=0.7, top_p=1.0, top_k=-1, max_tokens=8, seed=None)
    assert tasks[0].prompt_token_ids == (ord("q"), ord("1"))


def test_deterministic_seeds_depend_on_run_step_question_and_place_only():
    def seeds(step, **rollout):
        return [
            task.sampling.seed
            for task in training_tasks(
                config(deterministic=True, **rollout), step, [question("q1"), question("q2"), question("q1")], Prompts()
            )
        ]

    assert seeds(3) == seeds(3, temperature=0.5)
    assert len(set(seeds(3) + seeds(4))) == 6
    # sha256("r\x1fq1\x1f0\x1f3"), first 8 bytes, shifted right by 2
    assert seeds(3)[0] == 4319078618276629925


class FakeCoordinator:
    def __init__(self, fail=False):
        self.ran, self.fail = [], fail

    def run(self, key, tasks, on_progress):
        self.ran.append((key, [task.question.id for task in tasks]))
        if self.fail:
            raise RunFailed("engine 1 (pid 7)", "its process X ended")
        groups = tuple(scored(task.question.id, ["ab", "cde"]) for task in tasks)
        return Progress(done=2, total=2, generated=2, response_tokens=10, generate_s=4.0, reward_s=0.5, groups=groups)


def test_live_rollouts_ask_the_next_questions_of_the_stream(control):
    coordinator, stream = FakeCoordinator(), Stream()
    rollouts = LiveRollouts(config(), stream, Prompts(), coordinator, control)
    first = rollouts.next(1)
    state = rollouts.state()
    second = rollouts.next(2)
    assert coordinator.ran == [("step 1", ["q0", "q1"]), ("step 2", ["q2", "q3"])]
    assert [bytes(group.prompt.tolist()) for group in second.groups] == [b"q2", b"q3"]
    assert [one.group.question.id for one in first.scored] == ["q0", "q1"] and first.step == 1
    assert first.metrics == {"time/generate_s": 4.0, "time/reward_s": 0.5, "throughput/generated_tokens_per_s": 2.5}
    rollouts.load_state(state)
    rollouts.next(2)
    assert coordinator.ran[2] == coordinator.ran[1]


def test_a_failure_while_generating_fails_the_run_with_its_component(control):
    rollouts = LiveRollouts(config(), Stream(), Prompts(), FakeCoordinator(fail=True), control)
    with pytest.raises(RunFailed, match=r"engine 1 \(pid 7\): its process X ended"):
        rollouts.next(1)


def test_rollouts_that_are_abandoned_are_none(control):
    def stop(progress):
        raise StopRequested

    class Watched(FakeCoordinator):
        def run(self, key, tasks, on_progress):
            on_progress(None)

    assert LiveRollouts(config(), Stream(), Prompts(), Watched(), control, stop).next(1) is None


def test_replay_gives_the_recorded_groups_of_each_step(tmp_path, control):
    recorded = {
        step: [
            replace(scored(f"q{step}", ["ab", "c"]), rewards=(0.0, 1.0)),
            replace(scored("q0", ["d", ""]), rewards=(0.0, 1.0)),
        ]
        for step in (1, 2)
    }
    for step, groups in recorded.items():
        path = rollout_path(tmp_path / "old", step)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rollouts(path, step, groups)
    rollouts = ReplayedRollouts(config(replay=tmp_path / "old", advantage="dr_grpo"), control)
    found = rollouts.next(2)
    assert list(found.scored) == recorded[2]
    assert [r.tolist() for r in found.groups[0].responses] == [[97, 98], [99]]
    with pytest.raises(RunFailed, match="step_000003.parquet: no such file"):
        rollouts.next(3)


@pytest.mark.parametrize(
    "kind, advantages",
    [
        ("dr_grpo", (0.75, -0.25, -0.5, 0.0)),  # less their mean, 1/4; the crash does not count
        ("rloo", (1.125, -0.375, -0.75, 0.0)),  # n / (n - 1) = 3/2 times that
        ("grpo", (0.75 / 0.6614379, -0.25 / 0.6614379, -0.5 / 0.6614379, 0.0)),
    ],
)  # std^2 = (9 + 1 + 4) / 16 / 2
def test_a_replay_computes_the_advantages_of_its_own_configuration(tmp_path, control, kind, advantages):
    """Whatever advantages were recorded."""
    outcomes = (Outcome.CORRECT, Outcome.WRONG, Outcome.TRUNCATED, Outcome.CRASH)
    one = replace(scored("q", ["ab", "c", "d", "e"]), outcomes=outcomes, rewards=(1.0, 0.0, -0.25, 0.0))
    write_rollouts(rollout_path(tmp_path / "old", 1), 1, [one])
    found = ReplayedRollouts(config(kind, replay=tmp_path / "old"), control).next(1)
    assert found.scored[0].advantages == pytest.approx(advantages, abs=1e-5)
    assert found.groups[0].advantages.tolist() == pytest.approx(advantages, abs=1e-5)


def test_a_replay_applies_the_length_penalty_of_its_own_configuration(tmp_path, control):
    """Limit 8, buffer 4: responses of 4, 6 and 8 tokens get 0, -1/2 and -1; recorded without a buffer."""
    recorded = replace(scored("q", ["a" * 4, "b" * 6, "c" * 8]), rewards=(1.0, 1.0, 0.0))
    write_rollouts(rollout_path(tmp_path / "old", 1), 1, [recorded])
    replayed = changed_config(config("dr_grpo", replay=tmp_path / "old"), ["reward.overlong_buffer_tokens=4"])
    (group,) = ReplayedRollouts(replayed, control).next(1).scored
    assert group.rewards == (1.0, 1.0, 0.0)
    assert group.advantages == pytest.approx((1 - 1 / 6, 0.5 - 1 / 6, -1 - 1 / 6))
