"""Group advantages against numbers worked out by hand."""

import math

import pytest
import torch

from alphamed.algorithms.advantage import ADVANTAGES, group_advantages
from alphamed.config.choices import Advantage

EPSILON = 1e-6


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6)


def test_grpo_by_hand():
    # mean 1/4; deviations 3/4, -1/4 x 3; sum of squares 9/16 + 3/16 = 3/4; over n - 1 = 3: 1/4; std 1/2
    close(group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), [7] * 4, "grpo"), [1.5, -0.5, -0.5, -0.5])


def test_grpo_of_a_pair():
    # mean 1/2; sum of squares 1/2; over 1: 1/2; std 0.70711; 0.5 / 0.70711 = 0.70711
    close(group_advantages(torch.tensor([1.0, 0.0]), [0, 0], "grpo"), [math.sqrt(0.5), -math.sqrt(0.5)])


def test_dr_grpo_by_hand():
    close(group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.1]), [0] * 4, "dr_grpo"), [0.725, -0.275, -0.275, -0.175])


def test_rloo_by_hand():
    # 1 - (0 + 0 + 0.5)/3 = 5/6;  0 - (1 + 0 + 0.5)/3 = -1/2 (twice);  0.5 - 1/3 = 1/6
    close(group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.5]), [0] * 4, "rloo"), [5 / 6, -1 / 2, -1 / 2, 1 / 6])


def test_groups_of_any_size_in_any_order():
    rewards = torch.tensor([1.0, 3.0, 0.0, 5.0, 0.0, 0.0])
    groups = torch.tensor([40, -2, 40, 9, 40, -2])  # group 40: 1, 0, 0; group -2: 3, 0; group 9: 5 alone
    third = 1 / math.sqrt(3)  # std of (1, 0, 0): sqrt((4/9 + 1/9 + 1/9) / 2) = sqrt(1/3)
    close(
        group_advantages(rewards, groups, "grpo"),
        [2 / 3 / third, math.sqrt(0.5), -1 / 3 / third, 0.0, -1 / 3 / third, -math.sqrt(0.5)],
    )
    close(group_advantages(rewards, groups, "dr_grpo"), [2 / 3, 1.5, -1 / 3, 0.0, -1 / 3, -1.5])
    close(group_advantages(rewards, groups, "rloo"), [1.0, 3.0, -0.5, 0.0, -0.5, -3.0])


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_ids_may_be_anything_hashable(kind):
    rewards = torch.tensor([1.0, 3.0, 0.0, 5.0, 0.0, 0.0])
    by_number = group_advantages(rewards, torch.tensor([40, -2, 40, 9, 40, -2]), kind)
    by_name = group_advantages(rewards, ["q1/3", ("a", 1), "q1/3", None, "q1/3", ("a", 1)], kind)
    assert by_number.tolist() == by_name.tolist()


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 1e9, 1e-30])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(kind, reward, size):
    rewards = torch.full((size,), reward, dtype=torch.float64)  # 0.1 x 3 / 3 is not 0.1 in floating point
    assert group_advantages(rewards, [0] * size, kind).tolist() == [0.0] * size


def test_rounding_is_not_blown_up():
    rewards = torch.tensor([0.3, 0.1 + 0.2], dtype=torch.float64)  # 5.6e-17 apart
    assert group_advantages(rewards, [0, 0], "grpo").abs().max() < 1e-9


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_sums_to_zero_and_does_not_depend_on_order(kind):
    generator = torch.Generator().manual_seed(3)
    rewards, groups = torch.rand(40, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    advantages = group_advantages(rewards, groups, kind)
    sums = torch.zeros(6).index_add(0, groups, advantages)
    assert sums.abs().max() < 1e-5
    order = torch.randperm(40, generator=generator)
    torch.testing.assert_close(
        group_advantages(rewards[order], groups[order], kind), advantages[order], rtol=1e-6, atol=1e-7
    )


def test_against_torch_std():
    generator = torch.Generator().manual_seed(5)
    rewards = torch.rand(5, 8, generator=generator)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPSILON)
    groups = torch.arange(5).repeat_interleave(8)
    torch.testing.assert_close(group_advantages(rewards.flatten(), groups, "grpo"), expected.flatten(), rtol=1e-4, atol=1e-6)


def test_dtype_and_empty():
    for dtype in (torch.float64, torch.float32, torch.int64):
        assert group_advantages(torch.tensor([1, 0], dtype=dtype), [0, 0], "dr_grpo").dtype == torch.float32
    assert group_advantages(torch.zeros(0), [], "grpo").shape == (0,)


def test_every_kind_of_the_configuration_exists():
    assert set(ADVANTAGES) == {kind.value for kind in Advantage}
    assert group_advantages(torch.tensor([1.0, 0.0]), [0, 0], Advantage.DR_GRPO).tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ((torch.zeros(2), [0, 0], "gae"), "unknown kind 'gae'; choose one of grpo, dr_grpo, rloo"),
        ((torch.zeros(3), [0, 0], "grpo"), "3,.* and 2 group ids"),
        ((torch.zeros(2, 2), [0, 0], "grpo"), "give one of each per response"),
        ((torch.tensor([0.0, math.nan]), [0, 0], "grpo"), "nan is not finite"),
        ((torch.tensor([math.inf, 0.0]), [0, 1], "rloo"), "inf is not finite"),
    ],
)
def test_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        group_advantages(*arguments)
