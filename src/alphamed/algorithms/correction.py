"""Importance weights for sampling from other log-probs than the trainer's: the engine's numerics, or older weights."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alphamed.algorithms.loss import sequence_sum

CORRECTIONS = ("tis", "mis", "mis_sequence")


@torch.no_grad()
def importance_weights(
    old_logprobs: Float[Tensor, " T"],
    rollout_logprobs: Float[Tensor, " T"],
    sequence: Int[Tensor, " T"],
    kind: str,
    floor: float,
    cap: float,
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """The weight of every token's term in the loss, without gradient, and where it is not the ratio itself.

    `old_logprobs` are those of the weights that the update starts from, as the trainer computes them, `rollout_logprobs`
    those that the token was sampled with; natural logarithms. With w = pi_old / pi_rollout of a token:

      tis           min(w, cap). Truncated importance sampling (Ionides 2008; for engines: Yao et al., "Your Efficient RL
                    Framework Secretly Brings You Off-Policy RL Training", 2025).
      mis           w inside [floor, cap], else 0: the token is masked. IcePop (2510.18855), there with [0.5, 5].
      mis_sequence  W inside [floor, cap], else 0, where W is the product of w over the response: the response is masked.
                    Liu et al., "When Speed Kills Stability", 2025 (there without a floor). The product of many tokens leaves
                    narrow bounds soon: for responses of hundreds of tokens begin with `mis`.

    Positions outside the responses (`sequence` -1) get 0. The bounds are applied to the exponent, so a large difference
    gives the cap or 0 and never inf; NaN stays NaN. Masked tokens still count in what the loss is divided by.
    """
    if kind not in CORRECTIONS:
        raise ValueError(f"correction: unknown kind {kind!r}; choose one of {', '.join(CORRECTIONS)}")
    if not cap > 0:
        raise ValueError(f"correction cap: {cap} is not positive; 2 is usual")
    if kind != "tis" and not 0 <= floor < cap:
        raise ValueError(f"correction floor: {floor} is not between 0 and the cap, {cap}; 0.5 is usual")
    inside = sequence >= 0
    log_ratio = torch.where(inside, old_logprobs - rollout_logprobs, 0.0)
    if kind == "mis_sequence":
        log_ratio = sequence_sum(log_ratio, sequence)
    beyond = log_ratio > math.log(cap)
    if kind != "tis":
        beyond |= log_ratio < (math.log(floor) if floor else -math.inf)
    bounded = log_ratio.clamp(max=math.log(cap)).exp()
    weights = bounded if kind == "tis" else torch.where(beyond, 0.0, bounded)
    return torch.where(inside, weights, 0.0), beyond & inside
