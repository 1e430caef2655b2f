"""Memory on the fullest GPU of each role, by cause (pure arithmetic over the job; nothing is allocated).

The trainer's activations are counted tensor by tensor, as the layers of megatron/ keep them for the backward pass. With
q = heads x head_dim and kv = kv_heads x head_dim, elements per token and layer:

    layer's input, second residual, two normalised inputs   4 H                     split by sequence parallelism only
    fused qkv; rotated q and k; attention's output          (q + 2 kv) + (q + kv) + q     split over tensor ranks
    gate and up; their product                              2 F + F                 split over tensor ranks

Full recompute keeps the layer's input alone and works on one layer at a time; selective recompute drops rotated q and k.
Tests hold the sum to the allocator's own count on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from alphamed.config.choices import Recompute, SyncMode
from alphamed.planner import parameters
from alphamed.planner.batch import PlannedRow, fullest_row, in_flight
from alphamed.planner.hardware import GIB
from alphamed.planner.job import PlannedJob
from alphamed.rollout.spec import CUDA_BATCH_TOKENS

CONTEXT_BYTES = 3 * GIB // 4
"""A CUDA context with cuBLAS, cuDNN and the kernels' code: 0.5 to 0.8 GiB on Hopper."""
COMMUNICATOR_BYTES = 3 * GIB // 10
"""NCCL's buffers of one communicator: 16 to 32 channels, 4 MiB and more for each protocol and direction."""
ALLOCATOR_SHARE = 0.05
"""Of a trainer's GPU, lost to rounding and fragmentation in PyTorch's caching allocator: rows differ in length."""
CUDA_GRAPH_BYTES = GIB
"""Of an engine: captured graphs and vLLM's own buffers."""
CPU_CACHE_SHARE = 0.25
"""Of the machine's memory, for the caches of all engines on a CPU (rollout/spec.py, MAX_CPU_CACHE_SHARE)."""
BLOCK_TOKENS = 16
"""Tokens of a block of vLLM's KV cache."""


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes by cause on one GPU."""

    role: str  # "trainer" | "engine"
    where: str
    causes: Mapping[str, int]
    limit: int  # that may be used

    @property
    def total(self) -> int:
        return sum(self.causes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True, slots=True)
class EngineCache:
    """What an engine's memory leaves for its KV cache, per GPU, and what that holds."""

    bytes: int
    token_bytes: int  # per GPU
    tokens: int
    full_sequences: int  # at the longest prompt and response
    mean_sequences: int
    wanted_sequences: int  # sampled at once, as the configuration says


# -------------------------------------------------------------------------------------------------------------- trainer
def trainer_use(job: PlannedJob) -> Use:
    """The stage that needs most."""
    return max((stage_use(job, stage) for stage in range(job.parallel.pipeline)), key=lambda use: use.total)


def stage_use(job: PlannedJob, stage: int, row: PlannedRow | None = None, rows: int | None = None) -> Use:
    """A rank of one pipeline stage (its tensor rank 0 and data rank 0, which sends weights). `row`: the largest
    micro-batch, by default one at its token budget; `rows`: micro-batches of an update."""
    p = job.parallel
    causes = static_bytes(job, stage)
    row = (row or fullest_row(job)).over(p.context)
    layers, head = _passing_bytes(job, stage, row, rows)
    causes |= {"activations": layers, "logits": head}
    if job.offloaded_reference:
        causes["reference"] = causes.get("reference", 0) + _offloaded_bytes(job, stage, row, layers + head)
    if job.gpu.is_cpu and p.distributed_optimizer:
        # gloo reduces and scatters through a copy of the gradients, when the activations are gone
        causes["reduction copy"] = max(0, causes["gradients"] - layers - head)
    if not job.gpu.is_cpu:
        largest = (
            parameters.stage_size(job.shape, p.tensor, p.pipeline, job.virtual, stage).largest * p.tensor * job.trainer_bytes
        )
        causes["sync buckets"] = _sending_bytes(job, largest) if job.engines or not job.supervised else 0
        causes["NCCL and CUDA"] = CONTEXT_BYTES + COMMUNICATOR_BYTES * _communicators(job)
    share = 1.0 if job.gpu.is_cpu else 1 - ALLOCATOR_SHARE
    first, ranks = stage * p.tensor * p.replicas, p.tensor * p.replicas
    return Use("trainer", f"stage {stage}, ranks {first} to {first + ranks - 1}", causes, int(job.gpu.memory_bytes * share))


def static_bytes(job: PlannedJob, stage: int) -> dict[str, int]:
    """What a rank of this stage holds permanently: weights, gradients, optimizer state, a resident reference."""
    p, width = job.parallel, job.trainer_bytes
    layout = job.shape, p.tensor, p.pipeline, job.virtual, stage
    size, flat = parameters.stage_size(*layout), parameters.stage_buffer(*layout, p.replicas, p.distributed_optimizer)
    count = size.parameters
    owned = flat // p.replicas if p.distributed_optimizer else count
    # the distributed optimizer moves parameters into a flat buffer of the same layout as the gradients'
    causes = {
        "weights": (flat if p.distributed_optimizer else count) * width,
        "gradients": flat * 4,
        "optimizer": owned * (8 if width == 4 else 12),
    }  # Adam's two moments, and FP32 copies of bf16 weights
    if job.reference and (job.gpu.is_cpu or not job.offloaded_reference):  # a CPU's host copy is in the same memory
        causes["reference"] = count * width
    if job.config.model.fp8:
        # Transformer Engine keeps each layer matrix twice in FP8, both plain and transposed, the policy's and the
        # reference's
        causes["FP8 copies"] = 2 * size.linear * (1 + job.reference)
    return causes


