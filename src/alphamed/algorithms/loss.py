"""Policy losses, KL estimators and token weights: pure functions of packed [T] tensors.

Conventions. T are the label positions of one packed row. `sequence` holds the response that a label belongs to, -1 where it
belongs to none (prompt, padding); what the other tensors hold there is ignored, NaN included. Log-probs are natural
logarithms of the sampling distribution. A loss comes back as an unnormalised sum over tokens, each times its weight:

    loss = sum over micro-batches and ranks of (loss_sum + kl_coefficient * weighted_sum(kl, weights)) / normalizer

so the result does not depend on how the batch is cut. `token_weights` and `normalizer` belong together.

Numbers. Differences of log-probs enter exp() cut to +-20: e^20 = 4.9e8 is far outside every clipping range, and beyond
it exp() soon overflows and its gradient turns into NaN. A cut token has no gradient. Log-probs that are not finite are
not cut: they make the loss NaN, which the caller's check for a finite loss must find.
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
    """Sums over the response tokens of one micro-batch, to be added up over micro-batches and ranks (of `ratio_max`
    take the maximum). All are scalars; only `loss_sum` carries a gradient. The ratio is pi / pi_old, per token (`clip`,
    `cispo`) or per sequence and repeated over its tokens (`gspo`)."""

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
    """The policy-gradient loss of one packed row. With r = pi / pi_old, [r] = r cut to [1 - clip_low, 1 + clip_high]:

      clip   -min(r A, [r] A), r of the token. PPO's, with the separate bounds of DAPO (2503.14476).
      gspo   the same with r = (pi(response) / pi_old(response))^(1 / length), the same for all tokens of a response
             (2507.18071). With `sequence_mean` weights each response counts once, as in the paper.
      cispo  -stop_gradient([r]) A log pi, r of the token: no token loses its gradient (2506.13585). The paper leaves
             the lower bound away: clip_low >= 1.

    `advantages` repeat a response's advantage over its tokens; `weights` are those of `token_weights`; `correction`
    (see correction.py) multiplies each token's term. `old_logprobs` are constants: for the first update of a batch pass
    `logprobs.detach()`, which makes the ratio 1. Raises ValueError for an unknown kind.
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

    With `token_mean` weights and their `normalizer` it is the mean over all response tokens of all ranks and micro-batches
    of an optimizer step: what transformers computes with `num_items_in_batch` (loss/loss_utils.py, ForCausalLMLoss), and
    Megatron with calculate_per_token_loss. A mean of the micro-batches' means would weigh tokens of short rows more.
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

    With d = log reference - log pi (a constant reference; the gradient goes through log pi):

      k1  -d                  unbiased; its own gradient is 0 in expectation, so as a loss term it only adds noise
      k2  d^2 / 2             biased; its gradient is that of the KL for samples of pi
      k3  exp(d) - d - 1      unbiased, never negative; GRPO's choice (2402.03300, eq. 4). Its gradient is that of
                              KL(reference || pi)

    d is cut to +-20 in k3. Positions outside the responses are not read: sum with `weighted_sum`.
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
    """Weight of every label position in the sum that `normalizer` divides, 0 outside the responses.

      token_mean     1             every token of the mini-batch counts alike (DAPO)
      sequence_mean  1 / length    every response counts alike (GRPO)
      constant       1 / constant  a response counts by its length, against a fixed one (Dr.GRPO)

    A response must lie in one row as a whole, since `sequence_mean` takes its length from there.
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
    """What the global sum of weighted terms is divided by, given the global counts of the mini-batch."""
    if aggregation == "token_mean":
        return response_tokens
    if aggregation in ("sequence_mean", "constant"):
        return sequences
    raise ValueError(f"aggregation: unknown kind {aggregation!r}; choose one of token_mean, sequence_mean, constant")


def weighted_sum(values: Float[Tensor, " T"], weights: Float[Tensor, " T"]) -> Float[Tensor, ""]:
    """Sum of values x weights; where the weight is 0 the value is not read and gets a gradient of exactly 0."""
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
