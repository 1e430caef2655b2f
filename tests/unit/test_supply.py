"""Where a step's groups come from: in rounds, or ahead of the policy, with a coordinator that answers as the test says."""

import json
import random

import pytest

from alphamed.config.loading import build_config
from alphamed.errors import RunFailed
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.coordinator import Arrivals, Progress
from alphamed.rollout.failures import Overdue
from alphamed.rollout.refill import must_wait
from alphamed.rollout.supply import AsyncRollouts, SyncRollouts

RIGHT, WRONG = Outcome.CORRECT, Outcome.WRONG


def config(max_staleness=0, refills=0, steps=100, rollout=None, **more):
    return build_config(
        {
            "model": {"path": "m"},
            "data": {"train": ["d.jsonl"]},
            "run": {"steps": steps},
            "prompt": {"max_tokens": 16},
            "dynamic_sampling": {"refills": refills} | more,
            "rollout": {
                "questions_per_step": 3,
                "samples_per_question": 2,
                "max_response_tokens": 8,
                "max_staleness": max_staleness,
            }
            | (rollout or {}),
        }
    )


class Stream:
    """q0, q1, q2, ..."""

    def __init__(self):
        self.at = 0

    def take(self, n):
        self.at += n
        return [Question(f"q{i}", "?", {"A": "x", "B": "y"}, "A") for i in range(self.at - n, self.at)]

    def state(self):
        return {"at": self.at}

    def load_state(self, state):
        self.at = state["at"]


class Prompts:
    def render(self, question):
        return 1, 2


def answered(task, version, teaches=True):
    outcomes = (RIGHT, WRONG) if teaches else (WRONG, WRONG)
    rollouts = tuple(
        Rollout(task.group_id, task.question.id, i, (5, 6, 7), (0.0,) * 3, "", FinishReason.STOP, version)
        for i in range(task.sampling.n)
    )
    return ScoredGroup(
        RolloutGroup(task.group_id, task.question, task.prompt_token_ids, rollouts),
        outcomes,
        tuple(float(one == RIGHT) for one in outcomes),
        (0.0, 0.0),
        (None, None),
    )


class FakeCoordinator:
    """Answers in the order asked, one group a delivery, all but the questions that the test holds back. `useless` questions
    get groups that carries no signal."""

    def __init__(self, useless=()):
        self.version, self.waiting, self.held, self.useless, self.asked = 1, [], set(), set(useless), []

    def run(self, key, tasks, on_progress):
        self.asked.append((key, [task.question.id for task in tasks]))
        groups = tuple(answered(task, self.version, task.question.id not in self.useless) for task in tasks)
        return Progress(len(tasks), len(tasks), len(tasks), 6 * len(tasks), 2.0, 0.25, groups)

    def feed(self, key, tasks):
        self.asked.append((key, [task.question.id for task in tasks]))
        self.waiting += [(task, self.version) for task in tasks]

    def deliver(self, key, left_s, wait):
        """All that engines would have finished where nobody waited; otherwise the next group."""
        assert left_s > 0
        free = [item for item in self.waiting if item[0].question.id not in self.held]
        chosen = free[:1] if wait else [item for item in free if getattr(self, "idle", False)]
        assert chosen or not wait, "the step waits for a group that never comes"
        self.waiting = [item for item in self.waiting if item not in chosen]
        return Arrivals(
            tuple(answered(task, version, task.question.id not in self.useless) for task, version in chosen), 6 * len(chosen)
        )


def supply(config, coordinator):
    kind = AsyncRollouts if config.rollout.max_staleness else SyncRollouts
    r = config.rollout
    sampler = QuestionSampler(config.dynamic_sampling, Stream(), r.samples_per_question, r.questions_per_step)
    return kind(config, sampler, Prompts(), coordinator, None)


def ids(gathered):
    return [scored.group.question.id for scored in gathered.groups]


def versions(gathered):
    return [scored.group.rollouts[0].policy_version for scored in gathered.groups]


# -------------------------------------------------------------------------------------------------------------- in rounds
def test_rounds_replace_what_teaches_nothing():
    coordinator = FakeCoordinator(useless=["q0", "q2", "q3"])
    found = supply(config(refills=9), coordinator).gather(4)
    assert coordinator.asked == [
        ("step 4", ["q0", "q1", "q2"]),
        ("step 4, refill 1", ["q3", "q4"]),
        ("step 4, refill 2", ["q5"]),
    ]
    assert ids(found) == ["q5", "q1", "q4"]
    assert len({scored.group.group_id for scored in found.groups}) == 3
    assert found.metrics == {
        "time/generate_s": 6.0,
        "time/reward_s": 0.75,
        "throughput/generated_tokens_per_s": 36 / 6.0,
        "sampling/asked": 6,
        "sampling/kept": 3,
        "sampling/dropped": 3,
        "sampling/refill_limit_reached": 0.0,
        "sampling/skipped": 0,
        "sampling/reward_mean": 1.5 / 6,
        "sampling/groups_per_kept": 2.0,
    }


