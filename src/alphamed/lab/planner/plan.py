"""A plan: topology, memory, batch, time and problems of a job; and its JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from alphamed.config.choices import BadRows, Device
from alphamed.config.loading import changed_config
from alphamed.config.schema import Config
from alphamed.data.examples import load_examples
from alphamed.errors import DataError
from alphamed.lab.planner.deadline import deadline_problems
from alphamed.lab.planner.evaluations import Evaluations, count_questions, evaluations
from alphamed.lab.planner.search import fixed
from alphamed.lab.planner.shapes import find_shape
from alphamed.lab.planner.time import StepTime, step_time
from alphamed.lab.planner.topology import Topology, place
from alphamed.model.shape import ModelShape
from alphamed.planner import hardware, parameters
from alphamed.planner.batch import BatchPlan, batch_of
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import Problem, layout_problems, memory_problems
from alphamed.planner.memory import EngineCache, Use, engine_cache, engine_use, trainer_use

STORAGE_BYTES_PER_S = 5e9
"""A shared file system that all ranks write to, where the user gives no speed."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`grace_s`: needed between a warning and the kill, so that the current step ends and is saved. `at_risk_s`: the most
    work that is lost without it. A save that takes longer than `deadline_s` ends the run, as does a start of the engines that
    takes longer than `start_deadline_s`."""

    bytes: int
    save_s: float
    deadline_s: float
    start_deadline_s: float
    grace_s: float
    at_risk_s: float


@dataclass(frozen=True, slots=True)
class Assessment:
    """Everything that is computed for a legal layout."""

    topology: Topology
    batch: BatchPlan
    trainer: Use
    engine: Use | None
    cache: EngineCache | None
    time: StepTime
    evaluations: Evaluations | None

    @property
    def uses(self) -> list[Use]:
        return [self.trainer] + ([self.engine] if self.engine else [])


@dataclass(frozen=True, slots=True)
class Plan:
    job: PlannedJob
    source: str  # where the model's shape was found
    problems: tuple[Problem, ...]
    assessment: Assessment | None  # None where the layout is illegal
    checkpoint: Checkpoint | None

    @property
    def fits(self) -> bool:
        return not self.problems


def job_of(
    config: Config,
    gpu: str | None = None,
    nodes: int | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> tuple[PlannedJob, str]:
    """The job of a configuration, and where the model's shape was found. Raises ConfigError.

    On `cluster.device: cpu` the device is this machine: its memory, and each process's share of its cores.
    """
    shape, source = find_shape(config)
    if config.cluster.device == Device.CPU and gpu is None:
        device, per_node = _this_machine(config)
    else:
        device = hardware.gpu(config.cluster.gpu) if gpu is None else hardware.gpu(gpu, "--gpu")
        per_node = config.cluster.gpus_per_node
    nodes = config.cluster.nodes if nodes is None else nodes
    config, responses = _with_examples(config)
    lengths = prompt_tokens, response_tokens
    questions = count_questions(config)
    job = PlannedJob(
        config, shape, device, per_node, nodes, *lengths, evaluation_questions=questions, responses_per_prompt=responses
    )
    return job, source


def _with_examples(config: Config) -> tuple[Config, float | None]:
    """What the examples of supervised training say, where they are here: steps in place of epochs, responses per prompt."""
    if config.sft is None:
        return config, None
    try:
        examples = load_examples(config.data.train, BadRows.SKIP).examples
    except DataError:
        return config, None
    if config.sft.epochs is not None:
        steps = math.ceil(config.sft.epochs * len(examples) / config.sft.prompts_per_step)
        config = changed_config(config, [f"run.steps={steps}", "sft.epochs=null"])
    return config, sum(len(example.responses) for example in examples) / len(examples)


def job_here(config: Config, shape: ModelShape) -> PlannedJob:
    """The job on the machine that is about to run it: its GPUs as their driver reports them, or its CPU."""
    from alphamed.cluster.hardware import gpu_memory_bytes, wants_cuda

    if not wants_cuda(config):
        device, per_node = _this_machine(config)
        return PlannedJob(config, shape, device, per_node, evaluation_questions=count_questions(config))
    memory = gpu_memory_bytes()
    device = hardware.with_memory(memory) if memory else hardware.gpu(config.cluster.gpu)
    return PlannedJob(config, shape, device, config.cluster.gpus_per_node, evaluation_questions=count_questions(config))


def _this_machine(config: Config) -> tuple[hardware.Gpu, int]:
    from alphamed.cluster.hardware import cores, memory_bytes

    engines = config.rollout.engines * config.rollout.tensor_parallel if config.generates else 0
    processes = config.parallel.world + engines
    return hardware.cpu(cores(), memory_bytes()[0], processes), processes


def make_plan(job: PlannedJob, source: str = "", storage: float = STORAGE_BYTES_PER_S) -> Plan:
    """Plan a job; `storage` in bytes per second."""
    problems = layout_problems(job)
    if problems:
        return Plan(job, source, tuple(fixed(problems, job)), None, None)
    assessment = assess(job)
    saved = _checkpoint(job, assessment.time, storage)
    problems = memory_problems(job, assessment.uses, assessment.cache) + deadline_problems(job)
    problems = [replace(problem, fix=()) for problem in problems]  # advice.py searches one for all of them
    if saved.save_s > saved.deadline_s:
        expected = job.config.checkpoint.storage_bytes_per_s
        problems.append(
            Problem(
                f"checkpoint.storage_bytes_per_s: {expected:g} lets a checkpoint take {saved.deadline_s:,.0f} s, at "
                f"{storage:g} bytes/s it takes {saved.save_s:,.0f} s and would end the run; lower it to {storage:g}"
            )
        )
    return Plan(job, source, tuple(problems), assessment, saved)


def assess(job: PlannedJob) -> Assessment:
    """Topology, memory and time of a legal layout."""
    time = step_time(job)
    return Assessment(
        place(job),
        batch_of(job),
        trainer_use(job),
        engine_use(job),
        engine_cache(job) if job.engines else None,
        time,
        evaluations(job, time),
    )


def _checkpoint(job: PlannedJob, time: StepTime, storage: float) -> Checkpoint:
    """Weights in the trainer's type, FP32 masters of bf16 weights, two moments; a tied embedding once."""
    size = job.shape.parameters * (job.trainer_bytes + (8 if job.trainer_bytes == 4 else 12))
    save = size / storage
    last = job.config.run.last_step
    return Checkpoint(
        size,
        save,
        job.config.storage_deadline_s(size),
        job.config.start_deadline_s(job.shape.parameters * 2),  # model folders hold 16-bit weights, nearly all
        time.total + save,
        min(job.config.checkpoint.every or last, last) * time.total,
    )


