"""Beliefs about pass rates: the chance that a group teaches by hand and by integration, levels, fading, no starving."""

import json
from dataclasses import replace

import pytest

from alphamed.config.sections import DynamicSamplingConfig
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.reward.rules import earns_of
from alphamed.reward.shaping import Overlong, with_advantages
from alphamed.rollout.belief import PassRates, signal_chance
from alphamed.rollout.choice import QuestionSampler

RIGHT, WRONG, CRASH = Outcome.CORRECT, Outcome.WRONG, Outcome.CRASH


def question(name="q", level=None):
    return Question(name, "?", {"A": "x", "B": "y"}, "A", level=level)


def graded(name, *outcomes):
    rollouts = tuple(Rollout("g", name, i, (1,), (0.0,), "", FinishReason.STOP, 1) for i in range(len(outcomes)))
    rewards = tuple(float(outcome == RIGHT) for outcome in outcomes)
    return ScoredGroup(
        RolloutGroup("g", question(name), (1, 2), rollouts), outcomes, rewards, rewards, (None,) * len(outcomes)
    )


class Stream:
    """Questions in one order, again and again."""

    def __init__(self, questions):
        self.questions, self.at = questions, 0

    def take(self, n):
        self.at += n
        return [self.questions[i % len(self.questions)] for i in range(self.at - n, self.at)]

    def state(self):
        return {"at": self.at}

    def load_state(self, state):
        self.at = state["at"]


# ------------------------------------------------------------------------------------------------------------ the chance
def test_chance_by_hand():
    # Beta(1/2, 1/2): E[p^2] = 1/2 * 3/4 = 3/8, twice; E[p^8] = C(16, 8) / 4^8 = 12870 / 65536
    assert signal_chance(0, 0, 2) == pytest.approx(1 / 4)
    assert signal_chance(0, 0, 8) == pytest.approx(1 - 2 * 12870 / 65536)
    # Beta(3/2, 1/2): E[p^2] = 3/4 * 5/6 = 5/8, E[(1-p)^2] = 1/4 * 3/6 = 1/8
    assert signal_chance(1, 0, 2) == pytest.approx(1 / 4)
    # Beta(1/2, 5/2) and its mirror image
    assert signal_chance(0, 2, 8) == pytest.approx(signal_chance(2, 0, 8))


@pytest.mark.parametrize("right, wrong, samples", [(0, 8, 8), (1, 7, 8), (2.5, 0.25, 4), (0, 5, 16)])
def test_chance_by_integration(right, wrong, samples):
    import torch

    torch.manual_seed(0)
    p = torch.distributions.Beta(0.5 + right, 0.5 + wrong).sample((400_000,)).double()
    assert signal_chance(right, wrong, samples) == pytest.approx(
        float((1 - p**samples - (1 - p) ** samples).mean()), abs=2e-3
    )


def test_one_right_answer_of_eight_makes_a_question_worth_asking_and_none_does_not():
    unknown = signal_chance(0, 0, 8)
    assert signal_chance(1, 7, 8) > unknown > signal_chance(0, 8, 8)
    assert signal_chance(7, 1, 8) > unknown > signal_chance(8, 0, 8)


# ---------------------------------------------------------------------------------------------------------- observations
def test_levels_count_as_samples_of_another_model():
    """Level 1 is 5 of 5 right, level 6 is 0 of 5."""
    rates = PassRates(DynamicSamplingConfig(annotation_weight=5.0), 8)
    counts = [rates.counts(question(level=level), 0) for level in (1, 2, 3, 4, 5, 6)]
    assert counts == [pytest.approx(pair) for pair in [(5, 0), (4, 1), (3, 2), (2, 3), (1, 4), (0, 5)]]
    assert rates.counts(question(level=None), 0) == (0, 0)
    worth = [rates.chance(question(level=level), 0) >= rates.of_unknown for level in (1, 2, 3, 4, 5, 6)]
    assert worth == [False, True, True, True, True, False]