def test_rounds_end_at_the_bound():
    coordinator = FakeCoordinator(useless=[f"q{i}" for i in range(50) if i != 1])
    found = supply(config(refills=2), coordinator).gather(1)
    assert len(coordinator.asked) == 3 and ids(found) == ["q5", "q1", "q6"]
    assert found.metrics["sampling/refill_limit_reached"] == 1.0 and found.metrics["sampling/groups_per_kept"] == 7.0


def test_a_failure_of_a_round_is_passed_on():
    coordinator = FakeCoordinator()
    coordinator.run = lambda *_: (_ for _ in ()).throw(RunFailed("engine 1 (pid 7)", "its process X ended"))
    with pytest.raises(RunFailed, match="engine 1"):
        supply(config(), coordinator).gather(1)


def test_the_beliefs_of_rounds_are_part_of_the_state():
    one = supply(config(choose=True), FakeCoordinator(useless=["q0"]))
    one.gather(1)
    state = json.loads(json.dumps(one.state()))
    assert state == {
        "stream": {"at": 3},
        "pass_rates": {
            "q0": [0, 2, 1, 0, [[0, 2]], 2],
            "q1": [1, 1, 1, 0, [[1, 1], [0, 1]], 2],
            "q2": [1, 1, 1, 0, [[1, 1], [0, 1]], 2],
        },
    }
    other = supply(config(choose=True), FakeCoordinator())
    other.load_state(state)
    assert other.state() == state


def test_a_step_asks_as_many_questions_as_the_pace_says():
    class Pace:
        def questions(self, step):
            return {1: 3, 2: 1}[step]

    coordinator, chosen = FakeCoordinator(), config()
    sampler = QuestionSampler(chosen.dynamic_sampling, Stream(), 2, 3)
    rounds = SyncRollouts(chosen, sampler, Prompts(), coordinator, None, Pace())
    assert [ids(rounds.gather(step)) for step in (1, 2)] == [["q0", "q1", "q2"], ["q3"]]
    assert rounds.gather(2).metrics["sampling/questions"] == 1.0


# --------------------------------------------------------------------------------------------------- ahead of the policy
def test_one_step_ahead():
    coordinator = FakeCoordinator()
    ahead = supply(config(1, steps=3), coordinator)
    first = ahead.gather(1)
    assert (ids(first), versions(first)) == (["q0", "q1", "q2"], [1, 1, 1])
    assert coordinator.asked == [("rollouts", [f"q{i}" for i in range(6)])]  # this step's and the next one's
    assert first.metrics["staleness/max"] == 0.0
    coordinator.version = 2
    second = ahead.gather(2)
    assert (ids(second), versions(second)) == (["q3", "q4", "q5"], [1, 1, 1])
    assert second.metrics["staleness/mean"] == 1.0 and second.metrics["staleness/dropped"] == 0.0
    coordinator.version = 3
    third = ahead.gather(3)
    assert (ids(third), versions(third)) == (["q6", "q7", "q8"], [2, 2, 2])
    assert coordinator.asked[1:] == [("rollouts", ["q6", "q7", "q8"])]  # nothing for a fourth step
    assert coordinator.waiting == []


def test_two_steps_ahead_samples_are_at_most_two_pushes_old():
    coordinator = FakeCoordinator()
    ahead = supply(config(2), coordinator)
    ages = []
    for step in range(1, 8):
        ages.append(ahead.gather(step).metrics["staleness/max"])
        coordinator.version += 1
    assert ages == [0, 1, 2, 2, 2, 2, 2]
    assert [len(names) for _, names in coordinator.asked] == [9, 3, 3, 3, 3, 3, 3]


DROP = {"stragglers": "drop"}


