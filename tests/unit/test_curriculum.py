"""Curricula: weights by hand, shares that follow them, observed levels against another implementation, exact resumes."""

import json
from collections import Counter

import pytest

from alphamed.config.loading import build_config
from alphamed.config.sections import DynamicSamplingConfig, LevelsConfig
from alphamed.data.stream import QuestionStream
from alphamed.errors import ConfigError
from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.curriculum import check_levels, level_chances, weights_at

QUESTIONS = [Question(f"q{i}", f"Question {i}?", {"A": "x", "B": "y"}, "A", level=1 + i % 6) for i in range(60)]
BARE = [Question(q.id, q.question, q.options, "A") for q in QUESTIONS]
EASY_TO_HARD = {"schedule": [{"step": 1, "weights": [4, 2, 0, 0, 0, 0]}, {"step": 11, "weights": [0, 0, 0, 0, 2, 4]}]}


def levels(**tree) -> LevelsConfig:
    return LevelsConfig.model_validate(tree)


def sampler(config: LevelsConfig, questions=QUESTIONS, seed=3, **dynamic) -> QuestionSampler:
    return QuestionSampler(DynamicSamplingConfig(**dynamic), QuestionStream(questions, seed), 4, 8, config, seed)


def graded(question, right, samples=4):
    outcomes = (Outcome.CORRECT,) * right + (Outcome.WRONG,) * (samples - right)
    rollouts = tuple(Rollout("g", question.id, i, (1,), (0.0,), "", FinishReason.STOP, 1) for i in range(samples))
    zeros = (0.0,) * samples
    return ScoredGroup(RolloutGroup("g", question, (1,), rollouts), outcomes, zeros, zeros, (None,) * samples)


# --------------------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize(
    "step, weights",
    [
        (1, (4, 2, 0, 0, 0, 0)),
        (6, (2, 1, 0, 0, 1, 2)),
        (3, (3.2, 1.6, 0, 0, 0.4, 0.8)),
        (11, (0, 0, 0, 0, 2, 4)),
        (500, (0, 0, 0, 0, 2, 4)),
    ],
)
def test_weights_move_on_a_straight_line(step, weights):
    assert weights_at(levels(**EASY_TO_HARD).schedule, step) == pytest.approx(weights)


def test_weights_before_the_first_entry_are_its_own():
    late = levels(schedule=[{"step": 5, "weights": [1, 0, 0, 0, 0, 0]}, {"step": 6, "weights": [0, 1, 0, 0, 0, 0]}])
    assert [weights_at(late.schedule, step)[:2] for step in (1, 5, 6)] == [(1, 0), (1, 0), (0, 1)]


def test_shares_of_annotated_levels_follow_the_weights():
    """4,000 questions by weights 4:2:1:1:0:0: 2,000, 1,000, 500, 500; the largest standard deviation is 31.6."""
    choose = sampler(levels(schedule=[{"step": 1, "weights": [4, 2, 1, 1, 0, 0]}]))
    found = Counter(q.level for _ in range(500) for q in choose.take(8, 1))
    assert set(found) == {1, 2, 3, 4}
    assert all(abs(found[level] - n) < 5 * 31.6 for level, n in ((1, 2000), (2, 1000), (3, 500), (4, 500))), found


def test_equal_weights_are_the_stream_itself():
    choose = sampler(levels(schedule=[{"step": 1, "weights": [2] * 6}]))
    assert [choose.take(8, step) for step in range(1, 30)] == [
        stream for plain in [QuestionStream(QUESTIONS, 3)] for stream in (plain.take(8) for _ in range(29))
    ]


def test_an_epoch_asks_no_question_twice():
    choose = sampler(levels(schedule=[{"step": 1, "weights": [1, 1, 0.5, 0.5, 0, 0]}]))
    asked = []
    while True:
        asked.append(choose.take(1, 1)[0].id)
        if choose.state()["stream"]["epoch"]:
            break
    del asked[-1]  # may be of the next epoch
    assert len(asked) == len(set(asked)) >= 20  # expected: 20 of levels 1 and 2, half of the 20 of 3 and 4


def test_a_rare_level_is_found_all_the_same():
    """One question in 60 has nearly all the weight, and one other a little: the walk ends, and takes no third."""
    rare = [Question(q.id, q.question, q.options, "A", level=3) for q in QUESTIONS[2:]] + [
        Question("hard", "?", {"A": "x", "B": "y"}, "A", level=6),
        Question("easy", "?", {"A": "x", "B": "y"}, "A", level=1),
    ]
    choose = sampler(levels(schedule=[{"step": 1, "weights": [1e-9, 0, 0, 0, 0, 1]}]), rare)
    found = Counter(q.id for _ in range(5) for q in choose.take(4, 1))
    assert set(found) <= {"hard", "easy"} and found["hard"] == 20 - found["easy"] >= 15


# --------------------------------------------------------------------------------------------------------------- observed
@pytest.mark.parametrize("right, wrong", [(0, 0), (8, 0), (0, 8), (3.5, 1.25)])
def test_chances_of_levels_are_those_of_torch(right, wrong):
    """Five answers at pass rates drawn from the belief: 200,000 draws, five standard deviations."""
    import torch

    torch.manual_seed(0)
    rates = torch.distributions.Beta(0.5 + right, 0.5 + wrong).sample((200_000,))
    hits = torch.distributions.Binomial(5, rates.clamp(0, 1)).sample()
    found = level_chances(right, wrong)
    assert sum(found) == pytest.approx(1)
    for level, chance in enumerate(found, start=1):
        assert float((hits == 6 - level).double().mean()) == pytest.approx(chance, abs=5 * (chance / 200_000) ** 0.5 + 1e-5)


