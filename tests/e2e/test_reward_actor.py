"""The reward process as a Ray actor: scores, failures that name their component, and nothing left behind."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from waiting import until

from alphamed.config.loading import build_config
from alphamed.errors import RunFailed
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup
from alphamed.reward import process
from alphamed.reward.grader import GraderDied

pytestmark = pytest.mark.slow

QUESTION = Question("q1", "Which?", {"A": "this", "B": "that"}, "A")


def config_of(**reward):
    return build_config(
        {
            "model": {"path": "none"},
            "data": {"train": ["none.jsonl"]},
            "reward": reward,
            "rollout": {"questions_per_step": 2, "samples_per_question": 4},
        }
    )


def group_of(name, *texts):
    rollouts = tuple(Rollout(name, "q1", i, (1,), (-0.5,), text, FinishReason.STOP, 3) for i, text in enumerate(texts))
    return RolloutGroup(name, QUESTION, (7, 8), rollouts)


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_groups_are_scored_side_by_side(ray_session):
    """From the driver, and from the event loop of another actor, as the coordinator does it."""

    @ray_session.remote(num_cpus=0)
    class Coordinator:
        async def run(self, reward, groups):
            scored = await asyncio.gather(*(reward.grade.remote(group) for group in groups))
            await reward.check.remote()
            return scored

    reward = process.start(config_of(name="correct_and_format"))
    groups = [group_of(f"g{i}", r"\boxed{A}", r"\boxed{B}", "?", "?") for i in range(20)]
    here = ray_session.get([reward.grade.remote(group) for group in groups], timeout=600)
    there = ray_session.get(Coordinator.remote().run.remote(reward, groups), timeout=600)
    for scored in (here, there):
        assert [s.group.group_id for s in scored] == [f"g{i}" for i in range(20)]
        for s in scored:
            assert s.rewards == (1.0, 0.1, 0.0, 0.0)
            assert s.outcomes[:3] == (Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE)
            # mean 0.275, standard deviation 0.485627 (3 in the denominator)
            assert s.advantages == pytest.approx([1.492914, -0.360358, -0.566278, -0.566278], abs=1e-5)


def test_a_failing_function_stops_with_its_traceback(ray_session, user_rewards):
    actor = process.start(config_of(name=f"{user_rewards}:raises_for_b", max_failure_share=0.1))
    with pytest.raises(process.GradingFailed, match="reward function user_rewards:raises_for_b") as raised:
        ray_session.get(actor.grade.remote(group_of("g", r"\boxed{A}", r"\boxed{B}")), timeout=600)
    assert isinstance(raised.value.cause, RunFailed)
    assert "KeyError: 'no rule for B'" in str(raised.value.cause)


def test_a_killed_grader_is_named(ray_session, user_rewards, tmp_path):
    actor = process.start(config_of(name=f"{user_rewards}:waits_for_file", timeout_s=500.0))
    grading = actor.grade.remote(group_of("g", str(tmp_path / "never")))
    ray_session.get(actor.ready.remote(), timeout=600)
    (grader,) = ray_session.get(actor.grader_pids.remote(), timeout=600)
    os.kill(grader, signal.SIGKILL)
    with pytest.raises(GraderDied, match=rf"grader \(pid {grader}\).*killed by signal 9 \(SIGKILL"):
        ray_session.get(grading, timeout=600)


@pytest.mark.parametrize("how", ["killed", "forgotten"])
def test_graders_end_with_the_actor(ray_session, user_rewards, tmp_path, how):
    actor = process.start(config_of(name=f"{user_rewards}:hangs", timeout_s=500.0))
    grading = actor.grade.remote(group_of("g", "?"))
    pid = ray_session.get(actor.ready.remote(), timeout=600)
    (grader,) = ray_session.get(actor.grader_pids.remote(), timeout=600)
    if how == "killed":
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ray_session.exceptions.RayActorError):
            ray_session.get(grading, timeout=600)
    else:
        ray_session.kill(actor)
    until(lambda: gone(pid) and gone(grader), "end of actor and grader")
