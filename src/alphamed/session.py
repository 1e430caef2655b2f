"""The parts of a run, put together: what each rank holds while it trains, and how it is taken down again.

Rank 0 alone starts Ray, the engines, the reward process and the coordinator; whatever can fail or wait on one rank goes
through `control`, so that all ranks end alike.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alphamed.cluster.control import DEADLINE_S, Control
from alphamed.cluster.pulse import Pulse
from alphamed.config.choices import AnswerKeys
from alphamed.config.schema import Config
from alphamed.data.controls import with_shuffled_keys
from alphamed.data.example_supply import ExampleSupply, with_length
from alphamed.data.example_tokens import ExampleEncoder
from alphamed.data.prompts import PromptBuilder
from alphamed.data.sources import load_questions
from alphamed.data.stream import QuestionStream
from alphamed.data.tokenizer import Tokenizer, load_tokenizer
from alphamed.errors import RunFailed
from alphamed.evaluation.evaluator import Evaluator
from alphamed.evaluation.runner import Evaluation, load_sets
from alphamed.megatron import checkpoint, checkpoint_folder, runtime
from alphamed.megatron.policy import NoReference, Policy, Reference
from alphamed.model.shape import ModelShape, read_shape, resolve
from alphamed.model.weight_files import weight_bytes
from alphamed.rollout.coordinator import Coordinator
from alphamed.rollout.pace import Pace
from alphamed.rollout.pipeline import LiveRollouts, ReplayedRollouts
from alphamed.rollout.pool import EnginePool
from alphamed.rollout.start import EngineStart
from alphamed.run import Hooks, Run
from alphamed.rundir.profiling import StepProfiler
from alphamed.weights.hf_io import load_hf
from alphamed.weights.hf_save import save_hf
from alphamed.weights.probe import TEXT, Probe
from alphamed.weights.source import PolicySource
from alphamed.weights.sync import WeightSync


@dataclass(frozen=True)
class Engines:
    """What generates and grades, as rank 0 holds it."""

    pool: EnginePool
    coordinator: Coordinator
    grader: Any  # the reward process, an actor's handle


class NoSync:
    """Takes the place of the weight sync where there are no engines: versions count on, nothing is sent."""

    def __init__(self, version: int) -> None:
        self.version, self.seconds = version, 0.0

    def push(self) -> int:
        self.version += 1
        return self.version


@dataclass(frozen=True)
class Session:
    """Everything the loops in train.py and sft.py work with, on one rank."""

    config: Config
    control: Control
    run: Run
    policy: Policy
    reference: Reference | NoReference
    rollouts: LiveRollouts | ReplayedRollouts | ExampleSupply
    """Where each step's groups come from."""
    sync: WeightSync | NoSync
    folder: Path
    """The Hugging Face folder that training started from."""
    evaluator: Evaluator | None
    """On rank 0 of a run that evaluates."""
    hooks: Hooks
    profiler: StepProfiler

    def save_checkpoint(self, state: dict) -> None:
        checkpoint.save(self.run.checkpoints, self.policy, state, self.config.checkpoint.keep)

    def evaluate(self, background: bool) -> Callable[[], Evaluation]:
        """Begin to evaluate the weights that the engines hold. Before they get others, call what is returned."""
        assert self.evaluator is not None, "an evaluation is due, but nothing evaluates"
        return self.evaluator.begin(self.sync.version, background)

    def cursor(self) -> dict | None:
        """The place in the questions; only rank 0 moves through them."""
        return self.rollouts.state() if self.control.rank == 0 else None

    def require_agreement(self, step: int, stats: Mapping[str, float]) -> None:
        """Stop the run, on all ranks, where the engines' log-probs are not the policy's: they hold other weights, or compute
        something else. Replayed rollouts may come from another policy."""
        difference, limit = stats["policy/logprob_diff_mean"], self.config.resolved.max_logprob_diff
        if math.isnan(difference):
            raise RunFailed(
                "policy",
                f"step {step}: log-probs of its responses are not finite "
                f"(policy/logprob_diff_mean); look at its weights and at the step's batch in "
                f"{self.run.dir / 'dumps'}",
            )
        if self.config.rollout.replay is None and not difference <= limit:
            raise RunFailed(
                "rollout engines",
                f"step {step}: their log-probs differ from the policy's by {difference:.3g} in the "
                f"mean (policy/logprob_diff_mean), the limit is {limit:g}; look for wrongly loaded weights, or "
                f"raise sync.max_logprob_diff",
            )

    def export(self) -> None:
        """Write the policy as a Hugging Face folder, all ranks together, and its card."""
        policy, size = self.policy, weight_bytes(self.folder)
        with runtime.storage_deadline(self.config, size):
            self.control.everywhere(
                "exporting the model",
                lambda: save_hf(
                    self.run.hf,
                    self.folder,
                    policy.model_chunks(),
                    policy.shape,
                    policy.layout,
                    policy.tensor_group,
                    policy.pipeline_group,
                ),
                DEADLINE_S + self.config.storage_deadline_s(size),
            )
        if self.hooks.model_card is not None:
            write_card = self.hooks.model_card
            self.control.from_rank0("the model card", lambda: write_card(self.run.dir, self.config, self.run.hf))