def test_with_drop_a_step_does_not_wait_for_a_straggler_and_drops_it_when_it_is_too_old():
    coordinator = FakeCoordinator()
    coordinator.held = {"q1"}
    ahead = supply(config(1, rollout=DROP), coordinator)
    assert ids(ahead.gather(1)) == ["q0", "q2", "q3"]
    coordinator.version = 2
    second = ahead.gather(2)
    assert ids(second) == ["q4", "q5", "q6"] and versions(second) == [1, 1, 2]
    coordinator.version, coordinator.held, coordinator.idle = 3, set(), True  # q1 ends while the policy trains
    third = ahead.gather(3)
    assert ids(third) == ["q7", "q8", "q9"]
    assert third.metrics["staleness/dropped"] == 1.0 and third.metrics["staleness/max"] == 1.0
    assert third.metrics["staleness/dropped_share"] == 1 / 4  # 1 dropped, 3 trained on
    assert third.metrics["staleness/dropped_tokens_share"] == 1 / 4 and third.metrics["staleness/dropped_tokens_mean"] == 3.0
    asked = [name for _, names in coordinator.asked for name in names]
    assert asked == [f"q{i}" for i in range(13)]  # 9 trained on, 1 lost, 3 ahead


def test_a_step_that_would_make_a_straggler_too_old_waits_for_it():
    coordinator = FakeCoordinator()
    coordinator.held = {"q1"}
    ahead = supply(config(1), coordinator)
    assert ids(ahead.gather(1)) == ["q0", "q2", "q3"]
    coordinator.version = 2
    with pytest.raises(AssertionError, match="never comes"):  # q4 to q8 are ready, q1 is awaited
        ahead.gather(2)
    coordinator.held = set()
    second = ahead.gather(2)
    assert ids(second) == ["q1", "q4", "q5"] and second.metrics["staleness/dropped"] == 0.0


def test_stragglers_of_a_step_are_not_left_to_a_later_one_that_has_no_room_for_them():
    coordinator = FakeCoordinator()
    coordinator.held = {f"q{i}" for i in range(9) if i not in (0, 1, 2)}  # six of nine are slow
    ahead = supply(config(2), coordinator)
    assert ids(ahead.gather(1)) == ["q0", "q1", "q2"]
    coordinator.version = 2
    with pytest.raises(AssertionError, match="never comes"):  # q9 to q11 would leave all six to step 3
        ahead.gather(2)
    coordinator.held = {"q6", "q7", "q8"}
    assert ids(ahead.gather(2)) == ["q3", "q4", "q5"]
    coordinator.version, coordinator.held = 3, set()
    assert ids(ahead.gather(3)) == ["q6", "q7", "q8"]


def test_overdue_stragglers_are_named_with_what_helps():
    class PeerTimeout(FakeCoordinator):
        def deliver(self, key, left_s, wait):
            try:
                return super().deliver(key, left_s + 1e-9, wait)
            except AssertionError:
                raise Overdue("engine 0", "rollouts: 1 of 7 groups were not done after 0 s") from None

    coordinator = PeerTimeout()
    coordinator.held = {"q1"}
    ahead = supply(config(1, rollout={"step_deadline_s": 1e-9}), coordinator)
    ahead.gather(1)
    coordinator.version = 2
    with pytest.raises(
        Overdue,
        match=r"step 2 waits for .*q1.* \(asked in step 1\); raise rollout.step_deadline_s or set "
        r"rollout.stragglers=drop$",
    ):
        ahead.gather(2)


@pytest.mark.parametrize(
    ("step", "limit", "share", "ready", "unfinished", "waits"),
    [
        (5, 1, 1.0, [4, 4, 5], [4], True),  # asked in step 4: not later than step 5
        (5, 1, 1.0, [4, 4, 5], [5, 5], False),
        (5, 2, 1.0, [3, 4, 4], [4, 4, 4], False),  # step 6 takes the three
        (5, 2, 1.0, [3, 4, 5], [4, 4, 4, 4], True),  # step 6 takes three of four
        (5, 2, 0.5, [3, 4, 5], [4, 4, 4, 4], False),  # of four two are expected to teach
        (5, 2, 1.0, [3, 4, 4, 4, 4], [4, 4], True),  # two ready ones stay, and two are awaited
        (5, 2, 1.0, [4] * 9, [], False),
    ],
)  # nothing to wait for
def test_waiting_by_hand(step, limit, share, ready, unfinished, waits):
    assert must_wait(step, limit, 3, share, ready, unfinished) == waits


