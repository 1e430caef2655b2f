"""The typed values that flow through a training step, and the shape legend of the whole project.

Names and docstrings use these shape suffixes everywhere:

- `P`: questions in a step
- `G`: samples (responses) of one question
- `S`: responses in a batch
- `T`: packed tokens of a micro-batch
- `R`: tokens of one response
- `V`: local vocabulary shard
- `H`: hidden size

**Alignment.** Position t of a packed row predicts `labels[t]`, the next token of its sequence. Masks, log-probs, advantages and
every other per-token tensor are aligned to `labels`, never to `tokens`.

**Log-probs** are always those of the sampling distribution: log softmax(logits / temperature), in FP32, natural logarithm.

This module imports neither torch nor numpy at run time, so that the command line and the data tools start quickly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# ------------------------------------------------------------------------------------------------ questions and rollouts
@dataclass(frozen=True, slots=True)
class Question:
    """One multiple-choice question. `options` maps letters to texts, in order. `level` is the difficulty from 1 (easy) to 6.
    `informativeness` is a bin from 1 (little)."""

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    context: str | None = None
    source: str | None = None
    level: int | None = None
    informativeness: int | None = None


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """The model ended its answer."""
    LENGTH = "length"
    """The token limit cut it."""
    ABORT = "abort"
    """The engine was asked to stop."""

    @property
    def truncated(self) -> bool:
        """Whether the response was cut, however it is graded."""
        return self != FinishReason.STOP


class Outcome(StrEnum):
    """The result of grading a response. A grader's own failure is TIMEOUT or CRASH, never WRONG."""

    CORRECT = "correct"
    """The box states the right letter."""
    WRONG = "wrong"
    """The box states another letter."""
    UNPARSEABLE = "unparseable"
    """There is no readable box."""
    TRUNCATED = "truncated"
    """The token limit cut the response, which was not graded."""
    TIMEOUT = "timeout"
    """The reward function took too long."""
    CRASH = "crash"
    """The reward function failed."""

    @property
    def boxed(self) -> bool:
        """Whether the response ended in time with a readable answer, right or wrong."""
        return self in (Outcome.CORRECT, Outcome.WRONG)

    @property
    def failed(self) -> bool:
        """Whether the grader failed, so that the response has no reward."""
        return self in (Outcome.TIMEOUT, Outcome.CRASH)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine samples one request. Sample j of a request uses `seed` + j; `None` uses the engine's own generator.
    Temperature 0 is greedy."""

    n: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """One question to be answered `sampling.n` times. The coordinator sends it to an engine."""

    group_id: str
    question: Question
    prompt_token_ids: tuple[int, ...]
    sampling: Sampling
    evaluation: bool = False
    """Grade by whether the answer is right, whatever reward training uses."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response. `logprobs[i]` belongs to `response_token_ids[i]` (the end-of-text token included)."""

    group_id: str
    question_id: str
    sample_index: int
    response_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All responses to one question of one step; they share a prompt and a `group_id`."""

    group_id: str
    question: Question
    prompt_token_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A graded group. `outcomes`, `rewards`, `advantages` and `letters` (the extracted answer, None if unparseable) have one
    element for each of `group.rollouts`. Rewards are those of the reward function; the length penalty is part of the
    advantages only."""

    group: RolloutGroup
    outcomes: tuple[Outcome, ...]
    rewards: tuple[float, ...]
    advantages: tuple[float, ...]
    letters: tuple[str | None, ...]
    grading_s: float = 0.0

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from 0, so that the group changes the policy."""
        return any(advantage != 0 for advantage in self.advantages)


# -------------------------------------------------------------------------------------------------- what training consumes
@dataclass(frozen=True, slots=True)
class TokenGroup:
    """The tensors of a prompt and its responses, which are sampled and scored or examples to imitate. Equal on every rank."""

    prompt: Tensor  # [prompt tokens] int64
    responses: tuple[Tensor, ...]  # G x [R_j] int64
    rollout_logprobs: tuple[Tensor, ...]  # G x [R_j] float32
    advantages: Tensor  # [G] float32
    policy_version: int
    trained: tuple[Tensor, ...] | None = None  # G x [R_j] bool: tokens with a loss; None: all


@dataclass(frozen=True, slots=True)
class StepRollouts:
    """The groups of one step. `groups` is the same on all ranks. `scored` (texts, outcomes) and `metrics` exist only on rank 0
    and are empty elsewhere."""

    step: int
    groups: tuple[TokenGroup, ...]
    scored: tuple[ScoredGroup, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the trainer's parallel dimensions and this rank's position in them. Ranks are in Megatron's default order
    `tp-cp-ep-dp-pp`: tensor ranks are adjacent, and pipeline stages are farthest apart."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    tensor_rank: int = 0
    pipeline_rank: int = 0
    data_rank: int = 0
    context: int = 1
    context_rank: int = 0
    part_multiple: int = 1
    """The part of a row that one rank computes has a multiple of this many tokens."""

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def replica(self) -> int:
        """Index of this rank among the ranks with the same parameters."""
        return self.data_rank * self.context + self.context_rank

    @property
    def first_replica(self) -> bool:
        """Whether this rank is the first of the ranks with the same parameters."""
        return self.replica == 0

    @property
    def token_multiple(self) -> int:
        """Packed rows must have a multiple of this many tokens, because context ranks split them and, with sequence parallelism,
        tensor ranks split each part again."""
        return self.context * (self.tensor if self.sequence_parallel else 1) * self.part_multiple


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive packed tokens: a prefix of `prefix` tokens, then continuations. Each continuation attends to the prefix and to
    itself. A plain sequence is a segment without continuations. With `attends_shared_prefix`, all tokens also attend to the
    first segment of the row, which all prompts of the row share (system prompt, worked examples)."""

    prefix: int
    continuations: tuple[int, ...] = ()
    attends_shared_prefix: bool = False

    @property
    def tokens(self) -> int:
        return self.prefix + sum(self.continuations)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row. All tensors are [T]. Entries whose `mask` is False (prompts, padding) are 0.

    With shared prompts, the prefix is the prompt without its last token. Continuation j is that token followed by response j
    without its last token. Every response token therefore has its own label position."""

    tokens: Tensor  # int64
    labels: Tensor  # int64, 0 where mask is False
    positions: Tensor  # int64, position within the sequence
    mask: Tensor  # bool, True at labels that are response tokens with a loss
    sequence: Tensor  # int64, 0..S-1: which response of this micro-batch the label belongs to, -1 elsewhere
    rollout_logprobs: Tensor  # float32
    advantages: Tensor  # float32, the response's advantage repeated over its tokens
    segments: tuple[Segment, ...]
    samples: tuple[tuple[int, int], ...]  # sequence s came from (index of its group in the step, sample index)
    old_logprobs: Tensor | None = None  # float32, the policy's before the first update of the step
    reference_logprobs: Tensor | None = None  # float32

    @property
    def sequences(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The data of one optimizer step. `micro_batches` are those of this data rank (the same number on every rank). The counts
    are global, over all data ranks; the summed loss is divided by one of them."""

    micro_batches: tuple[MicroBatch, ...]
    response_tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The data of a training step on this rank, split into one mini-batch per optimizer step."""

    mini_batches: tuple[MiniBatch, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)  # batch/... of rundir/metrics.py
