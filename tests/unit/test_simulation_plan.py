"""`alphamed plan --simulate` without its run: what is cut and what is kept, the small model, the deadline, the judgement.
(The run itself: tests/e2e/test_simulate.py.)"""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import LIMIT_S

from alphamed.config.choices import Recompute, SyncMode
from alphamed.config.loading import load_config
from alphamed.config.sections import ParallelConfig
from alphamed.lab.planner import miniature, simulate
from alphamed.lab.planner.plan import job_of
from alphamed.lab.planner.shapes import published
from alphamed.model.shape import check_context, check_layout, read_shape
from alphamed.records import Layout

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
LLAMA, QWEN2, QWEN3 = (
    published()[name] for name in ("meta-llama/Llama-3.1-70B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B")
)


def job(name: str, *overrides: str):
    return job_of(load_config(ROOT / "examples" / "recipes" / f"{name}.yaml", overrides))[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_cut(path, tmp_path):
    full = job(path.stem)
    small = simulate.small_config(full.config, full.shape, tmp_path)
    p, recipe = small.parallel, full.config.parallel
    assert [p.tensor, p.pipeline, p.data] == [min(2, n) for n in (recipe.tensor, recipe.pipeline, recipe.data)]
    assert small.rollout.engines == 2 and small.run.steps == 2 and not small.model.fp8
    assert (p.sequence, p.recompute, p.overlap_grad_reduce) == (
        recipe.sequence,
        recipe.recompute,
        recipe.overlap_grad_reduce,
    )
    assert small.algorithm.kl_coefficient == full.config.algorithm.kl_coefficient
    layers = p.pipeline * (p.virtual_pipeline or 1)
    shape = miniature.miniature(full.shape, recipe, max(2, layers), small.max_model_tokens)
    check_layout(shape, p, small.rollout)
    check_context(shape, small.max_model_tokens)


def test_what_makes_a_layout_is_kept(tmp_path):
    full = job(
        "llama31_70b_16nodes",
        "parallel.virtual_pipeline=5",
        "sync.mode=direct",
        "rollout.max_staleness=3",
        "parallel.reference=offloaded",
        "parallel.recompute=selective",
        "algorithm.mini_batches=4",
        "parallel.micro_batch_tokens=32768",
    )
    small = simulate.small_config(full.config, full.shape, tmp_path)
    assert small.parallel.virtual_pipeline == 2 and small.parallel.recompute == Recompute.SELECTIVE
    assert small.sync.mode == SyncMode.DIRECT and small.parallel.reference == "offloaded"
    assert small.rollout.max_staleness == 1 and small.algorithm.mini_batches == 2
    assert small.parallel.logprob_chunk_tokens == 64  # 32,768 x 128,256 / 8 x 4 bytes are 2.1 GB
    assert small.data.train[0].is_relative_to(tmp_path) and small.run_dir.is_relative_to(tmp_path)


@pytest.mark.parametrize(
    ("shape", "tensor", "kv_heads"),
    [(LLAMA, 8, 2), (LLAMA, 16, 1), (QWEN2, 4, 2), (QWEN3, 8, 2), (replace(QWEN3, tied=True, kv_heads=32), 8, 4)],
)
def test_the_small_model_is_a_model_of_its_family(shape, tensor, kv_heads, tmp_path):
    from transformers import AutoModelForCausalLM

    small = miniature.miniature(shape, ParallelConfig(tensor=tensor), layers=2, max_positions=512)
    assert small.kv_heads == kv_heads  # fewer than tensor ranks where the large model's are
    miniature.write_model(tmp_path, small)
    assert read_shape(tmp_path) == small
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == small.parameters


def test_a_child_that_takes_too_long_is_ended(tmp_path):
    child = simulate.Child(tmp_path, time.monotonic() - 1)
    assert "not done" in child.run("doctor")


def test_a_child_that_fails_is_quoted(tmp_path):
    child = simulate.Child(tmp_path, time.monotonic() + LIMIT_S)
    output = child.run("train", "--config", "absent.yaml")
    assert "exit code 2" in output and "absent.yaml: no such file" in output


@pytest.fixture
def done(tmp_path):
    """What a run that went well leaves."""
    full = job("llama31_8b_1node")
    small = simulate.small_config(full.config, full.shape, tmp_path)
    for name in ("logs", "checkpoints/step_000001", "checkpoints/step_000002", "hf"):
        (small.run_dir / name).mkdir(parents=True)
    for rank in range(2):
        place = Layout(tensor=2, sequence_parallel=True, tensor_rank=rank)
        (small.run_dir / "logs" / f"rank_{rank}.log").write_text(f"a warning\n{place}\n")
    (small.run_dir / "hf" / "config.json").touch()
    rows = [
        {
            "step": step,
            "policy_version": step,
            "policy/loss": 0.1,
            "policy/grad_norm": 2.0,
            "policy/logprob_diff_mean": 0.01,
            "batch/micro_batches": 2.0,
            "time/sync_s": 0.5,
        }
        for step in (1, 2)
    ]
    return small, rows


def judged(small, rows) -> list[str]:
    """The lines that tell of a failure."""
    (small.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(outcome) for outcome in simulate.judge(small) if not outcome.passed]


def test_a_run_that_went_well_passes(done):
    assert judged(*done) == []


@pytest.mark.parametrize(
    ("field", "value"), [("policy/loss", None), ("policy/grad_norm", 0.0), ("policy/logprob_diff_mean", 0.2)]
)
def test_a_step_that_did_not_train_fails(done, field, value):
    small, rows = done
    rows[1][field] = value
    (failed,) = judged(small, rows)
    assert failed.startswith("FAILED   step 2:")


def test_what_is_missing_fails(done):
    small, rows = done
    (small.run_dir / "logs" / "rank_1.log").write_text(str(Layout(tensor=2, sequence_parallel=True)))  # rank 0's place
    (small.run_dir / "checkpoints" / "step_000001").rmdir()
    (small.run_dir / "hf" / "config.json").unlink()
    assert [line.split(":")[0] for line in judged(small, rows[:1])] == [
        "FAILED   ranks",
        "FAILED   steps",
        "FAILED   checkpoints",
        "FAILED   export",
    ]
