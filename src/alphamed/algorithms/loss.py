"""Policy losses, KL estimators and token weights: pure functions of packed [T] tensors.

**Conventions.** T are the label positions of one packed row. `sequence` is the response that a label belongs to, or -1 for none
(prompt, padding). Other tensors are ignored there, including NaN. Log-probs are natural logarithms of the sampling
distribution. A loss is an unnormalised sum over tokens, each times its weight:

    loss = sum over micro-batches and ranks of (loss_sum + kl_coefficient * weighted_sum(kl, weights)) / normalizer

The result therefore does not depend on how the batch is split. Use `token_weights` and `normalizer` together.

**Overflow.** Differences of log-probs are limited to +-20 before exp(). e^20 = 4.9e8 is far outside every clipping range, and
beyond it exp() soon overflows and its gradient becomes NaN. A limited token has no gradient. Non-finite log-probs are not
limited: they make the loss NaN, which the caller's check for a finite loss must detect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over the response tokens of one micro-batch. Add them up over micro-batches and ranks, but take the maximum of
    `ratio_max`. All are scalars, and only `loss_sum` has a gradient. The ratio is pi / pi_old, per token (`clip`, `cispo`) or
    per sequence and repeated over its tokens (`gspo`)."""

    loss_sum: Float[Tensor, ""]
    clipped_tokens: Float[Tensor, ""]  # tokens whose ratio the clipping changed
    ratio_sum: Float[Tensor, ""]
    ratio_max: Float[Tensor, ""]  # 0 where there is no response token
    drift_sum: Float[Tensor, ""]  # k3 estimate of KL(pi_old || pi), token by token
    tokens: Float[Tensor, ""]


