"""Layouts of the policy over NCCL against the oracle of the CPU: transformers and torch.optim.AdamW in one process.

With fewer GPUs than ranks they share one, where NCCL can (2.30 and newer, NCCL_MULTI_RANK_GPU_ENABLE=1). CUDA adds in
another order than the CPU, so FP32 tolerances are ten times those of the CPU layouts; bf16 as there.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

import oracle
from jobs import make_job, run_cases
from test_parity import CHUNKED, CP2, DP2, FULL, MODELS, OVERLAP, PP2, SELECTIVE, SMOOTH, SP, TP2, TRACES, VPP2
from worker import Case

from alphamed.cluster.environment import exact_fp32
from alphamed.config.choices import Dtype

MULTI_RANK_NCCL = 23000
DEADLINE_S = 500


def nccl_shares_gpus() -> bool:
    """Whether the NCCL that is loaded lets ranks share a GPU. torch.cuda.nccl.version() tells of the one that torch was
    compiled with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return version.value >= MULTI_RANK_NCCL


def ranks_possible() -> int:
    if not torch.cuda.is_available():
        return 0
    return 4 if nccl_shares_gpus() else torch.cuda.device_count()


def in_both(name: str, model: str, parallel: dict, **more) -> list[Case]:
    case = Case(name, model, "plain", parallel, device="cuda", **more)
    return [case, replace(case, name=f"{name}-bf16", dtype="bf16", expect="bf16", **SMOOTH)]


CASES = {
    2: [
        *in_both("tp2", "llama", TP2),
        *in_both("tp2-sp-chunked", "qwen3", TP2 | SP | CHUNKED, budget=64),
        *in_both("pp2-recompute", "qwen2", PP2 | FULL, budget=48),
        *in_both("vpp2", "llama", VPP2, budget=48),
        *in_both("dp2-overlap", "qwen3", DP2 | OVERLAP, budget=48),
        *in_both("cp2-selective", "llama", CP2 | SELECTIVE, budget=64),
        *in_both("dp2-plain-optimizer", "qwen2", DP2 | {"distributed_optimizer": False}, budget=64),
    ],
    4: [
        *in_both("tp2-pp2-sp", "qwen3", TP2 | PP2 | SP, budget=64),
        *in_both("tp2-sp-cp2", "qwen2", TP2 | SP | CP2, budget=64),
        *in_both("cp4", "qwen3", {"context": 4}, budget=64),
    ],
}
ALL = [(world, case) for world, cases in CASES.items() for case in cases]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(ranks_possible() < 2, reason="fewer than two GPUs, and no NCCL that shares one"),
]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("cuda-layouts"), MODELS)


@pytest.fixture(scope="module")
def traces(job) -> dict[tuple[str, str], oracle.Trace]:
    wanted = {(case.model, case.expect) for _, case in ALL}
    return {(m, e): oracle.train(Path(job["folders"][m]), job["data"][m], **TRACES[e]) for m, e in sorted(wanted)}


@pytest.fixture(scope="module")
def results(job):
    """World size -> folder of what its ranks found; each world is started once, when it is first asked for."""
    started: dict[int, Path | Exception] = {}

    def of(world: int) -> Path:
        if world not in started:
            try:
                started[world] = launch(job, world)
            except Exception as error:  # told of every case, in place of another try
                started[world] = error
        found = started[world]
        if isinstance(found, Exception):
            raise found
        return found

    return of


def launch(job: dict, world: int) -> Path:
    if ranks_possible() < world:
        pytest.skip(f"{world} ranks need {world} GPUs")
    environment = exact_fp32(Dtype.FP32) | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if torch.cuda.device_count() < world:
        environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    return run_cases(job, f"world{world}", world, CASES[world], timeout_s=DEADLINE_S, **environment)


@pytest.mark.parametrize("world, case", ALL, ids=[case.name for _, case in ALL])
def test_a_layout_over_nccl(world, case, results, traces):
    trace = traces[case.model, case.expect]
    found = [torch.load(results(world) / f"{case.name}.{rank}.pt", weights_only=False) for rank in range(world)]
    exact = case.dtype == "fp32"
    for rank in found:
        for stat, loss, norm in zip(rank["stats"], trace.loss, trace.grad_norm, strict=True):
            assert abs(stat["policy/loss"] - loss) <= (1e-4 + 1e-3 * abs(loss) if exact else 0.02)
            assert stat["policy/grad_norm"] == pytest.approx(norm, rel=1e-3 if exact else 0.05)
    for moment in ("before", "after"):
        seen = {sample: values for rank in found for sample, values in rank[moment].items()}
        assert seen.keys() == getattr(trace, moment).keys()
        differences = torch.cat([(seen[s].cpu() - values).abs() for s, values in getattr(trace, moment).items()])
        assert differences.max() <= 2e-4 if exact else differences.mean() <= 0.02
