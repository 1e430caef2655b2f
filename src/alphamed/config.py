"""Every knob of a run: frozen, nested, validated. `config_file.load_config` reads one YAML file and dotted overrides into it.

Defaults live on the fields and nowhere else. Checks across fields report what is wrong and never rewrite a value; what
follows from other values is a property. A user's mistake raises `ConfigError`, one line naming field, value and mend.
"""
from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alphamed.reward.extraction import extract_answer

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
DottedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class ConfigError(ValueError):
    """A mistake in a configuration: one line naming field, value and mend."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=False,
                              allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------------------------- choices
class Dtype(StrEnum):
    BF16 = "bf16"
    FP32 = "fp32"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Transport(StrEnum):
    AUTO = "auto"
    NCCL = "nccl"
    GLOO = "gloo"


class SyncMode(StrEnum):
    GATHER = "gather"
    DIRECT = "direct"


class Advantage(StrEnum):
    GRPO = "grpo"
    DR_GRPO = "dr_grpo"
    RLOO = "rloo"


class Loss(StrEnum):
    CLIP = "clip"
    GSPO = "gspo"
    CISPO = "cispo"


class KlEstimator(StrEnum):
    K1 = "k1"
    K2 = "k2"
    K3 = "k3"


class Aggregation(StrEnum):
    TOKEN_MEAN = "token_mean"
    SEQUENCE_MEAN = "sequence_mean"
    CONSTANT = "constant"


class Correction(StrEnum):
    AUTO = "auto"
    NONE = "none"
    TIS = "tis"
    MIS = "mis"
    MIS_SEQUENCE = "mis_sequence"


class OnPush(StrEnum):
    WAIT = "wait"
    KEEP = "keep"
    ABORT = "abort"


class PromptTemplate(StrEnum):
    CHAT = "chat"
    RAW = "raw"


class BadRows(StrEnum):
    REFUSE = "refuse"
    SKIP = "skip"


class TruncatedReward(StrEnum):
    NOTHING = "nothing"
    GRADE = "grade"


class OldLogprobs(StrEnum):
    AUTO = "auto"
    RECOMPUTE = "recompute"


class Recompute(StrEnum):
    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


class Schedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class WandbMode(StrEnum):
    OFFLINE = "offline"
    ONLINE = "online"
    OFF = "off"


# --------------------------------------------------------------------------------------------------------------- sections
class RunConfig(Section):
    name: DottedName = "run"
    """Name of the run; its directory is `root/name`."""
    root: Path = Path("runs")
    seed: NonNegative = 1234
    steps: Positive = 100
    """Length of the whole run; learning-rate schedules end here."""
    stop_after: Positive | None = None
    """End after this step although `steps` says more: a run in parts, with the schedule of the whole."""
    time_limit_s: PositiveFloat | None = None
    """No step begins later than this many seconds after the run (or its resume) started."""

    @property
    def last_step(self) -> int:
        return min(self.steps, self.stop_after or self.steps)


class ModelConfig(Section):
    path: str
    """A local Hugging Face folder or a hub name."""
    revision: str | None = None
    """Hub revision (a commit) when `path` is a hub name."""
    cache: Path = Path(".cache/models")
    """Where fetched models are kept."""
    dtype: Dtype = Dtype.BF16
    """Parameter and activation type of the trainer. Optimizer state and gradients are FP32 in either case."""
    fp8: bool = False
    """FP8 matrix products (Transformer Engine, Hopper or newer)."""


class DataConfig(Section):
    train: tuple[Path, ...] = Field(min_length=1)
    """JSONL or Parquet files of questions."""
    bad_rows: BadRows = BadRows.REFUSE
    shuffle_options: bool = True
    """Give the options new letters every epoch, so that a letter can not be learnt in place of an answer."""


class Shot(Section):
    """A worked example put before every question."""
    question: str
    options: dict[str, str]
    response: str


class PromptConfig(Section):
    template: PromptTemplate = PromptTemplate.CHAT
    system: str | None = None
    instruction: str = "Please reason step by step, and put the final answer in \\boxed{}"
    shots: tuple[Shot, ...] = ()
    max_tokens: Positive = 1024
    """Longer prompts are refused when the data is loaded."""


class RolloutConfig(Section):
    questions_per_step: Positive = 256
    samples_per_question: Annotated[int, Field(ge=2)] = 8
    temperature: Annotated[float, Field(ge=0.01, allow_inf_nan=False)] = 1.0      # what vLLM makes of less
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = -1
    max_response_tokens: Positive = 2048
    engines: Positive = 1
    tensor_parallel: Positive = 1
    dtype: Dtype = Dtype.BF16
    kv_cache_bytes: Positive | None = None
    """Size of an engine's KV cache; None lets vLLM take `gpu_memory_utilization` of its GPU."""
    gpu_memory_utilization: Fraction = 0.85
    max_concurrent_requests: Positive = 256
    """Requests an engine works on at once; the coordinator holds the rest."""
    deterministic: bool = False
    """Seed every sample with hash(run, question, sample, step), switch prefix cache and chunked prefill off."""
    replay: Path | None = None
    """A run directory whose recorded rollouts are trained on in place of engines."""
    max_staleness: NonNegative = 0
    """Pushes by which the weights that sampled a response may be older than those it trains. 0: generation and training take
    turns. Above: engines work this many steps ahead while the policy trains; older samples are dropped and counted."""
    on_push: OnPush = OnPush.KEEP
    """What becomes of requests that a push finds under way (max_staleness > 0): they end first (`wait`), go on with the new
    weights (`keep`), or begin anew (`abort`)."""
    start_deadline_s: PositiveFloat = 600.0
    step_deadline_s: PositiveFloat = 1800.0
    """A step's generation must finish within this time; what is missing is named."""


