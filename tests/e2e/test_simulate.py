"""`alphamed plan --simulate` as a user starts it: two steps of the real program with all that a recipe asks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import clean_temporary

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
ROOT = Path(__file__).parents[2]
LIMIT_S = 8 * 60 + 90
"""The simulation's own deadline, and what its child may take to end."""


def test_a_recipe_is_simulated_within_its_time_and_leaves_nothing():
    """Tensor, context and data ranks, an offloaded reference, direct pushes."""
    command = [
        sys.executable,
        "-m",
        "alphamed.cli",
        "plan",
        "--config",
        "examples/recipes/llama31_8b_2nodes.yaml",
        "--simulate",
        "sync.mode=direct",
        "parallel.reference=offloaded",
        "parallel.context=2",
        "parallel.data=2",
    ]
    with clean_temporary() as environment:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env=environment | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout.partition("SIMULATION")[2]
    assert "FAILED" not in report
    for line in (
        "ranks:",
        "step 1:",
        "step 2:",
        "checkpoints: step_000001, step_000002",
        "export:",
        "checkpoint: step 2 run again",
    ):
        assert f"PASSED   {line}" in report, report
    assert "weight push (direct)" in report
