"""Passes over the micro-batches of a mini-batch through Megatron's pipeline schedules, and the loss they compute.

The loss of a mini-batch is its weighted sum over all tokens of all data ranks, divided here, once, by the global count
known before the backward pass. So neither micro-batches, data ranks, stages nor packing change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from alphamed.algorithms.correction import importance_weights
from alphamed.algorithms.loss import kl_penalty, normalizer, policy_loss, supervised_loss, token_weights, weighted_sum
from alphamed.config.choices import Aggregation, Correction, Schedule
from alphamed.config.schema import Config
from alphamed.megatron.runtime import own_group
from alphamed.megatron.transfer import response_rows, to_device
from alphamed.records import Layout, MicroBatch, MiniBatch, Segment
from alphamed.rundir.profiling import stage


@dataclass(slots=True)
class Sums:
    """Sums over response tokens (the last two: maxima), added up over micro-batches and data ranks."""

    loss: float = 0.0  # divided by the normaliser already
    tokens: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    ratio: float = 0.0
    approx_kl: float = 0.0  # KL(old policy || policy)
    logprob_diff: float = 0.0  # |trainer's old - rollout's|
    corrected: float = 0.0  # tokens whose importance weight was cut or masked
    logprob_diff_max: float = 0.0
    ratio_max: float = 0.0

    MAXIMA = 2

    @classmethod
    def merge(cls, rows: Tensor) -> Tensor:
        """[k, n] float64 rows of one Sums each -> [n]."""
        split = rows.shape[1] - cls.MAXIMA
        return torch.cat([rows[:, :split].sum(0), rows[:, split:].amax(0)])


SUM_NAMES = tuple(f.name for f in fields(Sums))


# ------------------------------------------------------------------------------------------------------------------- loss
def micro_loss(
    micro: MicroBatch, logprobs: Tensor, entropy: Tensor, divisor: float, config: Config
) -> tuple[Tensor, Tensor]:
    """The micro-batch's share of the mini-batch's loss, and its sums as [n] float64.

    logprobs, entropy: [n] float32 at the response tokens, in row order. divisor: the mini-batch's global normaliser.
    """
    a, rows = config.algorithm, response_rows(micro.mask, logprobs.device)
    rollout, sequence = micro.rollout_logprobs[rows], micro.sequence[rows]
    # Without recomputed ones this is the first update of the step: the old policy is the current one, the ratio 1.
    old = logprobs.detach() if micro.old_logprobs is None else micro.old_logprobs[rows]
    weights = token_weights(sequence, a.aggregation, config.resolved.constant_tokens)
    correction, cut = None, logprobs.new_zeros(())
    if config.resolved.correction != Correction.NONE:
        correction, cut = importance_weights(
            old, rollout, sequence, config.resolved.correction, a.correction_floor, a.correction_cap
        )
    terms = policy_loss(
        logprobs, old, micro.advantages[rows], weights, sequence, a.loss, a.clip_low, a.clip_high, correction
    )
    total, kl_sum = terms.loss_sum, logprobs.new_zeros(())
    if micro.reference_logprobs is not None:
        kl = kl_penalty(logprobs, micro.reference_logprobs[rows], a.kl_estimator)
        total = total + a.kl_coefficient * weighted_sum(kl, weights)
        kl_sum = kl.detach().sum()
    loss = total / divisor
    difference = (old - rollout).abs()
    worst = difference.max() if len(difference) else difference.new_zeros(())
    sums = {
        "loss": loss,
        "tokens": terms.tokens,
        "kl": kl_sum,
        "entropy": entropy.sum(),
        "clipped": terms.clipped_tokens,
        "ratio": terms.ratio_sum,
        "approx_kl": terms.approx_kl_sum,
        "logprob_diff": difference.sum(),
        "corrected": cut.sum(),
        "logprob_diff_max": worst,
        "ratio_max": terms.ratio_max,
    }
    return loss, _sums_row(sums)


def supervised_micro_loss(micro: MicroBatch, logprobs: Tensor, entropy: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """`micro_loss` of given responses. divisor: response tokens of the mini-batch, over all data ranks."""
    weights = token_weights(micro.sequence[micro.mask], Aggregation.TOKEN_MEAN)
    loss = supervised_loss(logprobs, weights) / divisor
    return loss, _sums_row({"loss": loss, "tokens": weights.sum(), "entropy": entropy.sum()})


def _sums_row(sums: Mapping[str, Tensor]) -> Tensor:
    """[n] float64 without gradient: the scalars in the order of `Sums`, 0 for those that are not given."""
    absent = sums["loss"].new_zeros(())
    return torch.stack([sums.get(name, absent).detach().double() for name in SUM_NAMES])


# ----------------------------------------------------------------------------------------------------------------- passes
@torch.no_grad()
def forward_logprobs(
    chunks: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], layout: Layout, device: torch.device
) -> list[Tensor | None]:
    """[T] float32 CPU log-probs of every micro-batch, 0 outside the responses; None on all but the last stage."""

    def collect(micro, output, non_loss_data=True):
        return output[0]

    def over_row(micro: MicroBatch, values: Tensor) -> Tensor:
        full = torch.zeros(len(micro.tokens))
        full[micro.mask] = values.cpu()
        return full

    logprobs = _run(chunks, micro_batches, layout, device, collect, forward_only=True)
    if not logprobs:
        return [None] * len(micro_batches)
    # once all rows are under way: fetching a row's values waits for the device
    return [over_row(micro, values) for micro, values in zip(micro_batches, logprobs)]


@stage("forward_backward")
def forward_backward(
    chunks: Sequence[DistributedDataParallel], mini: MiniBatch, layout: Layout, device: torch.device, config: Config
) -> Sums:
    """Gradients of the mini-batch's loss, complete and reduced in the gradient buffers, and its sums on every rank."""
    supervised = config.sft is not None
    aggregation = Aggregation.TOKEN_MEAN if supervised else config.algorithm.aggregation
    divisor = normalizer(aggregation, mini.response_tokens, mini.sequences)

    def loss(micro, output):
        logprobs, entropy = output
        if supervised:
            value, sums = supervised_micro_loss(micro, logprobs, entropy, divisor)
        else:
            value, sums = micro_loss(micro, logprobs, entropy, divisor, config)
        return value, torch.tensor(0, dtype=torch.int), sums  # Megatron's own token count is not used

    for chunk in chunks:
        chunk.zero_grad_buffer()
    sums = _run(chunks, mini.micro_batches, layout, device, loss, forward_only=False)
    return Sums(*_reduce(sums, device).tolist())


