"""Mends of illegal layouts. Each has been applied and found legal: what is printed changes something and helps."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from math import log2

from alphamed.config import ConfigError
from alphamed.config_file import changed_config
from alphamed.model import context_sizes, tensor_sizes
from alphamed.planner.job import Job
from alphamed.planner.legality import Problem, engines_within, layout_problems, memory_problems, nearest
from alphamed.planner.memory import engine_cache, engine_use, stage_use, trainer_use
from alphamed.planner.time import step_time

Overrides = tuple[str, ...]
Change = tuple[Overrides, Job]
"""Overrides, and the job that they lead to."""
MOST_MENDS = 8
"""Problems that are mended one after the other before a layout is looked for as a whole."""
FULL = "parallel.recompute=full"


def mended(problems: list[Problem], job: Job) -> list[Problem]:
    """The problems of an illegal layout, the first with one mend for all of them, or with the word that none was found."""
    mend = _first_thought(job, problems) or (nearest_fit(job) or ((), job))[0] or _one_by_one(job)
    first, *others = (replace(problem, mend=()) for problem in problems)
    if mend:
        return [replace(first, mend=mend), *others]
    within = f"within {job.nodes} node{'s' if job.nodes > 1 else ''}" if job.nodes else "with as many GPUs"
    return [replace(first, text=f"{first.text}; no layout that fits was found {within}"), *others]


def _first_thought(job: Job, problems: list[Problem]) -> Overrides:
    """What one problem names as its mend, where that is enough."""
    changes = (_own(job, problem) for problem in problems)
    return next((overrides for overrides, changed in filter(None, changes) if not layout_problems(changed)), ())


def _one_by_one(job: Job) -> Overrides:
    """The mends that the problems name themselves, or the nearest layout where they name none, until no problem is left."""
    now, found = job, {}
    for _ in range(MOST_MENDS):
        problems = layout_problems(now)
        if not problems:
            return tuple(found.values())
        change = next((change for problem in problems if (change := _own(now, problem))), None) or nearest_fit(now)
        if change is None:
            return ()
        overrides, now = change
        found |= {override.partition("=")[0]: override for override in overrides}
    return ()


def _own(job: Job, problem: Problem) -> Change | None:
    """What a problem names as its mend, where that is possible; with the settings that follow where it is not without."""
    given = dict(override.removeprefix("parallel.").split("=") for override in problem.mend)
    cut = {axis: int(given.get(axis, size)) for axis, size in axes(job).items()}
    changes = ((overrides, applied(job, overrides)) for overrides in (problem.mend, problem.mend + consistent(job, cut)))
    return next(((overrides, changed) for overrides, changed in changes if changed), None)


def nearest_fit(job: Job) -> Change | None:
    """The nearest legal layout that fits the memory within the nodes that the run may take, with fewer engines where they
    need it and with full recomputation where that is needed; of several as near the fastest."""
    candidates = sorted(_candidates(job), key=lambda found: found[0])
    for _, group in groupby(candidates, key=lambda found: found[0]):
        changes = [(overrides, changed) for _, overrides in group if (changed := applied(job, overrides)) and fits(changed)]
        if changes:
            return min(changes, key=lambda change: step_time(change[1]).total)
    return None


def _candidates(job: Job) -> Iterator[tuple[tuple[int, float], Overrides]]:
    """Overrides of each layout with its distance: how many settings change, and by what factors."""
    r, per_node = job.rollout, job.gpus_per_node
    allowed = [size for size in tensor_sizes(job.shape) if job.gpu.is_cpu or per_node % size == 0]
    tensor = nearest(r.tensor_parallel, allowed)
    for cut in layouts(job, room(job)):
        now, new = axes(job), dict(cut)
        if job.engines:
            world = cut["tensor"] * cut["context"] * cut["pipeline"] * cut["data"]
            most = job.engines if job.gpu.is_cpu else engines_within(job, world, tensor)
            if most < 1:
                continue
            now |= {"rollout.tensor_parallel": r.tensor_parallel, "rollout.engines": job.engines}
            new |= {"rollout.tensor_parallel": tensor, "rollout.engines": min(job.engines, most)}
        changed = {key: size for key, size in new.items() if size != now[key]}
        overrides = tuple(f"{key if '.' in key else f'parallel.{key}'}={size}" for key, size in changed.items())
        distance = len(changed), round(sum(abs(log2(size / now[key])) for key, size in changed.items()), 6)
        overrides += consistent(job, cut)
        yield distance, overrides
        yield (distance[0] + 1, distance[1]), (*overrides, FULL)


# --------------------------------------------------------------------------------------------------------------- layouts
def layouts(job: Job, gpus: int) -> Iterator[dict[str, int]]:
    """Every layout of a trainer on at most so many GPUs, of powers of two and the present sizes. Tensor and context ranks,
    which talk in every layer, stay within a node."""
    powers = {2 ** power for power in range(max(gpus, 1).bit_length())}
    most = job.rollout.questions_per_step // job.algorithm.mini_batches         # a question for each data rank
    now, s = axes(job), job.shape
    neighbours = gpus if job.gpu.is_cpu else job.gpus_per_node
    for tensor in sorted((powers | {now["tensor"]}) & set(tensor_sizes(s))):
        for context in sorted((powers | {now["context"]}) & set(context_sizes(s, tensor))):
            if tensor * context > neighbours:
                continue
            for pipeline in sorted(size for size in powers | {now["pipeline"]} if s.layers % size == 0):
                for data in sorted(powers | {now["data"]}):
                    if data <= most and tensor * context * pipeline * data <= gpus:
                        yield {"tensor": tensor, "context": context, "pipeline": pipeline, "data": data}


def axes(job: Job) -> dict[str, int]:
    """The trainer's axes and their sizes."""
    p = job.parallel
    return {"tensor": p.tensor, "context": p.context, "pipeline": p.pipeline, "data": p.data}


def consistent(job: Job, cut: dict[str, int]) -> Overrides:
    """The settings that have to follow a layout."""
    p, found = job.parallel, []
    if p.sequence != (cut["tensor"] > 1):
        found.append(f"parallel.sequence={'true' if cut['tensor'] > 1 else 'false'}")
    if cut["pipeline"] == 1 and p.virtual_pipeline:
        found.append("parallel.virtual_pipeline=null")
    return tuple(found)


def room(job: Job) -> int:
    """GPUs of the nodes that the run may take, or of as many as it takes."""
    if job.gpu.is_cpu:
        return job.gpus
    per_node = job.gpus_per_node
    if job.shared and not job.colocated:
        return per_node
    engines = job.engines * job.rollout.tensor_parallel
    return per_node * (job.nodes or -(-job.parallel.world // per_node) + -(-engines // per_node))


def applied(job: Job, overrides: Overrides) -> Job | None:
    """The changed job, or None where the configuration refuses it or nothing changes."""
    try:
        config = changed_config(job.config, overrides)
    except ConfigError:
        return None
    return replace(job, config=config) if config != job.config else None


def fits(job: Job) -> bool:
    """Whether a layout is legal and its memory suffices."""
    if layout_problems(job) or not all(stage_use(job, stage).fits for stage in range(job.parallel.pipeline)):
        return False                                # most that are tried end at their first stage
    uses = [use for use in (trainer_use(job), engine_use(job)) if use]
    return not memory_problems(job, uses, engine_cache(job) if job.engines else None)