def test_observations_add_up_and_fade_by_half_in_a_half_life():
    rates = PassRates(DynamicSamplingConfig(half_life_steps=10, annotation_weight=4), 4)
    rates.observe([graded("q", RIGHT, RIGHT, WRONG, WRONG), graded("other", RIGHT)], 0)
    assert rates.counts(question(), 0) == (2, 2)
    assert rates.counts(question(), 10) == pytest.approx((1, 1))
    rates.observe([graded("q", RIGHT, WRONG, WRONG, WRONG)], 10)
    assert rates.counts(question(), 10) == pytest.approx((1 + 1, 1 + 3))
    assert rates.counts(question(), 30) == pytest.approx((2 / 4, 4 / 4))
    # the level (2: 4 of 5 right, so 3.2 and 0.8 of 4) fades from step 0
    assert rates.counts(question(level=2), 30) == pytest.approx((2 / 4 + 3.2 / 8, 4 / 4 + 0.8 / 8))


def test_answers_that_could_not_be_graded_say_nothing():
    rates = PassRates(DynamicSamplingConfig(), 4)
    rates.observe([graded("q", RIGHT, CRASH, Outcome.TIMEOUT, Outcome.TRUNCATED)], 3)
    assert rates.counts(question(), 3) == (1, 1)


# ----------------------------------------------------------------------------------------------------------------- choice
def test_without_choosing_the_questions_are_the_streams():
    sampler = QuestionSampler(DynamicSamplingConfig(), Stream([question("a", 6), question("b", 1), question("c", 3)]), 8, 4)
    assert [q.id for q in sampler.take(4, 1)] == ["a", "b", "c", "a"]
    assert sampler.state() == {"stream": {"at": 4}}


def test_unlikely_questions_are_passed_over_and_the_streams_order_is_kept():
    levels = {"a": None, "b": 6, "c": None, "d": 1, "e": 5}
    sampler = QuestionSampler(DynamicSamplingConfig(choose=True), Stream([question(*item) for item in levels.items()]), 8, 3)
    assert [q.id for q in sampler.take(3, 0)] == ["a", "c", "e"]
    assert sampler.skipped == 2
    sampler.observe([graded("a", *[WRONG] * 8)], 1)
    assert [q.id for q in sampler.take(2, 1)] == ["c", "e"]


def test_where_too_few_are_likely_the_likeliest_of_the_rest_are_asked():
    stream = Stream([question("b"), question("a", 6), question("c", 3), question("d", 6)])
    sampler = QuestionSampler(DynamicSamplingConfig(choose=True, search=2), stream, 8, 2)
    sampler.observe([graded("b", *[WRONG] * 16)], 0)
    assert [q.id for q in sampler.take(2, 0)] == ["a", "c"]  # looks at 4: c is good, a the best of the rest


def test_no_question_starves():
    """Passed over 4 times in a row, or 2 or 3, a question is asked whatever is believed of it; not all at the same time."""
    names = [f"hopeless{i}" for i in range(20)]
    stream = Stream([question("good", 3), *(question(name, 6) for name in names)])
    sampler = QuestionSampler(
        DynamicSamplingConfig(choose=True, max_passes=4, half_life_steps=1e9, search=200), stream, 8, 1
    )
    passes, found = dict.fromkeys(names, 0), []
    for step in range(400):
        before = stream.at
        (asked,) = sampler.take(1, step)
        for place in range(before, stream.at):
            name = stream.questions[place % 21].id
            if name != "good" and name != asked.id:
                passes[name] += 1
        if asked.id != "good":
            found.append(passes[asked.id])
            passes[asked.id] = 0
            sampler.observe([graded(asked.id, *[WRONG] * 8)], step)
    assert set(found) == {2, 3, 4} and max(passes.values()) <= 4


def test_a_question_is_not_asked_twice_in_a_step_while_there_are_others():
    stream = Stream([question("a", 3), question("b", 6), question("c", 6)])
    sampler = QuestionSampler(DynamicSamplingConfig(choose=True), stream, 8, 4)
    assert [q.id for q in sampler.take(3, 0)] == ["a", "b", "c"]
    assert sorted(q.id for q in sampler.take(4, 0)) == ["a", "a", "b", "c"]


def test_the_state_is_json_and_restores_every_belief_exactly():
    def fresh():
        return QuestionSampler(
            DynamicSamplingConfig(choose=True, half_life_steps=3, max_passes=2),
            Stream([question(f"q{i}", 1 + i % 6) for i in range(17)]),
            8,
            3,
        )

    def go_on(sampler, steps):
        asked = []
        for step in steps:
            asked.append([q.id for q in sampler.take(3, step)])
            sampler.observe(
                [graded(name, *[RIGHT] * (int(name[1:]) % 9), *[WRONG] * (8 - int(name[1:]) % 9)) for name in asked[-1]],
                step,
            )
        return asked

    first = fresh()
    go_on(first, range(1, 8))
    second = fresh()
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    assert go_on(second, range(8, 20)) == go_on(first, range(8, 20))


