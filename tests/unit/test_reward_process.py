"""The reward process without Ray: advantages, failure share, concurrency, graders that hang, die or lose a parent."""

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import until

from alphamed.answers.thinking import Thinking
from alphamed.config.sections import RewardConfig
from alphamed.errors import ConfigError, RunFailed
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup
from alphamed.reward.grader import GraderDied, GraderPool, RewardTimeout
from alphamed.reward.process import GradingFailed, RewardProcess
from alphamed.reward.rules import Graded
from alphamed.reward.shaping import scored_group

QUESTION = Question("q1", "Which?", {"A": "this", "B": "that"}, "A")
RIGHT, WRONG, NONE = r"\boxed{A}", r"\boxed{B}", "?"


def group_of(*texts, finish=FinishReason.STOP, question=QUESTION):
    rollouts = tuple(Rollout("g1", "q1", i, (1, 2), (-0.5, -0.5), text, finish, 3) for i, text in enumerate(texts))
    return RolloutGroup("g1", question, (7, 8), rollouts)


def process_of(name, step_samples=1000, advantage="grpo", **reward):
    return RewardProcess(RewardConfig(name=name, **{"timeout_s": 600.0, **reward}), advantage, step_samples, sys.path)


def gone(pid):
    """Whether the process has ended (a zombie that nobody reaps has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ------------------------------------------------------------------------------------------------------------- grading
def test_a_group_is_scored():
    scored = asyncio.run(process_of("correct_and_format").grade(group_of(RIGHT, WRONG, NONE, NONE)))
    assert scored.group.group_id == "g1"
    assert scored.outcomes == (Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.UNPARSEABLE)
    assert scored.rewards == (1.0, 0.1, 0.0, 0.0)
    assert scored.letters == ("A", "B", None, None)
    # mean 0.275; squares 0.525625 + 0.030625 + 2 * 0.075625 = 0.7075; / 3 = 0.235833; std 0.485627
    assert scored.advantages == pytest.approx([1.492914, -0.360358, -0.566278, -0.566278], abs=1e-5)
    assert scored.grading_s > 0


@pytest.mark.parametrize("advantage, expected", [("dr_grpo", [0.5, -0.5]), ("rloo", [1.0, -1.0])])
def test_the_configured_advantage_is_used(advantage, expected):
    scored = asyncio.run(process_of("correct", advantage=advantage).grade(group_of(RIGHT, WRONG)))
    assert scored.advantages == tuple(expected)


def test_truncated_follows_the_configuration():
    for truncated, outcome in (("nothing", Outcome.TRUNCATED), ("grade", Outcome.CORRECT)):
        group = group_of(RIGHT, RIGHT, finish=FinishReason.LENGTH)
        assert asyncio.run(process_of("correct", truncated=truncated).grade(group)).outcomes == (outcome, outcome)


def test_failed_samples_teach_nothing():
    outcomes = (Outcome.CORRECT, Outcome.CRASH, Outcome.WRONG, Outcome.TIMEOUT)

    def advantages(outcomes, rewards, kind):
        graded = [Graded(outcome, reward, None) for outcome, reward in zip(outcomes, rewards)]
        return scored_group(group_of(*[RIGHT] * len(graded)), graded, kind).advantages

    assert advantages(outcomes, (1.0, 0.0, 0.0, 0.0), "dr_grpo") == (0.5, 0.0, -0.5, 0.0)
    assert advantages(outcomes[:2], (1.0, 0.0), "grpo") == (0.0, 0.0)  # one sample has nothing to be compared with
    assert advantages((outcomes[1], outcomes[3]), (0.0, 0.0), "grpo") == (0.0, 0.0)


def test_an_evaluation_asks_whether_answers_are_right_whatever_the_reward_is(user_rewards):
    """The function crashes on every B; of an evaluation that is neither an outcome nor a failure of the run's."""
    process = process_of(f"{user_rewards}:raises_for_b", step_samples=8, max_failure_share=0.0)

    async def run():
        asked = [await process.grade(group_of(RIGHT, WRONG, NONE), evaluation=True) for _ in range(4)]
        await process.check()
        return asked

    for scored in asyncio.run(run()):
        assert scored.outcomes == (Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE)
        assert scored.rewards == (1.0, 0.0, 0.0)


