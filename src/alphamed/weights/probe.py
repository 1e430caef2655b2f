"""The log-prob probe: after the first push the engines must agree with the policy about a fixed text.

Digests show that tensors arrived; only this shows that they were loaded where they belong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

TEXT = (
    "A 54-year-old man comes to the emergency department with crushing chest pain that began 40 minutes ago and spreads "
    "to the left arm. He is sweating, his pulse is 104/min and his blood pressure is 92/58 mm Hg. The electrocardiogram "
    "shows ST elevation in leads II, III and aVF. Which artery is most likely occluded, and what is given first?"
)

EXACT_MAX = 2e-4  # both sides FP32
ROUNDED_MEAN, ROUNDED_P99 = 0.08, 0.35
"""Either side bf16: twice what two correct bf16 implementations were seen to differ by."""
FP8_MEAN, FP8_P99 = 0.2, 0.8
"""The policy in FP8, the engine in bf16: a guess, to be measured; a tensor in the wrong place gives 1 and more."""


@dataclass(frozen=True)
class Probe:
    """`logprobs(tokens)` gives the policy's log-probs (temperature 1, FP32) of tokens[1:]; every rank calls it, ranks that
    do not know the result return None. At least the sender of the last pipeline stage must know."""

    tokens: tuple[int, ...]
    logprobs: Callable[[tuple[int, ...]], Sequence[float] | None]

    def cut(self, limit: int) -> Probe:
        """The probe with at most `limit` tokens."""
        return replace(self, tokens=self.tokens[:limit])


@dataclass(frozen=True)
class ProbeDifference:
    """|engine - policy| over the tokens of the probe."""

    mean: float
    p99: float
    max: float

    @classmethod
    def between(cls, policy: Sequence[float], engine: Sequence[float]) -> ProbeDifference:
        sizes = sorted(abs(a - b) for a, b in zip(policy, engine, strict=True))
        assert sizes, "the probe has no tokens"
        return cls(sum(sizes) / len(sizes), sizes[min(len(sizes) - 1, int(0.99 * len(sizes)))], sizes[-1])

    def problem(self, exact: bool, fp8: bool = False) -> str | None:
        """What is out of bounds, if anything. NaN is. `exact`: both sides FP32. `fp8`: the policy computes in FP8."""
        if not math.isfinite(self.mean):  # NaN has no place in an order: `max` may not show it
            good, limit = False, "they must be finite"
        elif exact:
            good, limit = self.max <= EXACT_MAX, f"limit {EXACT_MAX:g} on the largest (FP32)"
        else:
            mean, p99, kind = (FP8_MEAN, FP8_P99, "FP8") if fp8 else (ROUNDED_MEAN, ROUNDED_P99, "bf16")
            good = self.mean <= mean and self.p99 <= p99
            limit = f"limits {mean:g} on the mean, {p99:g} on the 99th percentile ({kind})"
        return (
            None
            if good
            else (
                f"its log-probs of a fixed text differ from the policy's by {self.mean:.2g} in the mean, "
                f"{self.p99:.2g} at the 99th percentile, {self.max:.2g} at most; {limit}"
            )
        )
