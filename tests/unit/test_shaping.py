"""The soft overlong punishment (DAPO, 2503.14476, eq. 13) by hand, and in the rewards of a graded group."""

import asyncio
import sys
from dataclasses import replace

import pytest
from test_reward_process import RIGHT, WRONG, group_of

from alphamed.config.loading import build_config
from alphamed.config.sections import RewardConfig
from alphamed.errors import ConfigError
from alphamed.reward.process import RewardProcess
from alphamed.reward.shaping import Overlong


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


def test_it_is_part_of_the_reward_and_moves_the_advantages():
    """Limit 10, buffer 4: responses of 6, 8 and 10 tokens get 0, -0.5 and -1."""
    group = group_of(RIGHT, RIGHT, WRONG)
    group = replace(
        group,
        rollouts=tuple(
            replace(r, response_token_ids=(1,) * n, logprobs=(0.0,) * n) for r, n in zip(group.rollouts, (6, 8, 10))
        ),
    )
    process = RewardProcess(RewardConfig(), "dr_grpo", 1000, sys.path, Overlong(10, 4))
    scored = asyncio.run(process.grade(group))
    assert scored.rewards == (1.0, 0.5, -1.0)
    assert scored.advantages == pytest.approx([1 - 1 / 6, 0.5 - 1 / 6, -1 - 1 / 6])


def test_a_failed_grading_keeps_its_reward():
    from alphamed.records import Outcome
    from alphamed.reward.process import shaped
    from alphamed.reward.rules import Graded

    crashed, wrong = Graded(Outcome.CRASH, 0.0, None), Graded(Outcome.WRONG, 0.0, "B")
    rollouts = group_of("", "").rollouts  # of 2 tokens
    assert [one.reward for one in shaped([crashed, wrong], rollouts, Overlong(2, 1))] == [0.0, -1.0]


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
