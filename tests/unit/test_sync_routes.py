"""The plan of a push for every family, size and layout, by brute force; and one small model carried through it for real."""

from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch
from shards import holders
from test_hf_io import IndexedModule, attach, megatron_like

from alphamed.config.loading import build_config
from alphamed.config.sections import ParallelConfig
from alphamed.errors import ConfigError
from alphamed.lab.planner.shapes import published
from alphamed.model.families import entries, hf_shapes
from alphamed.model.shape import ModelShape
from alphamed.records import Layout
from alphamed.weights.buckets import box_of, pack, unpack
from alphamed.weights.hf_io import hf_parts
from alphamed.weights.routes import check_sync, make_plan
from alphamed.weights.sender import held_parts
from alphamed.weights.sync_plan import Slice, SyncPlan, Wire, in_turns
from alphamed.weights.tensors import to_shard
from alphamed.weights.writer import ParameterWriter


def shape(family, layers, hidden, ffn, heads, kv_heads, vocab, head_dim, tied=False):
    return ModelShape(
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        tied=tied,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=1e-5,
        rope_theta=1e6,
        rope_scaling=None,
        max_positions=32768,
    )


MODELS = {name.rpartition("/")[2]: model for name, model in published().items()}
FAMILIES = [
    "Llama-3.1-8B",
    "Llama-3.1-70B",
    "Qwen2.5-7B-Instruct",
    "Qwen2.5-32B-Instruct",
    "Qwen2.5-72B-Instruct",
    "Qwen3-8B",
    "Qwen3-32B",
]
BUCKET = 256 << 20
GATHER, DIRECT = (Wire(mode, "nccl", "bfloat16", BUCKET) for mode in ("gather", "direct"))
SIZES = (1, 2, 4, 8)


def layouts(model):
    """TP x PP x VPP up to 8 x 8 x 4, as far as the model's heads and layers allow."""
    for tensor in SIZES:
        for pipeline in SIZES:
            for virtual in (None, 2, 4):
                fits = model.heads % tensor == 0 and model.layers % (pipeline * (virtual or 1)) == 0
                if fits and not (virtual and pipeline == 1):
                    yield ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, data=2)


def tile(slices) -> bool:
    """Whether boxes fill their tensor, each place once: columns beside one another, rows on top of one another in each."""
    columns = defaultdict(list)
    for part in slices:
        columns[tuple(zip(part.start[1:], part.shape[1:], strict=True))].append((part.start[0], part.shape[0]))
    at = 0
    for column in sorted(columns):
        if column and column[0][0] != at:
            return False
        at += column[0][1] if column else 0
        row = 0
        for start, rows in sorted(columns[column]):
            if start != row:
                return False
            row += rows
        if row != slices[0].whole[0]:
            return False
    return at == (slices[0].whole[1] if len(slices[0].whole) > 1 else 0)


def by_name(slices):
    parts = defaultdict(list)
    for part in slices:
        parts[part.name].append(part)
    return parts


def assert_buckets_sound(plan):
    """No bucket over its limit, nothing lost in cutting."""
    for link in plan.links:
        buckets = link.buckets()
        assert all(bucket.bytes <= BUCKET for bucket in buckets)
        assert sum(part.elements for bucket in buckets for part in bucket.slices) == sum(p.elements for p in link.slices)


def stages(model, parallel):
    """The names of each stage: runs of layers dealt out in turn, embedding first, norm and output layer last."""
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    run = model.layers // chunks
    stages = [{"model.embed_tokens.weight"}] + [set() for _ in range(parallel.pipeline - 1)]
    stages[-1] |= {"model.norm.weight", "lm_head.weight"}
    for layer in range(model.layers):
        stages[layer // run % parallel.pipeline].add(str(layer))
    return [lambda name, own=own: name in own or name.split(".")[2] in own for own in stages]


# ------------------------------------------------------------------------------------------------------------- brute force
@pytest.mark.parametrize("name", FAMILIES)
def test_gathered_every_tensor_is_sent_once_in_buckets_within_the_limit(name):
    model = MODELS[name]
    expected = hf_shapes(model)
    for parallel in layouts(model):
        plan = make_plan(model, parallel, (8, 8), GATHER)
        assert [link.source for link in plan.links] == [stage * 2 * parallel.tensor for stage in range(parallel.pipeline)]
        assert_buckets_sound(plan)
        parts = by_name(part for bucket in in_turns(plan.links) for part in bucket.slices)
        assert {n: whole[0].whole for n, whole in parts.items()} == expected
        assert all(tile(part) for part in parts.values())
        assert plan.bytes == 2 * model.parameters
        assert all(
            in_stage(part.name)
            for in_stage, link in zip(stages(model, parallel), plan.links, strict=True)
            for part in link.slices
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_every_engine_rank_gets_its_share_once_from_ranks_that_hold_it(name):
    """All pairs of tensor-parallel sizes. Layers are cut alike: four of them show it; depth is the next test's."""
    model = replace(MODELS[name], layers=4)
    sizes = [size for size in SIZES if model.heads % size == 0]
    for tensor in sizes:
        parallel = ParallelConfig(tensor=tensor)
        held = {rank: by_name(slices) for rank, slices in holders(model, parallel).items()}
        for engine in sizes:
            plan = make_plan(model, parallel, (engine, engine), DIRECT)
            for worker in range(engine):
                got = []
                for link in plan.links_to(engine + worker):
                    assert link.receivers == (worker, engine + worker)
                    assert all(contains(held[link.source][part.name], part) for part in link.slices)
                    got += link.slices
                expected = dict(vllm_share(model, engine, worker))
                for own, parts in by_name(got).items():
                    start, size = expected.pop(own)
                    assert tile([moved(part, start, size) for part in parts]), (tensor, engine, worker, own)
                assert not expected
        assert SyncPlan.from_json(plan.to_json()) == plan  # the other end, which has it as text, cuts the same


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen2.5-32B-Instruct", "Qwen3-8B"])
def test_direct_stages_send_what_one_stage_would(name):
    """Engines of every size in turn, over all layouts."""
    model = MODELS[name]
    sizes = [size for size in SIZES if model.heads % size == 0]
    for number, parallel in enumerate(layouts(model)):
        engines = (sizes[number % len(sizes)],) * 2
        plan = make_plan(model, parallel, engines, DIRECT)
        single = make_plan(model, ParallelConfig(tensor=parallel.tensor), engines, DIRECT)
        assert_buckets_sound(plan)
        carried, in_stage = defaultdict(list), stages(model, parallel)
        for link in plan.links:
            stage, rank = divmod(link.source, 2 * parallel.tensor)
            assert stage == link.stage and all(in_stage[stage](name) for name in {part.name for part in link.slices})
            carried[rank, link.receivers] += link.slices
        assert {key: len(slices) for key, slices in carried.items()} == {
            (link.source, link.receivers): len(link.slices) for link in single.links
        }
        assert all(set(carried[link.source, link.receivers]) == set(link.slices) for link in single.links)
        assert {part.name for link in single.links_to(0) for part in link.slices} == hf_shapes(model).keys()


def contains(held, part):
    row, rows, column, columns = part.start[0], part.shape[0], part.start[-1], part.shape[-1]
    return any(
        h.start[0] <= row
        and row + rows <= h.start[0] + h.shape[0]
        and h.start[-1] <= column
        and column + columns <= h.start[-1] + h.shape[-1]
        for h in held
    )


def moved(part, start, size):
    return Slice(part.name, size, tuple(a - b for a, b in zip(part.start, start, strict=True)), part.shape)


@cache
def vllm_share(model, size, rank):
    """(start, shape) of what a tensor rank of vLLM holds of every tensor, written down from vLLM's layers: columns or rows
    in equal parts, a KV head on several ranks where there are fewer heads than ranks, the vocabulary in multiples of 64."""
    boxes = {}
    padded = (model.vocab + 63) // 64 * 64
    for name, whole in hf_shapes(model).items():
        start, shape = [0] * len(whole), list(whole)
        layer = name.split(".")[-2]
        if layer in ("q_proj", "gate_proj", "up_proj"):
            start[0], shape[0] = whole[0] // size * rank, whole[0] // size
        elif layer in ("k_proj", "v_proj"):
            heads = max(1, model.kv_heads // size)
            first = rank * model.kv_heads // size
            start[0], shape[0] = first * model.head_dim, heads * model.head_dim
        elif layer in ("o_proj", "down_proj"):
            start[1], shape[1] = whole[1] // size * rank, whole[1] // size
        elif layer in ("embed_tokens", "lm_head"):
            start[0] = min(padded // size * rank, model.vocab)
            shape[0] = min(padded // size * (rank + 1), model.vocab) - start[0]
        boxes[name] = tuple(start), tuple(shape)
    return boxes


def test_bytes_per_link_by_hand():
    """Llama-3.1-8B on TP 2, engines of TP 4. A rank of the engine gets 1/4 of all matrices and every norm:
    8,030,261,248 parameters, of which 65 norms of 4,096."""
    norms = 65 * 4096
    plan = make_plan(MODELS["Llama-3.1-8B"], ParallelConfig(tensor=2), (4, 4), DIRECT)
    assert [(link.source, link.receivers) for link in plan.links] == [(0, (0, 4)), (0, (1, 5)), (1, (2, 6)), (1, (3, 7))]
    assert {link.bytes for link in plan.links} == {2 * ((8_030_261_248 - norms) // 4 + norms)}
    # the other way round an engine's rank has two sources, and the norms from the first of them
    plan = make_plan(MODELS["Llama-3.1-8B"], ParallelConfig(tensor=4), (2,), DIRECT)
    assert [(link.source, link.receivers) for link in plan.links] == [(0, (0,)), (1, (0,)), (2, (1,)), (3, (1,))]
    assert [link.bytes - plan.links[1].bytes for link in plan.links] == [2 * norms, 0, 2 * norms, 0]


# --------------------------------------------------------------------------------------------------- a small model for real
SMALL = [shape("llama", 2, 48, 96, 8, kv, 509, head_dim=8, tied=tied) for kv in (8, 2, 1) for tied in (False, True)] + [
    shape("qwen2", 2, 48, 96, 8, 2, 509, head_dim=8),
    shape("qwen3", 2, 48, 96, 8, 4, 509, head_dim=10),
]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def engine_like(model, size, rank):
    """A module with vLLM's names. Its matrices in layers are packed: empty. Others hold NaN, padding of the vocabulary 0."""
    module = IndexedModule()
    module.packed_modules_mapping = PACKED
    rows = (model.vocab + 63) // 64 * 64 // size
    for name, (_, own) in vllm_share(model, size, rank).items():
        path, _, leaf = name.rpartition(".")
        parent, _, layer = path.rpartition(".")
        whole = next((fused for fused, parts in PACKED.items() if layer in parts), layer)
        if whole != layer and leaf == "bias":
            own = (sum(vllm_share(model, size, rank)[f"{parent}.{part}.bias"][1][0] for part in PACKED[whole]),)
        if layer in ("embed_tokens", "lm_head"):
            tensor = torch.zeros(rows, own[1])
            tensor[: own[0]] = torch.nan
        else:
            tensor = torch.empty(0) if len(own) == 2 else torch.full(own, torch.nan)
        attach(module, f"{parent}.{whole}.{leaf}".lstrip("."), torch.nn.Parameter(tensor, requires_grad=False))
    return module


@pytest.mark.parametrize("model", SMALL, ids=lambda m: f"{m.family}-{m.kv_heads}-{m.tied}")
@pytest.mark.parametrize("tensor, engine", [(1, 1), (2, 2), (4, 1), (2, 4), (4, 2), (8, 8), (1, 8)])
def test_shards_of_any_trainer_make_up_the_parameters_of_any_engine(model, tensor, engine):
    generator = torch.Generator().manual_seed(7)
    truth = {name: torch.randn(size, generator=generator) for name, size in hf_shapes(model).items()}
    plan = make_plan(model, ParallelConfig(tensor=tensor), (engine,), Wire("direct", "gloo", "float32", 4096))
    parts = []
    for rank in range(tensor):
        layout = Layout(tensor, tensor_rank=rank)
        chunk = megatron_like(model, layout)
        fill(chunk, model, truth, tensor, rank)
        parts.append(held_parts(hf_parts([chunk], model, layout)))
    for worker in range(engine):
        module, packed = engine_like(model, engine, worker), {}
        names = {child: name for name, child in module.named_modules()}

        def repack(layer, packed=packed, names=names):
            packed[names[layer]] = {leaf: p.data.clone() for leaf, p in layer.named_parameters(recurse=False)}

        links = plan.links_to(worker)
        writer = ParameterWriter(module, [part for link in links for part in link.slices], repack)
        sources = {link.name: parts[link.source] for link in links}
        for bucket in in_turns(links):
            flat = pack(bucket, map(sources[bucket.link], bucket.slices), "cpu")
            for piece, part in unpack(bucket, flat):
                writer.write(piece, part)
        writer.check_complete()
        for path, leaves in packed.items():
            for leaf, tensor_found in leaves.items():
                assert torch.equal(tensor_found, vllm_parameter(model, truth, engine, worker, path, leaf)), (path, leaf)
        assert packed.keys() == {name.rpartition(".")[0] for name, _ in module.named_parameters()}


def fill(chunk, model, truth, tensor, rank):
    own = dict(chunk.named_parameters())
    for entry in entries(model):
        if entry.megatron[0] in own:
            own[entry.megatron[0]].data.copy_(to_shard(entry, [truth[name] for name in entry.hf], tensor, rank))


def vllm_parameter(model, truth, size, rank, path, leaf):
    """What vLLM would have cut out of the whole tensors: its shares on top of one another, the vocabulary padded with 0."""
    parent, _, layer = path.rpartition(".")
    names = [".".join(filter(None, (parent, part, leaf))) for part in PACKED.get(layer, [layer])]
    shares = []
    for name in names:
        start, own = vllm_share(model, size, rank)[name]
        shares.append(truth[name][box_of(Slice(name, truth[name].shape, start, own))])
    whole = torch.cat(shares)
    if layer in ("embed_tokens", "lm_head"):
        rows = (model.vocab + 63) // 64 * 64 // size
        whole = torch.cat([whole, torch.zeros(rows - len(whole), whole.shape[1])])
    return whole


def test_a_slice_that_never_came_is_noticed():
    model = SMALL[0]
    plan = make_plan(model, ParallelConfig(), (1,), Wire("direct", "gloo", "float32", 4096))
    writer = ParameterWriter(engine_like(model, 1, 0), plan.links[0].slices, lambda layer: None)
    with pytest.raises(AssertionError, match="not every slice came of model.embed_tokens, model.layers.0.input_layernorm"):
        writer.check_complete()


# ----------------------------------------------------------------------------------------------------------------- refusals
def config(tensor=1, engine=1, **sync):
    return build_config(
        {
            "model": {"path": "m", "dtype": "fp32"},
            "data": {"train": ["d.jsonl"]},
            "cluster": {"device": "cpu"},
            "sync": sync,
            "parallel": {"tensor": tensor},
            "rollout": {"dtype": "fp32", "tensor_parallel": engine},
        }
    )


def test_direct_refuses_sizes_that_do_not_divide_one_another():
    config(tensor=4, engine=2, mode="direct"), config(tensor=2, engine=4, mode="direct"), config(tensor=4, engine=6)
    with pytest.raises(
        ConfigError,
        match=r"sync.mode: direct needs parallel.tensor \(4\) and rollout.tensor_parallel \(6\) "
        r"to divide one another; change one of them or set it to gather",
    ):
        config(tensor=4, engine=6, mode="direct")


def test_a_bucket_must_hold_a_row():
    check_sync(config(bucket_bytes=384), SMALL[0])  # the widest: down_proj, 96 columns in FP32
    with pytest.raises(ConfigError, match=r"sync.bucket_bytes: 383 cannot hold one row .* \(384 bytes\)"):
        check_sync(config(bucket_bytes=383), SMALL[0])
