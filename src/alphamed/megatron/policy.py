"""The policy that is trained and the frozen reference: log-probs of a batch, and updates from it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from alphamed.batching import attach
from alphamed.config.choices import ReferencePlace
from alphamed.config.schema import Config
from alphamed.megatron import provider
from alphamed.megatron.gpt import PolicyModel
from alphamed.megatron.offload import OffloadedWeights
from alphamed.megatron.runtime import Runtime, memory_metrics, own_group
from alphamed.megatron.step import Sums, apply_gradients, forward_backward, forward_logprobs, learning_rate
from alphamed.model.shape import ModelShape
from alphamed.records import Batch, Layout, MicroBatch, Segment
from alphamed.rundir.profiling import stage

UpdateStats = dict[str, float]


class UpdateError(RuntimeError):
    """Training cannot go on: gradients stay non-finite."""


@dataclass(slots=True)
class TrainingProgress:
    """What else continues besides weights and optimizer state; part of a checkpoint."""

    steps: int = 0  # calls of Policy.update: sets the learning rate
    skipped_in_a_row: int = 0  # updates without a finite gradient, up to now


class Policy:
    """A Megatron model with gradients and optimizer, spread over all trainer ranks. Every rank calls every method.

    Its weights are random at first. After writing others into `model_chunks()` call `weights_changed()`."""

    def __init__(self, config: Config, shape: ModelShape, runtime: Runtime) -> None:
        self.config, self.shape, self.runtime = config, shape, runtime
        self._chunks = provider.build_model(config, shape, runtime)
        self._wrapped = provider.wrap_gradients(config, self._chunks)
        self.optimizer = provider.build_optimizer(config, self._wrapped)
        self.progress = TrainingProgress()

    # ---------------------------------------------------------------------------------------------------------- training
    @stage("logprobs")
    def logprobs(self, batch: Batch) -> Batch:
        """The batch with `old_logprobs` ([T] float32 on the CPU, 0 outside the responses) on the last stage, None on the
        others."""
        return attach(batch, "old_logprobs", _logprobs(self._wrapped, batch, self.runtime))

    @stage("update")
    def update(self, batch: Batch) -> UpdateStats:
        """One optimizer step per mini-batch. Returns metrics, the same on all ranks.

        An update whose gradient is not finite is skipped and counted (see `require_finite`).
        """
        start, lr = time.perf_counter(), learning_rate(self.progress.steps, self.config)
        sums, norms = [], []
        for mini in batch.mini_batches:
            sums.append(forward_backward(self._wrapped, mini, self.layout, self.runtime.device, self.config))
            norms.append(apply_gradients(self.optimizer, lr))
            self.progress.skipped_in_a_row = 0 if norms[-1] is not None else self.progress.skipped_in_a_row + 1
        self.progress.steps += 1
        statistics = _statistics(sums, norms, lr, self._largest(time.perf_counter() - start))
        if self.config.sft is None:
            statistics |= _policy_statistics(sums)
        return statistics | {name: self._largest(value) for name, value in memory_metrics(self.runtime).items()}

    def require_finite(self) -> None:
        """Raises UpdateError on all ranks where the last updates, more than `optimizer.max_skipped_steps` of them, had no
        finite gradient. Not part of `update`, so that the bad step is recorded and its batch kept before the run ends."""
        skipped, limit = self.progress.skipped_in_a_row, self.config.optimizer.max_skipped_steps
        if skipped > limit:
            raise UpdateError(
                f"training step {self.progress.steps}: the gradient was not finite in {skipped} updates in a "
                f"row (optimizer.max_skipped_steps is {limit}); lower optimizer.lr or look at the step's "
                f"batch in dumps/"
            )

    def _largest(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        largest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.runtime.cpu_group)
        return largest.item()

    def score(self, tokens: Sequence[int]) -> list[float] | None:
        """Log-probs (temperature 1) of tokens[1:], each given those before it; None where the last stage is not."""
        heads = [chunk.head for chunk in self._chunks]
        for chunk, head in zip(self._chunks, heads, strict=True):
            chunk.head = replace(head, temperature=1.0)
        try:
            row = _plain_row(tokens, self.layout.token_multiple)
            (logprobs,) = forward_logprobs(self._wrapped, [row], self.layout, self.runtime.device)
        finally:
            for chunk, head in zip(self._chunks, heads, strict=True):
                chunk.head = head
        return None if logprobs is None else logprobs[row.mask].tolist()

    # ------------------------------------------------------------------------------------------- for weights/ and checkpoints
    @property
    def layout(self) -> Layout:
        return self.runtime.layout

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        return own_group(parallel_state.get_tensor_model_parallel_group())

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        return own_group(parallel_state.get_pipeline_model_parallel_group())

    def model_chunks(self) -> list[PolicyModel]:
        """This rank's GPTModel chunks without wrappers, one per virtual stage."""
        return self._chunks

    def weights_changed(self) -> None:
        """Take the optimizer's FP32 copies from the parameters again. Needed after parameters were written directly."""
        self.optimizer.reload_model_params()


