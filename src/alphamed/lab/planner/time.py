"""How long a step takes, by part, from floating-point operations and bytes with the efficiencies of calibration.py.

Log-probs and update: matrix products of a stage at a share of the GPU's peak, tensor-parallel traffic over NVLink that is
not hidden, the pipeline's bubble, the gradients' reduction, the optimizer's passes over memory. Generation: one decoding
step after another, each reading the weights and the running sequences' keys and values once. Sync: a stage's bytes
over its link. The run's other work (gathering, grading's remainder, logging) is a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from alphamed.config.choices import Recompute
from alphamed.lab.planner.calibration import CPU, GPU, Efficiency
from alphamed.lab.planner.topology import context_bytes
from alphamed.planner import parameters
from alphamed.planner.batch import BatchPlan, batch_of
from alphamed.planner.job import PlannedJob
from alphamed.planner.memory import engine_cache, static_bytes, token_bytes

GRID = 200
"""Points at which generation is integrated."""
SIGNAL_SHARE, CHOSEN_SIGNAL_SHARE = 0.5, 0.6
"""Groups whose rewards differ, of those graded, where dynamic sampling replaces the others: assumed, half of them; and where it
chooses questions, what the simulation of tests/unit/test_refill.py gives (1.6 to 1.8 groups for each one kept)."""

GLOO_BYTES_PER_S = 1e9
"""Of a push over gloo between processes with GPUs: assumed (benchmarks/weight_sync.py shows a third of it on two cores)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by part. `total` is less than the sum where generation overlaps."""

    generate: float
    logprobs: float
    update: float
    sync: float
    other: float
    handover: float  # of the GPUs between trainer and engines, where they share them
    overlapped: bool
    model_flops: float  # of the update alone, without recomputation: what MFU counts

    @property
    def training(self) -> float:
        return self.logprobs + self.update

    @property
    def waited(self) -> float:
        """Of generation, what the trainer waits for: what a run measures as time/generate_s."""
        return max(0.0, self.generate - self.training) if self.overlapped else self.generate

    @property
    def total(self) -> float:
        together = max(self.generate, self.training) if self.overlapped else self.generate + self.training
        return together + self.sync + self.other + self.handover

    def parts(self) -> dict[str, float]:
        return {
            "generate": self.generate,
            "logprobs": self.logprobs,
            "update": self.update,
            "sync": self.sync,
            "other": self.other,
        } | ({"handover": self.handover} if self.handover else {})


def efficiency_of(job: PlannedJob) -> Efficiency:
    return CPU if job.gpu.is_cpu else GPU


def step_time(job: PlannedJob, efficiency: Efficiency | None = None) -> StepTime:
    """The expected step. `efficiency`: by default the calibrated one for the job's kind of device."""
    e = efficiency or efficiency_of(job)
    batch = batch_of(job)
    passes = job.logprob_passes * batch.updates
    sampled = job.engines and not job.supervised
    return StepTime(
        generate=generate_seconds(job, e) if sampled else 0.0,
        logprobs=passes * _pass_seconds(job, batch, e, backward=False) + _swap_seconds(job, e),
        update=batch.updates * (_pass_seconds(job, batch, e, backward=True) + _optimizer_seconds(job, batch, e)),
        sync=sync_seconds(job, e) if sampled else 0.0,
        other=e.other_s,
        handover=handover_seconds(job, e) if job.colocated else 0.0,
        overlapped=job.overlaps,
        model_flops=3 * batch.updates * batch.rows * job.parallel.data * _model_flops(job, batch),
    )


# -------------------------------------------------------------------------------------------------------------- trainer
def layer_flops(job: PlannedJob, batch: BatchPlan) -> float:
    """Forward, one layer, one row: 2 per parameter and token, 4 q per pair of tokens that attend."""
    s, micro = job.shape, batch.micro
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    matrices = s.hidden * (2 * q + 2 * kv) + 3 * s.hidden * s.ffn
    return micro.tokens * (2 * matrices + 4 * q * micro.context)


def head_flops(job: PlannedJob, batch: BatchPlan) -> float:
    """Forward, the output layer at the positions that have labels."""
    return 2 * batch.micro.responses * job.shape.hidden * job.shape.vocab


def _model_flops(job: PlannedJob, batch: BatchPlan) -> float:
    return job.shape.layers * layer_flops(job, batch) + head_flops(job, batch)


