"""What a plan is made for: configuration, model shape, machines, and the expected lengths of texts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from alphamed.config.choices import Dtype, ReferencePlace, Transport
from alphamed.config.schema import Config
from alphamed.config.sections import AlgorithmConfig, ParallelConfig, RolloutConfig
from alphamed.model.shape import ModelShape
from alphamed.planner.hardware import Gpu

BYTES = {Dtype.BF16: 2, Dtype.FP32: 4}
EXPECTED_SHARE = 0.25
"""Prompts and responses are planned with this share of their limits where nothing better is known: reasoning of an
instruction-tuned model on medical questions takes 300 to 600 tokens of the usual 2,048."""


@dataclass(frozen=True)
class PlannedJob:
    """`colocated`: engines use the trainer's GPUs, taking turns with it. `overlapped`: the next batch is generated while the
    trainer updates, whatever the configuration says."""

    config: Config
    shape: ModelShape
    gpu: Gpu
    gpus_per_node: int
    nodes: int | None = None  # None: as few as needed
    prompt_tokens: float | None = None  # expected means; None: EXPECTED_SHARE of the limits
    response_tokens: float | None = None
    colocated: bool = False
    overlapped: bool = False
    evaluation_questions: tuple[int, ...] | None = None  # of each evaluation set; None: not known
    responses_per_prompt: float | None = None  # of supervised training, expected mean; None: one

    @property
    def parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def shared(self) -> bool:
        """Whether engines compute on the trainer's GPUs: taking turns with it, or at the same time in the same memory."""
        return self.colocated or (self.config.cluster.share_gpus and not self.gpu.is_cpu)

    @property
    def overlaps(self) -> bool:
        """Whether the next steps are generated while the trainer updates. On shared GPUs and cores each slows the other
        down by as much, so that nothing is gained."""
        return self.overlapped or (
            not self.supervised and self.rollout.max_staleness > 0 and not self.shared and not self.gpu.is_cpu
        )

    @property
    def sync_over_gloo(self) -> bool:
        """Whether weights go from GPUs to the network through host memory."""
        return self.config.sync.transport == Transport.GLOO and not self.gpu.is_cpu and not self.colocated

    @property
    def rollout(self) -> RolloutConfig:
        return self.config.rollout

    @property
    def algorithm(self) -> AlgorithmConfig:
        return self.config.algorithm

    @property
    def virtual(self) -> int:
        return self.parallel.virtual_pipeline or 1

    @property
    def trainer_bytes(self) -> int:
        """Of one parameter or activation of the trainer."""
        return BYTES[self.config.model.dtype]

    @property
    def engine_bytes(self) -> int:
        return BYTES[self.rollout.dtype]

    @property
    def engines(self) -> int:
        return self.rollout.engines if self.config.generates else 0

    @property
    def gpus(self) -> int:
        """All that the run computes on."""
        engines = self.engines * self.rollout.tensor_parallel
        return max(self.parallel.world, engines) if self.shared else self.parallel.world + engines

    @property
    def supervised(self) -> bool:
        """Whether responses are given: nothing is sampled for a step, and engines serve evaluations alone."""
        return self.config.sft is not None

    @property
    def prompts(self) -> int:
        """Prompts of a step."""
        return self.config.sft.prompts_per_step if self.config.sft else self.rollout.questions_per_step

    @property
    def group_size(self) -> float:
        """Responses that share a prompt."""
        return (self.responses_per_prompt or 1.0) if self.supervised else float(self.rollout.samples_per_question)

    @property
    def samples(self) -> int:
        """Responses of a step."""
        return round(self.prompts * self.group_size)

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        return 1 if self.supervised else self.algorithm.mini_batches

    @cached_property
    def mean_prompt(self) -> float:
        return self.prompt_tokens or max(2.0, self.config.prompt.max_tokens * EXPECTED_SHARE)

    @cached_property
    def mean_response(self) -> float:
        return self.response_tokens or max(1.0, self.rollout.max_response_tokens * EXPECTED_SHARE)

    @property
    def reference(self) -> bool:
        return self.algorithm.kl_coefficient > 0 and not self.supervised

    @property
    def offloaded_reference(self) -> bool:
        return self.reference and self.parallel.reference == ReferencePlace.OFFLOADED

    @property
    def logprob_passes(self) -> int:
        """Forward passes over the batch besides the update: old log-probs, the reference's."""
        return 0 if self.supervised else int(self.config.resolved.recompute_old_logprobs) + int(self.reference)