# ----------------------------------------------------------------------------------------------------------------- JSON
def to_json(plan: Plan, advice: list[Any]) -> dict[str, Any]:
    """The plan as JSON values; bytes and seconds are numbers without units in the keys' names (`_bytes`, `_s`)."""
    job, s = plan.job, plan.job.shape
    tree: dict[str, Any] = {
        "fits": plan.fits,
        "problems": [{"text": problem.text, "fix": list(problem.fix)} for problem in plan.problems],
        "model": {
            "path": job.config.model.path,
            "source": plan.source,
            "family": s.family,
            "parameters": s.parameters,
            "layers": s.layers,
            "hidden": s.hidden,
            "vocab": s.vocab,
        },
        "cluster": {"gpu": job.gpu.name, "gpus_per_node": job.gpus_per_node, "gpus": job.gpus},
    }
    if plan.assessment is None or plan.checkpoint is None:
        return tree
    assessment, time = plan.assessment, plan.assessment.time
    tree["cluster"]["nodes"] = assessment.topology.nodes
    tree |= {
        "topology": {
            "seats": [_sparse(asdict(seat)) for seat in assessment.topology.seats],
            "groups": [asdict(group) for group in assessment.topology.groups],
            "leaving_bytes": assessment.topology.leaving,
        },
        "trainer": {
            "memory_bytes": dict(assessment.trainer.causes),
            "total_bytes": assessment.trainer.total,
            "limit_bytes": assessment.trainer.limit,
            "where": assessment.trainer.where,
            "parameters_by_stage": _by_stage(job),
        },
        "batch": asdict(assessment.batch),
        "step": {
            "seconds": time.parts() | {"total": time.total},
            "tokens_per_s_per_gpu": tokens_rate(plan),
            "mfu": mfu(plan),
        },
        "run": {"steps": job.config.run.last_step, "hours": hours(plan), "gpu_hours": hours(plan) * job.gpus},
        "checkpoint": asdict(plan.checkpoint),
        "bottleneck": bottleneck(plan),
        "advice": [{"overrides": list(item.overrides), "seconds": item.seconds, "saved": item.saved} for item in advice],
    }
    if assessment.evaluations:
        tree["evaluations"] = asdict(assessment.evaluations) | {"total": assessment.evaluations.total}
    if assessment.engine and assessment.cache:
        tree["engine"] = {
            "memory_bytes": dict(assessment.engine.causes),
            "total_bytes": assessment.engine.total,
            "limit_bytes": assessment.engine.limit,
            "cache": asdict(assessment.cache),
        }
    return tree


def _sparse(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value not in (None, ())}


def _by_stage(job: PlannedJob) -> list[int]:
    p = job.parallel
    return [parameters.count(stage) for stage in parameters.stage_parameters(job.shape, p.tensor, p.pipeline, job.virtual)]


# -------------------------------------------------------------------------------------------------------- derived values
def mfu(plan: Plan) -> float:
    """Model FLOPs of the update, recomputation not counted, over the trainer's BF16 peak in that time."""
    job, time = plan.job, _assessment(plan).time
    return time.model_flops / (time.update * job.parallel.world * job.gpu.flops)


def tokens_rate(plan: Plan) -> float:
    """Prompt and response tokens of all samples, per second of a step and GPU."""
    batch = _assessment(plan).batch
    return batch.samples * (batch.prompt_tokens + batch.response_tokens) / _assessment(plan).time.total / plan.job.gpus


def hours(plan: Plan) -> float:
    """Of the run to its last step: steps, checkpoints, the last of them at the end, and evaluations."""
    assert plan.checkpoint is not None
    assessment, last, every = _assessment(plan), plan.job.config.run.last_step, plan.job.config.checkpoint.every
    saves = -(-last // (every or max(1, last)))
    evaluating = assessment.evaluations.total if assessment.evaluations else 0.0
    return (last * assessment.time.total + saves * plan.checkpoint.save_s + evaluating) / 3600


def steps_text(plan: Plan) -> str:
    """How many steps `hours` counts: all, or those until run.stop_after."""
    run = plan.job.config.run
    return f"{run.steps} steps" if run.last_step == run.steps else f"{run.last_step} of {run.steps} steps"


def bottleneck(plan: Plan) -> str:
    """The part of a step that takes longest."""
    parts = _assessment(plan).time.parts()
    return max(parts, key=lambda part: parts[part])


def _assessment(plan: Plan) -> Assessment:
    assert plan.assessment is not None, "an illegal layout has neither memory nor time"
    return plan.assessment
