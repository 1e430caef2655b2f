"""Helpers of the engine tests: pools of tiny engines, a model as weight source, transformers as the judge."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from shards import holders
from tiny import tiny_hf
from transformers import AutoModelForCausalLM

from alphamed.cluster.control import Control
from alphamed.config.loading import build_config
from alphamed.config.schema import Config
from alphamed.config.sections import ParallelConfig
from alphamed.model.families import hf_shapes
from alphamed.model.shape import read_shape
from alphamed.records import GenerationTask, Question, Sampling
from alphamed.rollout import pool as pool_module
from alphamed.rollout.pool import EnginePool
from alphamed.rollout.spec import engine_environment, engine_specs
from alphamed.weights.buckets import box_of
from alphamed.weights.probe import Probe
from alphamed.weights.routes import make_plan
from alphamed.weights.sync import WeightSync

EOS = 2
DEADLINE_S = 600
TEXT = tuple((7 * i * i + 3) % 509 for i in range(90))
"""A fixed text of the tiny models' 509 tokens."""
QUESTION = Question("q", "?", {"A": "x", "B": "y"}, "A")


def tiny(folder: Path, seed: int, tied: bool, family: str = "llama") -> Path:
    """Heads of 32: vLLM has no CPU kernel for smaller ones."""
    return tiny_hf(
        folder,
        family,
        seed=seed,
        tied=tied,
        head_dim=32 if family != "qwen2" else None,
        hidden=128 if family == "qwen2" else 64,
    )


def config(mode: str = "gather", transport: str = "auto", **rollout) -> Config:
    dtype = rollout.get("dtype", "fp32")
    return build_config(
        {
            "model": {"path": "m", "dtype": dtype},
            "data": {"train": ["d.jsonl"]},
            "cluster": {"device": "cpu"},
            "prompt": {"max_tokens": 100},
            "sync": {"mode": mode, "transport": transport, "bucket_bytes": 50_000},
            "rollout": {
                "dtype": dtype,
                "max_response_tokens": 28,
                "max_concurrent_requests": 32,
                "deterministic": True,
                "kv_cache_bytes": 64 << 20,
            }
            | rollout,
        }
    )


def start_pool(config: Config, *folders: Path) -> EnginePool:
    """One engine on each folder."""
    return start_engines([(config, folder) for folder in folders])


def start_engines(wanted: Sequence[tuple[Config, Path]]) -> EnginePool:
    """Engines of the given configurations on the given folders, with workers that take the hooks of worker_hooks.py."""
    specs = [
        replace(
            engine_specs(config, folder, read_shape(folder), (EOS,))[0],
            index=i,
            worker_extension="worker_hooks.HookedReceiver",
        )
        for i, (config, folder) in enumerate(wanted)
    ]
    original = pool_module.engine_environment
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    pool_module.engine_environment = lambda spec: engine_environment(spec) | {"PYTHONPATH": path}
    try:
        return EnginePool.of_specs(specs, DEADLINE_S)
    finally:
        pool_module.engine_environment = original


class ModelSource:
    """A transformers model in the place of the policy, on one rank."""

    rank, exports, scores = 0, True, True

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self.model, self._shape = load(folder, dtype), read_shape(folder)

    def plan(self, engines, wire):
        return make_plan(self._shape, ParallelConfig(), engines, wire)

    def tensors(self):
        own = dict(self.model.named_parameters())
        return ((name, own[name].detach()) for name in hf_shapes(self._shape))

    def parts(self):
        own = dict(self.model.named_parameters())
        return ((part, own[part.name].detach()[box_of(part)]) for part in holders(self._shape, ParallelConfig())[0])


def sync_of(config: Config, pool: EnginePool, source: ModelSource, tmp_path: Path, probed: bool = False) -> WeightSync:
    probe = Probe(TEXT, lambda tokens: logprobs(source.model, tokens)) if probed else None
    return WeightSync(config, source, pool, Control(None, 0, 1, [], tmp_path, 30.0, 15.0), probe, version=pool.version)


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logprobs(model, tokens, temperature: float = 1.0) -> list[float]:
    """transformers' log-probs of tokens[1:], in FP32 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()


def largest_difference(a, b) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def score(pool: EnginePool, version: int | None = None) -> list[list[float]]:
    """Each engine's log-probs of TEXT."""
    version = pool.version if version is None else version
    return pool.call("score", [dict(tokens=TEXT, version=version) for _ in pool.engines], "scoring", DEADLINE_S)


def task(name: str, length: int = 20, n: int = 1, temperature: float = 0.0, max_tokens: int = 24, seed: int | None = None):
    return GenerationTask(name, QUESTION, TEXT[:length], Sampling(n, temperature, 1.0, -1, max_tokens, seed))


def generate(engine, tasks, version):
    """One engine's answers to tasks sent together."""
    import ray

    return ray.get([engine.actor.generate.remote(task, version) for task in tasks], timeout=DEADLINE_S)


def said(groups) -> list:
    """Tokens and log-probs of every response."""
    return [(rollout.response_token_ids, rollout.logprobs) for group in groups for rollout in group.rollouts]


def assert_said_alike(one: list, other: list) -> None:
    """The same tokens, and log-probs that differ by FP32 rounding at most: how requests that come together share the engine's
    steps depends on their arrival, and a matrix product with other rows beside it may round otherwise in its last bits."""
    assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
    for (_, a), (_, b) in zip(one, other, strict=True):
        assert largest_difference(a, b) < 1e-5
