"""The policy on one CUDA device against the same oracle as on CPU: transformers and torch.optim.AdamW on the CPU, in FP32.

Log-probs before and after three updates, losses, gradient norms and every parameter's gradient. CUDA adds in another order
than the CPU, so tolerances are ten times those of the CPU layouts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

import oracle
from jobs import make_job, run_cases
from worker import Case

from alphamed.cluster.environment import exact_fp32
from alphamed.config.choices import Dtype

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODELS = {
    "llama": {"family": "llama", "tied": True, "llama3_rope": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": True},
}
CASES = [Case(f"cuda-{model}", model, "plain", device="cuda") for model in MODELS]


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> dict:
    return make_job(tmp_path_factory.mktemp("cuda"), MODELS)


@pytest.fixture(scope="module")
def results(job) -> Path:
    """One process runs all cases on the first device, in the environment that a run would give it."""
    return run_cases(job, "results", 1, CASES, timeout_s=400, **exact_fp32(Dtype.FP32))


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
