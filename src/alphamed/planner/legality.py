"""What is illegal or does not fit, each with the nearest legal setting: all that Megatron or vLLM would refuse at start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster.hosts import deal
from alphamed.config.choices import Device, Recompute, Transport
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.model.shape import check_context, check_layout, context_sizes, divisors, tensor_sizes
from alphamed.planner.hardware import GIB
from alphamed.planner.job import PlannedJob
from alphamed.planner.memory import BLOCK_TOKENS, EngineCache, Use, free_for_engine


@dataclass(frozen=True, slots=True)
class Problem:
    """One line: what is wrong, and what to set instead (`fix`: overrides for the command line, where one is known; those of
    this module are first guesses, which search.py tries)."""

    text: str
    fix: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text + (f"; try {' '.join(self.fix)}" if self.fix else "")


def layout_problems(job: PlannedJob) -> list[Problem]:
    """Problems of the layout itself. Where there are any, memory and time cannot be computed."""
    return list(_layout_problems(job))


def _layout_problems(job: PlannedJob) -> Iterator[Problem]:
    p, r, s = job.parallel, job.rollout, job.shape
    for field, value, allowed in (
        ("parallel.tensor", p.tensor, tensor_sizes(s)),
        ("rollout.tensor_parallel", r.tensor_parallel, tensor_sizes(s)),
        ("parallel.context", p.context, context_sizes(s, p.tensor)),
        ("parallel.pipeline", p.pipeline, divisors(s.layers)),
    ):
        if value not in allowed:  # check_layout checks them in the same order
            yield Problem(_refusal(job), (f"{field}={nearest(value, allowed)}",))
            return
    if s.layers // p.pipeline % job.virtual:
        near = nearest(job.virtual, divisors(s.layers // p.pipeline))
        yield Problem(_refusal(job), (f"parallel.virtual_pipeline={near if near > 1 else 'null'}",))
        return
    if not job.gpu.is_cpu:
        yield from _node_problems(job)
    try:
        check_context(s, job.config.max_model_tokens, job.config.longest_response)
    except ConfigError as error:
        yield Problem(str(error), _shorter(job))
    else:
        if job.gpu.is_cpu and job.engines and job.config.cluster.device == Device.CPU:
            yield from _cpu_engine_problems(job)
    if job.config.model.fp8 and job.gpu.fp8_flops is None:
        yield Problem(f"model.fp8: {job.gpu.name} computes no FP8", ("model.fp8=false",))
    if p.recompute == Recompute.SELECTIVE and not p.share_prompts and p.context == 1 and not job.gpu.is_cpu:
        yield Problem(
            "parallel.recompute: selective computes attention again, but rows without shared prompts take "
            "Transformer Engine's fused attention, which keeps nothing that this would save",
            ("parallel.recompute=none",),
        )


def _cpu_engine_problems(job: PlannedJob) -> Iterator[Problem]:
    """What an engine on this machine's CPU refuses: sizes of heads, more tensor ranks than cores, cores that are not here."""
    from alphamed.cluster.hardware import cores
    from alphamed.rollout.spec import engine_specs

    try:
        engine_specs(job.config, Path(), job.shape, eos_ids=())
    except ConfigError as error:
        fewer = [size for size in tensor_sizes(job.shape) if size <= cores()]
        near = nearest(job.rollout.tensor_parallel, fewer)
        fix = (f"rollout.tensor_parallel={near}",) if near != job.rollout.tensor_parallel else ()
        yield Problem(str(error).removesuffix("; lower it"), fix)


def _shorter(job: PlannedJob) -> tuple[str, ...]:
    """The longest response, or where no room remains for one the prompt, cut to what the model's positions allow."""
    positions, c = job.shape.max_positions, job.config
    room = positions - c.prompt.max_tokens
    if room > 0:
        return (f"{c.longest_response}={room}",)
    room = positions - (c.max_model_tokens - c.prompt.max_tokens)
    return (f"prompt.max_tokens={room}",) if room > 0 else ()


