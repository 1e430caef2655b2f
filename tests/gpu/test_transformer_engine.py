"""Transformer Engine's layers on one GPU, in bf16 and FP8: packed rows with shared prompts (our attention) and without (its
own, `thd`), against transformers and torch.optim.AdamW on the CPU in bf16.

FP8 keeps 3 bits of mantissa where bf16 keeps 7: its log-probs are allowed several times the difference.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

import oracle
from jobs import make_job, run_cases
from test_parity import SMOOTH, TRACES, UNSHARED
from worker import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not importlib.util.find_spec("transformer_engine"), reason="no Transformer Engine"),
]

SHAPE = dict(hidden=256, ffn=512, heads=4, kv_heads=2, head_dim=64, vocab=512, scale=0.05)
MODELS = {"llama": {"family": "llama", "tied": True, "llama3_rope": True}, "qwen3": {"family": "qwen3"}}
MEAN_DIFFERENCE = {"bf16": 0.02, "fp8": 0.1}
CASES = [
    case
    for model in MODELS
    for case in (
        Case(f"shared-{model}", model, "bf16", device="cuda", dtype="bf16", **SMOOTH),
        Case(f"thd-{model}", model, "bf16", UNSHARED, device="cuda", dtype="bf16", **SMOOTH),
        Case(f"recompute-{model}", model, "bf16", {"recompute": "full"}, budget=64, device="cuda", dtype="bf16", **SMOOTH),
        Case(f"selective-{model}", model, "bf16", {"recompute": "selective"}, device="cuda", dtype="bf16", **SMOOTH),
        Case(f"fp8-{model}", model, "bf16", device="cuda", dtype="bf16", fp8=True, **SMOOTH),
        Case(f"fp8-thd-{model}", model, "bf16", UNSHARED, device="cuda", dtype="bf16", fp8=True, budget=208, **SMOOTH),
    )
]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("te"), MODELS, **SHAPE)


@pytest.fixture(scope="module")
def traces(job) -> dict[str, oracle.Trace]:
    return {name: oracle.train(Path(folder), job["data"][name], **TRACES["bf16"]) for name, folder in job["folders"].items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_updates(case, job, traces):
    """Each case in a process of its own: one that fails takes no other with it."""
    if case.fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU computes nothing in FP8")
    folder = run_cases(job, case.name, 1, [case], timeout_s=300)
    found, trace = torch.load(folder / f"{case.name}.0.pt", weights_only=False), traces[case.model]
    kind = "fp8" if case.fp8 else "bf16"
    for stat, loss, norm in zip(found["stats"], trace.loss, trace.grad_norm, strict=True):
        assert abs(stat["policy/loss"] - loss) <= (0.1 if case.fp8 else 0.02)
        assert stat["policy/grad_norm"] == pytest.approx(norm, rel=0.25 if case.fp8 else 0.05)
    for moment in ("before", "after"):
        expected = getattr(trace, moment)
        difference = torch.cat([(found[moment][sample].cpu() - values).abs() for sample, values in expected.items()]).mean()
        print(f"{case.name} {moment}: mean |difference of log-probs| {difference:.4f}")
        assert difference <= MEAN_DIFFERENCE[kind]
