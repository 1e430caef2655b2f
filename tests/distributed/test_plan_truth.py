"""The planner's arithmetic against Megatron's own models on the meta device, and against torch's allocator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphamed.config.loading import build_config, load_config
from alphamed.lab.planner.plan import job_of
from alphamed.model.shape import shape_of
from alphamed.planner import parameters
from alphamed.planner.batch import PlannedRow
from alphamed.planner.hardware import cpu
from alphamed.planner.job import PlannedJob
from alphamed.planner.memory import stage_use, static_bytes

pytestmark = pytest.mark.slow
ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
BUILT = ("llama31_8b_1node", "llama31_8b_2nodes", "qwen3_32b_4nodes", "llama31_70b_16nodes")

BUILD = """
import json, sys, warnings
warnings.simplefilter("ignore")
from alphamed.config.loading import load_config
from alphamed.lab.planner.meta_build import build_ranks, check_topology
from alphamed.lab.planner.plan import job_of
found = {}
for name, *overrides in json.loads(sys.argv[1]):
    job, _ = job_of(load_config(f"examples/recipes/{name}.yaml", overrides))
    ranks = []
    problems = check_topology(job.config, job.shape, progress=ranks.append)
    found[" ".join((name, *overrides))] = {"problems": problems, "ranks": [
        [r.layout.pipeline_rank, r.elements, r.gradients, r.owned] for r in ranks]}