class Clock(FakeCoordinator):
    """Engines without a limit: a group takes the time that its number in the stream says, a step's training one second."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now, self.begun = seconds, 0.0, {}

    def feed(self, key, tasks):
        super().feed(key, tasks)
        self.begun |= {task.question.id: self.now for task in tasks}

    def end(self, item):
        return self.begun[item[0].question.id] + self.seconds[int(item[0].question.id[1:])]

    def deliver(self, key, left_s, wait):
        if wait:
            self.now = max(self.now, min(map(self.end, self.waiting)))
        done = sorted((item for item in self.waiting if self.end(item) <= self.now), key=self.end)
        self.waiting = [item for item in self.waiting if item not in done]
        return Arrivals(tuple(answered(task, version) for task, version in done), 6 * len(done))


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("stragglers", ["wait", "drop"])
def test_the_longest_groups_are_trained_on_or_counted(limit, stragglers):
    steps, wanted = 200, 16
    draw = random.Random(7)
    seconds = [draw.lognormvariate(-0.7, 0.8) for _ in range(2 * steps * wanted)]  # median 0.5 s
    coordinator = Clock(seconds)
    chosen = config(limit, steps=steps, rollout={"questions_per_step": wanted, "stragglers": stragglers})
    ahead = supply(chosen, coordinator)
    trained, dropped = [], 0.0
    for step in range(1, steps + 1):
        found = ahead.gather(step)
        trained += [int(name[1:]) for name in ids(found)]
        dropped += found.metrics["staleness/dropped"]
        assert found.metrics["staleness/max"] <= limit
        coordinator.version, coordinator.now = coordinator.version + 1, coordinator.now + 1.0
    asked = len(coordinator.begun)
    slowest = sorted(range(asked), key=seconds.__getitem__)[-150:]
    assert len(trained) == len(set(trained)) == steps * wanted
    if stragglers == "wait":
        assert set(slowest) <= set(trained) and dropped == 0 and asked == steps * wanted
    else:
        assert len(set(slowest) & set(trained)) < 30  # what waiting is for
        assert dropped == asked - steps * wanted - len(ahead.state()["under_way"]) > 100


def test_ready_groups_that_a_push_makes_too_old_are_dropped():
    coordinator = FakeCoordinator()
    coordinator.idle = True
    ahead = supply(config(1), coordinator)
    ahead.gather(1)
    coordinator.version = 2
    ahead.gather(2)  # q6, q7, q8 are under way or ready
    coordinator.version = 9
    found = ahead.gather(3)
    assert min(versions(found)) >= 8 and found.metrics["staleness/dropped"] == 3.0
    assert ids(found) == ["q9", "q10", "q11"]


def test_ahead_of_the_policy_groups_that_teach_nothing_are_replaced_as_they_come():
    coordinator = FakeCoordinator(useless=["q1", "q2", "q4"])
    ahead = supply(config(1, refills=9), coordinator)
    first = ahead.gather(1)
    assert ids(first) == ["q0", "q3", "q5"]
    assert first.metrics["sampling/dropped"] == 3 and first.metrics["sampling/kept"] == 3
    assert first.metrics["sampling/groups_per_kept"] == 2.0
    # six expected to teach; then as many as may replace the three dropped
    assert [names for _, names in coordinator.asked] == [[f"q{i}" for i in range(6)], ["q6"], ["q7"], ["q8"]]
    coordinator.version = 2
    ahead.gather(2)
    # recently 3 in 4 (the mean of 1 and 1/2) taught: for 6 groups 8 are needed, 3 are under way
    assert coordinator.asked[4][1] == ["q9", "q10", "q11", "q12", "q13"]


def test_ahead_of_the_policy_the_bound_ends_the_replacing():
    coordinator = FakeCoordinator(useless=[f"q{i}" for i in range(60) if i != 4])
    found = supply(config(1, refills=1), coordinator).gather(1)
    assert found.metrics["sampling/refill_limit_reached"] == 1.0 and len(found.groups) == 3
    assert ids(found)[:2] == ["q0", "q1"]  # dropped ones take the places left
    assert found.metrics["sampling/dropped"] == 3


def test_a_resume_asks_first_what_was_under_way():
    coordinator = FakeCoordinator()
    coordinator.held = {"q2"}
    ahead = supply(config(1), coordinator)
    assert ids(ahead.gather(1)) == ["q0", "q1", "q3"]
    state = json.loads(json.dumps(ahead.state()))
    later = FakeCoordinator()
    later.version = 2
    resumed = supply(config(1), later)
    resumed.load_state(state)
    assert resumed.state() == state
    found = resumed.gather(2)
    assert later.asked[0][1] == ["q2", "q4", "q5", "q6", "q7", "q8"]
    assert ids(found) == ["q2", "q4", "q5"] and versions(found) == [2, 2, 2]


def test_an_empty_resume_goes_on_in_the_stream():
    later = FakeCoordinator()
    resumed = supply(config(1), later)
    resumed.load_state({"stream": {"at": 12}})  # written by a run without staleness
    assert ids(resumed.gather(5)) == ["q12", "q13", "q14"]