def layer_bytes(job: PlannedJob, recompute: Recompute) -> tuple[float, float]:
    """(kept for the backward pass, of these the layer's input) of one layer, bytes per token on one rank."""
    s, p, width = job.shape, job.parallel, job.trainer_bytes
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    along = p.tensor if p.sequence else 1
    entry = s.hidden * width / along
    if recompute == Recompute.FULL:
        return entry, entry
    linear_in = 1 if job.config.model.fp8 else width  # inputs of matrix products are kept in FP8
    rotated = 0 if recompute == Recompute.SELECTIVE else _rotated_bytes(job)
    attention = (q + 2 * kv) * width + rotated + q * width + s.heads * 4
    stored = 2 * entry + 2 * s.hidden * linear_in / along + 2 * 4
    stored += (attention + 2 * s.ffn * width + s.ffn * linear_in) / p.tensor
    if s.qk_norm:  # q and k before their norms, and the norms' factors
        stored += ((q + kv) * width + (s.heads + s.kv_heads) * 4) / p.tensor
    return stored, entry


def _rotated_bytes(job: PlannedJob) -> float:
    """What attention keeps per token besides the fused qkv and its own output: rotated q and k. Context ranks keep what they
    have exchanged, rotated q and k with v, in place of the fused qkv, and the output on both sides of the exchange back."""
    s, p = job.shape, job.parallel
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if p.context == 1:
        return (q + kv) * job.trainer_bytes
    repeated = max(s.kv_heads, p.tensor * p.context) * s.head_dim - kv
    return (q + 2 * repeated) * job.trainer_bytes


def _passing_bytes(job: PlannedJob, stage: int, row: PlannedRow, rows: int | None) -> tuple[int, int]:
    """Activations of this stage at its worst moment, and what the log-probs add to them on the last stage."""
    s, p, width = job.shape, job.parallel, job.trainer_bytes
    layers = s.layers // p.pipeline
    along = p.tensor if p.sequence else 1
    stored, entry = layer_bytes(job, p.recompute)
    whole, _ = layer_bytes(job, Recompute.NONE)
    activations = in_flight(job, stage, rows) * layers * stored * row.tokens
    recomputed = row.tokens * (whole if p.recompute == Recompute.FULL else 0)
    # the backward pass of a layer: gradients of gate and up, of their product, of both residuals; under sequence
    # parallelism the gathered input
    backward = (
        row.tokens * (3 * s.ffn / p.tensor + 3 * s.hidden / along + (s.hidden if p.sequence else 0)) * width + recomputed
    )
    if stage < p.pipeline - 1:
        return int(activations + backward), 0
    ends = row.tokens * 2 * s.hidden * width / along + row.responses * s.hidden * width  # final norm, rows with labels
    head = _head_bytes(job, row)
    return int(activations + ends + max(0.0, backward - head)), int(head)


def _offloaded_bytes(job: PlannedJob, stage: int, row: PlannedRow, update: int) -> int:
    """An offloaded reference during its forward pass, when the policy keeps no activations: what it needs beyond
    `update`, the bytes that an update needs at that place."""
    s, p, width = job.shape, job.parallel, job.trainer_bytes
    weights = parameters.stage_size(s, p.tensor, p.pipeline, job.virtual, stage).parameters * width
    along = p.tensor if p.sequence else 1
    # a layer's forward pass: gate and up, their product, residual, its normalised copy; the output layer comes after it
    layer = row.tokens * (3 * s.ffn / p.tensor + 3 * s.hidden / along) * width
    forward = max(layer, _head_bytes(job, row) if stage == p.pipeline - 1 else 0)
    return max(0, int(weights + forward) - update)