class DynamicSamplingConfig(Section):
    """Groups whose rewards do not differ (all right, all wrong) teach nothing: replace them, ask fewer of them."""
    refills: NonNegative = 0
    """Rounds in which the groups of a step that teach nothing are replaced by others; 9 is DAPO's limit. Ahead of the policy
    (rollout.max_staleness > 0) as many groups as that many whole rounds. Places still empty then keep what was dropped."""
    choose: bool = False
    """Pass over questions that are unlikely to teach, by their level and by what this run has seen of them."""
    half_life_steps: PositiveFloat = 30.0
    """Steps after which an observation counts half, for the policy has changed."""
    annotation_weight: NonNegativeFloat = 5.0
    """Samples that a question's level counts as when the run begins. Levels come from five samples of another model."""
    max_passes: Positive = 10
    """Times in a row that a question can be passed over at most; then it is asked whatever is believed of it."""
    search: Positive = 10
    """Questions looked at for one round of questions, at most, as a multiple of rollout.questions_per_step."""

    @property
    def active(self) -> bool:
        return self.refills > 0 or self.choose


class RewardConfig(Section):
    name: str = "correct"
    """A built-in reward (`correct`, `correct_and_format`) or `module:function`."""
    truncated: TruncatedReward = TruncatedReward.NOTHING
    """What a response that hit the token limit may earn."""
    overlong_buffer_tokens: NonNegative = 0
    """Tokens below rollout.max_response_tokens over which a penalty falls from 0 to -1 (DAPO's soft overlong punishment); 0:
    none."""
    timeout_s: PositiveFloat = 10.0
    workers: Positive = 2
    """Processes that run a user's reward function."""
    max_failure_share: Fraction = 0.02
    """Crashes and time-outs above this share of a step's samples stop the run."""


class AlgorithmConfig(Section):
    advantage: Advantage = Advantage.GRPO
    loss: Loss = Loss.CLIP
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    kl_coefficient: NonNegativeFloat = 0.0
    """0 builds no reference model."""
    kl_estimator: KlEstimator = KlEstimator.K3
    aggregation: Aggregation = Aggregation.TOKEN_MEAN
    constant_tokens: Positive | None = None
    """What `aggregation: constant` divides each response's sum by; None: rollout.max_response_tokens."""
    correction: Correction = Correction.AUTO
    """Importance correction for sampling from other log-probs than the trainer's. `auto`: `tis` where rollout.max_staleness
    is above 0, else `none`."""
    correction_cap: PositiveFloat = 2.0
    """Largest ratio: `tis` cuts larger ones to it, `mis` masks their tokens, `mis_sequence` their responses."""
    correction_floor: NonNegativeFloat = 0.5
    """Smallest ratio that `mis` and `mis_sequence` do not mask."""
    mini_batches: Positive = 1
    """Optimizer steps per batch of rollouts."""
    old_logprobs: OldLogprobs = OldLogprobs.AUTO
    """`auto` recomputes them only where a batch gets more than one update; with one they equal the current ones."""


class ParallelConfig(Section):
    """Layout of the trainer."""
    tensor: Positive = 1
    pipeline: Positive = 1
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    data: Positive = 1
    sequence: bool = False
    """Sequence parallelism: activations between tensor-parallel regions are split over the tensor ranks."""
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    recompute: Recompute = Recompute.NONE
    micro_batch_tokens: Positive = 8192
    """Token budget of a packed micro-batch."""
    share_prompts: bool = True
    """The samples of a question share one copy of their prompt (where the attention implementation can)."""
    logprob_chunk_tokens: NonNegative = 0
    """Compute log-probs in chunks of this many tokens, never holding all logits; 0 = off."""

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data


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
    """`gather` brings each tensor together on one rank of its stage and sends it whole; `direct` sends every rank's own
    shard to the engine ranks that need it."""
    transport: Transport = Transport.AUTO
    bucket_bytes: Positive = 256 << 20
    probe: bool = True
    """After the first push compare the engines' log-probs of a fixed text with the policy's."""
    max_logprob_diff: PositiveFloat | None = None
    """Limit on policy/logprob_diff_mean that stops the run; None: 0.15 where either side is bf16, 1e-3 in FP32, 1 where
    samples may be stale: the policy's own movement is in the difference then."""


class CheckpointConfig(Section):
    every: NonNegative = 10
    """Steps between checkpoints; 0: only at the end."""
    keep: Positive = 2


class EvaluationConfig(Section):
    files: tuple[Path, ...] = ()
    questions: Positive | None = None
    """At most this many questions of each file, by seed."""
    decisions: tuple[Path, ...] = ()
    """Decisions on suspect questions: quarantined ones are left out, fixed keys used (`alphamed data suspects`)."""
    allow_overlap: bool = False
    """Evaluate on questions that data.train holds too; refused otherwise."""
    before: bool = False
    after: bool = False
    every: NonNegative = 0
    max_response_tokens: Positive | None = None
    """None: rollout.max_response_tokens."""


class LoggingConfig(Section):
    wandb: WandbMode = WandbMode.OFFLINE
    wandb_project: str = "alphamed"
    rollout_files: bool = True
    report: bool = True
    export_hf: bool = True
    """Write the trained model as a Hugging Face folder when the run ends."""


class ClusterConfig(Section):
    device: Device = Device.AUTO
    gpus_per_node: Positive = 8
    gpu: str = "h100-80g"
    """What `alphamed plan` reckons with: a100-80g, h100-80g, h200-141g, b200-180g."""
    nodes: Positive | None = None
    """How many the run may take, for `alphamed plan`; None: as many as it needs."""
    start_unfit: bool = False
    """Start although the plan says that memory does not suffice."""
    trainer_threads: Positive | None = None
    """CPU threads of a trainer rank; None: cores / local ranks on CPU, 8 on CUDA."""
    engine_cores: str | None = None
    """CPU backend: cores an engine binds its threads to (`0-1`; one list per tensor rank, `0|1`); None: all cores."""
    rank_timeout_s: PositiveFloat = 600.0
    """Deadline of a collective between trainer ranks."""
    heartbeat_timeout_s: PositiveFloat = 30.0
    """A rank that has not been heard of for this long is given up."""


