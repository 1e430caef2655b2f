"""Groups that carries no signal are replaced: which, how often, what is counted; and the simulation of a run."""

import random

import pytest

from alphamed.config.sections import DynamicSamplingConfig
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.reward.shaping import Overlong, with_advantages
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.refill import BatchSlots, GroupCounts, has_reward_variance

RIGHT, WRONG = Outcome.CORRECT, Outcome.WRONG


def graded(name, outcomes, rewards=None, lengths=None):
    rollouts = tuple(
        Rollout(name, name, i, (1,) * n, (0.0,) * n, "", FinishReason.STOP, 1)
        for i, n in enumerate(lengths or [2] * len(outcomes))
    )
    rewards = tuple(rewards or (float(outcome == RIGHT) for outcome in outcomes))
    return ScoredGroup(
        RolloutGroup(name, Question(name, "?", {"A": "x", "B": "y"}, "A"), (1, 2), rollouts),
        tuple(outcomes),
        rewards,
        (0.0,) * len(outcomes),
        (None,) * len(outcomes),
    )


def mixed(name):
    return graded(name, [RIGHT, WRONG])


def wrong(name):
    return graded(name, [WRONG, WRONG])


def names(groups):
    return [scored.group.group_id for scored in groups]


# ------------------------------------------------------------------------------------------------------------ which teach
def test_all_right_and_all_wrong_teach_nothing():
    assert has_reward_variance(mixed("q"))
    assert not has_reward_variance(wrong("q")) and not has_reward_variance(graded("q", [RIGHT, RIGHT]))


def test_partial_rewards_count_and_failed_gradings_do_not():
    assert has_reward_variance(graded("q", [WRONG, Outcome.UNPARSEABLE], rewards=[0.1, 0.0]))
    assert not has_reward_variance(graded("q", [RIGHT, Outcome.CRASH, Outcome.TIMEOUT], rewards=[1.0, 0.0, 0.0]))
    assert not has_reward_variance(graded("q", [Outcome.CRASH, Outcome.CRASH]))


def test_lengths_alone_teach_nothing():
    """Limit 10, buffer 3: 8, 9 and 10 tokens cost 1/3, 2/3 and 1, and those of 10 and 7 end up worth the same."""
    long, uneven = graded("q", [RIGHT] * 3, lengths=[8, 9, 10]), graded("q", [RIGHT, WRONG], lengths=[10, 7])
    long, uneven = (with_advantages(scored, "dr_grpo", Overlong(10, 3)) for scored in (long, uneven))
    assert long.advantages == pytest.approx((1 / 3, 0, -1 / 3)) and not has_reward_variance(long)
    assert uneven.advantages == (0.0, 0.0) and has_reward_variance(uneven)


# ----------------------------------------------------------------------------------------------------------------- places
def test_without_refills_every_group_stays():
    places, asked = BatchSlots(2, 0), []
    for missing in places.rounds():
        asked.append(missing)
        places.fill([wrong("a"), mixed("b")])
    assert asked == [2] and names(places.groups) == ["a", "b"]
    assert places.counts.metrics(0) == {
        "sampling/asked": 2,
        "sampling/kept": 2,
        "sampling/dropped": 0,
        "sampling/refill_limit_reached": 0.0,
        "sampling/skipped": 0,
        "sampling/reward_mean": 0.25,
        "sampling/groups_per_kept": 1.0,
    }


def test_groups_that_teach_nothing_are_replaced_in_their_places():
    rounds = iter([[wrong("a"), mixed("b"), wrong("c")], [mixed("d"), wrong("e")], [mixed("f")]])
    places, asked = BatchSlots(3, 9), []
    for missing in places.rounds():
        asked.append(missing)
        places.fill(next(rounds))
    assert asked == [3, 2, 1] and names(places.groups) == ["d", "b", "f"]
    assert places.counts.metrics(4) == {
        "sampling/asked": 6,
        "sampling/kept": 3,
        "sampling/dropped": 3,
        "sampling/refill_limit_reached": 0.0,
        "sampling/skipped": 4,
        "sampling/reward_mean": 1.5 / 6,
        "sampling/groups_per_kept": 2.0,
    }