def _head_bytes(job: PlannedJob, row: PlannedRow) -> float:
    """Logits of one micro-batch, or of a chunk: FP32, their gradient in the trainer's type next to them, the hidden states'
    gradient, and the output layer's product before it is added to its gradient."""
    s, p, width = job.shape, job.parallel, job.trainer_bytes
    columns = -(-s.vocab // p.tensor)
    at_once = min(row.responses, p.logprob_chunk(s.vocab) or row.responses)
    product = columns * s.hidden * width if width == 2 else 0
    return at_once * columns * (4 + (width if width == 2 else 0)) + row.responses * s.hidden * width + product


def _communicators(job: PlannedJob) -> int:
    """NCCL groups that a rank takes part in and uses: world, then each axis longer than one, and its sync link."""
    p = job.parallel
    return 1 + sum(size > 1 for size in (p.tensor, p.context, p.replicas, p.pipeline)) + (1 if job.engines else 0)


# -------------------------------------------------------------------------------------------------------------- engines
def engine_use(job: PlannedJob) -> Use | None:
    """A GPU of an engine. The KV cache takes the rest of its share; less than one full sequence does not fit."""
    if not job.engines:
        return None
    causes = engine_causes(job)
    cache = engine_cache(job)
    causes["KV cache"] = max(cache.bytes, cache.token_bytes * job.config.max_model_tokens)
    return Use("engine", f"each of {job.engines} engines of {job.rollout.tensor_parallel}", causes, _engine_limit(job))


def engine_cache(job: PlannedJob) -> EngineCache:
    """The KV cache of an engine, and how many sequences it holds."""
    r = job.rollout
    token = token_bytes(job)
    free = (
        r.kv_cache_bytes // r.tensor_parallel if r.kv_cache_bytes else _engine_limit(job) - sum(engine_causes(job).values())
    )
    if job.gpu.is_cpu and not r.kv_cache_bytes:  # as rollout/spec.py does
        all_full = token * job.config.max_model_tokens * max(r.max_concurrent_requests, r.samples_per_question)
        free = min(all_full, int(job.gpu.memory_bytes * CPU_CACHE_SHARE) // (r.engines * r.tensor_parallel))
    tokens = max(0, free) // (token * BLOCK_TOKENS) * BLOCK_TOKENS
    mean = job.mean_prompt / r.samples_per_question + job.mean_response  # siblings share their prompt's blocks
    return EngineCache(
        tokens * token,
        token,
        tokens,
        tokens // job.config.max_model_tokens,
        int(tokens / mean),
        max(r.max_concurrent_requests, r.samples_per_question),
    )


def token_bytes(job: PlannedJob) -> int:
    """Keys and values of a token in an engine's cache, per GPU."""
    heads = max(1, job.shape.kv_heads // job.rollout.tensor_parallel)  # fewer KV heads than ranks: each rank holds a copy
    return 2 * job.shape.layers * heads * job.shape.head_dim * job.engine_bytes


def free_for_engine(job: PlannedJob) -> int:
    """Of an engine's GPU, what is free when vLLM asks for its share: a process has its context and communicators by then."""
    return job.gpu.memory_bytes - CONTEXT_BYTES - COMMUNICATOR_BYTES * (1 + (job.rollout.tensor_parallel > 1))


def _engine_limit(job: PlannedJob) -> int:
    return int(job.gpu.memory_bytes * (1.0 if job.gpu.is_cpu else job.rollout.gpu_memory_utilization))


def engine_causes(job: PlannedJob) -> dict[str, int]:
    s, r, width = job.shape, job.rollout, job.engine_bytes
    vocab = -(-s.vocab // 64) * 64  # vLLM pads the vocabulary to a multiple of 64
    matrices = s.parameters - s.vocab * s.hidden * (1 if s.tied else 2)
    weights = (matrices + vocab * s.hidden * (1 if s.tied else 2)) * width // r.tensor_parallel
    if job.gpu.is_cpu:
        return {"weights": weights}
    sequences = max(r.max_concurrent_requests, r.samples_per_question)
    # the profiling run: residual, normalised input, gate and up and their product of one layer, then FP32 logits with a
    # copy of a sequence each
    working = max(CUDA_BATCH_TOKENS, sequences) * (3 * s.hidden + 3 * s.ffn // r.tensor_parallel) * width
    sampling = 2 * sequences * s.vocab * 4
    # a push comes while no request runs, in the room of the activations
    return {
        "weights": weights,
        "activations": max(working + sampling, _receiving_bytes(job)),
        "CUDA graphs": CUDA_GRAPH_BYTES,
        "NCCL and CUDA": CONTEXT_BYTES + COMMUNICATOR_BYTES * (1 + (r.tensor_parallel > 1)),
    }


def _sending_bytes(job: PlannedJob, largest: int) -> int:
    """What a sender holds besides its parameters (weights/sender.py): a bucket on the way over each of its links and one
    that is being packed; gathered parameters as shards of all tensor ranks and as whole tensors, at most `largest` each."""
    p, bucket = job.parallel, job.config.sync.bucket_bytes
    if job.config.sync.mode == SyncMode.DIRECT:
        return (1 + max(1, job.rollout.tensor_parallel // p.tensor)) * bucket
    return 2 * bucket + (1 + (p.tensor > 1)) * largest


def _receiving_bytes(job: PlannedJob) -> int:
    """What a worker holds besides its parameters (SyncPlan.buffer_bytes): a bucket posted on each of its links and the one
    that is being loaded; whole tensors that come in several buckets until their last: embedding and output layer."""
    s, p, bucket = job.shape, job.parallel, job.config.sync.bucket_bytes
    if job.config.sync.mode == SyncMode.DIRECT:
        return (1 + p.pipeline * max(1, p.tensor // job.rollout.tensor_parallel)) * bucket
    table = s.vocab * s.hidden * job.engine_bytes
    ends = 1 if s.tied or p.pipeline == 1 else 2
    return (1 + p.pipeline) * bucket + (ends * table if table > bucket else 0)