def _pass_seconds(job: PlannedJob, batch: BatchPlan, e: Efficiency, backward: bool) -> float:
    """All rows of an update through the pipeline: forward only, or forward and backward with recomputation."""
    p, s = job.parallel, job.shape
    per_stage = s.layers / p.pipeline
    # context ranks share a row's tokens in the matrix products, and its heads in attention
    attention = 4 * s.heads * s.head_dim * batch.micro.context * batch.micro.tokens / p.context
    once = layer_flops(job, batch) / p.context
    again = {Recompute.FULL: once, Recompute.SELECTIVE: attention}.get(p.recompute, 0.0)
    work = 3 * once + again if backward else once
    layers = per_stage * work / (p.tensor * _peak(job) * e.matmul)
    directions = 2 + (p.recompute == Recompute.FULL) if backward else 1
    layers += per_stage * directions * (_tensor_seconds(job, batch, e) + _context_seconds(job, batch, e))
    head = head_flops(job, batch) * (3 if backward else 1) / (p.tensor * p.context * job.gpu.flops * e.matmul)
    if backward and p.logprob_chunk(s.vocab):
        head *= 4 / 3
    # every stage waits for the slowest, which is the last: it has the output layer as well
    waiting = (p.pipeline - 1) / job.virtual
    return batch.rows * (layers + head) + waiting * layers + batch.rows * job.virtual * _border_seconds(job, batch, e)


def _tensor_seconds(job: PlannedJob, batch: BatchPlan, e: Efficiency) -> float:
    """Time of one layer, one direction: two all-reduces (or an all-gather and a reduce-scatter each) of the activations."""
    p = job.parallel
    if p.tensor == 1:
        return 0.0
    bytes_ = 2 * 2 * (p.tensor - 1) / p.tensor * batch.micro.tokens / p.context * job.shape.hidden * job.trainer_bytes
    return bytes_ / (_tensor_link(job) * e.link)


def _context_seconds(job: PlannedJob, batch: BatchPlan, e: Efficiency) -> float:
    """Time of one layer, one direction: the exchanges around attention."""
    p = job.parallel
    link = job.gpu.nvlink if p.tensor * p.context <= job.gpus_per_node else job.gpu.network
    return context_bytes(job, batch) * (p.context - 1) / (link * e.link)


def _tensor_link(job: PlannedJob) -> float:
    return job.gpu.nvlink if job.parallel.tensor <= job.gpus_per_node else job.gpu.network


def _border_seconds(job: PlannedJob, batch: BatchPlan, e: Efficiency) -> float:
    """Passing one row to the next stage, which 1F1B hides only in part; counted once a row."""
    p = job.parallel
    if p.pipeline == 1:
        return 0.0
    across = p.world > job.gpus_per_node
    along = p.tensor if p.sequence else 1
    return (
        batch.micro.tokens
        / p.context
        * job.shape.hidden
        * job.trainer_bytes
        / along
        / ((job.gpu.network if across else job.gpu.nvlink) * e.link)
    )


def _optimizer_seconds(job: PlannedJob, batch: BatchPlan, e: Efficiency) -> float:
    """Reducing gradients over data ranks, gathering parameters, and Adam, which reads and writes its state once."""
    p = job.parallel
    count = parameters.stage_size(job.shape, p.tensor, p.pipeline, job.virtual, 0).parameters
    owned = count / (p.replicas if p.distributed_optimizer else 1)
    adam = owned * 30 / (job.gpu.hbm * e.memory) + 2 * count * 4 / (job.gpu.hbm * e.memory)
    if p.replicas == 1:
        return adam
    stride = p.tensor * p.replicas
    link = job.gpu.nvlink if stride <= job.gpus_per_node else job.gpu.network
    share = (p.replicas - 1) / p.replicas
    reduce = share * count * 4 * (1 if p.distributed_optimizer else 2) / (link * e.link)
    gather = share * count * job.trainer_bytes / (link * e.link) if p.distributed_optimizer else 0.0
    return adam + gather + (reduce / batch.rows if p.overlap_grad_reduce else reduce)


def _swap_seconds(job: PlannedJob, e: Efficiency) -> float:
    """An offloaded reference's weights from pinned host memory to the device, once a step; nothing travels back."""
    p = job.parallel
    if not job.offloaded_reference:
        return 0.0
    largest = max(
        parameters.stage_size(job.shape, p.tensor, p.pipeline, job.virtual, stage).parameters for stage in range(p.pipeline)
    )
    return largest * job.trainer_bytes / (job.gpu.host * e.link)


def _peak(job: PlannedJob) -> float:
    """FLOPs per second of a layer's matrix products, at most."""
    fp8 = job.config.model.fp8 and job.gpu.fp8_flops
    # activations are cast and scaled, and attention stays in BF16: about 1.35 of BF16's speed in published training runs
    return job.gpu.flops * 1.35 if fp8 else job.gpu.flops


# ------------------------------------------------------------------------------------------------------------- engines
def generate_seconds(job: PlannedJob, e: Efficiency) -> float:
    """Time of a step: of its questions, and of those that replace groups without signal.

    When generation and training take turns, each round of refills begins when the one before has ended. The longest of a few
    responses does not reach the limit: of n exponential values the largest has the mean scale x (ln n + Euler's constant).
    """
    r = job.rollout
    first, *refills = rounds(job)
    seconds = batch_seconds(job, e, first, r.samples_per_question, r.max_response_tokens)
    scale = decay_scale(job.mean_response, r.max_response_tokens)
    for questions in refills:
        longest = scale * (math.log(questions * r.samples_per_question) + 0.5772)
        seconds += batch_seconds(job, e, questions, r.samples_per_question, min(longest, r.max_response_tokens))
    return seconds


