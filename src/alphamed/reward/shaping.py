"""From the rewards of a group to its advantages: a penalty on responses that come near the token limit (the soft overlong
punishment), then the comparison within the group.

The penalty is applied here alone (`with_advantages`). Rewards are recorded without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from alphamed.config.schema import Config
from alphamed.records import RolloutGroup, ScoredGroup
from alphamed.reward.rules import Graded


@dataclass(frozen=True, slots=True)
class Overlong:
    """DAPO's length-aware penalty (2503.14476, eq. 13) for responses of at most `max_tokens`, over a buffer of
    `buffer_tokens` below that; without a buffer there is none."""

    max_tokens: int
    buffer_tokens: int

    @classmethod
    def of(cls, config: Config) -> Overlong:
        return cls(config.rollout.max_response_tokens, config.reward.overlong_buffer_tokens)

    def penalty(self, tokens: int) -> float:
        """What is added to the reward of a response of `tokens` tokens, the end-of-text token included, before rewards are
        compared. With L = max_tokens and b = buffer_tokens:

          0                   up to L - b
          (L - b - tokens)/b  from there to L
          -1                  beyond L
        """
        if not self.buffer_tokens:
            return 0.0
        over = tokens - (self.max_tokens - self.buffer_tokens)
        return -min(max(over, 0) / self.buffer_tokens, 1.0)


NO_PENALTY = Overlong(0, 0)


def scored_group(
    group: RolloutGroup, graded: Sequence[Graded], advantage: str, overlong: Overlong = NO_PENALTY, grading_s: float = 0.0
) -> ScoredGroup:
    """A group with its grading and the advantages that follow from it."""
    scored = ScoredGroup(
        group,
        outcomes=tuple(sample.outcome for sample in graded),
        rewards=tuple(sample.reward for sample in graded),
        advantages=(0.0,) * len(graded),
        letters=tuple(sample.letter for sample in graded),
        grading_s=grading_s,
    )
    return with_advantages(scored, advantage, overlong)


def with_advantages(scored: ScoredGroup, kind: str, overlong: Overlong) -> ScoredGroup:
    """The group with advantages computed from its rewards and the penalty on the lengths of its responses. Samples that could
    not be graded get 0 and do not count for the others."""
    import torch

    from alphamed.algorithms.advantage import group_advantages

    graded = [i for i, outcome in enumerate(scored.outcomes) if not outcome.failed]
    lengths = [len(rollout.response_token_ids) for rollout in scored.group.rollouts]
    shaped = [scored.rewards[i] + overlong.penalty(lengths[i]) for i in graded]
    values = group_advantages(torch.tensor(shaped, dtype=torch.float64), [0] * len(shaped), kind).tolist()
    advantages = dict(zip(graded, values, strict=True))
    return replace(scored, advantages=tuple(advantages.get(i, 0.0) for i in range(len(scored.outcomes))))