# ------------------------------------------------------------------------------------------------ rewards, not correctness
def earned(name, *rewards, outcome=WRONG, tokens=1):
    rollouts = tuple(
        Rollout("g", name, i, (1,) * tokens, (0.0,) * tokens, "", FinishReason.STOP, 1) for i in range(len(rewards))
    )
    return ScoredGroup(
        RolloutGroup("g", question(name), (1, 2), rollouts),
        (outcome,) * len(rewards),
        rewards,
        (0.0,) * len(rewards),
        (None,) * len(rewards),
    )


def rates_of(earns=None, samples=8, **settings):
    return PassRates(DynamicSamplingConfig(**settings), samples, earns)


def test_a_group_teaches_where_its_rewards_differ_whatever_is_right():
    """All answers of `graded` are wrong, with eight different rewards; those of `same` are right and wrong, all worth 0.5."""
    rates = rates_of()
    same = replace(earned("same", *[0.5] * 8), outcomes=(RIGHT, WRONG) * 4)
    rates.observe([earned("graded", *[i / 8 for i in range(8)]), same], 0)
    assert rates.chance(question("graded"), 0) > 0.99 > rates.of_unknown > rates.chance(question("same"), 0)
    # Beta(1/2 + 8, 1/2): E[p^8] over eight samples that all earned the same, and its mirror image
    assert rates.chance(question("same"), 0) == pytest.approx(signal_chance(8, 0, 8))


def test_three_rewards_by_hand():
    """Dirichlet(1/3 + 2, 1/3 + 1, 1/3 + 1) of 4 samples, two answers: E[p^2] = a (a + 1) / (5 * 6) with a = 7/3, 4/3, 4/3."""
    rates = rates_of(samples=2)
    rates.observe([earned("q", 0.0, 0.0, 0.3, 1.0)], 0)
    assert rates.chance(question(), 0) == pytest.approx(1 - (7 / 3 * 10 / 3 + 2 * 4 / 3 * 7 / 3) / 30)


def test_many_rewards_that_fade_leave_a_question_nothing_is_known_of():
    rates = rates_of(half_life_steps=1)
    rates.observe([earned("q", *[i / 8 for i in range(8)])], 0)
    assert 0 < rates.chance(question(), 60) < 1 and rates.chance(question(), 60) >= rates.of_unknown


def test_the_length_penalty_is_no_difference_between_answers():
    """At 75 tokens of 100 with a buffer of 50 half a point is taken off the advantages."""
    rates = rates_of()
    rates.observe([replace(earned("q", *[1.0] * 8), rewards=(1.0,) * 4 + (0.5,) * 4)], 0)
    assert rates.chance(question(), 0) > 0.9  # answers of one token: the difference is the answers'
    long = earned("long", *[1.0] * 4, tokens=75)
    short = earned("long", *[1.0] * 4)
    group = ScoredGroup(
        replace(long.group, rollouts=long.group.rollouts + short.group.rollouts),
        (RIGHT,) * 8,
        long.rewards + short.rewards,
        (0.0,) * 8,
        (None,) * 8,
    )
    group = with_advantages(group, "dr_grpo", Overlong(100, 50))
    assert group.advantages == (-0.25,) * 4 + (0.25,) * 4
    rates.observe([group], 0)
    assert rates.chance(question("long"), 0) == pytest.approx(signal_chance(8, 0, 8))


def test_levels_say_nothing_of_a_reward_that_does_not_follow_from_right_and_wrong():
    assert rates_of(None).chance(question(level=6), 0) == rates_of(None).of_unknown
    assert rates_of((1.0, 0.0)).chance(question(level=6), 0) == pytest.approx(signal_chance(0, 5, 8))
    assert [earns_of(name) for name in ("correct", "correct_and_format", "format_only", "random", "my:own")] == [
        (1.0, 0.0),
        (1.0, 0.1),
        None,
        None,
        None,
    ]


def test_a_state_of_before_rewards_were_kept_is_read():
    rates = rates_of((1.0, 0.0))
    rates.load_state({"q": [1, 7, 3, 2]})
    assert rates.counts(question(), 3) == (1, 7) and rates.chance(question(), 3) == rates.of_unknown
