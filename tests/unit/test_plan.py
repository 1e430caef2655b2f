"""`alphamed plan`: parameters, memory, batch, topology and time against numbers worked out by hand or published."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from alphamed.config.choices import Recompute
from alphamed.config.loading import build_config, changed_config, load_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.lab.planner import advice, published
from alphamed.lab.planner.calibration import GPU
from alphamed.lab.planner.plan import job_of, make_plan, to_json
from alphamed.lab.planner.shapes import find_shape, published as shapes
from alphamed.lab.planner.suggest import layouts
from alphamed.lab.planner.time import decay_scale, step_time
from alphamed.lab.planner.topology import axis_groups, context_bytes, coordinates, place
from alphamed.planner.batch import batch_of, in_flight
from alphamed.planner.hardware import gpu
from alphamed.planner.job import PlannedJob
from alphamed.planner.legality import layout_problems
from alphamed.planner.memory import _receiving_bytes, engine_cache, layer_bytes, stage_use, static_bytes, trainer_use
from alphamed.planner.parameters import buffer_elements, count, layers_of, stage_parameters
from alphamed.weights import routes
from alphamed.weights.sync_plan import Wire

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"


def config_of(name: str = LLAMA_8B, /, **sections) -> Config:
    tree = {
        "model": {"path": name},
        "data": {"train": ["x.jsonl"]},
        "cluster": {"device": "cuda"},
        "parallel": {"micro_batch_tokens": 4096},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return build_config(tree)


def job(name: str = LLAMA_8B, /, **sections) -> PlannedJob:
    return job_of(config_of(name, **sections))[0]


# ----------------------------------------------------------------------------------------------------------- parameters
# totals of the published safetensors files, as the models' hub pages show them
@pytest.mark.parametrize(
    ("name", "total"),
    [
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_70B, 70_553_706_496),
        ("Qwen/Qwen2.5-3B-Instruct", 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("Qwen/Qwen2.5-72B-Instruct", 72_706_203_648),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen3-32B", 32_762_123_264),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name, total):
    assert shapes()[name].parameters == total


def test_a_stage_of_70b_holds_what_megatron_holds():
    # seen: Megatron-Core 0.16.1 with a fake process group, ranks 0 and 20 of TP 8 x PP 4
    stages = stage_parameters(shapes()[LLAMA_70B], 8, 4, 1)
    assert [count(stage) for stage in stages] == [2_270_756_864, 2_139_422_720, 2_139_422_720, 2_270_765_056]


@pytest.mark.parametrize("name", [LLAMA_8B, "Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen3-8B"])
def test_ranks_hold_every_parameter_once(name):
    shape = shapes()[name]
    for tensor, pipeline, virtual in itertools.product((1, 2), (1, 2, 4), (1, 2)):
        if pipeline == 1 and virtual > 1 or shape.layers % (pipeline * virtual):
            continue
        stages = stage_parameters(shape, tensor, pipeline, virtual)
        parameters = [parameter for stage in stages for chunk in stage for parameter in chunk]
        whole = sum(
            parameter.elements * (1 if parameter.kind == "replicated" else tensor)
            for parameter in parameters
            if not parameter.copy
        )
        assert whole == shape.parameters, (tensor, pipeline, virtual)  # these vocabularies divide by 2
        assert sum(parameter.copy for parameter in parameters) == (shape.tied and pipeline > 1)
        layers = [
            layer
            for stage in range(pipeline)
            for chunk in range(virtual)
            for layer in layers_of(stage, chunk, shape.layers, pipeline, virtual)
        ]
        assert sorted(layers) == list(range(shape.layers))


@pytest.mark.parametrize(("tensor", "pipeline", "engine"), [(1, 1, 1), (4, 4, 4), (8, 2, 2), (2, 4, 8)])
def test_room_for_a_direct_push_is_what_the_sync_plan_takes(tensor, pipeline, engine):
    planned = job(
        LLAMA_70B,
        parallel={"tensor": tensor, "pipeline": pipeline},
        rollout={"tensor_parallel": engine},
        sync={"mode": "direct"},
    )
    wire = Wire("direct", "nccl", "bfloat16", planned.config.sync.bucket_bytes)
    plan = routes.make_plan(planned.shape, planned.parallel, (engine,), wire)
    largest = max(plan.buffer_bytes(worker) for worker in range(engine))
    assert 0.85 * _receiving_bytes(planned) < largest <= _receiving_bytes(planned)  # buckets end between tensors


def test_vocabulary_is_padded_to_the_tensor_ranks_and_buffers_to_their_alignment():
    shape = replace(shapes()[LLAMA_8B], layers=1, hidden=8, ffn=6, heads=2, kv_heads=2, head_dim=4, vocab=509)
    (chunk,) = stage_parameters(shape, 2, 1, 1)[0]
    by_name = {parameter.names[0]: parameter.shape for parameter in chunk}
    assert by_name["embedding.word_embeddings.weight"] == (255, 8)
    assert by_name["decoder.layers.0.self_attention.linear_qkv.weight"] == (12, 8)
    assert by_name["decoder.layers.0.mlp.linear_fc2.weight"] == (8, 3)
    # backwards: output 2040 | norm at 2048 (8) | fc2 24 at 2112 | fc1 48 at 2176 | norm at 2240 | proj 32 at 2304 | qkv
    # 96 at 2368 | norm at 2496 | embedding 2040 at 2560, which ends at 4600; lcm(3, 128) = 384 makes it 4608
    assert buffer_elements((chunk,), 3, True) == 4608
    assert buffer_elements((chunk,), 3, False) == 2 * 2040 + 3 * 8 + 24 + 48 + 32 + 96


# --------------------------------------------------------------------------------------------------------------- memory
def test_static_memory_by_hand():
    # 8B over 4 tensor ranks: norms (65 x 4096) whole, everything else cut; 2 data ranks share the optimizer's state
    causes = static_bytes(job(parallel={"tensor": 4, "data": 2, "sequence": True}, algorithm={"kl_coefficient": 0.1}), 0)
    held = (8_030_261_248 - 65 * 4096) // 4 + 65 * 4096
    assert causes == {"weights": 2 * held, "gradients": 4 * held, "optimizer": 12 * held // 2, "reference": 2 * held}


def test_activations_of_a_layer_by_hand():
    # 8B, TP 4 with sequence parallelism, answers that share no prompt, bf16, bytes per token:
    # input, residual, two normalised inputs 4 x 4096 x 2 / 4 = 8192, two norm factors 8; qkv (4096 + 2 x 1024) x 2,
    # rotated q and k (4096 + 1024) x 2, output 4096 x 2, log-sum-exps 32 x 4; gate, up, product 3 x 14336 x 2
    planned = job(parallel={"tensor": 4, "sequence": True, "share_prompts": False})
    attention, mlp = (6144 + 5120 + 4096) * 2 + 128, 3 * 14336 * 2
    assert layer_bytes(planned, "none") == (8192 + 8 + (attention + mlp) / 4, 2048)
    assert layer_bytes(planned, "selective")[0] == 8192 + 8 + (attention - 5120 * 2 + mlp) / 4
    assert layer_bytes(planned, "full") == (2048, 2048)


def test_a_offloaded_reference_by_hand():
    """8B over 4 tensor ranks, bf16, one row of 16,384 tokens: 4.0 GB that an update's activations make room for."""
    resident, swapped = (
        job(
            parallel={"tensor": 4, "sequence": True, "micro_batch_tokens": 16384, "reference": place},
            algorithm={"kl_coefficient": 0.1},
        )
        for place in ("resident", "offloaded")
    )
    held = 2 * ((8_030_261_248 - 65 * 4096) // 4 + 65 * 4096)
    before, after = (stage_use(planned, 0).causes for planned in (resident, swapped))
    assert before["reference"] == held and after["reference"] == 0
    assert {**before, "reference": 0} == after
    # full recompute keeps 32 inputs of 16,384 x 2,048 bytes: the reference and its output layer need more than an update
    small = job(
        parallel={"tensor": 4, "sequence": True, "micro_batch_tokens": 4096, "recompute": "full", "reference": "offloaded"},
        algorithm={"kl_coefficient": 0.1},
    )
    causes = stage_use(small, 0).causes
    logits = 4096 * 32064 * (4 + 2) + 4096 * 4096 * 2 + 32064 * 4096 * 2  # whole, with their gradient
    assert causes["reference"] == held + logits - causes["activations"] - causes["logits"]
    # over PCIe 5 at 70% of 64 GB/s, once a step
    more = step_time(swapped).logprobs - step_time(resident).logprobs
    assert more == pytest.approx(held / (64e9 * 0.7))


def test_chunks_of_their_own_accord_are_planned():
    planned = job(parallel={"micro_batch_tokens": 16384})
    whole = replace(planned, config=changed_config(planned.config, ["parallel.logprob_chunk_tokens=0"]))
    logits = 128256 * 6  # FP32, and their gradient in bf16, of a token
    assert stage_use(whole, 0).causes["logits"] - stage_use(planned, 0).causes["logits"] == (16384 - 2048) * logits
    assert step_time(planned).update > step_time(whole).update


@pytest.mark.parametrize(
    ("virtual", "stage", "expected"), [(None, 0, 4), (None, 3, 1), (2, 0, (2 * 3 + 4 + 1) / 2), (2, 3, (4 + 1) / 2)]
)
def test_micro_batches_in_flight(virtual, stage, expected):
    # 1F1B: as many as stages follow. Interleaved: 2 (stages behind) + (chunks - 1) stages chunks before the first backward
    planned = job(parallel={"pipeline": 4, "virtual_pipeline": virtual})
    assert in_flight(planned, stage, rows=64) == expected
    assert in_flight(planned, stage, rows=1) <= 1


def test_kv_cache_by_hand():
    planned = job(rollout={"tensor_parallel": 2, "kv_cache_bytes": 4 << 30})
    cache = engine_cache(planned)
    assert cache.token_bytes == 2 * 32 * 4 * 128 * 2  # keys and values, layers, 4 of 8 heads, bf16
    assert cache.tokens == (2 << 30) // 65536 == 32768 and cache.full_sequences == 32768 // 3072


def test_fp8_copies_and_the_reference_double_what_layers_hold():
    plain = static_bytes(job(parallel={"tensor": 4}), 0)
    both = static_bytes(job(model={"fp8": True}, parallel={"tensor": 4}), 0)
    matrices = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) // 4
    assert both == plain | {"FP8 copies": 2 * matrices}


# ---------------------------------------------------------------------------------------------------- batch and topology
def test_batch_arithmetic_by_hand():
    planned = job(
        rollout={"questions_per_step": 64, "samples_per_question": 4, "max_response_tokens": 400},
        prompt={"max_tokens": 404},
        parallel={"data": 2, "micro_batch_tokens": 2000, "pipeline": 2},
        algorithm={"mini_batches": 2},
    )
    batch = batch_of(planned)  # expected: 101 prompt, 100 response tokens
    assert batch.trained_tokens == 64 * (100 + 400)
    assert batch.rows == math.ceil(32000 / 2 / 2 / (2000 * 0.92)) == 5 and batch.micro.tokens == 1600
    assert batch.shared_fraction == 1 - 500 / 800 and batch.bubble == 1 / 6


def nodes_of(topology) -> dict[str, set[int]]:
    return {role: {seat.node for seat in topology.seats if seat.role == role} for role in ("trainer", "engine")}


def test_ranks_and_engines_have_their_places():
    planned = replace(
        job(
            parallel={"tensor": 2, "pipeline": 2, "data": 2, "sequence": True}, rollout={"engines": 2, "tensor_parallel": 2}
        ),
        gpus_per_node=4,
    )
    topology = place(planned)
    seats = {(seat.node, seat.gpu): seat for seat in topology.seats}
    assert len(seats) == 12 and nodes_of(topology) == {"trainer": {0, 1}, "engine": {2}}
    assert [(seats[1, g].rank, seats[1, g].tensor, seats[1, g].data, seats[1, g].pipeline) for g in range(4)] == [
        (4, 0, 0, 1),
        (5, 1, 0, 1),
        (6, 0, 1, 1),
        (7, 1, 1, 1),
    ]
    assert [(seats[2, g].engine, seats[2, g].worker) for g in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert seats[0, 0].layers == ((0, 15),) and seats[1, 0].layers == ((16, 31),)
    assert axis_groups(planned.parallel)["data"] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert axis_groups(planned.parallel)["pipeline"] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    kinds = {group.kind: group for group in topology.groups}
    assert kinds["tensor"].within_node and kinds["data"].within_node and not kinds["pipeline"].within_node
    # a broadcast crosses to the one engine node once: 8.03 billion parameters in bf16
    assert kinds["weight sync"].leaving == 2 * 8_030_261_248


def test_engines_may_have_the_gpus_that_ranks_leave_on_their_hosts():
    """4 + 4 on each of two hosts of 8: an engine of 4 on each, weights cross once, to the second."""
    planned = job(
        parallel={"tensor": 4, "data": 2},
        rollout={"engines": 2, "tensor_parallel": 4},
        cluster={"ranks_per_host": 4, "nodes": 2},
    )
    topology = place(planned)
    seats = {(seat.node, seat.gpu): seat for seat in topology.seats}
    assert len(seats) == 16 and nodes_of(topology) == {"trainer": {0, 1}, "engine": {0, 1}}
    assert [seats[1, gpu].rank for gpu in range(4)] == [4, 5, 6, 7] and seats[1, 0].data == 1
    assert [(seats[node, gpu].engine, seats[node, gpu].worker) for node in (0, 1) for gpu in range(4, 8)] == [
        (engine, worker) for engine in (0, 1) for worker in range(4)
    ]
    kinds = {group.kind: group for group in topology.groups}
    assert kinds["tensor"].within_node and not kinds["data"].within_node
    assert kinds["weight sync"].leaving == 2 * 8_030_261_248 and not layout_problems(planned)
    crowded = replace(planned, nodes=1)
    assert [problem.text for problem in layout_problems(crowded)] == [
        "cluster.nodes: 8 trainer ranks, 4 on a host, and 2 engines need 2 nodes of 8 GPUs, there are 1"
    ]


def test_context_ranks_stand_between_tensor_and_data_ranks():
    planned = job(parallel={"tensor": 2, "context": 2, "pipeline": 2, "data": 2, "sequence": True})
    assert [coordinates(rank, planned.parallel) for rank in (1, 2, 4, 13)] == [
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (1, 0, 1, 1),
    ]  # (tensor, context, data, pipeline)
    groups = axis_groups(planned.parallel)
    assert groups["context"][:3] == [[0, 2], [1, 3], [4, 6]]
    assert groups["data"] == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert [
        group.source
        for group in routes.make_plan(
            planned.shape, planned.parallel, (2,), Wire("gather", "nccl", "bfloat16", 1 << 28)
        ).links
    ] == [0, 8]


def test_a_context_rank_has_a_part_of_a_row_and_of_the_optimizer():
    alone, shared = (
        job(parallel={"context": context, "micro_batch_tokens": tokens, "recompute": "selective"})
        for context, tokens in ((1, 4096), (2, 8192))
    )
    alone_causes, shared_causes = (stage_use(each, 0).causes for each in (alone, shared))
    assert {cause: alone_causes[cause] for cause in ("activations", "logits", "weights", "gradients")} == {
        cause: shared_causes[cause] for cause in ("activations", "logits", "weights", "gradients")
    }
    assert alone_causes["optimizer"] == 2 * shared_causes["optimizer"]


def test_what_context_ranks_exchange_and_keep():
    """Llama-3.1-8B has 32 query and 8 key and value heads of 128: 4096 and 1024 elements a token, 2 bytes each."""
    alone, shared, many = (job(parallel={"context": context}) for context in (1, 2, 16))
    # rotated q and k beside the fused qkv; or q, k and v as exchanged in place of it, and the output once more
    differences = [
        layer_bytes(planned, Recompute.NONE)[0] - layer_bytes(planned, Recompute.SELECTIVE)[0]
        for planned in (alone, shared, many)
    ]
    assert differences == [2 * (4096 + 1024), 2 * 4096, 2 * (4096 + 2 * 1024)]  # 16 ranks: 8 more copies of k and of v
    row = batch_of(shared).micro.tokens
    # 2 ranks hold half a row each, and send half of their heads' q, k, v and outputs to the other
    assert context_bytes(shared, batch_of(shared)) == pytest.approx(row / 2 * (4096 + 1024 + 1024 + 4096) / 2 * 2)


def test_one_node_is_shared_and_what_is_left_idles():
    topology = place(job(parallel={"tensor": 4, "sequence": True}, rollout={"engines": 3}))
    assert [seat.role for seat in topology.seats] == ["trainer"] * 4 + ["engine"] * 3 + ["idle"]
    assert topology.leaving == 0


# ----------------------------------------------------------------------------------------------------------------- time
def test_the_published_70b_step_by_hand():
    """NeMo-RL 0.3, Llama-3.1-70B on 64 H100: 147 s, of which generation 84, update 28, log-probs 18 (the latter two with the
    hand-over of the GPUs), weight sync 14. Tensor 4 x pipeline 4 x data 4: 20 layers a stage, the last with norm and output."""
    time = step_time(published.steps()["70b"].job)
    matrices = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    stage = 20 * (matrices + 2 * 8192) + 8192 + 8192 * 128256
    rank = 20 * (matrices / 4 + 2 * 8192) + 8192 + 8192 * 128256 / 4
    assert time.sync == pytest.approx(2 * stage / 2.595e9) == pytest.approx(14, rel=0.01)
    # FP32 masters and two moments of a quarter of the rank's parameters, to the host and back
    assert time.handover == pytest.approx(2 * 12 * rank / 4 / 1.814e9, rel=1e-4)
    assert time.other == 147 - 84 - 28 - 18 - 14
    assert time.generate == pytest.approx(84, rel=0.01)
    assert time.update + time.logprobs + time.handover == pytest.approx(28 + 18, rel=0.01)
    assert time.total == pytest.approx(147, rel=0.01)


def test_fitting_recovers_the_efficiencies_that_steps_were_made_with(monkeypatch):
    chosen = replace(GPU, matmul=0.35, decode_s=7e-3, handover=2.5e9, sync=1.7e9, other_s=4.0)
    made = {}
    for key in published.CALIBRATION:
        step = published.steps()[key]
        time = step_time(step.job, chosen)
        parts = time.parts() | {"update": time.update + time.handover}
        del parts["other"], parts["handover"]
        made[key] = replace(step, seconds=time.total, parts=parts)
    monkeypatch.setattr(published, "steps", lambda: made)
    fitted = published.fit(GPU)
    for name in ("matmul", "decode_s", "handover", "sync", "other_s"):
        assert getattr(fitted, name) == pytest.approx(getattr(chosen, name), rel=1e-3), name


def test_unseen_published_steps_are_met_within_a_fifth():
    steps = published.steps()
    unseen = {
        key: step_time(step.job).total / step.seconds for key, step in steps.items() if key not in published.CALIBRATION
    }
    assert len(unseen) == 3
    assert all(0.8 < ratio < 1.2 for ratio in unseen.values()), unseen


# the same layouts with other lengths in NeMo-RL 0.4, from that release's performance summary; no fit has used them
@pytest.mark.parametrize(
    ("key", "tokens", "seconds"),
    [("8b", 1060, 97.7), ("8b one off", 1129, 74.6), ("32b", 3206, 393), ("32b one off", 3207, 215)],
)
def test_steps_of_an_earlier_release_are_met_within_a_fifth(key, tokens, seconds):
    earlier = replace(published.steps()[key].job, response_tokens=tokens - published.PROMPT_TOKENS)
    assert 0.8 < step_time(earlier).total / seconds < 1.2


def test_the_documented_table_is_the_models():
    assert published.table() in (ROOT / "docs" / "plan.md").read_text()


def test_lengths_cut_at_a_limit_have_the_mean_that_was_asked_for():
    scale = decay_scale(500, 1000)
    cut = sum(math.exp(-(i + 0.5) / scale) for i in range(1000))  # mean of a cut distribution: sum of its tail
    assert cut == pytest.approx(500, rel=1e-3)
    assert decay_scale(1000, 1000) == math.inf


def test_update_time_of_one_gpu_by_hand():
    # two rows of 3,600 tokens in all; 6 FLOPs per parameter and token in matrices, 12 q per pair, 6 H V per response token
    planned = job(
        rollout={"questions_per_step": 4, "samples_per_question": 4, "max_response_tokens": 400},
        prompt={"max_tokens": 404},
        parallel={"micro_batch_tokens": 2000},
    )
    tokens, responses, context = 4 * 500, 1600, 101 + 50
    matrices = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    flops = tokens * (6 * matrices + 12 * 32 * 4096 * context) + 6 * responses * 4096 * 128256
    adam = 8_030_261_248 * (30 + 8) / (3.35e12 * GPU.memory)
    assert step_time(planned).model_flops == pytest.approx(flops)
    assert step_time(planned).update == pytest.approx(flops / (989.4e12 * GPU.matmul) + adam)


# -------------------------------------------------------------------------------------------------------------- recipes
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_the_nodes_that_they_name(path):
    recipe = load_config(path)
    plan = make_plan(*job_of(recipe))
    assert plan.fits, plan.problems
    assert plan.assessment.topology.nodes == recipe.cluster.nodes and f"{recipe.cluster.nodes}node" in path.stem
    assert recipe.run.name == path.stem and recipe.model.fp8 == path.stem.endswith("_fp8")
    assert {"trainer", "engine"} == {seat.role for seat in plan.assessment.topology.seats}  # no GPU idles


def test_there_is_a_recipe_for_every_model_and_cluster():
    names = {path.stem for path in RECIPES}
    assert {
        "llama31_8b_1node",
        "llama31_8b_1node_shared",
        "qwen25_3b_1node_1gpu",
        "llama31_8b_2nodes",
        "qwen25_7b_1node",
        "qwen3_8b_1node",
        "qwen25_32b_4nodes",
        "qwen3_32b_4nodes",
    } <= names
    assert {
        f"{model}_{nodes}nodes{fp8}" for model in ("llama31_70b", "qwen25_72b") for nodes in (8, 16) for fp8 in ("", "_fp8")
    } <= names


@pytest.mark.parametrize("name", ["train_alphamed_8b", "train_alphamed_70b"])
def test_the_first_examples_fit_as_well(name):
    assert make_plan(*job_of(load_config(ROOT / "examples" / f"{name}.yaml"))).fits


# ---------------------------------------------------------------------------------------------------- problems and advice
@pytest.mark.parametrize(
    ("sections", "field", "fix"),
    [
        ({"parallel": {"tensor": 3, "micro_batch_tokens": 4096}}, "parallel.tensor: 3", "parallel.tensor=4"),
        ({"rollout": {"tensor_parallel": 3}}, "rollout.tensor_parallel: 3", "rollout.tensor_parallel=4"),
        ({"parallel": {"pipeline": 5}}, "parallel.pipeline: 5", "parallel.pipeline=4"),
        (
            {"parallel": {"pipeline": 4, "virtual_pipeline": 3}},
            "parallel.virtual_pipeline: 3",
            "parallel.virtual_pipeline=4",
        ),
        ({"parallel": {"tensor": 16, "sequence": True}}, "parallel.tensor: 16", "parallel.tensor=8"),
        ({"parallel": {"data": 12}}, "parallel: tensor 1 x data 12 x pipeline 1 = 12 ranks", "parallel.data=16"),
        (
            {"parallel": {"data": 4}, "rollout": {"engines": 12}, "cluster": {"nodes": 2}},
            "cluster.nodes",
            "rollout.engines=8",
        ),
        (
            {"parallel": {"data": 4}, "rollout": {"engines": 8}, "cluster": {"nodes": 1}},
            "cluster.nodes",
            "rollout.engines=4",
        ),
        (
            {"parallel": {"recompute": "selective", "share_prompts": False}},
            "parallel.recompute: selective",
            "parallel.recompute=none",
        ),
        (
            {"prompt": {"max_tokens": 130000}, "parallel": {"micro_batch_tokens": 140000, "context": 8}},
            "prompt.max_tokens",
            "rollout.max_response_tokens=1072",
        ),
    ],
)
def test_illegal_settings_come_with_the_nearest_that_fit(sections, field, fix):
    """On GPUs of 180 GB, of which 8 billion parameters in training take 145."""
    wide = sections | {
        "cluster": {"device": "cuda", "gpu": "b200-180g"} | sections.get("cluster", {}),
        "parallel": {"recompute": "full"} | sections.get("parallel", {}),
    }
    plan = make_plan(job(**wide))
    assert not plan.fits and plan.assessment is None
    assert plan.problems[0].text.startswith(field) and plan.problems[0].fix == (fix,)
    assert make_plan(job_of(changed_config(config_of(**wide), [fix]))[0]).fits


BROKEN = [
    ("qwen25_7b_1node", ["parallel.pipeline=7"]),
    ("qwen25_7b_1node", ["evaluation.max_response_tokens=100000"]),
    (
        "qwen25_7b_1node",
        ["evaluation.max_response_tokens=100000", "rollout.max_response_tokens=40000", "parallel.micro_batch_tokens=50000"],
    ),
    ("qwen25_7b_1node", ["prompt.max_tokens=40000", "parallel.micro_batch_tokens=50000"]),
    ("qwen25_7b_1node", ["cluster.gpus_per_node=1", "cluster.nodes=null"]),
    ("llama31_8b_1node", ["parallel.context=2"]),
    ("llama31_8b_1node", ["parallel.context=4"]),
    ("llama31_8b_1node", ["parallel.pipeline=2"]),
    ("llama31_8b_1node", ["parallel.data=3"]),
    ("llama31_8b_1node", ["parallel.tensor=16", "rollout.tensor_parallel=3"]),
    ("llama31_8b_1node", ["parallel.context=2", "model.fp8=true", "cluster.gpu=a100-80g"]),
    ("llama31_8b_1node", ["parallel.pipeline=4", "parallel.virtual_pipeline=3"]),
    ("llama31_8b_1node", ["rollout.gpu_memory_utilization=0.1"]),
    ("llama31_8b_1node", ["rollout.kv_cache_bytes=1000"]),
    ("llama31_8b_1node", ["rollout.kv_cache_bytes=90000000000"]),
    ("llama31_8b_1node", ["parallel.tensor=1", "parallel.sequence=false"]),
    ("llama31_70b_8nodes", ["parallel.context=2"]),
    ("llama31_70b_8nodes", ["cluster.nodes=7"]),
    ("llama31_70b_8nodes", ["parallel.pipeline=3"]),
]


@pytest.mark.parametrize(("name", "overrides"), BROKEN, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_every_printed_mend_changes_something_and_leads_to_a_legal_plan(name, overrides):
    config = load_config(ROOT / "examples" / "recipes" / f"{name}.yaml", overrides)
    plan = make_plan(*job_of(config))
    assert not plan.fits
    fixes = [problem.fix for problem in plan.problems if problem.fix]
    changes = advice.fixes(plan)
    assert len(fixes) == 1 if plan.assessment is None else changes
    for fix in (*fixes, *(change.overrides for change in changes)):
        fixed = changed_config(config, fix)
        assert fixed != config
        assert make_plan(*job_of(fixed)).assessment is not None, fix
    for change in changes:
        assert make_plan(*job_of(changed_config(config, change.overrides))).fits, change


@pytest.mark.parametrize(
    ("name", "overrides", "fix"),
    [
        ("qwen25_7b_1node", ["parallel.pipeline=7"], ("parallel.pipeline=1",)),
        ("qwen25_7b_1node", ["evaluation.max_response_tokens=100000"], ("evaluation.max_response_tokens=31744",)),
        # 64 ranks fill all 8 nodes; half of the tensor ranks leave 4 of them to the engines
        ("llama31_70b_8nodes", ["parallel.context=2"], ("parallel.tensor=4",)),
        ("llama31_8b_1node", ["parallel.data=3"], ("parallel.data=1",)),
    ],
)
def test_the_mend_is_the_nearest(name, overrides, fix):
    plan = make_plan(*job_of(load_config(ROOT / "examples" / "recipes" / f"{name}.yaml", overrides)))
    assert plan.problems[0].fix == fix


@pytest.mark.parametrize(
    ("name", "nodes"), [("llama31_70b_8nodes", 1), ("llama31_70b_8nodes", 2), ("llama31_70b_16nodes", 3)]
)
def test_where_no_mend_is_found_that_is_said(name, nodes):
    """70 billion parameters take 18 bytes each while they are trained: 1,270 GB and more, a node has 640."""
    plan = make_plan(*job_of(load_config(ROOT / "examples" / "recipes" / f"{name}.yaml"), nodes=nodes))
    assert plan.problems[0].fix == ()
    assert plan.problems[0].text.endswith(f"no settings that fit were found within {nodes} node{'s' if nodes > 1 else ''}")


def test_a_cache_that_is_too_small_is_told_the_least_size():
    """A token of Llama-3.1-8B takes 2 x 32 layers x 8 heads x 128 x 2 bytes; a prompt and a response 1,024 + 2,048."""
    config = load_config(ROOT / "examples" / "recipes" / "llama31_8b_1node.yaml", ["rollout.kv_cache_bytes=1000"])
    plan = make_plan(*job_of(config))
    assert plan.problems[0].text.endswith(f"raise it to at least {131072 * 3072}")
    exact, less = (
        make_plan(*job_of(changed_config(config, [f"rollout.kv_cache_bytes={size}"])))
        for size in (131072 * 3072, 131072 * 3072 - 1)
    )
    assert exact.fits and not less.fits


def test_advice_keeps_ranks_that_talk_in_every_layer_within_a_node():
    planned = job_of(load_config(ROOT / "examples" / "recipes" / "llama31_70b_8nodes.yaml"))[0]
    for overrides in advice.neighbours(planned, 64):
        p = changed_config(planned.config, overrides).parallel if "parallel.context=2" in overrides else planned.parallel
        assert p.tensor * p.context <= 8, overrides
    assert all(cut["tensor"] * cut["context"] <= 8 for cut in layouts(planned, 64))
    assert any(cut["context"] == 8 for cut in layouts(planned, 64))


def test_a_row_that_is_too_long_for_tensor_ranks_is_shared_by_context_ranks():
    """140,000 tokens in a row: full recomputation keeps 32 inputs of 4,096 x 2 bytes of each, 36.7 GB, beside 48 GB of
    weights and gradients."""
    planned = job(
        parallel={"tensor": 1, "data": 8, "micro_batch_tokens": 140000, "recompute": "full"},
        rollout={"max_response_tokens": 120000, "engines": 8},
        cluster={"nodes": 2},
    )
    plan = make_plan(planned)
    assert not plan.fits and plan.assessment
    shared = changed_config(planned.config, ["parallel.context=8", "parallel.data=1", "rollout.step_deadline_s=100000"])
    assert make_plan(job_of(shared)[0]).fits
    assert all(make_plan(job_of(changed_config(planned.config, change.overrides))[0]).fits for change in advice.fixes(plan))
    assert advice.fixes(plan)


def test_what_is_too_large_comes_with_changes_that_make_it_fit():
    planned = job(
        LLAMA_70B,
        parallel={"tensor": 8, "pipeline": 4, "sequence": True, "micro_batch_tokens": 16384},
        rollout={"engines": 2, "tensor_parallel": 8},
    )
    plan = make_plan(planned)
    assert not plan.fits and "activations" in plan.problems[0].text
    changes = advice.fixes(plan)
    assert changes
    for change in changes:
        fixed = make_plan(replace(planned, config=changed_config(planned.config, change.overrides)))
        assert fixed.fits and fixed.assessment.time.total == change.seconds


def test_advice_holds_when_it_is_followed():
    planned = job_of(load_config(ROOT / "examples" / "recipes" / "llama31_70b_8nodes.yaml"))[0]
    plan = make_plan(planned)
    changes = advice.faster(plan)
    assert len(changes) == 2
    for change in changes:
        other = make_plan(replace(planned, config=changed_config(planned.config, change.overrides)))
        assert other.fits and other.assessment.time.total == change.seconds < plan.assessment.time.total
        assert other.job.gpus <= plan.job.gpus
        assert other.assessment.batch.samples == plan.assessment.batch.samples  # what is trained stays


def test_fullest_stage_is_the_one_reported():
    planned = job(LLAMA_70B, parallel={"tensor": 8, "pipeline": 4, "sequence": True, "recompute": "full"})
    assert trainer_use(planned).total == max(stage_use(planned, stage).total for stage in range(4))


def test_gpus_have_names():
    assert gpu("h100-80g").memory_bytes == 81559 << 20
    with pytest.raises(ConfigError, match="cluster.gpu: 'v100'.*h100-80g"):
        gpu("v100")


def test_unknown_models_are_refused_without_a_network(tmp_path):
    with pytest.raises(ConfigError, match="nobody/nothing.*table of published shapes"):
        find_shape(config_of("nobody/nothing", model={"cache": str(tmp_path)}))


def test_json_holds_finite_plain_values():
    plan = make_plan(job(parallel={"tensor": 4, "sequence": True}, rollout={"engines": 4}), "somewhere")
    tree = json.loads(json.dumps(to_json(plan, advice.faster(plan)), allow_nan=False))
    assert tree["model"]["parameters"] == 8_030_261_248 and tree["fits"] is True and tree["problems"] == []
    assert sum(tree["trainer"]["memory_bytes"].values()) == tree["trainer"]["total_bytes"]
    assert sum(tree["engine"]["memory_bytes"].values()) == tree["engine"]["total_bytes"]
    parts = tree["step"]["seconds"]
    assert parts.pop("total") == pytest.approx(sum(parts.values()))


# ---------------------------------------------------------------------------------------------------------- shared GPUs
SHARED = {
    "cluster": {"device": "cuda", "share_gpus": True, "gpus_per_node": 1},
    "prompt": {"max_tokens": 512},
    "algorithm": {"kl_coefficient": 0.0},
}
QWEN_3B = "Qwen/Qwen2.5-3B-Instruct"
SMALL = {"micro_batch_tokens": 2560, "recompute": "full", "logprob_chunk_tokens": 1024}


def test_trainer_and_engine_on_one_gpu_must_fit_together():
    # 3.09e9 parameters: 2 + 4 + 12 bytes each are 51.7 GiB, beside activations; half of 80 GiB is too much for an engine
    plan = make_plan(job(QWEN_3B, **SHARED, rollout={"gpu_memory_utilization": 0.5}))
    assert not plan.fits and plan.problems[0].text.startswith("cluster.share_gpus: the trainer needs ")
    assert "rollout.gpu_memory_utilization keeps 39.8 GiB of it for an engine" in plan.problems[0].text
    assert advice.fixes(make_plan(job(QWEN_3B, **SHARED | {"parallel": SMALL}, rollout={"gpu_memory_utilization": 0.5})))[
        0
    ].overrides == ("rollout.gpu_memory_utilization=0.2",)
    fitting = make_plan(job(QWEN_3B, **SHARED | {"parallel": SMALL}, rollout={"gpu_memory_utilization": 0.15}))
    assert fitting.fits, fitting.problems
    assert [(seat.node, seat.gpu, seat.role) for seat in fitting.assessment.topology.seats] == [
        (0, 0, "trainer"),
        (0, 0, "engine"),
    ]
    assert fitting.job.gpus == 1 and fitting.assessment.topology.nodes == 1


def test_shared_gpus_are_those_of_one_node():
    plan = make_plan(job(QWEN_3B, **SHARED, parallel={"data": 2, "micro_batch_tokens": 4096}))
    assert "cluster.share_gpus: 2 trainer ranks and 1 engine workers share the GPUs of one node, it has 1" in str(
        plan.problems[0]
    )


def test_a_layout_that_is_too_large_for_shared_gpus_shrinks():
    one_node = SHARED | {"parallel": SMALL | {"data": 2}, "cluster": SHARED["cluster"] | {"nodes": 1}}
    two = make_plan(job(QWEN_3B, **one_node, rollout={"gpu_memory_utilization": 0.15}))
    assert "try" in str(two.problems[0]) and "parallel.data=1" in str(two.problems[0])


def test_weights_over_gloo_take_longer():
    shared = SHARED | {"parallel": SMALL}
    for job_, bytes_per_s in (
        (job(QWEN_3B), GPU.sync),
        (job(QWEN_3B, **shared), GPU.sync),
        (job(QWEN_3B, **shared, sync={"transport": "gloo"}), 1e9),
    ):
        assert step_time(job_).sync == pytest.approx(3_085_938_688 * 2 / bytes_per_s)


@pytest.mark.parametrize(
    "nodes, engines, fix",
    [
        (16, 8, ("parallel.data=1",)),  # 64 ranks on 8 nodes, 8 engines on the other 8
        (12, 8, ("parallel.data=1", "rollout.engines=4")),
        (20, 8, ("rollout.engines=4",)),
    ],
)
def test_a_run_that_is_too_large_for_its_nodes_shrinks_no_more_than_it_must(nodes, engines, fix):
    large = job(
        LLAMA_70B,
        parallel={"tensor": 8, "pipeline": 4, "context": 2, "data": 2},
        cluster={"device": "cuda", "nodes": nodes},
        rollout={"tensor_parallel": 8, "engines": engines},
    )
    (problem,) = [
        problem
        for problem in make_plan(large).problems
        if problem.text.startswith("cluster.nodes: 128 trainer ranks and 8 engines")
    ]
    assert problem.fix == fix


def test_shared_memory_does_not_reach_to_another_machine():
    planned = job(QWEN_3B, cluster={"device": "cuda", "gpus_per_node": 2}, sync={"transport": "ipc"})
    assert not [problem for problem in make_plan(planned).problems if "ipc" in problem.text]
    two = make_plan(job(QWEN_3B, cluster={"device": "cuda", "gpus_per_node": 1}, sync={"transport": "ipc"}))
    assert "sync.transport: ipc needs one machine, 1 trainer ranks and 1 engines of 1 GPUs need several of 1 GPUs" in str(
        two.problems[0]
    ) and "sync.transport=auto" in str(two.problems[0])


def test_mends_are_not_told_twice():
    large = load_config(
        ROOT / "examples" / "recipes" / "llama31_8b_1node_shared.yaml", ["parallel.tensor=2", "parallel.data=4"]
    )
    changes = [frozenset(change.overrides) for change in advice.fixes(make_plan(*job_of(large)))]
    assert len(changes) == len(set(changes)) > 0


def test_without_cuda_sharing_changes_nothing():
    shared = job(QWEN_3B, cluster={"device": "cpu", "share_gpus": True})
    assert not shared.shared and shared.gpus == 2


@pytest.mark.parametrize(
    ("parallel", "tokens"),
    [
        ({}, 16),
        ({"tensor": 2, "sequence": True}, 32),
        ({"tensor": 2, "sequence": True, "context": 2}, 64),
        ({"context": 2}, 32),
    ],
)
def test_rows_of_fp8_are_multiples_of_16_on_every_rank(parallel, tokens):
    wide = {"parallel": {"micro_batch_tokens": 8192} | parallel}
    assert config_of(model={"path": LLAMA_8B, "fp8": True}, **wide).token_multiple == tokens
    assert config_of(**wide).token_multiple == tokens // 16