def test_thinking_is_cut_off_in_training_and_evaluation_alike():
    """The draft boxes the right letter, the answer the wrong one."""
    process = RewardProcess(RewardConfig(), "grpo", 1000, sys.path, thinking=Thinking("</think>"))
    group = group_of(r"<think>\boxed{A}</think> \boxed{B}", r"<think>\boxed{A}", r"\boxed{A}")
    for evaluation in (False, True):
        scored = asyncio.run(process.grade(group, evaluation))
        assert scored.outcomes == (Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.CORRECT)
        assert scored.letters == ("B", None, "A")


def test_graders_work_at_the_same_time(user_rewards, tmp_path):
    """Sample A is answered only once sample B is being graded, and the other way round."""
    process = process_of(f"{user_rewards}:meets", workers=2)
    question = replace(QUESTION, context=str(tmp_path))

    async def run():
        return await asyncio.gather(*(process.grade(group_of(text, question=question)) for text in (RIGHT, WRONG)))

    assert [scored.rewards for scored in asyncio.run(run())] == [(1.0,), (1.0,)]


def test_the_event_loop_stays_free_while_a_grader_works(user_rewards, tmp_path):
    process = process_of(f"{user_rewards}:waits_for_file", workers=1)

    async def run():
        slow = asyncio.create_task(process.grade(group_of(f"{tmp_path}/go")))
        await process.ready()
        for _ in range(100):
            await process.check()
        assert not slow.done()
        (tmp_path / "go").touch()
        return await slow

    assert asyncio.run(run()).rewards == (1.0,)


def test_a_function_that_can_not_be_used_is_a_config_error(user_rewards):
    process = process_of(f"{user_rewards}:missing")
    for call in (process.ready, lambda: process.grade(group_of(RIGHT))):
        with pytest.raises(ConfigError, match="user_rewards:missing' does not exist"):
            asyncio.run(call())
        process = process_of(f"{user_rewards}:missing")


# ------------------------------------------------------------------------------------------------------- failure share
def test_failures_up_to_the_share_are_let_pass(user_rewards):
    process = process_of(f"{user_rewards}:raises_for_b", step_samples=8, max_failure_share=0.25)

    async def run():
        return [await process.grade(group_of(RIGHT, WRONG, RIGHT, RIGHT)) for _ in range(4)]

    for scored in asyncio.run(run()):  # 2 of every 8 are 0.25, not above it
        assert scored.outcomes == (Outcome.CORRECT, Outcome.CRASH, Outcome.CORRECT, Outcome.CORRECT)
        assert scored.rewards == (1.0, 0.0, 1.0, 1.0)
        assert scored.advantages == (0.0, 0.0, 0.0, 0.0)


def test_failures_above_the_share_stop_the_run_with_the_first_traceback(user_rewards):
    process = process_of(f"{user_rewards}:raises_for_b", step_samples=8, max_failure_share=0.25)

    async def run():
        await process.grade(group_of(RIGHT, WRONG, WRONG, RIGHT))
        with pytest.raises(GradingFailed) as raised:
            await process.grade(group_of(RIGHT, WRONG))
        with pytest.raises(GradingFailed):  # and it stays stopped
            await process.grade(group_of(RIGHT))
        with pytest.raises(GradingFailed):
            await process.check()
        return raised.value

    error = asyncio.run(run())
    assert error.component == "reward function user_rewards:raises_for_b"
    assert (
        "failed for 3 of the last 6 samples (3 crashes, 0 time-outs; reward.max_failure_share allows 25.0% of a "
        "step's 8)" in str(error)
    )
    assert "\nTraceback (most recent call last):\n" in str(error) and "KeyError: 'no rule for B'" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, RunFailed) and str(copy) == str(error)


def test_time_outs_count_as_failures(user_rewards):
    for timeout_s in (0.5, 5.0, 50.0):  # until the machine has had the time to write down where it hangs
        process = process_of(f"{user_rewards}:hangs", step_samples=4, max_failure_share=0.0, timeout_s=timeout_s)
        with pytest.raises(GradingFailed, match=r"1 of the last 1 samples \(0 crashes, 1 time-outs") as raised:
            asyncio.run(process.grade(group_of(RIGHT)))
        if "in hangs" in str(raised.value):
            return
    pytest.fail(str(raised.value))


def test_wrong_and_unparseable_answers_are_no_failures():
    process = process_of("correct", step_samples=4, max_failure_share=0.0)
    assert asyncio.run(process.grade(group_of(WRONG, NONE))).rewards == (0.0, 0.0)