@contextlib.contextmanager
def open_session(config: Config, hooks: Hooks = Hooks(), engine_start: EngineStart | None = None) -> Iterator[Session]:
    """Build this rank's parts, from the last checkpoint where there is one; end all of them on the way out. `engine_start`:
    where it has begun."""
    with contextlib.ExitStack() as stack:
        here = runtime.start(config)
        stack.callback(runtime.stop, here)
        print(here.layout, file=sys.stderr)  # goes to the rank's log; `alphamed plan --simulate` reads it
        control = stack.enter_context(
            Control.open(here.cpu_group, config.run_dir, config.cluster.heartbeat_timeout_s, longest_s=config.longest_wait_s)
        )
        folder = control.from_rank0(
            "finding the model", lambda: resolve(config.model.path, config.model.revision, config.model.cache)
        )
        config = control.from_rank0("the length of the run", partial(with_length, config, folder))
        run = Run.open(config, control, hooks)
        stack.callback(run.close)
        pulse = Pulse(run.dir, control.heard_s, lambda: run.activity)
        if control.rank == 0:
            stack.enter_context(pulse)
        shape, tokenizer = read_shape(folder), load_tokenizer(folder)
        policy, saved, damaged = _policy(config, shape, here, folder, control, run)
        reference = _reference(config, shape, here, folder, control)
        run.begin(saved, folder)
        for line in damaged:
            run.note(line)
        prompts = PromptBuilder(tokenizer, config.prompt)
        if config.generates:
            run.note("starting the engines ...")
        engines = _engines(config, folder, engine_start or EngineStart(config), control, stack)
        if engines:
            pulse.watch(
                [
                    *((f"engine {engine.index}", engine.actor) for engine in engines.pool.engines),
                    ("reward process", engines.grader),
                ]
            )
        pace = Pace(config, run.deadline, run.note) if config.sizes_steps and control.rank == 0 else None
        rollouts = _rollouts(config, tokenizer, prompts, engines, control, run, pace)
        if run.state.cursor:
            control.from_rank0("the place in the questions", lambda: rollouts.load_state(run.state.cursor))
        yield Session(
            config,
            control,
            run,
            policy,
            reference,
            rollouts,
            _sync(config, policy, tokenizer, engines, control, run),
            folder,
            _evaluator(config, prompts, engines, control, run, pace),
            hooks,
            StepProfiler(config, control.rank),
        )