def test_past_the_bound_what_was_dropped_last_fills_the_step():
    places, rounds = BatchSlots(2, 1), iter([[wrong("a"), mixed("b")], [wrong("c")]])
    for _ in places.rounds():
        places.fill(next(rounds))
    assert names(places.groups) == ["c", "b"]
    assert places.counts.refill_limit_reached and (places.counts.usable, places.counts.dropped) == (1, 2)


def test_stale_groups_count_as_generated_and_not_as_kept():
    counts = GroupCounts()
    counts.count(mixed("a"), usable=True)
    counts.count(mixed("b"), usable=True, stale=True)
    counts.count(wrong("c"))
    assert (counts.graded, counts.usable, counts.dropped, counts.stale) == (3, 1, 1, 1)
    assert counts.metrics(0)["sampling/groups_per_kept"] == 3.0


# ------------------------------------------------------------------------------------------------------------- simulation
QUESTIONS, PER_STEP, SAMPLES, STEPS = 2_000, 32, 8, 100


class Stream:
    """A new order every epoch."""

    def __init__(self, questions, seed):
        self.questions, self.rest, self.random = questions, [], random.Random(seed)

    def take(self, n):
        while len(self.rest) < n:
            self.rest += self.random.sample(self.questions, len(self.questions))
        taken, self.rest = self.rest[:n], self.rest[n:]
        return taken


def generated_per_kept(choose, annotated, steps=STEPS, seed=5):
    """A run on questions of which a fifth has a pass rate in 0.3..0.7; the rest is hopeless or solved. Levels come from five
    samples of a model whose pass rates differ by up to 0.1."""
    rng = random.Random(seed)
    rates, questions = {}, []
    for i in range(QUESTIONS):
        rates[f"q{i}"] = rng.uniform(0.3, 0.7) if i % 5 == 0 else rng.choice([0.0, 1.0])
        other = min(1.0, max(0.0, rates[f"q{i}"] + rng.uniform(-0.1, 0.1)))
        level = 6 - sum(rng.random() < other for _ in range(5)) if annotated else None
        questions.append(Question(f"q{i}", "?", {"A": "x", "B": "y"}, "A", level=level))
    sampler = QuestionSampler(DynamicSamplingConfig(choose=choose), Stream(questions, seed), SAMPLES, PER_STEP)
    graded_groups = kept = hits = 0
    asked_of = dict.fromkeys(rates, 0)
    for step in range(1, steps + 1):
        places = BatchSlots(PER_STEP, 9)
        for missing in places.rounds():
            groups = [
                graded(q.id, [RIGHT if rng.random() < rates[q.id] else WRONG for _ in range(SAMPLES)])
                for q in sampler.take(missing, step)
            ]
            places.fill(groups)
            sampler.observe(groups, step)
            for scored in groups:
                asked_of[scored.group.question.id] += 1
        graded_groups, kept = graded_groups + places.counts.graded, kept + places.counts.usable
        hits += places.counts.refill_limit_reached
    return graded_groups / kept, hits, asked_of


def test_choosing_by_belief_needs_at_most_two_groups_where_blind_refilling_needs_five():
    blind, blind_hits, _ = generated_per_kept(choose=False, annotated=False)
    assert blind >= 5.0  # one in 5 may teach, and 2% of those groups do not
    assert blind_hits > STEPS / 2  # 32 places, 9 refills: 0.8^10 = 11% stay empty
    levels, hits, asked_of = generated_per_kept(choose=True, annotated=True)
    assert levels <= 2.0 and hits < STEPS / 10
    assert min(asked_of.values()) >= 1  # none starves


def test_without_levels_the_runs_own_results_do_the_same():
    found, hits, asked_of = generated_per_kept(choose=True, annotated=False)
    assert found <= 2.0 and hits < STEPS / 5  # the first meeting of all questions is blind
    assert min(asked_of.values()) >= 1


@pytest.mark.parametrize("choose", [False, True])
def test_a_simulation_repeats_exactly(choose):
    assert generated_per_kept(choose, True, steps=5) == generated_per_kept(choose, True, steps=5)
