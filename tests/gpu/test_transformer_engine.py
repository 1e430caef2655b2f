"""Transformer Engine's layers on one GPU, in bf16 and FP8: packed rows with shared prompts (our attention) and without (its
own, `thd`), against transformers and torch.optim.AdamW on the CPU in bf16.

FP8 keeps 3 bits of mantissa where bf16 keeps 7: its log-probs are allowed several times the difference.
"""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

import oracle
from test_parity import SMOOTH, TRACES, UNSHARED
from tiny import tiny_hf
from worker import Case

pytestmark = [pytest.mark.gpu, pytest.mark.slow,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
              pytest.mark.skipif(not importlib.util.find_spec("transformer_engine"), reason="no Transformer Engine")]

SHAPE = dict(hidden=256, ffn=512, heads=4, kv_heads=2, head_dim=64, vocab=512, scale=0.05)
MODELS = {"llama": {"family": "llama", "tied": True, "llama3_rope": True}, "qwen3": {"family": "qwen3"}}
MEAN_DIFFERENCE = {"bf16": 0.02, "fp8": 0.1}
CASES = [case for model in MODELS for case in (
    Case(f"shared-{model}", model, "bf16", device="cuda", dtype="bf16", **SMOOTH),
    Case(f"thd-{model}", model, "bf16", UNSHARED, device="cuda", dtype="bf16", **SMOOTH),
    Case(f"recompute-{model}", model, "bf16", {"recompute": "full"}, budget=64, device="cuda", dtype="bf16", **SMOOTH),
    Case(f"selective-{model}", model, "bf16", {"recompute": "selective"}, device="cuda", dtype="bf16", **SMOOTH),
    Case(f"fp8-{model}", model, "bf16", device="cuda", dtype="bf16", fp8=True, **SMOOTH),
    Case(f"fp8-thd-{model}", model, "bf16", UNSHARED, device="cuda", dtype="bf16", fp8=True, budget=208, **SMOOTH))]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("te")
    folders = {name: tiny_hf(root / name, **options, **SHAPE) for name, options in MODELS.items()}
    return {"root": root, "folders": {name: str(folder) for name, folder in folders.items()},
            "data": {name: oracle.make_data(folder) for name, folder in folders.items()}}


@pytest.fixture(scope="module")
def traces(job) -> dict[str, oracle.Trace]:
    return {name: oracle.train(Path(folder), job["data"][name], **TRACES["bf16"]) for name, folder in job["folders"].items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_three_updates(case, job, traces):
    """Each case in a process of its own: one that fails takes no other with it."""
    if case.fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU computes nothing in FP8")
    folder, job_file = job["root"] / case.name, job["root"] / f"{case.name}.pt"
    folder.mkdir()
    torch.save({"folders": job["folders"], "data": job["data"], "cases": [asdict(case)]}, job_file)
    search = os.pathsep.join([str(DISTRIBUTED), str(DISTRIBUTED.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
                           str(DISTRIBUTED / "worker.py"), str(job_file), str(folder)],
                          env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"the worker failed:\n{done.stderr[-6000:]}"
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
