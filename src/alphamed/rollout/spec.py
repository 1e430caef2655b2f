"""The settings of each engine: sizes, dtype, cores and environment, all derived from the configuration (pure)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster.environment import SILENT, exact_fp32
from alphamed.cluster.hardware import cores, memory_bytes, wants_cuda
from alphamed.config.choices import Dtype, OnPush
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.hashing import stable_hash
from alphamed.model.shape import ModelShape, check_context

RECEIVER = "alphamed.weights.receiver.WeightReceiver"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vLLM 0.32 fails with others only when the first request comes."""
UNUSED_BY_VLLM = ("torch._inductor.lowering",)
"""Modules of the compiler, which engines on CPU never call: vLLM does without them where they are absent, 1 s sooner."""
MAX_CPU_CACHE_SHARE = 0.25
"""Of the machine's memory, for the KV caches of all engines, where the configuration gives no size."""

CUDA_BATCH_TOKENS = 8192
"""Tokens that an engine on CUDA computes at once, at most: prompts in chunks of that many, which also bounds its activations
(planner/memory.py). vLLM's own value depends on the GPU and on who asks, 2,048 to 16,384."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine. `cores` holds a list of core ids per tensor rank on CPU and is empty on CUDA."""

    index: int
    folder: str
    dtype: str  # "float32" | "bfloat16"
    tensor_parallel: int
    cuda: bool
    cores: tuple[tuple[int, ...], ...]
    threads: int  # of a tensor rank on CPU: fewer than its cores where CPU time is limited
    max_model_tokens: int  # prompt and response together
    max_prompt_tokens: int
    max_sequences: int  # sampled at once
    kv_cache_bytes: int | None  # per tensor rank; None: from gpu_memory_utilization
    gpu_memory_utilization: float
    deterministic: bool
    seed: int
    eos_ids: tuple[int, ...]  # each ends a response and belongs to it, but not to its text
    asynchronous: bool = False  # pushes come while requests are under way
    on_push: str = "wait"  # what becomes of those: "wait" | "keep" | "abort"
    worker_extension: str = RECEIVER
    answer_after: str | None = None  # reward.answer_after: what ends the thinking stays in the text of a response

    @property
    def name(self) -> str:
        return f"engine {self.index}"


def engine_specs(config: Config, folder: Path, shape: ModelShape, eos_ids: tuple[int, ...]) -> tuple[EngineSpec, ...]:
    """The engines of a run. Raises ConfigError where `cluster.engine_cores` or the model does not fit."""
    r = config.rollout
    cuda = wants_cuda(config)
    if not cuda and shape.head_dim not in CPU_HEAD_SIZES:
        raise ConfigError(
            f"model.path: heads of {shape.head_dim} are none that vLLM computes on CPU "
            f"({', '.join(map(str, CPU_HEAD_SIZES))}); choose another model or cluster.device=cuda"
        )
    check_context(shape, config.max_model_tokens, config.longest_response)
    sequences = max(r.max_concurrent_requests, r.samples_per_question)
    cache_bytes = r.kv_cache_bytes
    if cache_bytes is None and not cuda:
        cache_bytes = _cpu_cache_bytes(config, shape, sequences)
    bound = () if cuda else engine_cores(config)
    return tuple(
        EngineSpec(
            index=index,
            folder=str(folder),
            dtype="float32" if r.dtype == Dtype.FP32 else "bfloat16",
            tensor_parallel=r.tensor_parallel,
            cuda=cuda,
            cores=bound,
            threads=_threads(config, bound),
            max_model_tokens=config.max_model_tokens,
            max_prompt_tokens=config.prompt.max_tokens,
            max_sequences=sequences,
            kv_cache_bytes=cache_bytes // r.tensor_parallel if cache_bytes else None,
            gpu_memory_utilization=r.gpu_memory_utilization,
            deterministic=r.deterministic,
            seed=stable_hash(config.run.seed, "engine", index) % 2**31,
            eos_ids=tuple(eos_ids),
            asynchronous=r.max_staleness > 0,
            on_push=str(r.on_push if r.max_staleness else OnPush.WAIT),
            answer_after=config.reward.answer_after,
        )
        for index in range(r.engines)
    )


