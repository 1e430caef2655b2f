"""A run's configuration as a whole: frozen, nested, validated. `loading.load_config` reads one YAML file and dotted
overrides into it.

Checks across fields report what is wrong and never rewrite a value; what follows from other values is a property. A user's
mistake raises `ConfigError`, one line naming field, value and fix.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase
from typing import Self

from pydantic import model_validator

from alphamed.answers.extraction import extract_answer
from alphamed.answers.thinking import AUTO, THINK_END, Thinking
from alphamed.config.choices import (
    AnswerKeys,
    Correction,
    Device,
    KlEstimator,
    ProfileKind,
    ReferencePlace,
    RewardSignature,
    SyncMode,
    Transport,
)
from alphamed.config.operation import CheckpointConfig, ClusterConfig, LoggingConfig, ProfileConfig
from alphamed.config.resolved import Resolved
from alphamed.config.sections import (
    MAX_GPUS,
    AlgorithmConfig,
    DataConfig,
    DynamicSamplingConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    SyncConfig,
)
from alphamed.config.supervised import SftConfig

START_S = 600.0
"""For engines to start, without reading the model: processes, compilation, CUDA graphs."""


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
    profile: ProfileConfig = ProfileConfig()
    cluster: ClusterConfig = ClusterConfig()
    sft: SftConfig | None = None
    """Supervised training in place of reinforcement learning (`alphamed sft`)."""

    # ------------------------------------------------------------------------------------------------ derived values
    @property
    def run_dir(self) -> Path:
        return self.run.root / self.run.name

    @property
    def evaluates(self) -> bool:
        return self.evaluation.before or self.evaluation.after or self.evaluation.every > 0

    @property
    def generates(self) -> bool:
        """Whether the run has engines: for its rollouts, or for the evaluations of supervised training."""
        return self.rollout.replay is None and (self.sft is None or self.evaluates)

    @property
    def training_temperature(self) -> float:
        """What logits are divided by in the loss."""
        return self.rollout.temperature if self.sft is None else 1.0

    @property
    def resolved(self) -> Resolved:
        """What settings that are left to the program come to."""
        return Resolved(self)

    @property
    def max_model_tokens(self) -> int:
        """Prompt and response together: the context an engine is built for."""
        return self.prompt.max_tokens + max(self.rollout.max_response_tokens, self.evaluation.max_response_tokens or 0)

    @property
    def longest_response(self) -> str:
        """The setting that `max_model_tokens` comes from, in addition to prompt.max_tokens."""
        longer = (self.evaluation.max_response_tokens or 0) > self.rollout.max_response_tokens
        return f"{'evaluation' if longer else 'rollout'}.max_response_tokens"

    @property
    def part_multiple(self) -> int:
        """Tokens of a rank's part of a row: FP8 matrix products take multiples of 16 only (Transformer Engine's
        `assert_dim_for_fp8_exec`, and of a transposed operand's last dimension)."""
        return 16 if self.model.fp8 else 1

    @property
    def token_multiple(self) -> int:
        """Rows hold a multiple of this many tokens (records.Layout.token_multiple)."""
        p = self.parallel
        return p.context * (p.tensor if p.sequence else 1) * self.part_multiple

    @property
    def sizes_steps(self) -> bool:
        """Whether the time that steps take decides how many questions the next one asks."""
        sized = self.run.min_steps is not None and self.run.time_limit_s is not None
        return sized and self.rollout.replay is None and self.sft is None

    @property
    def longest_wait_s(self) -> float:
        """What rank 0 may take for work whose deadlines are settings: starting the engines, a step's rounds of rollouts, the
        evaluation of all sets one after another. (Where the start's deadline follows from the model, it is given there.)"""
        r, evaluation = self.rollout, self.evaluation
        rounds = max(1 + self.dynamic_sampling.refills, len(evaluation.all_files))
        return max(r.start_deadline_s or 0.0, rounds * r.step_deadline_s)

    @property
    def _length_known(self) -> bool:
        """Whether run.steps is the run's length, which with sft.epochs follows from the data."""
        return self.sft is None or self.sft.epochs is None

    def storage_deadline_s(self, size: int) -> float:
        """Deadline of a collective while `size` bytes are read or written."""
        return self.cluster.rank_timeout_s + size / self.checkpoint.storage_bytes_per_s

    def start_deadline_s(self, model_bytes: int) -> float:
        """rollout.start_deadline_s, for a model whose files have `model_bytes`."""
        reading = self.rollout.engines * model_bytes / self.checkpoint.storage_bytes_per_s
        return self.rollout.start_deadline_s or START_S + reading

    # -------------------------------------------------------------------------------------------- checks across fields
    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self):
        p, r, o = self.parallel, self.rollout, self.optimizer
        if (together := p.world + r.engines * r.tensor_parallel) > MAX_GPUS:
            yield (
                f"parallel: {p.axes()} and rollout.engines ({r.engines} of {r.tensor_parallel}) are {together} "
                f"processes; lower them to at most {MAX_GPUS:,}"
            )
        if p.sequence and p.tensor == 1:
            yield "parallel.sequence: true needs parallel.tensor > 1; set it to false or raise parallel.tensor"
        if p.virtual_pipeline is not None and p.pipeline == 1:
            yield (
                f"parallel.virtual_pipeline: {p.virtual_pipeline} needs parallel.pipeline > 1; "
                f"remove it or raise parallel.pipeline"
            )
        if p.reference == ReferencePlace.OFFLOADED and self.model.fp8:
            yield (
                "parallel.reference: offloaded leaves Transformer Engine's FP8 copies of the weights on the device; set it "
                "to resident or model.fp8 to false"
            )
        yield from self._rollout_problems()
        if o.min_lr > o.lr:
            yield f"optimizer.min_lr: {o.min_lr} is above optimizer.lr ({o.lr}); lower it"
        if o.warmup_steps >= self.run.steps and o.warmup_steps and self._length_known:
            yield f"optimizer.warmup_steps: {o.warmup_steps} leaves no step of {self.run.steps}; lower it below run.steps"
        # a row is rounded up to what context ranks and, with sequence parallelism, tensor ranks can split, and FP8 can take
        room = self.prompt.max_tokens + r.max_response_tokens + self.token_multiple - 1
        if p.micro_batch_tokens < room:
            yield (
                f"parallel.micro_batch_tokens: {p.micro_batch_tokens} cannot hold one prompt and response "
                f"({self.prompt.max_tokens} + {r.max_response_tokens} tokens); raise it to at least {room}"
            )
        if self.model.fp8 and self.cluster.device == Device.CPU:
            yield "model.fp8: true needs CUDA; set it to false or cluster.device to cuda"
        if self.sync.mode == SyncMode.DIRECT and p.tensor % r.tensor_parallel and r.tensor_parallel % p.tensor:
            yield (
                f"sync.mode: direct needs parallel.tensor ({p.tensor}) and rollout.tensor_parallel ({r.tensor_parallel}) "
                f"to divide one another; change one of them or set it to gather"
            )
        if self.sync.transport == Transport.NCCL and self.cluster.device == Device.CPU:
            yield "sync.transport: nccl needs CUDA; set it to gloo or auto"
        thinking = Thinking(THINK_END if self.reward.answer_after == AUTO else self.reward.answer_after or "")
        for i, shot in enumerate(self.prompt.shots):
            if extract_answer(thinking.answer(shot.response) or "", shot.options) is None:
                yield (
                    f"prompt.shots.{i}.response: boxes none of its letters ({', '.join(shot.options)}); end with a boxed one"
                )
        yield from self._reward_problems()
        yield from self._profile_problems()
        yield from self._supervised_problems()
        yield from self._level_problems()
        yield from self._evaluation_problems()

    def _rollout_problems(self):
        p, r, a = self.parallel, self.rollout, self.algorithm
        if r.top_p != 1.0 or r.top_k != -1:
            name, value, full = ("top_p", r.top_p, 1.0) if r.top_p != 1.0 else ("top_k", r.top_k, -1)
            yield (
                f"rollout.{name}: {value} would sample from another distribution than the one the loss uses; "
                f"set it to {full}"
            )
        sampled = self.sft is None
        if sampled and (a.mini_batches > r.questions_per_step or r.questions_per_step % a.mini_batches):
            yield (
                f"algorithm.mini_batches: {a.mini_batches} does not divide rollout.questions_per_step "
                f"({r.questions_per_step}); choose a divisor"
            )
        if sampled and r.questions_per_step // a.mini_batches < p.data:
            yield (
                f"rollout.questions_per_step: {r.questions_per_step} gives {p.data} data ranks less than one question "
                f"per update; raise it to at least {p.data * a.mini_batches} or lower parallel.data"
            )
        if r.max_staleness and r.deterministic:
            yield (
                f"rollout.max_staleness: {r.max_staleness} makes samples depend on when weights arrive, "
                f"rollout.deterministic cannot be true; set one of them to 0 or false"
            )
        if self.sizes_steps and (r.max_staleness or r.deterministic):
            setting = "rollout.max_staleness" if r.max_staleness else "rollout.deterministic"
            yield (
                f"run.min_steps: {self.run.min_steps} sizes steps by their time, which {setting} does not allow; set "
                f"run.min_steps=null or {setting}={0 if r.max_staleness else 'false'}"
            )
        if self.reward.overlong_buffer_tokens > r.max_response_tokens:
            yield (
                f"reward.overlong_buffer_tokens: {self.reward.overlong_buffer_tokens} exceeds "
                f"rollout.max_response_tokens ({r.max_response_tokens}); lower it"
            )
        if self.resolved.correction in (Correction.MIS, Correction.MIS_SEQUENCE) and a.correction_floor >= a.correction_cap:
            yield (
                f"algorithm.correction_floor: {a.correction_floor} is not below algorithm.correction_cap "
                f"({a.correction_cap}); lower it"
            )

    def _profile_problems(self):
        profile, world = self.profile, self.parallel.world
        for step in profile.steps:
            if step > self.run.steps and self._length_known:
                yield f"profile.steps: step {step} is never reached, run.steps is {self.run.steps}; lower it"
        for rank in profile.ranks:
            if rank >= world:
                yield f"profile.ranks: {rank} is no trainer rank, the layout has {world}; give 0 to {world - 1}"
        if profile.steps and profile.kind == ProfileKind.NSYS and self.cluster.device == Device.CPU:
            yield "profile.kind: nsys records what GPUs do; set it to torch or cluster.device to cuda"

    def _reward_problems(self):
        a, reward = self.algorithm, self.reward
        if a.kl_coefficient and a.skip_no_signal:
            yield (
                f"algorithm.skip_no_signal: with a KL term (algorithm.kl_coefficient: {a.kl_coefficient}) every response has a "
                f"gradient; leave it out, or set kl_coefficient to 0"
            )
        if a.kl_coefficient and a.kl_estimator == KlEstimator.K1:
            yield (
                f"algorithm.kl_estimator: k1 has a gradient of 0 in expectation, so that algorithm.kl_coefficient "
                f"({a.kl_coefficient}) would add noise and hold nothing back; set it to k2 or k3, the coefficient to 0"
            )
        if reward.signature != RewardSignature.ALPHAMED and ":" not in reward.name:
            yield (
                f"reward.signature: {reward.signature} says how a function of your own is called, reward.name is "
                f"{reward.name!r}; leave it out, or name the function (module:function)"
            )
        if reward.answer_after and not reward.answer_after.strip():
            yield "reward.answer_after: it is white space only; give the text that ends the thinking, auto or null"
        elif reward.answer_after and any(reward.answer_after in f"\\boxed{{{letter}}}" for letter in ascii_uppercase):
            yield (
                f"reward.answer_after: {reward.answer_after!r} is a part of answers themselves, which would be cut in two; "
                f"give a text that only ends the thinking"
            )

    def _evaluation_problems(self):
        if self.run.last_step == 0 and not (self.evaluation.before or self.evaluation.after):
            yield "run.stop_after: 0 evaluates and ends, but no evaluation is asked for; set evaluation.before=true"
        if self.evaluates and not self.evaluation.all_files:
            yield "evaluation.files: [] but evaluation is asked for; name at least one file"
        e, every = self.evaluation, self.checkpoint.every
        if e.development and (not e.every or not every or e.every % every):
            yield (
                f"evaluation.development: {e.development} chooses among checkpoints, so each evaluation needs one; set "
                f"evaluation.every ({e.every}) to a multiple of checkpoint.every ({every})"
            )
        if e.development in e.files:
            yield (
                f"evaluation.development: {e.development} is one of evaluation.files; who chooses by a set cannot be "
                f"measured with it"
            )
        if self.rollout.replay and self.evaluates:
            yield "evaluation: needs engines, which rollout.replay does without; set before and after to false, every to 0"

    def _supervised_problems(self):
        if self.sft is None:
            return
        prompts, data = self.sft.prompts_per_step, self.parallel.data
        if not any(part in self.sft.response_format for part in ("{response}", "{letter}")):
            yield f"sft.response_format: {self.sft.response_format!r} leaves the response out; put {{response}} into it"
        if prompts < data:
            yield (
                f"sft.prompts_per_step: {prompts} gives {data} data ranks less than one prompt each; raise it to at least "
                f"{data} or lower parallel.data"
            )
        if self.rollout.replay:
            yield "rollout.replay: supervised training (sft) takes its responses from data.train; remove one of the two"
        if self.data.levels.schedule:
            yield "data.levels.schedule: supervised training (sft) has no curriculum; remove it"
        if self.data.answer_keys != AnswerKeys.GIVEN:
            yield f"data.answer_keys: {self.data.answer_keys} has no effect on given responses (sft); remove it"

    def _level_problems(self):
        schedule = self.data.levels.schedule
        for earlier, later in zip(schedule, schedule[1:]):
            if later.step <= earlier.step:
                yield (
                    f"data.levels.schedule: step {later.step} comes after step {earlier.step}; put the entries in the "
                    f"order of their steps, each step once"
                )
        for entry in schedule:
            if sum(entry.weights) == 0:
                yield f"data.levels.schedule: all weights of step {entry.step} are 0; give one level a weight"
            if entry.step > self.run.steps:
                yield (
                    f"data.levels.schedule: step {entry.step} is never reached, run.steps is {self.run.steps}; lower it "
                    f"or raise run.steps"
                )