def test_chances_by_hand():
    """Of Beta(1/2, 1/2): all of five right is 1/2 3/2 5/2 7/2 9/2 / 5! = 945 / 3840."""
    assert level_chances(0, 0)[0] == level_chances(0, 0)[5] == pytest.approx(945 / 3840)


def test_observed_levels_follow_the_runs_own_answers():
    """Odd questions turn out easy, even ones hard; with weight on hard ones alone these are asked four times as often at
    least. (After 0 of 8, level 6 has a chance of .78, after 8 of 8 one of .0002.)"""
    choose = sampler(levels(schedule=[{"step": 1, "weights": [0, 0, 0, 0, 0, 1]}], by="observed"), BARE)
    for _ in range(2):
        choose.observe([graded(q, 4 * (int(q.id[1:]) % 2)) for q in BARE], 1)
    found = Counter(int(q.id[1:]) % 2 for _ in range(50) for q in choose.take(8, 2))
    assert found[0] > 390
    assert choose.level_metrics()["sampling/level_mean"] > 5.5


def test_observations_are_forgotten():
    """Long after, nothing is known any more: easy and hard ones are asked alike."""
    choose = sampler(levels(schedule=[{"step": 1, "weights": [0, 0, 0, 0, 0, 1]}], by="observed"), BARE, half_life_steps=2)
    choose.observe([graded(q, 4 * (int(q.id[1:]) % 2)) for q in BARE], 1)
    found = Counter(int(q.id[1:]) % 2 for _ in range(50) for q in choose.take(8, 200))
    assert 150 < found[0] < 250


# ---------------------------------------------------------------------------------------------------------------- resumes
@pytest.mark.parametrize(
    "tree, dynamic",
    [(EASY_TO_HARD, {}), (EASY_TO_HARD | {"by": "observed"}, {}), (EASY_TO_HARD | {"by": "observed"}, {"choose": True})],
)
def test_a_resume_asks_the_same_questions(tree, dynamic):
    """Killed after any step, with the state through JSON: the same questions in the same letters, and the same metrics."""

    def step(choose, number):
        asked = choose.take(8, number)
        choose.observe([graded(q, hash_free(q.id, number) % 5) for q in asked], number)
        return [(q.id, tuple(q.options.values())) for q in asked], choose.level_metrics()

    def hash_free(name, number):
        return sum(map(ord, name)) * (number + 3) // 7

    whole, states, found = sampler(levels(**tree), **dynamic), [], []
    for number in range(1, 15):
        found.append(step(whole, number))
        states.append(json.loads(json.dumps(whole.state())))
    for killed_after in (1, 4, 9):
        resumed = sampler(levels(**tree), **dynamic)
        resumed.load_state(states[killed_after - 1])
        assert [step(resumed, number) for number in range(killed_after + 1, 15)] == found[killed_after:]


def test_metrics_tell_the_levels_asked():
    choose = sampler(levels(schedule=[{"step": 1, "weights": [0, 1, 0, 0, 0, 0]}]))
    choose.take(8, 1)
    found = choose.level_metrics()
    assert found["sampling/level_mean"] == 2 and found["sampling/level_skipped"] > 8
    assert choose.level_metrics() == {}
    assert QuestionSampler(DynamicSamplingConfig(), QuestionStream(QUESTIONS, 3), 4, 8).level_metrics() == {}


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "schedule, words",
    [
        ([{"step": 5, "weights": [1] * 6}, {"step": 5, "weights": [2] * 6}], "step 5 comes after step 5"),
        ([{"step": 5, "weights": [0] * 6}], "all weights of step 5 are 0; give one level a weight"),
        ([{"step": 11, "weights": [1] * 6}], "step 11 is never reached, run.steps is 10"),
        ([{"step": 1, "weights": [1] * 5}], "data.levels.schedule.0.weights"),
        ([{"step": 1, "weights": [1, 1, 1, 1, 1, -1]}], "data.levels.schedule.0.weights.5: -1"),
        ([{"step": 0, "weights": [1] * 6}], "data.levels.schedule.0.step: 0"),
        ([{"step": 1, "weights": [1, 1, 1, 1, 1, float("nan")]}], "data.levels.schedule.0.weights.5"),
        ([{"step": 1, "weights": [1] * 6, "stpe": 2}], "did you mean 'step'?"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_line(schedule, words):
    with pytest.raises(ConfigError) as error:
        build_config(
            {"model": {"path": "m"}, "run": {"steps": 10}, "data": {"train": ["t.jsonl"], "levels": {"schedule": schedule}}}
        )
    assert str(error.value).startswith("data.levels.schedule") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_levels_must_be_there():
    config = levels(schedule=[{"step": 1, "weights": [0, 0, 0, 0, 1, 1]}])
    check_levels(config, QUESTIONS)
    with pytest.raises(ConfigError, match="^data.levels.by: annotated, but 1 of 61 questions have no level .*: q0.; "):
        check_levels(config, [*QUESTIONS, BARE[0]])
    with pytest.raises(ConfigError, match="^data.levels.schedule: step 1 gives no weight to a level .* .1, 2.; give one"):
        check_levels(config, [q for q in QUESTIONS if q.level < 3])
    check_levels(levels(schedule=config.schedule, by="observed"), BARE)
    check_levels(levels(), BARE)