def rounds(job: PlannedJob) -> list[int]:
    """Questions asked in each round of a step's generation, expected. Ahead of the policy groups are replaced as they come, so
    there is one round; otherwise as many as leave half a group or more to replace."""
    sampling, questions = job.config.dynamic_sampling, job.rollout.questions_per_step
    share = CHOSEN_SIGNAL_SHARE if sampling.choose else SIGNAL_SHARE
    if job.rollout.max_staleness:
        return [math.ceil(questions / max(share, 1 / (1 + sampling.refills)))]
    missing = [questions * (1 - share) ** number for number in range(1 + sampling.refills)]
    return [math.ceil(count) for count in missing if count >= 0.5]


def wait_seconds(job: PlannedJob) -> float:
    """The longest that a run waits for generation at once, which rollout.step_deadline_s bounds: a round; ahead of the policy
    the whole of the first step, whose generation overlaps with nothing."""
    r = job.rollout
    return batch_seconds(job, efficiency_of(job), rounds(job)[0], r.samples_per_question, r.max_response_tokens)


def batch_seconds(job: PlannedJob, e: Efficiency, questions: int, samples: int, longest: float) -> float:
    """An engine's share of `questions` with `samples` responses each, from its first prompt to its longest response.

    Lengths end at a constant rate per token (their mean is the job's), cut at the limit, and the longest response of a
    step reaches the limit: one of hundreds of samples does not stop. Sequences that wait for a slot keep the engine full
    first."""
    cache = engine_cache(job)
    mean = min(job.mean_response, longest)
    total = math.ceil(questions / job.rollout.engines) * samples
    running = max(1, min(total, cache.wanted_sequences, cache.mean_sequences))
    scale = decay_scale(mean, longest)
    seconds = prefill_seconds(job, total / samples, e)
    full_context = job.mean_prompt + mean / 2
    seconds += (total - running) * mean / running * decode_seconds(job, running, full_context, e)
    step = longest / GRID
    for i in range(GRID):
        at = (i + 0.5) * step
        alive = max(1.0, running * math.exp(-at / scale)) if scale < math.inf else float(running)
        seconds += step * decode_seconds(job, alive, job.mean_prompt + at, e)
    return seconds


def decay_scale(mean: float, longest: float) -> float:
    """The scale of an exponential distribution whose values, cut at `longest`, have this mean."""
    if mean >= longest * 0.999:
        return math.inf
    low, high = mean, 1e4 * longest
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - math.exp(-longest / middle)) < mean else (low, middle)
    return (low + high) / 2


def decode_seconds(job: PlannedJob, sequences: float, context: float, e: Efficiency) -> float:
    """One decoding step of an engine: the longer of reading (weights, and keys and values of `context` tokens of each
    sequence) and computing, then what the tensor ranks and the host add."""
    s, t = job.shape, job.rollout.tensor_parallel
    active = s.parameters - (0 if s.tied else s.vocab * s.hidden)  # one row of the embedding is read
    reading = active * job.engine_bytes / t + sequences * context * token_bytes(job)
    flops = sequences * (2 * active + 4 * s.layers * s.heads * s.head_dim * context) / t
    waiting = e.decode_s + (2 * s.layers * e.reduce_s if t > 1 else 0.0)
    return max(reading / (job.gpu.hbm * e.memory), flops / (job.gpu.flops * e.matmul)) + waiting


def prefill_seconds(job: PlannedJob, prompts: float, e: Efficiency) -> float:
    """Prompts are read once per question; the prefix cache serves its other samples."""
    s = job.shape
    flops = prompts * job.mean_prompt * 2 * s.parameters
    return flops / (job.rollout.tensor_parallel * job.gpu.flops * e.matmul)


# ---------------------------------------------------------------------------------------------------------------- sync
def sync_seconds(job: PlannedJob, e: Efficiency) -> float:
    """Stages send at the same time; the one with most to send ends last. Shared memory (`ipc`) is taken to be as fast as NCCL:
    a bus copies several times faster than an engine loads."""
    pipeline = job.parallel.pipeline
    largest = max(parameters.stage_size(job.shape, 1, pipeline, job.virtual, stage).parameters for stage in range(pipeline))
    return largest * job.engine_bytes / (GLOO_BYTES_PER_S if job.sync_over_gloo else e.sync)


def handover_seconds(job: PlannedJob, e: Efficiency) -> float:
    """Optimizer state to host memory before engines take the GPU, and back: many tensors through pageable memory."""
    moved = max(static_bytes(job, stage)["optimizer"] for stage in range(job.parallel.pipeline))
    return 2 * moved / e.handover
