"""The soft overlong punishment (DAPO, 2503.14476, eq. 13) by hand, and in the rewards of a graded group."""

import asyncio
import sys
from dataclasses import replace

import pytest
from test_reward_process import RIGHT, WRONG, group_of

from alphamed.config.loading import build_config
from alphamed.config.sections import RewardConfig
from alphamed.errors import ConfigError
from alphamed.records import Outcome
from alphamed.reward.process import RewardProcess
from alphamed.reward.rules import Graded
from alphamed.reward.shaping import Overlong, scored_group
from alphamed.run import length_penalty


@pytest.mark.parametrize(
    "tokens, penalty",
    [
        (1, 0.0),
        (15_360, 0.0),
        (16_384, 0.0),  # DAPO: 16,384 expected, 4,096 of buffer
        (17_408, -0.25),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1.0),
        (30_000, -1.0),
    ],
)
def test_by_hand(tokens, penalty):
    assert Overlong(20_480, 4_096).penalty(tokens) == penalty


def test_without_a_buffer_there_is_none():
    assert Overlong(100, 0).penalty(100) == 0.0


def group_of_lengths(*lengths):
    """A right, a right and a wrong response, and as many more wrong ones."""
    group = group_of(*[RIGHT, RIGHT, WRONG, WRONG][: len(lengths)])
    return replace(
        group,
        rollouts=tuple(
            replace(r, response_token_ids=(1,) * n, logprobs=(0.0,) * n) for r, n in zip(group.rollouts, lengths)
        ),
    )


def test_it_moves_the_advantages_and_no_reward():
    """Limit 10, buffer 4: responses of 6, 8 and 10 tokens get 0, -0.5 and -1, so that they are compared as 1, 0.5 and -1."""
    process = RewardProcess(RewardConfig(), "dr_grpo", 1000, sys.path, Overlong(10, 4))
    scored = asyncio.run(process.grade(group_of_lengths(6, 8, 10)))
    assert scored.rewards == (1.0, 1.0, 0.0)
    assert scored.advantages == pytest.approx([1 - 1 / 6, 0.5 - 1 / 6, -1 - 1 / 6])
    assert length_penalty([scored], Overlong(10, 4)) == {"reward/length_penalty": -0.5}
    assert length_penalty([scored], Overlong(10, 0)) == {}


def test_an_evaluation_knows_no_penalty():
    process = RewardProcess(RewardConfig(), "dr_grpo", 1000, sys.path, Overlong(10, 4))
    scored = asyncio.run(process.grade(group_of_lengths(6, 8, 10), evaluation=True))
    assert scored.rewards == (1.0, 1.0, 0.0) and scored.advantages == pytest.approx([1 / 3, 1 / 3, -2 / 3])


def test_a_failed_grading_has_no_part_in_it():
    """Limit 2, buffer 1: three responses of 2 tokens cost a point each; the one whose grader crashed is not compared."""
    graded = [Graded(Outcome.CRASH, 0.0, None), Graded(Outcome.WRONG, 0.0, "B"), Graded(Outcome.CORRECT, 1.0, "C")]
    scored = scored_group(group_of_lengths(2, 2, 2), graded, "dr_grpo", Overlong(2, 1))
    assert scored.rewards == (0.0, 0.0, 1.0) and scored.advantages == (0.0, -0.5, 0.5)


def test_a_buffer_longer_than_the_limit_is_refused():
    with pytest.raises(ConfigError, match=r"reward.overlong_buffer_tokens: 9 exceeds rollout.max_response_tokens \(8\)"):
        build_config(
            {
                "model": {"path": "m"},
                "data": {"train": ["d"]},
                "rollout": {"max_response_tokens": 8},
                "reward": {"overlong_buffer_tokens": 9},
            }
        )
