"""The soft overlong punishment: a penalty on responses that come near the token limit.

It is applied in one place, where advantages are computed (`reward.process.with_advantages`). Rewards are recorded without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from alphamed.config.schema import Config


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