def _node_problems(job: PlannedJob) -> Iterator[Problem]:
    p, r, per_node = job.parallel, job.rollout, job.gpus_per_node
    if p.tensor > per_node:
        yield Problem(
            f"parallel.tensor: {p.tensor} reaches beyond a node of {per_node} GPUs",
            (f"parallel.tensor={nearest(per_node, [t for t in tensor_sizes(job.shape) if t <= per_node])}",),
        )
    if job.engines and per_node % r.tensor_parallel:
        allowed = [t for t in tensor_sizes(job.shape) if per_node % t == 0]
        yield Problem(
            f"rollout.tensor_parallel: {r.tensor_parallel} does not divide the {per_node} GPUs of a node",
            (f"rollout.tensor_parallel={nearest(r.tensor_parallel, allowed)}",),
        )
        return
    engine_gpus = 0 if job.colocated else job.engines * r.tensor_parallel
    if job.shared and not job.colocated:
        if refusal := nccl_on_shared_gpus(job.config):
            yield Problem(refusal, ("sync.transport=auto",))
        if max(p.world, engine_gpus) > per_node:
            yield Problem(
                f"cluster.share_gpus: {p.world} trainer ranks and {engine_gpus} engine workers share the GPUs of one node, "
                f"it has {per_node}",
                ("cluster.share_gpus=false",),
            )
        return
    if job.config.cluster.ranks_per_host and not job.gpu.is_cpu:
        yield from _dealt_problems(job)
        return
    if p.world + engine_gpus <= per_node:
        return
    if job.engines and job.config.sync.transport == Transport.IPC:
        yield Problem(
            f"sync.transport: ipc needs one machine, {p.world} trainer ranks and {job.engines} engines of "
            f"{r.tensor_parallel} GPUs need several of {per_node} GPUs",
            ("sync.transport=auto",),
        )
    if p.world > per_node and p.world % per_node:
        near = max(1, round(p.world / per_node)) * per_node // (p.tensor * p.context * p.pipeline)
        yield Problem(
            f"parallel: {p.axes()} = {p.world} ranks do not fill nodes of {per_node} GPUs",
            (f"parallel.data={max(1, near)}",),
        )
        return
    trainer, engine = -(-p.world // per_node), -(-engine_gpus // per_node)
    if job.nodes is not None and trainer + engine > job.nodes:
        yield Problem(
            f"cluster.nodes: {p.world} trainer ranks and {job.engines} engines of {r.tensor_parallel} GPUs need "
            f"{trainer} + {engine} nodes of {per_node} GPUs, there are {job.nodes}",
            _shrunk(job),
        )


def nccl_on_shared_gpus(config: Config) -> str | None:
    """Why the weights of trainer ranks cannot reach engines on their own GPUs; None where they can."""
    if (
        not config.cluster.share_gpus
        or config.sync.transport != Transport.NCCL
        or not config.generates
        or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    ):
        return None
    return (
        "sync.transport: nccl refuses two members on one GPU, and cluster.share_gpus puts them there; set it to auto (or "
        "export NCCL_MULTI_RANK_GPU_ENABLE=1, with NCCL 2.30 or newer)"
    )


def _dealt_problems(job: PlannedJob) -> Iterator[Problem]:
    """Where `cluster.ranks_per_host` leaves GPUs of the trainer's hosts to engines."""
    try:
        shares = deal(job.config, 0 if job.colocated else job.engines, job.gpus_per_node, mixed=True, share=False)
    except ConfigError as error:
        yield Problem(str(error))
        return
    if job.nodes is not None and len(shares) > job.nodes:
        yield Problem(
            f"cluster.nodes: {job.parallel.world} trainer ranks, {job.config.cluster.ranks_per_host} on a host, and "
            f"{job.engines} engines need {len(shares)} nodes of {job.gpus_per_node} GPUs, there are {job.nodes}"
        )


def _shrunk(job: PlannedJob) -> tuple[str, ...]:
    """Fewer engines, then fewer data ranks, until the nodes suffice."""
    assert job.nodes is not None
    p, r, per_node = job.parallel, job.rollout, job.gpus_per_node
    total = job.nodes * per_node
    if (engines := engines_within(job, p.world, r.tensor_parallel)) >= 1:
        return (f"rollout.engines={engines}",)
    if job.nodes == 1:
        data = (per_node - r.tensor_parallel) // (p.tensor * p.context * p.pipeline)
        return (f"parallel.data={data}", "rollout.engines=1") if data else ()
    data = (total - per_node) // (p.tensor * p.context * p.pipeline)
    if not data:
        return ()
    engines = engines_within(job, data * p.tensor * p.context * p.pipeline, r.tensor_parallel)
    fewer = (f"rollout.engines={engines}",) if engines < job.engines else ()
    return (f"parallel.data={data}", *fewer)


def engines_within(job: PlannedJob, world: int, tensor: int) -> int:
    """How many engines of `tensor` GPUs the nodes of a run have room for besides a trainer of `world` ranks: on the rest of
    its only node, or on separate nodes."""
    per_node = job.gpus_per_node
    if job.shared and not job.colocated:
        return per_node // tensor if world <= per_node else 0
    same_node = (per_node - world) // tensor if world < per_node else 0
    if job.nodes is None:
        return max(job.engines, same_node)
    return max(same_node, (job.nodes - -(-world // per_node)) * per_node // tensor)


def memory_problems(job: PlannedJob, uses: list[Use], cache: EngineCache | None) -> list[Problem]:
    """What does not fit, without a fix (advice.py looks for one)."""
    problems = []
    for use in uses:
        if not use.fits:
            largest = max(use.causes, key=lambda cause: use.causes[cause])
            problems.append(
                Problem(
                    f"{use.role} ({use.where}): needs {use.total / GIB:.1f} GiB, {use.limit / GIB:.1f} GiB can "
                    f"be used of {job.gpu.name}; the largest part is {largest}, "
                    f"{use.causes[largest] / GIB:.1f} GiB"
                )
            )
    if (
        job.engines
        and not job.gpu.is_cpu
        and job.rollout.gpu_memory_utilization * job.gpu.memory_bytes > free_for_engine(job)
    ):
        problems.append(
            Problem(
                f"rollout.gpu_memory_utilization: {job.rollout.gpu_memory_utilization:g} of {job.gpu.name} is more "
                f"than the {free_for_engine(job) / GIB:.1f} GiB that a CUDA context and NCCL leave free when an "
                f"engine starts; lower it to at most {most_utilization(job):g}"
            )
        )
    if job.shared and not job.colocated and len(uses) == 2 and not problems:
        # an engine fills its share with its cache; where the cache's size is given vLLM still wants all of the share free
        trainer, engine = uses
        if trainer.total + engine.limit > trainer.limit:
            problems.append(
                Problem(
                    f"cluster.share_gpus: the trainer needs {trainer.total / GIB:.1f} GiB of a GPU, "
                    f"rollout.gpu_memory_utilization keeps {engine.limit / GIB:.1f} GiB of it for an engine, "
                    f"{trainer.limit / GIB:.1f} GiB can be used of {job.gpu.name}"
                )
            )
    if job.gpu.is_cpu:
        ranks = {"trainer": job.parallel.world, "engine": job.engines * job.rollout.tensor_parallel}
        together = sum(use.total * ranks[use.role] for use in uses)
        if together > job.gpu.memory_bytes:
            problems.append(
                Problem(
                    f"parallel: {ranks['trainer']} trainer ranks and {ranks['engine']} engine workers need "
                    f"{together / GIB:.1f} GiB together, this machine has "
                    f"{job.gpu.memory_bytes / GIB:.1f} GiB"
                )
            )
    if cache is not None and cache.full_sequences < 1 and all(use.fits for use in uses if use.role == "engine"):
        problems.append(
            Problem(
                f"rollout.kv_cache_bytes: the KV cache holds {cache.tokens} tokens, a prompt with the longest "
                f"response takes {job.config.max_model_tokens}; raise it to at least "
                f"{least_cache_bytes(job, cache)}"
            )
        )
    return problems


def most_utilization(job: PlannedJob) -> float:
    """The largest rollout.gpu_memory_utilization, in hundredths, with which an engine starts on a GPU of its own."""
    return 100 * free_for_engine(job) // job.gpu.memory_bytes / 100


def least_cache_bytes(job: PlannedJob, cache: EngineCache) -> int:
    """rollout.kv_cache_bytes that hold a prompt with the longest response, in whole blocks, on all GPUs of an engine."""
    blocks = -(-job.config.max_model_tokens // BLOCK_TOKENS)
    return blocks * BLOCK_TOKENS * cache.token_bytes * job.rollout.tensor_parallel


# --------------------------------------------------------------------------------------------------------- legal values
def nearest(value: int, allowed: list[int]) -> int:
    """The closest allowed value by ratio; the larger of two."""
    return min(allowed, key=lambda size: (max(size, value) / min(size, value), -size))


def _refusal(job: PlannedJob) -> str:
    try:
        check_layout(job.shape, job.parallel, job.rollout)
    except ConfigError as error:
        return str(error).partition("; choose")[0]
    raise AssertionError("check_layout accepts what the planner refuses")