def engine_cores(config: Config) -> tuple[tuple[int, ...], ...]:
    """Cores of each tensor rank of an engine on CPU: as in `cluster.engine_cores` ("0-1", "0,2|1,3"), else all cores,
    dealt out evenly. Raises ConfigError."""
    setting, ranks = config.cluster.engine_cores, config.rollout.tensor_parallel
    if setting is None:
        present = cores()
        if present < ranks:
            raise ConfigError(f"rollout.tensor_parallel: {ranks} needs as many cores, {present} present; lower it")
        return tuple(tuple(sorted(os.sched_getaffinity(0))[rank::ranks]) for rank in range(ranks))
    lists = setting.split("|")
    if len(lists) != ranks:
        raise ConfigError(
            f"cluster.engine_cores: {setting!r} holds {len(lists)} lists, rollout.tensor_parallel is {ranks}; "
            f"give one list for each, separated by |"
        )
    return tuple(_core_list(text, setting) for text in lists)


def _threads(config: Config, bound: tuple[tuple[int, ...], ...]) -> int:
    """Threads of a tensor rank: one per core, but no more than there is CPU time where the configuration names no cores."""
    if config.cluster.engine_cores is None and cores() < sum(map(len, bound)):
        return max(1, cores() // config.rollout.tensor_parallel)
    return max(map(len, bound), default=0)


def _core_list(text: str, setting: str) -> tuple[int, ...]:
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
            raise ConfigError(f"cluster.engine_cores: {setting!r} is no list of cores; write it like 0-3 or 0,2|1,3")
        cores += range(int(first), int(last or first) + 1)
    absent = sorted(set(cores) - os.sched_getaffinity(0))
    if absent:
        raise ConfigError(
            f"cluster.engine_cores: {setting!r} names core {absent[0]}, which this machine does not offer; "
            f"choose from {', '.join(map(str, sorted(os.sched_getaffinity(0))))}"
        )
    return tuple(cores)


def _cpu_cache_bytes(config: Config, shape: ModelShape, sequences: int) -> int:
    """Room for every sequence at full length (keys and values of all layers), within a share of the machine's memory."""
    element = 4 if config.rollout.dtype == Dtype.FP32 else 2
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * element
    limit = int(memory_bytes()[0] * MAX_CPU_CACHE_SHARE) // config.rollout.engines
    sequence_bytes = token * config.max_model_tokens
    return max(sequence_bytes, min(sequences * sequence_bytes, limit)) + (64 << 20)


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment variables of the engine's actor and of every process it starts."""
    variables = SILENT | {
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_HOST_IP": "127.0.0.1",  # an engine's processes share a node; other addresses may need a route
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if spec.cuda:
        variables |= exact_fp32(Dtype.FP32 if spec.dtype == "float32" else Dtype.BF16) | {
            # it is compiled when it is first used, by nvcc, from sources that are looked for in the network; and it has no
            # part in sampling from the whole distribution, the only one that is trained on
            "VLLM_USE_FLASHINFER_SAMPLER": "0"
        }
    else:
        variables |= {
            "OMP_NUM_THREADS": str(spec.threads),
            # vLLM starts a thread on each core it is given. Fewer threads move freely: fixed ones would meet those of every
            # other container with limited time on the same first cores
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, ids)) for ids in spec.cores)
            if spec.threads == max(map(len, spec.cores))
            else "nobind",
            "GLOO_SOCKET_IFNAME": "lo",
            # Engines run eagerly, but vLLM decorates small functions of its sampler with torch.compile: each start would
            # compile them again for about 15 s, as the compiler's cache is in the run's own temporary folder.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables
