"""The coordinator's scheduling, without Ray: engines and grader are objects whose answers the test gives."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from alphamed.errors import RunFailed
from alphamed.records import FinishReason, GenerationTask, Outcome, Question, Rollout, RolloutGroup, Sampling, ScoredGroup
from alphamed.rollout.coordinator import RolloutCoordinator
from alphamed.rollout.failures import EngineDied, Overdue
from alphamed.rollout.pool import Engine

QUESTION = Question("q", "?", {"A": "x", "B": "y"}, "A")


def task(name, n=2):
    return GenerationTask(name, QUESTION, (1, 2), Sampling(n, 1.0, 1.0, -1, 8))


class Method:
    """`actor.method.remote(...)` as an actor handle has it."""

    def __init__(self, function):
        self.remote = function


@dataclass
class FakeEngine:
    """Answers a task when the test says so."""

    asked: list[str] = field(default_factory=list)
    answers: dict[str, asyncio.Future] = field(default_factory=dict)

    def __post_init__(self):
        self.generate = Method(self._generate)

    async def _generate(self, task, version):
        self.asked.append(task.group_id)
        self.answers[task.group_id] = asyncio.get_running_loop().create_future()
        await self.answers[task.group_id]
        return RolloutGroup(
            task.group_id,
            task.question,
            task.prompt_token_ids,
            tuple(
                Rollout(task.group_id, "q", i, (5, 6, 7), (0.0,) * 3, "", FinishReason.STOP, version)
                for i in range(task.sampling.n)
            ),
        )

    def answer(self, name):
        self.answers[name].set_result(None)


@dataclass
class FakeGrader:
    graded: list[str] = field(default_factory=list)
    evaluations: list[str] = field(default_factory=list)
    hold: bool = False
    failure: RunFailed | None = None

    def __post_init__(self):
        self.grade, self.check = Method(self._grade), Method(self._check)

    async def _check(self):
        if self.failure:
            raise self.failure

    async def _grade(self, group, evaluation):
        self.graded.append(group.group_id)
        self.evaluations += [group.group_id] * evaluation
        if self.hold:
            await asyncio.sleep(60)
        n = len(group.rollouts)
        return ScoredGroup(group, (Outcome.WRONG,) * n, (0.0,) * n, (0.0,) * n, (None,) * n)


def scene(engines=1, concurrent=4, deadline_s=60.0):
    fakes, grader = [FakeEngine() for _ in range(engines)], FakeGrader()
    return (
        fakes,
        grader,
        RolloutCoordinator(
            [Engine(i, fake, 1, "here", {"actor": 100 + i}) for i, fake in enumerate(fakes)],
            grader,
            99,
            concurrent,
            deadline_s,
        ),
    )


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def begin(coordinator, names, n=2, key="step 1", version=3):
    await coordinator.start()
    await coordinator.submit(key, [task(name, n) for name in names], version)
    await settle()


def test_groups_come_in_the_order_of_tasks_and_are_graded_as_they_finish():
    async def run():
        (engine,), grader, coordinator = scene()
        await begin(coordinator, "ab")
        engine.answer("b")
        await settle()
        assert grader.graded == ["b"]
        progress = await coordinator.collect("step 1", 0.0)
        assert (progress.done, progress.total, progress.generated, progress.response_tokens) == (1, 2, 1, 6)
        assert progress.groups is None
        engine.answer("a")
        done = await coordinator.collect("step 1", 10.0)
        assert [one.group.group_id for one in done.groups] == ["a", "b"]
        assert {rollout.policy_version for one in done.groups for rollout in one.group.rollouts} == {3}
        assert grader.graded == ["b", "a"] and done.response_tokens == 12

    asyncio.run(run())


def test_the_grader_is_told_what_belongs_to_an_evaluation():
    async def run():
        (engine,), grader, coordinator = scene()
        await coordinator.start()
        await coordinator.submit("both", [task("a", 2), replace(task("b", 2), evaluation=True)], 3)
        await settle()
        for name in "ab":
            engine.answer(name)
        await coordinator.collect("both", 10.0)
        assert sorted(grader.graded) == ["a", "b"] and grader.evaluations == ["b"]

    asyncio.run(run())


def test_an_engine_gets_no_more_than_its_share_and_the_least_loaded_goes_first():
    async def run():
        (one, two), _, coordinator = scene(engines=2, concurrent=4)
        await begin(coordinator, "abcdef")  # 2 samples each, 4 at once
        assert (one.asked, two.asked) == (["a", "c"], ["b", "d"])
        two.answer("b")
        await settle()
        assert (one.asked, two.asked) == (["a", "c"], ["b", "d", "e"])
        one.answer("c")
        await settle()
        assert one.asked == ["a", "c", "f"]

    asyncio.run(run())


def test_the_background_takes_what_others_leave_and_at_most_half():
    async def run():
        (engine,), _, coordinator = scene(concurrent=4)
        await coordinator.start()
        await coordinator.submit("evaluation", [task(name, n=1) for name in "wxyz"], 3, background=True)
        await settle()
        assert engine.asked == []  # until the step has asked
        await coordinator.submit("step 1", [task(name) for name in "abc"], 3)
        await settle()
        assert engine.asked == ["a", "b"]
        engine.answer("a")
        await settle()
        assert engine.asked == ["a", "b", "c"]
        engine.answer("b")
        await settle()
        assert engine.asked == ["a", "b", "c"]  # two places are free, but c has the other half
        engine.answer("c")
        await settle()
        assert engine.asked == ["a", "b", "c", "w", "x"]  # half of 4, though nothing else is there
        assert (await coordinator.collect("step 1", 1.0)).groups is not None
        assert (await coordinator.collect("evaluation", 0.0)).groups is None
        await settle()
        assert engine.asked[-2:] == ["y", "z"]  # waited for, it has the background no longer
        for name in "wxyz":
            engine.answer(name)
        assert [one.group.group_id for one in (await coordinator.collect("evaluation", 1.0)).groups] == list("wxyz")

    asyncio.run(run())


def test_no_place_is_taken_from_a_group_that_waits_for_several():
    async def run():
        (engine,), _, coordinator = scene(concurrent=8)
        await coordinator.start()
        await coordinator.submit("evaluation", [task(name, n=1) for name in "xy"], 3, background=True)
        await coordinator.submit("step 1", [task("a", n=7), task("b", n=3)], 3)
        await settle()
        assert engine.asked == ["a"]  # one place is free, b waits for three
        engine.answer("a")
        await settle()
        assert engine.asked == ["a", "b", "x"]  # 3 + 1 are half of 8

    asyncio.run(run())


def test_who_waits_for_one_set_of_an_evaluation_waits_for_all():
    async def run():
        (engine,), _, coordinator = scene(concurrent=4)
        await coordinator.start()
        for key, names in (("one", "vw"), ("two", "xyz")):
            await coordinator.submit(key, [task(name, n=1) for name in names], 3, background=True)
        await coordinator.collect("one", 0.0)
        await settle()
        assert engine.asked == ["v", "w", "x", "y"]

    asyncio.run(run())


def test_thousands_of_questions_in_the_background_wait_in_one_line():
    async def run():
        (engine,), _, coordinator = scene(concurrent=4)
        await coordinator.start()
        before = len(asyncio.all_tasks())
        await coordinator.submit("evaluation", [task(str(i), n=1) for i in range(3000)], 3, background=True)
        assert len(asyncio.all_tasks()) - before == 4  # as many as are answered at once, not one for each question
        for i in range(3000):
            progress = await coordinator.collect("evaluation", 0.0)
            await settle()
            engine.answer(str(i))
        progress = await coordinator.collect("evaluation", 5.0)
        assert [one.group.group_id for one in progress.groups] == [str(i) for i in range(3000)]

    asyncio.run(run())


def test_the_deadline_begins_when_the_end_is_waited_for():
    async def run():
        (engine,), _, coordinator = scene(deadline_s=0.2)
        await coordinator.start()
        await coordinator.submit("evaluation", [task("v")], 3, background=True)
        await asyncio.sleep(0.3)
        assert (await coordinator.collect("evaluation", 0.0)).done == 0
        with pytest.raises(Overdue, match="evaluation: 1 of 1 groups were not done after 0 s: v"):
            await coordinator.collect("evaluation", 5.0)

    asyncio.run(run())


def test_a_group_larger_than_the_share_is_still_served_alone():
    async def run():
        (engine,), _, coordinator = scene(concurrent=4)
        await begin(coordinator, "ab", n=9)
        assert engine.asked == ["a"]
        engine.answer("a")
        await settle()
        assert engine.asked == ["a", "b"]

    asyncio.run(run())


def test_grading_does_not_hold_an_engine():
    async def run():
        (engine,), grader, coordinator = scene(concurrent=2)
        grader.hold = True
        await begin(coordinator, "ab")
        engine.answer("a")
        await settle()
        assert grader.graded == ["a"] and engine.asked == ["a", "b"]

    asyncio.run(run())


def test_two_jobs_share_the_engines():
    async def run():
        (engine,), _, coordinator = scene()
        await begin(coordinator, "a")
        await coordinator.submit("evaluation", [task("x")], 3)
        await settle()
        engine.answer("x")
        assert (await coordinator.collect("evaluation", 10.0)).groups[0].group.group_id == "x"
        assert (await coordinator.collect("step 1", 0.0)).done == 0

    asyncio.run(run())


def test_no_tasks_are_done_at_once():
    async def run():
        _, _, coordinator = scene()
        await begin(coordinator, "")
        assert (await coordinator.collect("step 1", 10.0)).groups == ()

    asyncio.run(run())


def test_an_engines_failure_ends_the_job_and_frees_its_place():
    async def run():
        (engine,), _, coordinator = scene(concurrent=2)
        await begin(coordinator, "ab")
        engine.answers["a"].set_exception(EngineDied("engine 0 (pid 100)", "its process X ended"))
        with pytest.raises(EngineDied, match="engine 0"):
            await coordinator.collect("step 1", 10.0)
        await settle()
        await coordinator.submit("step 2", [task("c")], 3)
        await settle()
        assert engine.asked[-1] == "c"

    asyncio.run(run())


def test_a_reward_process_that_stopped_working_ends_the_job_before_anything_is_graded():
    async def run():
        _, grader, coordinator = scene()
        grader.failure = RunFailed("grader (pid 5)", "was killed")
        await begin(coordinator, "a")
        with pytest.raises(RunFailed, match=r"grader \(pid 5\): was killed"):
            await coordinator.collect("step 1", 10.0)

    asyncio.run(run())


def test_an_unknown_error_is_the_coordinators():
    async def run():
        (engine,), _, coordinator = scene()
        await begin(coordinator, "a")
        engine.answers["a"].set_exception(KeyError("x"))
        with pytest.raises(RunFailed, match=r"rollout coordinator \(pid \d+\): step 1: KeyError"):
            await coordinator.collect("step 1", 10.0)

    asyncio.run(run())


def test_past_the_deadline_the_engines_and_groups_that_are_missing_are_named():
    async def run():
        (one, two), grader, coordinator = scene(engines=2, concurrent=2, deadline_s=0.05)
        grader.hold = True
        await begin(coordinator, "abcd")
        two.answer("b")  # hangs in grading; d goes to engine 1, c waits
        await settle()
        with pytest.raises(Overdue) as caught:
            await coordinator.collect("step 1", 10.0)
        assert (
            caught.value.component
            == "engine 0 (pid 100), engine 1 (pid 101), reward process (pid 99), waiting for an engine"
        )
        assert caught.value.message == (
            "step 1: 4 of 4 groups were not done after 0 s: a (engine 0 (pid 100)), b (reward process (pid 99)), "
            "c (engine 1 (pid 101)), d (waiting for an engine)"
        )

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------------------------ feeds
async def feed(coordinator, names, version=3):
    await coordinator.feed("rollouts", [task(name) for name in names], version)
    await settle()


def ids(arrivals):
    return [one.group.group_id for one in arrivals.groups]


def test_a_feed_hands_groups_out_as_they_come_and_each_once():
    async def run():
        (engine,), _, coordinator = scene(concurrent=8)
        await coordinator.start()
        await feed(coordinator, "abc")
        engine.answer("b")
        await settle()
        first = await coordinator.deliver("rollouts", 10.0, 60.0)
        assert ids(first) == ["b"] and first.response_tokens == 6
        assert ids(await coordinator.deliver("rollouts", 0.0, 60.0)) == []
        engine.answer("c"), engine.answer("a")
        await settle()
        assert sorted(ids(await coordinator.deliver("rollouts", 0.0, 60.0))) == ["a", "c"]
        await feed(coordinator, "d")  # a feed that ran dry goes on
        engine.answer("d")
        await settle()
        assert ids(await coordinator.deliver("rollouts", 10.0, 60.0)) == ["d"]

    asyncio.run(run())


def test_tasks_of_a_feed_are_asked_with_the_version_of_the_latest_feeding():
    """A task that waited for an engine while weights came asks for the new ones: an engine would serve it anyway."""

    async def run():
        (engine,), _, coordinator = scene(concurrent=2)
        await coordinator.start()
        await feed(coordinator, "ab", version=3)
        await feed(coordinator, "c", version=4)
        for name in "abc":
            engine.answer(name)
            await settle()
        arrivals = await coordinator.deliver("rollouts", 10.0, 60.0)
        versions = {one.group.group_id: one.group.rollouts[0].policy_version for one in arrivals.groups}
        assert versions == {"a": 3, "b": 4, "c": 4}

    asyncio.run(run())


def test_an_engines_failure_reaches_the_next_delivery_of_a_feed():
    async def run():
        (engine,), _, coordinator = scene(concurrent=8)
        await coordinator.start()
        await feed(coordinator, "ab")
        engine.answer("a")
        engine.answers["b"].set_exception(EngineDied("engine 0 (pid 100)", "its process X ended"))
        await settle()
        with pytest.raises(EngineDied, match="engine 0"):
            await coordinator.deliver("rollouts", 10.0, 60.0)

    asyncio.run(run())


def test_a_feed_that_brings_nothing_in_time_names_what_is_missing():
    async def run():
        (engine,), _, coordinator = scene(concurrent=2)
        await coordinator.start()
        await feed(coordinator, "ab")
        missing = r"rollouts: 2 of 2 groups .*: a \(engine 0 \(pid 100\)\), b \(waiting for an engine\)"
        with pytest.raises(Overdue, match=missing):
            await coordinator.deliver("rollouts", 10.0, 0.05)

    asyncio.run(run())


def test_evaluation_runs_beside_a_feed():
    async def run():
        (engine,), _, coordinator = scene(concurrent=8)
        await coordinator.start()
        await feed(coordinator, "a")
        await coordinator.submit("evaluation", [task("x")], 3)
        await settle()
        engine.answer("x")
        assert (await coordinator.collect("evaluation", 10.0)).groups[0].group.group_id == "x"
        engine.answer("a")
        await settle()
        assert ids(await coordinator.deliver("rollouts", 10.0, 60.0)) == ["a"]

    asyncio.run(run())