def _run(chunks, micro_batches, layout: Layout, device: torch.device, finish, forward_only: bool) -> list:
    """One pass of the schedule. `finish(micro, output)` runs on the last stage; its results come back in order."""
    rows = [*micro_batches, *_idle(len(micro_batches), layout)]

    def forward_step(rows_left: Iterator[MicroBatch], chunk):
        micro = to_device(next(rows_left), device)
        return chunk(micro), partial(finish, micro)

    many = len(chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in chunks] if many else iter(rows),
        model=list(chunks) if many else chunks[0],
        num_microbatches=len(rows),
        seq_length=max(len(m.tokens) for m in rows),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _idle(present: int, layout: Layout) -> list[MicroBatch]:
    """Micro-batches that train nothing: the interleaved schedule takes a multiple of the stages. `batching.pack` fills up to
    one; a single row that is only scored is not."""
    missing = -present % layout.pipeline if layout.virtual_pipeline else 0
    tokens = layout.token_multiple
    zero, none = torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens)
    idle = MicroBatch(
        tokens=zero,
        labels=zero,
        positions=torch.arange(tokens),
        mask=zero.bool(),
        sequence=zero - 1,
        rollout_logprobs=none,
        advantages=none,
        segments=(Segment(tokens),),
        samples=(),
    )
    return [idle] * missing


def _reduce(sums: list[Tensor], device: torch.device) -> Tensor:
    """The totals over all micro-batches of all data ranks, on every rank. `sums`: one row a micro-batch, on the last stage."""
    data = own_group(parallel_state.get_data_parallel_group())
    stages = own_group(parallel_state.get_pipeline_model_parallel_group())
    totals = torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device)
    if sums:
        totals = Sums.merge(torch.stack(sums).to(device))
        split = len(totals) - Sums.MAXIMA
        dist.all_reduce(totals[:split], group=data)
        dist.all_reduce(totals[split:], op=dist.ReduceOp.MAX, group=data)
    if dist.get_world_size(stages) > 1:
        dist.broadcast(totals, src=dist.get_process_group_ranks(stages)[-1], group=stages)
    return totals.cpu()


# -------------------------------------------------------------------------------------------------------------- optimizer
@stage("optimizer")
def apply_gradients(optimizer: ChainedOptimizer, lr: float) -> float | None:
    """One optimizer step at learning rate `lr`, gradients clipped to the configured norm. Returns the norm before
    clipping, or None where it is not finite: then parameters and optimizer state are left as they were. The norm is the
    same on all ranks, so all of them step or none does."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    overflow = optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    finite = math.isfinite(norm) and not overflow
    if finite:
        for part in optimizer.chained_optimizers:
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32([*parameters], max_norm=part.config.clip_grad, total_norm=norm)
        optimizer.step_with_ready_grads()
    optimizer.zero_grad()  # without the distributed optimizer the next backward pass would add to these gradients
    return norm if finite else None


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of training step `step` (from 0): a linear rise that reaches `lr` in the last warm-up step, then the
    schedule, which would reach `min_lr` in the step after the last."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.schedule == Schedule.CONSTANT:
        return o.lr
    done = min(1.0, (step - o.warmup_steps) / max(1, config.run.steps - o.warmup_steps))
    left = 1 - done if o.schedule == Schedule.LINEAR else 0.5 * (1 + math.cos(math.pi * done))
    return o.min_lr + (o.lr - o.min_lr) * left
