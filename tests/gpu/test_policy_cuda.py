"""The policy on one CUDA device against the same oracle as on CPU: transformers and torch.optim.AdamW on the CPU, in FP32.

Log-probs before and after three updates, losses, gradient norms and every parameter's gradient. CUDA adds in another order
than the CPU, so tolerances are ten times those of the CPU layouts.
"""
from __future__ import annotations

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
from tiny import tiny_hf
from worker import Case

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODELS = {"llama": {"family": "llama", "tied": True, "llama3_rope": True}, "qwen2": {"family": "qwen2"},
          "qwen3": {"family": "qwen3", "tied": True}}
CASES = [Case(f"cuda-{model}", model, "plain", device="cuda") for model in MODELS]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("cuda")
    folders = {name: tiny_hf(root / name, **options) for name, options in MODELS.items()}
    data = {name: oracle.make_data(folder) for name, folder in folders.items()}
    return {"root": root, "folders": {name: str(folder) for name, folder in folders.items()}, "data": data}


@pytest.fixture(scope="module")
def results(job) -> Path:
    """One process runs all cases on the first device, without TF32."""
    folder = job["root"] / "results"
    folder.mkdir()
    torch.save({"folders": job["folders"], "data": job["data"], "cases": [asdict(c) for c in CASES]}, job["root"] / "job.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
               str(DISTRIBUTED / "worker.py"), str(job["root"] / "job.pt"), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DISTRIBUTED), str(DISTRIBUTED.parent),
                                                               os.environ.get("PYTHONPATH", "")]),
                                "NVIDIA_TF32_OVERRIDE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"the worker failed:\n{done.stderr[-6000:]}"
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_updates_and_gradients(case, job, results):
    found = torch.load(results / f"{case.name}.0.pt", weights_only=False)
    trace = oracle.train(Path(job["folders"][case.model]), job["data"][case.model])
    for stat, loss, norm in zip(found["stats"], trace.loss, trace.grad_norm, strict=True):
        assert abs(stat["policy/loss"] - loss) <= 1e-4 + 1e-3 * abs(loss)
        assert stat["policy/grad_norm"] == pytest.approx(norm, rel=1e-3)
    for moment in ("before", "after"):
        for sample, expected in getattr(trace, moment).items():
            torch.testing.assert_close(found[moment][sample], expected, atol=2e-4, rtol=0)
    assert found["gradient"].keys() == trace.gradient.keys()
    for name, gradient in found["gradient"].items():
        worst = (gradient.cpu() - trace.gradient[name]).abs().max() / trace.gradient[name].abs().max()
        assert worst <= 1e-4, f"{name}: {worst:.1e}"
