"""Settings that may be left to the program (`auto`, null) with the value that they have in a run: `config.resolved`.

A setting and its resolved value have the same name: `config.algorithm.correction` is what the file sets, and
`config.resolved.correction` what a run does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alphamed.config.choices import Correction, Dtype, OldLogprobs

if TYPE_CHECKING:
    from alphamed.config.schema import Config


@dataclass(frozen=True, slots=True)
class Resolved:
    config: Config

    @property
    def correction(self) -> Correction:
        """algorithm.correction, never AUTO."""
        setting = self.config.algorithm.correction
        if setting != Correction.AUTO:
            return setting
        return Correction.TIS if self.config.rollout.max_staleness else Correction.NONE

    @property
    def recompute_old_logprobs(self) -> bool:
        """algorithm.old_logprobs: with one update a batch they equal the current ones."""
        algorithm = self.config.algorithm
        return algorithm.old_logprobs == OldLogprobs.RECOMPUTE or algorithm.mini_batches > 1

    @property
    def constant_tokens(self) -> int:
        """algorithm.constant_tokens."""
        return self.config.algorithm.constant_tokens or self.config.rollout.max_response_tokens

    @property
    def max_logprob_diff(self) -> float:
        """sync.max_logprob_diff: by what rounding of the two sides' number formats explains."""
        config = self.config
        if config.sync.max_logprob_diff:
            return config.sync.max_logprob_diff
        if config.rollout.max_staleness:
            return 1.0  # the policy's own movement is in it
        exact = config.model.dtype == config.rollout.dtype == Dtype.FP32
        return 1e-3 if exact else 0.3 if config.model.fp8 else 0.15