# ------------------------------------------------------------------------------------------------ graders and their end
def test_a_grader_is_kept_for_the_next_call(user_rewards):
    with GraderPool(f"{user_rewards}:pid", workers=3, timeout_s=600) as pool:
        assert len({pool(QUESTION, "", None, "") for _ in range(5)}) == 1


def test_a_hanging_grader_is_killed_with_its_children_and_replaced(user_rewards, tmp_path):
    for timeout_s in (1.0, 10.0, 100.0):  # until the function has had the time to start its child
        with GraderPool(f"{user_rewards}:hangs_with_child", workers=1, timeout_s=timeout_s) as pool:
            (grader,) = pool.pids
            with pytest.raises(RewardTimeout):
                pool(QUESTION, str(tmp_path / "child"), None, "")
            if not (tmp_path / "child").exists():
                continue
            assert gone(grader) and pool.pids == []
            until(lambda: gone(int((tmp_path / "child").read_text())), "the end of the child")
            with pytest.raises(RewardTimeout):  # a new grader, not a dead one, was asked
                pool(QUESTION, str(tmp_path / "child"), None, "")
            pool.check_alive()  # what the pool killed itself is no kill from outside
            return
    pytest.fail("the function never started its child")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grader_killed_while_idle_is_noticed(user_rewards, number):
    process = process_of(f"{user_rewards}:half")

    async def run():
        await process.grade(group_of(RIGHT))
        (pid,) = await process.grader_pids()
        os.kill(pid, number)
        until(lambda: gone(pid), "end of the grader")
        for call in (process.check(), process.grade(group_of(RIGHT)), process.check()):
            with pytest.raises(
                GraderDied,
                match=rf"^grader \(pid {pid}\) of reward function user_rewards:half: was "
                rf"killed by signal {number.value} \({number.name}",
            ):
                await call

    asyncio.run(run())


def test_a_grader_killed_at_work_is_noticed(user_rewards, tmp_path):
    process = process_of(f"{user_rewards}:waits_for_file", max_failure_share=1.0)

    async def run():
        grading = asyncio.create_task(process.grade(group_of(str(tmp_path / "never"))))
        await process.ready()
        (pid,) = await process.grader_pids()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(GraderDied, match=rf"pid {pid}.*SIGKILL"):
            await grading
        with pytest.raises(GraderDied):
            await process.check()

    asyncio.run(run())


def test_graders_do_not_see_torchrun(user_rewards, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SOMETHING_ELSE", "3")
    with GraderPool(f"{user_rewards}:environment", workers=1, timeout_s=600) as pool:
        assert pool(QUESTION, "RANK", None, "") == 0.0 and pool(QUESTION, "SOMETHING_ELSE", None, "") == 1.0


def test_graders_end_with_the_pool(user_rewards):
    with GraderPool(f"{user_rewards}:half", workers=1, timeout_s=600) as pool:
        (pid,) = pool.pids
    assert gone(pid)
    forgotten = GraderPool(f"{user_rewards}:half", workers=1, timeout_s=600)
    (pid,) = forgotten.pids
    del forgotten
    until(lambda: gone(pid), "end of the grader")


PARENT = """
import sys
from alphamed.records import Question
from alphamed.reward.grader import GraderPool
pool = GraderPool(sys.argv[1], workers=1, timeout_s=600)
print(*pool.pids, flush=True)
pool(Question("q", "?", {"A": "a"}, "A"), sys.argv[2], None, "")      # never answers
"""


@pytest.mark.parametrize("function", ["hangs", "waits_for_file"])
def test_a_grader_at_work_ends_with_its_parent(user_rewards, tmp_path, function):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "user"), *filter(None, sys.path)])}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, f"{user_rewards}:{function}", str(tmp_path / "never")],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as parent:
        grader = int(parent.stdout.readline())
        assert not gone(grader)
        parent.kill()
    until(lambda: gone(grader), "end of the grader")


def test_a_pool_started_from_a_thread_that_ends_lives_on(user_rewards):
    """The kernel would end a grader with the thread that started it."""
    pools = []
    thread = threading.Thread(target=lambda: pools.append(GraderPool(f"{user_rewards}:half", 1, 600)))
    thread.start()
    thread.join()
    with pools[0] as pool:
        time.sleep(0.2)
        pool.check_alive()
        assert pool(QUESTION, "A", None, "A") == 0.5
