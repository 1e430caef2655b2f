"""Hugging Face folders in and out of Megatron-shaped modules in one process, and every way a folder can be broken."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config, tiny_hf

from alphamed.errors import ConfigError
from alphamed.model.families import entries, shard_shape
from alphamed.model.shape import read_shape
from alphamed.model.weight_files import INDEX, SINGLE, check_weights
from alphamed.records import Layout
from alphamed.weights.hf_io import hf_manifest, hf_tensors, load_hf
from alphamed.weights.hf_save import save_hf

FAMILIES = ("llama", "qwen2", "qwen3")


def megatron_like(shape, layout, layers=None, transformer_engine=False, dtype=torch.float32):
    """A module with the parameter names and shapes of a GPTModel chunk that holds `layers` (0-based; None: all): the
    embedding where it holds the first, final norm and output layer where it holds the last."""
    chunk = torch.nn.Module()
    layers = range(shape.layers) if layers is None else layers
    first, last = layers[0] == 0, layers[-1] == shape.layers - 1
    for entry in entries(shape):
        name = entry.megatron[-1 if transformer_engine else 0]
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            if int(number) not in layers:
                continue
            name = f"decoder.layers.{int(number) - layers[0]}.{rest}"
        elif not (first if name.startswith("embedding.") else last) or (entry.copy and first):
            continue
        attach(chunk, name, torch.nn.Parameter(torch.full(shard_shape(entry, layout.tensor), torch.nan, dtype=dtype)))
    for local, layer in chunk.decoder.layers.named_children():
        layer.layer_number = layers[0] + int(local) + 1  # Megatron's own attribute, from 1
    return chunk


def attach(module, name, parameter):
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, IndexedModule())
        module = getattr(module, part)
    module.register_parameter(leaf, parameter)


class IndexedModule(torch.nn.Module):
    def __getitem__(self, index):
        return getattr(self, str(index))


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(raw(a[k]), raw(b[k])) for k in a)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


# ----------------------------------------------------------------------------------------------------------- in and out
@pytest.mark.parametrize("transformer_engine", (False, True))
@pytest.mark.parametrize("tied", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
def test_single_process_round_trip(tmp_path, family, tied, transformer_engine):
    folder = tiny_hf(tmp_path / "in", family, tied=tied, max_shard_size="100KB")
    shape, layout = read_shape(folder), Layout()
    chunk = megatron_like(shape, layout, transformer_engine=transformer_engine)
    load_hf(folder, [chunk], shape, layout)
    assert same_bits(dict(hf_tensors([chunk], shape, layout, None)), stored(folder))
    save_hf(tmp_path / "out", folder, [chunk], shape, layout, None, None)
    assert same_bits(stored(tmp_path / "out"), stored(folder))


@pytest.mark.parametrize("tied", (False, True))
def test_stages_hold_disjoint_parts(tmp_path, tied):
    """Interleaved stages 0: layers 0, 2 and 1: layers 1, 3 of a 4-layer model: right layers, every tensor in one."""
    folder = tiny_hf(tmp_path, "qwen2", tied=tied)
    shape, source, names = read_shape(folder), stored(folder), []
    for rank, chunks in ((0, ([0], [2])), (1, ([1], [3]))):
        layout = Layout(pipeline=2, virtual_pipeline=2, pipeline_rank=rank)
        modules = [megatron_like(shape, layout, layers) for layers in chunks]
        load_hf(folder, modules, shape, layout)
        exported = dict(hf_tensors(modules, shape, layout, None))
        assert [(n, tuple(t.shape)) for n, t in exported.items()] == hf_manifest(modules, shape)
        assert same_bits(exported, {name: source[name] for name in exported})
        names += exported
        if rank == 1:
            output = modules[1].get_parameter("output_layer.weight")
            assert torch.equal(output, source["model.embed_tokens.weight" if tied else "lm_head.weight"])
    assert sorted(names) == sorted(source)


def test_tensor_ranks_load_their_shards(tmp_path):
    folder = tiny_hf(tmp_path, "llama")
    shape, source = read_shape(folder), stored(folder)
    for rank in (0, 1):
        layout = Layout(tensor=2, tensor_rank=rank)
        chunk = megatron_like(shape, layout)
        load_hf(folder, [chunk], shape, layout)
        output = chunk.get_parameter("output_layer.weight")
        rows = source["lm_head.weight"][255 * rank : 255 * (rank + 1)]  # 509 rows over 2 ranks of 255
        assert torch.equal(output[: len(rows)], rows) and not output[len(rows) :].any()
        down = chunk.get_parameter("decoder.layers.3.mlp.linear_fc2.weight")
        assert torch.equal(down, source["model.layers.3.mlp.down_proj.weight"][:, 64 * rank : 64 * (rank + 1)])


def test_types(tmp_path):
    """BF16 files, FP32 parameters: loading widens exactly, saving narrows to the stored type or the one asked for."""
    folder = tiny_hf(tmp_path / "in", "qwen3", dtype="bfloat16")
    shape, layout = read_shape(folder), Layout()
    chunk = megatron_like(shape, layout)
    load_hf(folder, [chunk], shape, layout)
    norm = chunk.get_parameter("decoder.final_layernorm.weight")
    assert torch.equal(norm, stored(folder)["model.norm.weight"].float())
    save_hf(tmp_path / "same", folder, [chunk], shape, layout, None, None)
    assert same_bits(stored(tmp_path / "same"), stored(folder))
    assert (tmp_path / "same" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    save_hf(tmp_path / "wide", folder, [chunk], shape, layout, None, None, dtype=torch.float32)
    assert {t.dtype for t in stored(tmp_path / "wide").values()} == {torch.float32}
    assert read_shape(tmp_path / "wide") == dataclasses.replace(shape, dtype="float32")


def test_saved_folder_is_what_transformers_expects(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_hf(tmp_path / "in", "llama", llama3_rope=True)
    shape, layout = read_shape(folder), Layout()
    chunk = megatron_like(shape, layout)
    load_hf(folder, [chunk], shape, layout)
    save_hf(tmp_path / "out", folder, [chunk], shape, layout, None, None, max_file_bytes=200_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * shape.parameters
    assert len(set(index["weight_map"].values())) > 3 and index["weight_map"].keys() == stored(folder).keys()
    mine, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", folder))
    ids = torch.arange(40)[None] * 11 % shape.vocab
    assert torch.equal(mine(ids).logits, theirs(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert text == "<|im_start|>user\nx<|im_end|>\n"
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tiny_hf(tmp_path / "in", "llama")
    shape, layout = read_shape(folder), Layout()
    chunk = megatron_like(shape, layout)
    load_hf(folder, [chunk], shape, layout)
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.safetensors").write_bytes(b"old")
    save_hf(out, folder, [chunk], shape, layout, None, None)
    assert (out / SINGLE).is_file() and not (out / "stale.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_full_disk_leaves_the_older_folder(tmp_path):
    """A child process may write files of 50 kB at most: one line of error, the older folder untouched, nothing left."""
    folder = tiny_hf(tmp_path / "in", "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "older").write_text("kept")
    code = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_hf_io import megatron_like
from alphamed.model.shape import read_shape
from alphamed.records import Layout
from alphamed.weights.hf_io import load_hf
from alphamed.weights.hf_save import save_hf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, layout = Path({str(folder)!r}), Layout()
shape = read_shape(folder)
chunk = megatron_like(shape, layout)
load_hf(folder, [chunk], shape, layout)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
try:
    save_hf(Path({str(tmp_path / "out")!r}), folder, [chunk], shape, layout, None, None)
except OSError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "export to" in done.stdout and "failed on pipeline stage 0" in done.stdout, done.stderr
    assert "make room" in done.stdout and done.stdout.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["older"]


# ------------------------------------------------------------------------------------------------------- broken folders
def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


GATE = "model.layers.2.mlp.gate_proj.weight"
BREAKAGES = {
    "missing tensor": (lambda t: without(t, GATE), f"tensor '{GATE}' is missing"),
    "other shape": (
        lambda t: t | {GATE: t[GATE].T.contiguous()},
        f"'{GATE}' has the shape [64, 128], config.json means [128, 64]",
    ),
    "quantised": (lambda t: t | {GATE: t[GATE].to(torch.int8)}, f"'{GATE}' has type I8; only F32, BF16, F16"),
    "no output layer": (lambda t: without(t, "lm_head.weight"), "tensor 'lm_head.weight' is missing"),
    "another layer": (
        lambda t: t | {"model.layers.4.mlp.up_proj.weight": t[GATE].clone()},
        "has no place in the llama model",
    ),
    "a bias": (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "q_proj.bias' has no place"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_wrong_tensors(tmp_path, breakage):
    change, message = BREAKAGES[breakage]
    folder = tiny_hf(tmp_path, "llama")
    shape = read_shape(folder)
    save_file(change(stored(folder)), folder / SINGLE)
    refused_by(lambda: check_weights(folder, shape), message)
    if breakage not in ("another layer", "a bias"):  # loading reads only what it needs
        refused_by(lambda: load_hf(folder, [megatron_like(shape, Layout())], shape, Layout()), message)


@pytest.mark.parametrize("rank", (0, 1))
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, rank):
    """By the rank that reads them; of several tensors in one parameter the one that holds them is named."""
    folder = tiny_hf(tmp_path, "llama")
    shape, layout, tensors = read_shape(folder), Layout(tensor=2, tensor_rank=rank), stored(folder)
    tensors["model.layers.1.self_attn.k_proj.weight"][-1, 0] = float("nan")
    save_file(tensors, folder / SINGLE)
    load = lambda: load_hf(folder, [megatron_like(shape, layout)], shape, layout)  # noqa: E731
    if rank:
        refused_by(load, "model.layers.1.self_attn.k_proj.weight holds values that are not finite")
    else:
        load()


def test_values_that_overflow_in_the_parameters_dtype_are_refused(tmp_path):
    """The largest FP32 number rounds to infinity in BF16; the largest BF16 number is 3.39e38."""
    folder = tiny_hf(tmp_path, "llama")
    shape, tensors = read_shape(folder), stored(folder)

    def load(value):
        tensors["model.norm.weight"][3] = value
        save_file(tensors, folder / SINGLE)
        load_hf(folder, [megatron_like(shape, Layout(), dtype=torch.bfloat16)], shape, Layout())

    load(3.38e38)
    refused_by(lambda: load(3.4028e38), "model.norm.weight holds values that are not finite")


def truncate(folder):
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:-1000])


def lose_a_file(folder):
    split(folder)
    next(iter(sorted(folder.glob("model-*")))).unlink()


def spoil_index(folder, content):
    split(folder)
    (folder / INDEX).write_text(content)


def split(folder):
    tiny_hf(folder, "llama", max_shard_size="100KB")
    (folder / SINGLE).unlink(missing_ok=True)


def promise_more(folder):
    split(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.x"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, message",
    (
        (truncate, "is not a complete safetensors file"),
        (lambda f: (f / SINGLE).write_bytes(b"not safetensors"), "is not a complete safetensors file"),
        (lambda f: (f / SINGLE).write_bytes(b""), "is not a complete safetensors file"),
        (lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), "give a folder with safetensors weights"),
        (lose_a_file, f"which {INDEX} names, is missing"),
        (lambda f: spoil_index(f, "{"), "is no weight index"),
        (lambda f: spoil_index(f, '{"weight_map": []}'), "is no weight index"),
        (promise_more, f"does not hold tensor 'model.layers.9.x', which {INDEX} promises"),
    ),
    ids=lambda x: None if callable(x) else x[:30],
)
def test_damaged_files(tmp_path, damage, message):
    folder = tiny_hf(tmp_path, "llama")
    shape = read_shape(folder)
    damage(folder)
    refused_by(lambda: check_weights(folder, shape), message)
    refused_by(lambda: load_hf(folder, [megatron_like(shape, Layout())], shape, Layout()), message)


def refused_by(action, message):
    with pytest.raises(ConfigError) as refused:
        action()
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).startswith("model.path: ")


def test_tied_model_with_an_output_layer(tmp_path):
    """Equal to the embedding it is accepted and not written again; another one is refused."""
    folder = tiny_hf(tmp_path / "in", "llama", tied=True)
    shape, layout, tensors = read_shape(folder), Layout(), stored(folder)
    chunk = megatron_like(shape, layout)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / SINGLE)
    check_weights(folder, shape)
    load_hf(folder, [chunk], shape, layout)
    save_hf(tmp_path / "out", folder, [chunk], shape, layout, None, None)
    assert same_bits(stored(tmp_path / "out"), tensors)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / SINGLE)
    refused_by(lambda: load_hf(folder, [chunk], shape, layout), "lm_head.weight differs from model.embed_tokens.weight")


def test_config_and_weights_of_different_models(tmp_path):
    folder = edit_config(tiny_hf(tmp_path, "llama"), num_hidden_layers=3)
    name = "'model.layers.3.input_layernorm.weight'"
    refused_by(lambda: check_weights(folder, read_shape(folder)), f"{name} has no place")
    edit_config(folder, num_hidden_layers=5)
    name = "'model.layers.4.input_layernorm.weight'"
    refused_by(lambda: check_weights(folder, read_shape(folder)), f"tensor {name} is missing")


def test_a_parameter_no_table_knows_is_an_error(tmp_path):
    folder = tiny_hf(tmp_path, "llama")
    shape = read_shape(folder)
    chunk = megatron_like(shape, Layout())
    attach(chunk, "decoder.layers.0.mlp.linear_fc1.bias", torch.nn.Parameter(torch.zeros(256)))
    with pytest.raises(AssertionError, match="no llama table entry names: .*linear_fc1.bias"):
        load_hf(folder, [chunk], shape, Layout())