# ------------------------------------------------------------------------------------------------------------------- parts
def _policy(
    config: Config, shape: ModelShape, here: runtime.Runtime, folder: Path, control: Control, run: Run
) -> tuple[Policy, dict | None, list[str]]:
    """The policy with the weights of the last checkpoint that is whole, or of the model's folder, the state saved with them, and
    lines on damaged checkpoints."""
    policy = Policy(config, shape, here)
    candidates = control.from_rank0("finding the last checkpoint", lambda: checkpoint_folder.newest_first(run.checkpoints))
    saved, damaged = checkpoint.load_newest(candidates, policy)
    if saved is not None:
        return policy, saved, damaged
    _load(policy, "loading the model", config, folder, control)
    return policy, None, []


def _reference(
    config: Config, shape: ModelShape, here: runtime.Runtime, folder: Path, control: Control
) -> Reference | NoReference:
    if config.algorithm.kl_coefficient == 0 or config.sft is not None:
        return NoReference()
    reference = Reference(config, shape, here)
    _load(reference, "loading the reference", config, folder, control)
    return reference


def _load(model: Policy | Reference, work: str, config: Config, folder: Path, control: Control) -> None:
    """Fill a model with the weights of a Hugging Face folder."""
    control.everywhere(
        work,
        lambda: load_hf(folder, model.model_chunks(), model.shape, model.runtime.layout),
        DEADLINE_S + config.storage_deadline_s(weight_bytes(folder)),
    )
    model.weights_changed()


def _engines(
    config: Config, folder: Path, starting: EngineStart, control: Control, stack: contextlib.ExitStack
) -> Engines | None:
    """On rank 0 of a run that generates: Ray, the engines, the reward process and the coordinator; None elsewhere."""
    if not config.generates:
        return None

    def start() -> Engines:
        stack.callback(starting.stop)
        pool, grader = starting.finish()
        return Engines(pool, Coordinator.start(config, pool, grader), grader)

    # the other ranks wait longer, so that rank 0 names what was late
    return control.on_rank0("starting the engines", start, DEADLINE_S + config.start_deadline_s(weight_bytes(folder)))


def _rollouts(
    config: Config,
    tokenizer: Tokenizer,
    prompts: PromptBuilder,
    engines: Engines | None,
    control: Control,
    run: Run,
    pace: Pace | None,
) -> LiveRollouts | ReplayedRollouts | ExampleSupply:
    if config.sft is not None:
        return ExampleSupply(config, ExampleEncoder(tokenizer, prompts, config), control)
    if config.rollout.replay is not None:
        return ReplayedRollouts(config, control)
    questions = load_questions(config.data.train, config.data.bad_rows).questions
    if config.data.answer_keys == AnswerKeys.SHUFFLED:
        questions = with_shuffled_keys(questions, config.run.seed)
    stream = QuestionStream(questions, config.run.seed, config.data.shuffle_options, config.data.spread)
    return LiveRollouts(config, stream, prompts, engines and engines.coordinator, control, run.show_generation, pace)


def _sync(
    config: Config, policy: Policy, tokenizer: Tokenizer, engines: Engines | None, control: Control, run: Run
) -> WeightSync | NoSync:
    # The first push after a resume brings the weights of the last step: it gets that step's version again. Supervised
    # training pushes for evaluations only, so that its next push brings others.
    version = max(0, run.state.policy_version - (config.sft is None))
    if not config.generates:
        return NoSync(version)
    probe = Probe(tuple(tokenizer.encode(TEXT)), policy.score)
    return WeightSync(config, PolicySource(policy, policy.shape), engines and engines.pool, control, probe, version)


def _evaluator(
    config: Config, prompts: PromptBuilder, engines: Engines | None, control: Control, run: Run, pace: Pace | None
) -> Evaluator | None:
    """On rank 0 of a run that evaluates: what has the evaluation files answered; None elsewhere."""
    settings = config.evaluation
    sets = control.on_rank0(
        "loading the evaluation",
        lambda: load_sets(settings.all_files, settings.questions, config.run.seed, config.data.bad_rows, settings.decisions),
    )
    if engines is None or not sets:
        return None
    return Evaluator(config, sets, prompts.render, engines.coordinator, run.dir, run, pace)