def policy_loss(
    logprobs: Float[Tensor, " T"],
    old_logprobs: Float[Tensor, " T"],
    advantages: Float[Tensor, " T"],
    weights: Float[Tensor, " T"],
    sequence: Int[Tensor, " T"],
    kind: str,
    clip_low: float,
    clip_high: float,
    correction: Float[Tensor, " T"] | None = None,
) -> LossTerms:
    """The policy-gradient loss of one packed row, with r = pi / pi_old and [r] = r clipped to [1 - clip_low, 1 + clip_high]:

    - `clip`: -min(r A, [r] A), with r of the token. This is PPO's loss with the separate bounds of DAPO (2503.14476).
    - `gspo`: the same with r = (pi(response) / pi_old(response))^(1 / length), equal for all tokens of a response
      (2507.18071). With `sequence_mean` weights each response counts once, as in the paper.
    - `cispo`: -stop_gradient([r]) A log pi, with r of the token. No token loses its gradient (2506.13585). The paper has no
      lower bound, which is clip_low >= 1.

    `advantages` repeat a response's advantage over its tokens. `weights` come from `token_weights`. `correction` (see
    correction.py) multiplies the term of each token. `old_logprobs` are constants; for the first update of a batch pass
    `logprobs.detach()`, which makes the ratio 1.

    Raises ValueError for an unknown kind.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss: unknown kind {kind!r}; choose one of {', '.join(LOSSES)}")
    mask = sequence >= 0
    logprobs = torch.where(mask, logprobs, 0.0)
    log_ratio = logprobs - torch.where(mask, old_logprobs, 0.0).detach()
    advantages = torch.where(mask, advantages, 0.0)
    terms, ratio, clipped = LOSSES[kind](logprobs, log_ratio, advantages, sequence, clip_low, clip_high)
    if correction is not None:
        terms = terms * torch.where(mask, correction, 0.0).detach()
    return LossTerms(loss_sum=weighted_sum(terms, weights), **_statistics(log_ratio, ratio, clipped, mask))


def supervised_loss(logprobs: Float[Tensor, " T"], weights: Float[Tensor, " T"]) -> Float[Tensor, ""]:
    """Cross entropy with given responses: the sum of -log pi(token | tokens before it), each times its weight.

    With `token_mean` weights and their `normalizer`, it is the mean over all response tokens of all ranks and micro-batches
    of an optimizer step. transformers computes the same with `num_items_in_batch` (loss/loss_utils.py, ForCausalLMLoss), and
    Megatron with calculate_per_token_loss. A mean of micro-batch means would give tokens of short rows more weight.
    """
    return -weighted_sum(logprobs, weights)


# ----------------------------------------------------------------------------------------------------------- the losses
# Each takes (logprobs, log_ratio, advantages, sequence, clip_low, clip_high) and gives the terms [T], the ratios [T]
# and whether clipping changed the token's term [T].
def _clip(logprobs, log_ratio, advantages, sequence, clip_low, clip_high) -> tuple[Tensor, Tensor, Tensor]:
    return _clipped_surrogate(_exp(log_ratio), advantages, clip_low, clip_high)


def _gspo(logprobs, log_ratio, advantages, sequence, clip_low, clip_high) -> tuple[Tensor, Tensor, Tensor]:
    ratio = _exp(_sequence_mean(log_ratio, sequence))
    return _clipped_surrogate(ratio, advantages, clip_low, clip_high)


def _cispo(logprobs, log_ratio, advantages, sequence, clip_low, clip_high) -> tuple[Tensor, Tensor, Tensor]:
    ratio = _exp(log_ratio)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -bounded.detach() * advantages * logprobs, ratio, (bounded != ratio) & (advantages != 0)


LOSSES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {"clip": _clip, "gspo": _gspo, "cispo": _cispo}


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    free = ratio * advantages
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return -torch.minimum(free, bounded), ratio, bounded < free


# -------------------------------------------------------------------------------------------------------- KL estimators
def kl_penalty(logprobs: Float[Tensor, " T"], reference_logprobs: Float[Tensor, " T"], kind: str) -> Float[Tensor, " T"]:
    """Estimates of KL(pi || reference) from the sampled tokens (Schulman, "Approximating KL divergence", 2020), [T].

    With d = log reference - log pi, where the reference is constant and the gradient flows through log pi:

    - `k1`: -d. Unbiased. Its own gradient is 0 in expectation, so as a loss term it only adds noise.
    - `k2`: d^2 / 2. Biased. Its gradient is that of the KL for samples of pi.
    - `k3`: exp(d) - d - 1. Unbiased and never negative; used by GRPO (2402.03300, eq. 4). Its gradient is that of
      KL(reference || pi). d is limited to +-20.

    Positions outside the responses are undefined: sum with `weighted_sum`, which ignores them.
    """
    difference = reference_logprobs.detach() - logprobs
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return _k3(difference)
    raise ValueError(f"KL estimator: unknown kind {kind!r}; choose one of k1, k2, k3")


def _k3(difference: Tensor) -> Tensor:
    bounded = _bounded(difference)
    return torch.expm1(bounded) - bounded


# ---------------------------------------------------------------------------------------------------------- aggregation
def token_weights(
    sequence: Int[Tensor, " T"], aggregation: str, constant: int | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " T"]:
    """Weight of every label position in the sum that `normalizer` divides. It is 0 outside the responses.

    - `token_mean`: 1. Every token of the mini-batch counts the same (DAPO).
    - `sequence_mean`: 1 / length. Every response counts the same (GRPO).
    - `constant`: 1 / constant. A response counts in proportion to its length (Dr.GRPO).

    A whole response must be in one row, because `sequence_mean` takes its length from the row.
    """
    mask = sequence >= 0
    if aggregation == "token_mean":
        return mask.to(dtype)
    if aggregation == "sequence_mean":
        return mask.to(dtype) / _lengths(sequence, dtype)
    if aggregation == "constant":
        if not constant or constant < 0:
            raise ValueError(f"aggregation constant: needs a positive number of tokens, not {constant}")
        return mask.to(dtype) / constant
    raise ValueError(f"aggregation: unknown kind {aggregation!r}; choose one of token_mean, sequence_mean, constant")


def normalizer(aggregation: str, response_tokens: int, sequences: int) -> int:
    """The divisor of the global sum of weighted terms, from the global counts of the mini-batch."""
    if aggregation == "token_mean":
        return response_tokens
    if aggregation in ("sequence_mean", "constant"):
        return sequences
    raise ValueError(f"aggregation: unknown kind {aggregation!r}; choose one of token_mean, sequence_mean, constant")


def weighted_sum(values: Float[Tensor, " T"], weights: Float[Tensor, " T"]) -> Float[Tensor, ""]:
    """Sum of values x weights. Where the weight is 0, the value is ignored and its gradient is exactly 0."""
    return (torch.where(weights != 0, values, 0.0) * weights).sum()


# -------------------------------------------------------------------------------------------------------------- helpers
def _bounded(difference: Tensor) -> Tensor:
    """A finite difference of log-probs cut to +-20; one that is not finite becomes NaN, so that it shows."""
    return torch.where(torch.isfinite(difference), difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), torch.nan)


def _exp(log_ratio: Tensor) -> Tensor:
    return _bounded(log_ratio).exp()


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """Sum of `values` over each response, repeated over its tokens; 0 outside."""
    mask, index = sequence >= 0, sequence.clamp(min=0)
    bins = values.new_zeros(len(sequence))  # every response has a token, so T labels hold at most T responses
    sums = bins.index_add(0, index, torch.where(mask, values, 0.0))
    return torch.where(mask, sums[index], 0.0)


def _lengths(sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens of the response each label belongs to; 1 outside, so that it can be divided by."""
    return sequence_sum(torch.ones_like(sequence, dtype=dtype), sequence).clamp(min=1)


def _sequence_mean(values: Tensor, sequence: Tensor) -> Tensor:
    """Mean of `values` over each response, repeated over its tokens; 0 outside."""
    return sequence_sum(values, sequence) / _lengths(sequence, values.dtype)


@torch.no_grad()
def _statistics(
    log_ratio: Float[Tensor, " T"], ratio: Float[Tensor, " T"], clipped: Bool[Tensor, " T"], mask: Bool[Tensor, " T"]
) -> dict[str, Tensor]:
    return {
        "clipped_tokens": (clipped & mask).sum().to(ratio.dtype),
        "ratio_sum": torch.where(mask, ratio, 0.0).sum(),
        "ratio_max": torch.where(mask, ratio, 0.0).max() if len(ratio) else ratio.new_zeros(()),
        "drift_sum": torch.where(mask, _k3(log_ratio), 0.0).sum(),
        "tokens": mask.sum().to(ratio.dtype),
    }