class Config(Section):
    model: ModelConfig
    data: DataConfig
    run: RunConfig = RunConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    dynamic_sampling: DynamicSamplingConfig = DynamicSamplingConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sync: SyncConfig = SyncConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    # ------------------------------------------------------------------------------------------------ derived values
    @property
    def run_dir(self) -> Path:
        return self.run.root / self.run.name

    @property
    def max_logprob_diff(self) -> float:
        exact = self.model.dtype == self.rollout.dtype == Dtype.FP32
        return self.sync.max_logprob_diff or (1.0 if self.rollout.max_staleness else 1e-3 if exact else 0.15)

    @property
    def correction(self) -> Correction:
        chosen = self.algorithm.correction
        return chosen if chosen != Correction.AUTO else Correction.TIS if self.rollout.max_staleness else Correction.NONE

    @property
    def max_model_tokens(self) -> int:
        """Prompt and response together: the context an engine is built for."""
        return self.prompt.max_tokens + max(self.rollout.max_response_tokens, self.evaluation.max_response_tokens or 0)

    @property
    def recompute_old_logprobs(self) -> bool:
        return self.algorithm.old_logprobs == OldLogprobs.RECOMPUTE or self.algorithm.mini_batches > 1

    @property
    def constant_tokens(self) -> int:
        return self.algorithm.constant_tokens or self.rollout.max_response_tokens

    # -------------------------------------------------------------------------------------------- checks across fields
    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self):
        p, r, a, o = self.parallel, self.rollout, self.algorithm, self.optimizer
        if p.sequence and p.tensor == 1:
            yield "parallel.sequence: true needs parallel.tensor > 1; set it to false or raise parallel.tensor"
        if p.virtual_pipeline is not None and p.pipeline == 1:
            yield (f"parallel.virtual_pipeline: {p.virtual_pipeline} needs parallel.pipeline > 1; "
                   f"remove it or raise parallel.pipeline")
        if r.top_p != 1.0 or r.top_k != -1:
            name, value, full = ("top_p", r.top_p, 1.0) if r.top_p != 1.0 else ("top_k", r.top_k, -1)
            yield (f"rollout.{name}: {value} would sample from another distribution than the one the loss uses; "
                   f"set it to {full}")
        if a.mini_batches > r.questions_per_step or r.questions_per_step % a.mini_batches:
            yield (f"algorithm.mini_batches: {a.mini_batches} does not divide rollout.questions_per_step "
                   f"({r.questions_per_step}); choose a divisor")
        if r.questions_per_step // a.mini_batches < p.data:
            yield (f"rollout.questions_per_step: {r.questions_per_step} gives {p.data} data ranks less than one question "
                   f"per update; raise it to at least {p.data * a.mini_batches} or lower parallel.data")
        if r.max_staleness and r.deterministic:
            yield (f"rollout.max_staleness: {r.max_staleness} makes samples depend on when weights arrive, "
                   f"rollout.deterministic can not be true; set one of them to 0 or false")
        if self.reward.overlong_buffer_tokens > r.max_response_tokens:
            yield (f"reward.overlong_buffer_tokens: {self.reward.overlong_buffer_tokens} exceeds "
                   f"rollout.max_response_tokens ({r.max_response_tokens}); lower it")
        if self.correction in (Correction.MIS, Correction.MIS_SEQUENCE) and a.correction_floor >= a.correction_cap:
            yield (f"algorithm.correction_floor: {a.correction_floor} is not below algorithm.correction_cap "
                   f"({a.correction_cap}); lower it")
        if o.min_lr > o.lr:
            yield f"optimizer.min_lr: {o.min_lr} is above optimizer.lr ({o.lr}); lower it"
        if o.warmup_steps >= self.run.steps and o.warmup_steps:
            yield f"optimizer.warmup_steps: {o.warmup_steps} leaves no step of {self.run.steps}; lower it below run.steps"
        # with sequence parallelism a row is rounded up to a multiple of the tensor ranks
        room = self.prompt.max_tokens + r.max_response_tokens + (p.tensor - 1 if p.sequence else 0)
        if p.micro_batch_tokens < room:
            yield (f"parallel.micro_batch_tokens: {p.micro_batch_tokens} can not hold one prompt and response "
                   f"({self.prompt.max_tokens} + {r.max_response_tokens} tokens); raise it to at least {room}")
        if self.model.fp8 and self.cluster.device == Device.CPU:
            yield "model.fp8: true needs CUDA; set it to false or cluster.device to cuda"
        if self.sync.mode == SyncMode.DIRECT and p.tensor % r.tensor_parallel and r.tensor_parallel % p.tensor:
            yield (f"sync.mode: direct needs parallel.tensor ({p.tensor}) and rollout.tensor_parallel ({r.tensor_parallel}) "
                   f"to divide one another; change one of them or set it to gather")
        if self.sync.transport == Transport.NCCL and self.cluster.device == Device.CPU:
            yield "sync.transport: nccl needs CUDA; set it to gloo or auto"
        if (self.evaluation.before or self.evaluation.after or self.evaluation.every) and not self.evaluation.files:
            yield "evaluation.files: [] but evaluation is asked for; name at least one file"
        if r.replay and (self.evaluation.before or self.evaluation.after or self.evaluation.every):
            yield "evaluation: needs engines, which rollout.replay does without; set before and after to false, every to 0"
        for i, shot in enumerate(self.prompt.shots):
            if extract_answer(shot.response, shot.options) is None:
                yield f"prompt.shots.{i}.response: boxes none of its letters ({', '.join(shot.options)}); end with a boxed one"
