"""Each patch of megatron_patches repairs something that fails without it; none is applied where CUDA is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PATCHES = ("cuda_runtime", "cuda_tensors", "eager", "rng_tracker", "weight_gradient", "adam_step")
# What each check dies of where its patch is missing.
ERRORS = {
    "cuda_runtime": "CUDA",
    "cuda_tensors": "CUDA",
    "eager": "torch.compile was started",
    "rng_tracker": "CUDA",
    "weight_gradient": "gradient_accumulation_fusion",
    "adam_step": "step",
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def checks() -> dict:
    script = Path(__file__).with_name("patch_checks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_patch_has_a_check(checks):
    folder = Path(__file__).parents[2] / "megatron_patches"
    assert (
        sorted(checks)
        == sorted(PATCHES)
        == sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "apply"))
    )


@pytest.mark.parametrize("patch", PATCHES)
def test_patch_is_needed_and_works(checks, patch):
    assert checks[patch]["with"] is None
    assert checks[patch]["without"] is not None, f"{patch} repairs nothing: its check passes without it; remove the patch"
    assert ERRORS[patch].lower() in checks[patch]["without"].lower()


@pytest.mark.parametrize("patch", PATCHES)
def test_patch_says_why_where_and_when_it_can_go(patch):
    text = (Path(__file__).parents[2] / "megatron_patches" / f"{patch}.py").read_text()
    for heading in ("Why:", "Where:", "Versions:", "Remove when:"):
        assert heading in text


def test_refuses_to_run_where_cuda_is(monkeypatch):
    from megatron_patches import apply

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.zeros
    with pytest.raises(RuntimeError, match="CUDA"):
        apply.apply()
    assert torch.zeros is before