open(sys.argv[2], "w").write(json.dumps(found))
"""
CASES = [[name] for name in BUILT] + [
    ["llama31_70b_8nodes", "parallel.virtual_pipeline=2"],
    ["qwen25_7b_1node", "parallel.distributed_optimizer=false"],
    ["llama31_8b_1node", "parallel.context=2", "rollout.engines=1"],
    ["qwen25_7b_1node", "model.path=Qwen/Qwen2.5-3B-Instruct", "parallel.tensor=2", "parallel.pipeline=2"],
]


def child(arguments: list[str], **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict:
    result = tmp_path_factory.mktemp("built") / "built.json"
    child(["-c", BUILD, json.dumps(CASES), str(result)])
    return json.loads(result.read_text())


@pytest.mark.parametrize("case", [" ".join(case) for case in CASES])
def test_every_rank_holds_what_the_planner_says(built, case):
    name, *overrides = case.split(" ")
    job, _ = job_of(load_config(ROOT / "examples" / "recipes" / f"{name}.yaml", overrides))
    p = job.parallel
    stages = parameters.stage_parameters(job.shape, p.tensor, p.pipeline, job.virtual)
    assert built[case]["problems"] == []
    assert len(built[case]["ranks"]) == p.world
    owned = [0] * p.pipeline
    for stage, elements, gradients, mine in built[case]["ranks"]:
        assert elements == parameters.count(stages[stage])
        planned = static_bytes(job, stage)
        assert planned["gradients"] == pytest.approx(4 * gradients, rel=1e-6)  # overlap cuts more buckets, each padded
        assert planned["optimizer"] == pytest.approx(12 * mine, rel=1e-5)  # padding is not stepped
        owned[stage] += mine
    copies = 1 if p.distributed_optimizer else p.replicas
    assert owned == [p.tensor * copies * parameters.count(stage) for stage in stages]


def test_a_wrong_layer_table_is_found():
    from alphamed.lab.planner.meta_build import _sync_problems
    from alphamed.model.families import hf_shapes

    shape = job_of(load_config(ROOT / "examples" / "recipes" / "llama31_8b_1node.yaml"))[0].shape
    names = list(hf_shapes(shape).items())
    assert _sync_problems(shape, {0: tuple(names[:9]), 1: tuple(names[9:])}) == []
    problems = _sync_problems(shape, {0: tuple(names[:9]), 1: (("lm_head.weight", (1, 2)), *names[8:-1])})
    assert problems == [
        f"lm_head.weight: stage 1 sends (1, 2), the model has {shape.vocab, shape.hidden}",
        f"{names[8][0]}: sent by stages 0 and 1",
    ]


# --------------------------------------------------------------------------------------------------------------- memory
def model(family: str = "llama", **fields) -> dict:
    return {
        "model_type": family,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 2003,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    } | fields


def case(tree: dict, parallel: dict | None = None, dtype: str = "fp32", kl: float = 0.0, groups=(4, 65, 4, 100)) -> dict:
    return {
        "model": tree,
        "groups": groups,
        "config": {
            "model": {"path": "-", "dtype": dtype},
            "data": {"train": ["-"]},
            "prompt": {"max_tokens": 128},
            "rollout": {"questions_per_step": 4, "samples_per_question": 4, "max_response_tokens": 128, "dtype": dtype},
            "algorithm": {"kl_coefficient": kl},
            "parallel": {"micro_batch_tokens": 2048} | (parallel or {}),
            "cluster": {"device": "cpu", "trainer_threads": 1, "rank_timeout_s": 120.0},
        },
    }


MEMORY = {
    "weights": case(model(vocab_size=8009, hidden_size=512, intermediate_size=1408), groups=(1, 17, 4, 16)),
    "activations": case(model()),
    "full recompute": case(model(num_hidden_layers=8), {"recompute": "full"}),
    "selective recompute": case(model(num_hidden_layers=8), {"recompute": "selective"}),
    "logits": case(model(vocab_size=16001, num_hidden_layers=2)),
    "logits in chunks": case(model(vocab_size=16001, num_hidden_layers=2), {"logprob_chunk_tokens": 256}),
    "bf16": case(model(num_hidden_layers=6), dtype="bf16"),
    "bf16 logits": case(model(vocab_size=16001, num_hidden_layers=2), dtype="bf16"),
    "Qwen3 with a reference": case(model("qwen3", head_dim=64), kl=0.01),
    "Qwen3 with an offloaded reference": case(model("qwen3", head_dim=64), {"reference": "offloaded"}, kl=0.01),
    "Qwen2, nothing shared": case(model("qwen2"), {"share_prompts": False, "distributed_optimizer": False}),
    "tied": case(model(vocab_size=8009, tie_word_embeddings=True)),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("memory")
    (folder / "cases.json").write_text(json.dumps(MEMORY))
    child([str(HERE / "memory_worker.py"), str(folder / "cases.json"), str(folder / "result.json")])
    return json.loads((folder / "result.json").read_text())


def expected(given: dict, found: dict) -> tuple[int, int]:
    """(peak, static) bytes that the plan assumes for what a rank was given."""
    job = PlannedJob(build_config(given["config"]), shape_of(given["model"], "case"), cpu(1, 1 << 40, 1), 1)
    use = stage_use(job, found["stage"], PlannedRow(found["tokens"], found["responses"], 0.0), found["rows"])
    return use.total, sum(static_bytes(job, found["stage"]).values())


@pytest.mark.parametrize("name", MEMORY)
def test_peak_memory_is_the_allocators_within_a_tenth(measured, name):
    peak, static = expected(MEMORY[name], measured[name])
    assert peak == pytest.approx(measured[name]["peak"], rel=0.1)
    assert static == pytest.approx(measured[name]["static"], rel=0.01)


TWO_RANKS = {
    "tensor": case(model(), {"tensor": 2}),
    "tensor, logits": case(model(vocab_size=16002, num_hidden_layers=2), {"tensor": 2}),
    "sequence": case(model(num_hidden_layers=6), {"tensor": 2, "sequence": True}),
    "context": case(model(), {"context": 2}),
    "context, nothing shared": case(model(num_hidden_layers=6), {"context": 2, "share_prompts": False}),
    "context, selective recompute": case(model(num_hidden_layers=8), {"context": 2, "recompute": "selective"}),
    "context, full recompute": case(model(num_hidden_layers=8), {"context": 2, "recompute": "full"}),
    "context, more than KV heads": case(model(num_key_value_heads=1), {"context": 2}),
    "pipeline": case(model(num_hidden_layers=8), {"pipeline": 2, "micro_batch_tokens": 512}),
    "data": case(model(), {"data": 2}),
}


@pytest.fixture(scope="module")
def measured_on_two_ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("memory-of-two")
    (folder / "cases.json").write_text(json.dumps(TWO_RANKS))
    child(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(HERE / "memory_worker.py"),
            str(folder / "cases.json"),
            str(folder / "result.json"),
        ],
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    return [json.loads((folder / f"result.json.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", TWO_RANKS)
def test_peak_memory_of_each_of_two_ranks_is_the_allocators_within_a_tenth(measured_on_two_ranks, name):
    for found in measured_on_two_ranks:
        peak, static = expected(TWO_RANKS[name], found[name])
        assert peak == pytest.approx(found[name]["peak"], rel=0.1)
        assert static == pytest.approx(found[name]["static"], abs=6e6)  # with what libraries keep for themselves
