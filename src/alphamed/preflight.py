"""Everything that can be checked before a process is started: configuration, hardware, model folder, data, prompts,
reward.

`validate` raises the first mistake as ConfigError or DataError, one line naming field or place, value and fix. It
imports neither torch nor transformers and takes seconds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.answers.thinking import Thinking
from alphamed.config.choices import Device
from alphamed.config.schema import Config
from alphamed.config.supervised import SftConfig
from alphamed.data.example_tokens import ExampleEncoder, load_usable
from alphamed.data.mcq import RowProblem
from alphamed.data.overlap import refuse_overlap
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError
from alphamed.model.shape import ModelShape, check_context, check_layout, resolve
from alphamed.model_folder import ModelFolder, check_model_folder, require_utf8
from alphamed.records import Question
from alphamed.reward.rules import check_name, opened_rule, try_rule
from alphamed.rollout.curriculum import check_levels
from alphamed.rundir.directory import MODEL_PLACE, check_resume, check_same_model


@dataclass(frozen=True, slots=True)
class Checked:
    """Results of validation. `evaluation_questions`: those that will be asked, of all files."""

    model: ModelFolder
    questions: int
    evaluation_questions: int
    skipped: tuple[RowProblem, ...]
    notes: tuple[str, ...]
    """How files were read that are not in the form of the schema."""
    rewards: Mapping[str, float]
    """Of a right, a wrong and an empty answer to the first question; none where rollouts are replayed."""
    moved: Mapping[str, tuple[Any, Any]]
    """Settings of a continued run that name another place of the same files: name -> (old, new)."""

    @property
    def shape(self) -> ModelShape:
        return self.model.shape

    def summary(self, config: Config) -> str:
        """What a run would start with, for whoever asked to check only."""
        trained = "questions" if config.sft is None else "examples"
        asked = "" if config.sft is None else " questions"
        lines = [
            f"{self.questions} {trained}, {self.evaluation_questions}{asked} for evaluation, {self.shape.parameters:,} "
            f"parameters, {config.parallel.world} ranks, {config.rollout.engines if config.generates else 0} engines"
        ]
        earned = ", ".join(
            f"{reward:g} for {'an' if kind == 'empty' else 'a'} {kind} answer" for kind, reward in self.rewards.items()
        )
        return "\n".join([*lines, *([f"reward {config.reward.name}: {earned}"] if earned else [])])

    def print_notes(self) -> None:
        """What whoever starts a run should know of its model and data, on stderr."""
        self.model.print_remarks()
        lines = [
            *(f"skipped: {problem}" for problem in self.skipped),
            *(f"note: {note}" for note in self.notes),
            *(
                f"{name}: {now!r} holds what {was!r} held when the run was started"
                for name, (was, now) in self.moved.items()
            ),
        ]
        for line in lines:
            print(line, file=sys.stderr)


def validate(config: Config, check_plan: Callable[[Config, ModelShape], None]) -> Checked:
    """Check a run before it starts. A model that has to be fetched is fetched. `check_plan` raises ConfigError for what
    cannot fit (`lab.hooks.refuse_unfit`)."""
    if config.sft is not None:
        return _validate_supervised(config, config.sft, check_plan)
    changed = _check_run_dir(config)
    _check_hardware(config)
    check_name(config.reward.name)
    training = load_questions(config.data.train, config.data.bad_rows)
    check_levels(config.data.levels, training.questions)
    evaluation = [load_questions((path,), config.data.bad_rows) for path in config.evaluation.all_files]
    if not config.evaluation.allow_overlap:
        refuse_overlap(training.questions, [q for file in evaluation for q in file.questions])
    if len(training.questions) < config.rollout.questions_per_step:
        raise ConfigError(
            f"rollout.questions_per_step: {config.rollout.questions_per_step} is more than the "
            f"{len(training.questions)} questions of data.train; lower it or add data"
        )
    asked = _asked(config, [file.questions for file in evaluation])
    folder = resolve(config.model.path, config.model.revision, config.model.cache)
    _check_names(config, folder)
    check_same_model(config.run_dir, folder)
    model = _check_model(config, folder)
    check_plan(config, model.shape)
    # every prompt once: one that is too long, or holds an id that the model has not, shows now and not at step 40
    model.prompts.require_lengths([*training.questions, *(q for file in evaluation for q in file.questions)])
    paths = (*config.data.train, *config.evaluation.all_files)
    readings = sum((file.readings for file in evaluation), training.readings)
    thinking = Thinking.of(config.reward.answer_after, model.tokenizer, model.prompts)
    return Checked(
        model,
        len(training.questions),
        asked,
        sum((file.skipped for file in evaluation), training.skipped),
        tuple(f"{path}: {note}" for path, reading in zip(paths, readings, strict=True) for note in reading.notes()),
        _check_reward(config, training.questions[0], thinking),
        {name: pair for name, pair in changed.items() if name in (*MODEL_PLACE, "data.train")},
    )


def _validate_supervised(config: Config, sft: SftConfig, check_plan: Callable[[Config, ModelShape], None]) -> Checked:
    """`validate` of supervised training: examples in place of questions, engines only for evaluations."""
    changed = _check_run_dir(config)
    _check_hardware(config)
    evaluation = [load_questions((path,), config.data.bad_rows) for path in config.evaluation.all_files]
    asked = _asked(config, [file.questions for file in evaluation])
    folder = resolve(config.model.path, config.model.revision, config.model.cache)
    _check_names(config, folder)
    check_same_model(config.run_dir, folder)
    model = _check_model(config, folder)
    check_plan(config, model.shape)
    questions = [question for file in evaluation for question in file.questions]
    model.prompts.require_lengths(questions)
    training = load_usable(config, ExampleEncoder(model.tokenizer, model.prompts, config))
    if not config.evaluation.allow_overlap:
        refuse_overlap([example.question() for example in training.examples], questions)
    if len(training.examples) < sft.prompts_per_step:
        raise ConfigError(
            f"sft.prompts_per_step: {sft.prompts_per_step} is more than the {len(training.examples)} examples of "
            f"data.train; lower it or add data"
        )
    notes = [
        f"{path}: {note}"
        for path, file in zip(config.evaluation.all_files, evaluation, strict=True)
        for reading in file.readings
        for note in reading.notes()
    ]
    return Checked(
        model,
        len(training.examples),
        asked,
        sum((file.skipped for file in evaluation), training.skipped),
        tuple(notes),
        {},
        {name: pair for name, pair in changed.items() if name in (*MODEL_PLACE, "data.train")},
    )


def _asked(config: Config, files: Sequence[Sequence[Question]]) -> int:
    """How many questions an evaluation asks, after decisions and evaluation.questions; 0 where none is asked for."""
    from alphamed.data.decisions import read_decisions
    from alphamed.evaluation.runner import choose

    wanted, counts = config.evaluation, []
    try:
        for path in wanted.decisions:
            read_decisions(path)
        for file, questions in zip(wanted.all_files, files, strict=True):
            chosen, left, _ = choose(questions, wanted.questions, config.run.seed, wanted.decisions)
            if not left:
                raise ConfigError(f"they leave none of the {len(questions)} questions of {file}; fix them")
            counts.append(len(chosen))
    except ConfigError as error:
        raise ConfigError(f"evaluation.decisions: {error}") from None
    return sum(counts) if config.evaluates else 0


def _check_run_dir(config: Config) -> dict[str, tuple[Any, Any]]:
    """Whether the run directory is new, or may be continued with this configuration; returns what differs and may."""
    _check_place(config.run_dir)
    changed = check_resume(config)
    if config.rollout.replay:
        _check_replay(config, config.rollout.replay)
    return changed


def _check_names(config: Config, folder: Path) -> None:
    places = {"run.root": config.run_dir.absolute(), "model.path": folder, "the current folder": Path.cwd()}
    for setting, path in places.items():
        require_utf8(setting, path)


def _check_place(folder: Path) -> None:
    """Whether the run's folder can be made and written: what is missing of it is made under another name and removed."""
    try:
        present = next(folder_above for folder_above in (folder, *folder.parents) if os.path.lexists(folder_above))
        with tempfile.TemporaryDirectory(prefix=".alphamed-", dir=present) as probe:
            Path(probe, folder.relative_to(present)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.root: {folder} cannot be made or written ({error.strerror}); choose another") from None


def _check_replay(config: Config, run_dir: Path) -> None:
    """Whether the rollouts to train on reach to the last step, and come from settings like these."""
    from alphamed.rundir.recorded_settings import require_recorded
    from alphamed.rundir.rollout_files import recorded_steps

    last_step = config.run.last_step
    if not (run_dir / "rollouts").is_dir():
        raise ConfigError(
            f"rollout.replay: {str(run_dir)!r} holds no rollouts/ folder; give the "
            f"directory of a run that recorded them (logging.rollout_files: true)"
        )
    recorded = recorded_steps(run_dir)
    if last_step not in recorded:
        present = f"rollouts of steps {recorded[0]} to {recorded[-1]}" if recorded else "no rollouts"
        raise ConfigError(
            f"rollout.replay: {str(run_dir)!r} holds {present}, this run trains to step {last_step}; set "
            f"run.stop_after to a recorded step"
        )
    require_recorded(config, run_dir)


def _check_hardware(config: Config) -> None:
    from alphamed.cluster import variables
    from alphamed.cluster.hardware import gpus_present, wants_cuda
    from alphamed.planner.legality import nccl_on_shared_gpus
    from alphamed.rollout.spec import engine_cores

    variables.refuse(os.environ)
    if config.cluster.device == Device.CUDA and gpus_present() == 0:
        raise ConfigError(
            "cluster.device: cuda needs an NVIDIA GPU, this machine has none; set it to cpu, or start on "
            "a machine that has (bash examples/... on one node, examples/slurm/train.sbatch on several)"
        )
    if wants_cuda(config) and (refusal := nccl_on_shared_gpus(config)):
        raise ConfigError(refusal)
    if not wants_cuda(config) and config.generates:
        engine_cores(config)


def _check_model(config: Config, folder: Path) -> ModelFolder:
    from alphamed.rollout.spec import engine_specs
    from alphamed.weights.routes import check_sync

    def fits(shape: ModelShape) -> None:
        check_layout(shape, config.parallel, config.rollout)
        check_sync(config, shape)
        check_context(shape, config.max_model_tokens, config.longest_response)
        if config.generates:
            engine_specs(config, folder, shape, eos_ids=())

    return check_model_folder(folder, config, fits)


def _check_reward(config: Config, question: Question, thinking: Thinking) -> Mapping[str, float]:
    """Try the reward on answers to a question; where rollouts are replayed none is asked for."""
    if config.rollout.replay:
        return {}
    with opened_rule(config.reward, config.prompt, config.run.seed) as rule:
        return try_rule(rule, question, thinking)
