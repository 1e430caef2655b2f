"""The tiers of tests, each test in one by rule.

    first    bash tests/run.sh          not slow, or slow and named below: one real run of each kind, one case of each family
    ci       bash tests/run.sh --ci     the other slow ones as well
    matrix   bash tests/run.sh --all    and what is marked so: kills, resumes, studies, several hosts, the CPU image

tests/conftest.py marks them; tests/unit/test_tiers.py checks the table.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

FIRST = (
    # layouts against transformers: one process in FP32 and bf16, each parallel axis, and all that combine
    "distributed/test_parity.py::test_single_process?single-*",
    "distributed/test_parity.py::test_gradients_equal_the_padded_unshared_model?single-*",
    "distributed/test_parity.py::test_two_ranks?tp2-sp-qwen2?",
    "distributed/test_parity.py::test_two_ranks?vpp2-recompute?",
    "distributed/test_parity.py::test_two_ranks?dp2-overlap?",
    "distributed/test_parity.py::test_two_ranks?cp2-llama?",
    "distributed/test_parity.py::test_two_ranks?tp2-sp-chunked-bf16?",
    # weights and checkpoints of one process; resumes under other layouts are in the second tier
    "distributed/test_weights.py::*?1-*",
    "distributed/test_plan_truth.py::test_peak_memory_is_the_allocators_within_a_tenth?activations?",
    "distributed/test_shared_tensors.py::*",
    # what an engine says and holds; a push
    "e2e/test_engine.py::*",
    "e2e/test_reward_actor.py::test_groups_are_scored_side_by_side",
    "e2e/test_reward_actor.py::test_a_killed_grader_is_named",
    # whole runs: rollouts ahead of the policy with evaluations in the background; replayed, stopped and resumed; an evaluation
    "e2e/test_async.py::test_a_run_one_step_ahead",
    "e2e/test_resume.py::test_the_replay_trains_on_what_was_recorded",
    "e2e/test_resume.py::test_replayed_steps_in_two_parts",
    "e2e/test_eval.py::test_a_folder_is_evaluated_and_nothing_stays_behind",
    "e2e/test_supervised.py::test_the_loss_falls_and_no_engine_is_started",
    "distributed/test_parity.py::test_supervised*?single*",
)
"""Slow tests of the first tier: patterns of their ids below tests/. A bracket is written ?."""
SECOND_ONLY = {
    "cluster/": "needs Slurm",
    "gpu/": "needs CUDA",
    "e2e/test_learning.py": "trains long enough to learn",
    "e2e/test_model_folders.py": "an engine of test_engine.py with another stop list",
    "e2e/test_nothing_leaves.py": "a run of test_async.py in a sealed network",
    "e2e/test_sync.py": "pushes in every mode; one is in test_engine.py",
    "e2e/test_wheel.py": "makes an environment",
    "unit/test_bad_input.py": "starts torchrun for single lines",
    "unit/test_plan_cli.py": "builds ranks",
    "unit/test_weight_folder.py": "imports vLLM",
}
"""Files and folders whose slow tests are all in the second tier, and why."""


def tier_of(test: str, markers: Collection[str]) -> str:
    """The tier of a test with this id below tests/."""
    if "matrix" in markers:
        return "matrix"
    first = "slow" not in markers or any(fnmatch.fnmatchcase(test, pattern) for pattern in FIRST)
    return "first" if first else "ci"