class Reference:
    """The frozen starting point: the same layout as the policy's, no gradients, no optimizer. With `parallel.reference:
    offloaded` its weights are on the device only while `logprobs` runs.

    Its weights are random at first. After writing others into `model_chunks()` call `weights_changed()`."""

    def __init__(self, config: Config, shape: ModelShape, runtime: Runtime) -> None:
        self.shape, self.runtime = shape, runtime
        self._offloaded = config.parallel.reference == ReferencePlace.OFFLOADED
        self._weights: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        self._chunks = provider.build_model(config, shape, runtime)
        for chunk in self._chunks:
            chunk.requires_grad_(False).eval()
        self._wrapped = provider.wrap_precision(self._chunks)

    def model_chunks(self) -> list[PolicyModel]:
        return self._chunks

    def weights_changed(self) -> None:
        """The weights are those to keep: where they are offloaded they leave the device now, for good but for `logprobs`."""
        if self._offloaded:
            self._weights = OffloadedWeights(self._chunks)

    @stage("reference")
    def logprobs(self, batch: Batch) -> Batch:
        """The batch with `reference_logprobs` as Policy.logprobs gives old ones."""
        with self._weights:
            return attach(batch, "reference_logprobs", _logprobs(self._wrapped, batch, self.runtime))


class NoReference:
    """In place of the reference where the KL coefficient is 0."""

    def logprobs(self, batch: Batch) -> Batch:
        return batch


def _logprobs(chunks: Sequence[torch.nn.Module], batch: Batch, runtime: Runtime) -> list[list[torch.Tensor | None]]:
    return [forward_logprobs(chunks, mini.micro_batches, runtime.layout, runtime.device) for mini in batch.mini_batches]


def _plain_row(tokens: Sequence[int], multiple: int) -> MicroBatch:
    """One sequence, every next token of which is scored."""
    length = len(tokens) - 1
    padding = -length % multiple
    mask = torch.arange(length + padding) < length
    none = torch.zeros(length + padding)
    return MicroBatch(
        tokens=torch.tensor([*tokens[:-1], *[0] * padding]),
        labels=torch.tensor([*tokens[1:], *[0] * padding]),
        positions=torch.cat([torch.arange(length), torch.arange(padding)]),
        mask=mask,
        sequence=mask.long() - 1,
        rollout_logprobs=none,
        advantages=none,
        samples=((0, 0),),
        segments=(Segment(length), Segment(padding)) if padding else (Segment(length),),
    )


def _token_mean(sums: Sequence[Sums], name: str) -> float:
    return sum(getattr(s, name) for s in sums) / sum(s.tokens for s in sums)


def _statistics(sums: Sequence[Sums], norms: Sequence[float | None], lr: float, seconds: float) -> UpdateStats:
    """Metrics of a step from those of its updates, whatever the loss: token means over all of them, the mean loss and
    gradient norm."""
    taken = [n for n in norms if n is not None]
    return {
        "policy/loss": sum(s.loss for s in sums) / len(sums),
        "policy/entropy": _token_mean(sums, "entropy"),
        "policy/grad_norm": sum(taken) / len(taken) if taken else math.nan,
        "policy/lr": lr,
        "policy/skipped_updates": float(len(norms) - len(taken)),
        "time/update_s": seconds,
        "throughput/trained_tokens_per_s": sum(s.tokens for s in sums) / seconds,
    }


def _policy_statistics(sums: Sequence[Sums]) -> UpdateStats:
    """Metrics of policy losses: the policy against the weights that sampled, those before the update, and the reference."""
    return {
        "policy/kl": _token_mean(sums, "kl"),
        "policy/clip_fraction": _token_mean(sums, "clipped"),
        "policy/corrected_fraction": _token_mean(sums, "corrected"),
        "policy/ratio_mean": _token_mean(sums, "ratio"),
        "policy/ratio_max": max(s.ratio_max for s in sums),
        "policy/approx_kl": _token_mean(sums, "approx_kl"),
        "policy/logprob_diff_mean": _token_mean(sums, "logprob_diff"),
        "policy/logprob_diff_max": max(s.logprob_diff_max for s in sums),
    }
