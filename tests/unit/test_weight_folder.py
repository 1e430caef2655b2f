"""Which weight files a folder's model is made of: what is ambiguous is refused, what is read is what vLLM reads too."""

import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_hf

from alphamed.errors import ConfigError
from alphamed.model.shape import read_shape
from alphamed.model.weight_files import (
    CHUNK,
    INDEX,
    SINGLE,
    WeightFiles,
    check_weights,
    has_weights,
    require_finite,
    weight_bytes,
    weight_files,
)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("single") / "m", "llama", layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return tiny_hf(tmp_path_factory.mktemp("sharded") / "m", "llama", layers=2, max_shard_size="100KB", seed=1)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "m")


def shards(folder):
    return sorted(file.name for file in folder.glob("model-*.safetensors"))


def refused(folder, *words):
    with pytest.raises(ConfigError) as error:
        check_weights(folder, read_shape(folder))
    assert all(word in str(error.value) for word in (str(folder), *words)) and "\n" not in str(error.value), error.value


def put_in_index(folder, name, file):
    tree = json.loads((folder / INDEX).read_text())
    tree["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(tree))


# ----------------------------------------------------------------------------------------------------------- which files
def test_two_sets_of_weights_are_refused_whatever_is_in_them(single, sharded, tmp_path):
    folder = copied(sharded, tmp_path)
    shutil.copy(single / SINGLE, folder)
    refused(folder, SINGLE, INDEX, "two sets of weights")


def test_an_index_may_name_the_single_file(single, tmp_path):
    folder = copied(single, tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}))
    check_weights(folder, read_shape(folder))
    assert list(weight_files(folder)) == [SINGLE]


@pytest.mark.parametrize(
    "other", ("adapter_model.safetensors", "consolidated.safetensors", "model-00001-of-00002.safetensors")
)
def test_a_single_file_beside_others_needs_an_index(single, tmp_path, other):
    folder = copied(single, tmp_path)
    shutil.copy(folder / SINGLE, folder / other)
    refused(folder, SINGLE, other)


def test_what_an_index_does_not_name_is_not_read(sharded, tmp_path):
    folder = copied(sharded, tmp_path)
    named = shards(folder)
    shutil.copy(folder / named[0], folder / "consolidated.safetensors")
    shutil.copy(folder / named[0], folder / "model-00099-of-00099.safetensors")
    (folder / "original").mkdir()
    for name in ("original/consolidated.safetensors", "pytorch_model.bin", "model.gguf"):
        (folder / name).write_bytes(b"not weights")
    check_weights(folder, read_shape(folder))
    assert list(weight_files(folder)) == named


def test_a_tensor_in_two_files_is_refused(sharded, tmp_path):
    """The trainer would take the one that the index names, vLLM the one that it reads last."""
    folder = copied(sharded, tmp_path)
    first, last = shards(folder)[0], shards(folder)[-1]
    name = sorted(load_file(folder / first))[0]
    save_file(load_file(folder / last) | {name: load_file(folder / first)[name]}, folder / last)
    refused(folder, name, first, last)


@pytest.mark.parametrize(
    "break_it, words",
    (
        (lambda d: (d / shards(d)[1]).unlink(), ("00002-of", "is missing")),
        (lambda d: (d / shards(d)[1]).write_bytes((d / shards(d)[1]).read_bytes()[:-4]), ("00002-of", "not a complete")),
        (lambda d: put_in_index(d, "model.extra", shards(d)[0]), ("does not hold tensor 'model.extra'", "00001-of")),
        (lambda d: put_in_index(d, "model.norm.weight", "../m/model-00001-of-00005.safetensors"), ("not one of its own",)),
        (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), ("names no weights",)),
        (lambda d: (d / INDEX).write_text('{"weight_map": [1]}'), ("is no weight index",)),
    ),
)
def test_an_index_that_does_not_hold(sharded, tmp_path, break_it, words):
    folder = copied(sharded, tmp_path)
    break_it(folder)
    refused(folder, *words)


def test_sizes(single, sharded, tmp_path):
    assert weight_bytes(single) == (single / SINGLE).stat().st_size
    assert weight_bytes(sharded) == sum((sharded / name).stat().st_size for name in shards(sharded))
    assert has_weights(single) and has_weights(sharded) and not has_weights(tmp_path)


@pytest.mark.slow
def test_vllm_reads_the_files_that_the_trainer_reads(single, sharded, tmp_path):
    """vLLM's own choice, with the load format that engines are given. Its automatic one would take the stray
    consolidated.safetensors and nothing else."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    stray = copied(sharded, tmp_path)
    shutil.copy(stray / shards(stray)[0], stray / "consolidated.safetensors")

    def chosen(folder, load_format="safetensors"):
        loader = get_model_loader(LoadConfig(load_format=load_format))
        files = loader._prepare_weights(str(folder), None, None, True, None)[1]
        return sorted(file.rpartition("/")[2] for file in files)

    for folder in (single, sharded, stray):
        assert chosen(folder) == sorted(weight_files(folder))
    assert chosen(stray, "auto") == ["consolidated.safetensors"]


# ---------------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_a_value_that_is_not_finite_is_found_by_tensor(tmp_path, dtype, value):
    good = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny, 0.0, -0.0], dtype=dtype)
    save_file({"a.weight": good, "b.weight": torch.full((3, 5), -1.0, dtype=dtype)}, tmp_path / SINGLE)
    require_finite(tmp_path)
    bad = torch.full((3, 5), -1.0, dtype=dtype)
    bad[2, 4] = value
    save_file({"a.weight": good, "b.weight": bad}, tmp_path / SINGLE)
    with pytest.raises(ConfigError) as error:
        require_finite(tmp_path)
    assert str(error.value) == (
        f"model.path: {tmp_path}: b.weight holds values that are not finite; repair the model or fetch it again"
    )


def test_every_value_of_a_large_tensor_is_read(tmp_path):
    values = np.zeros(CHUNK + 3, np.float16)
    for place in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        own = values.copy()
        own[place] = np.nan
        save_file({"w": torch.from_numpy(own)}, tmp_path / SINGLE)
        with pytest.raises(ConfigError, match="w holds values that are not finite"):
            require_finite(tmp_path)


def test_values_are_found_where_the_header_leaves_them_unaligned(tmp_path):
    """A header of any length is valid; here values begin at an odd byte."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - (8 + len(header)) % 2)
    for value, good in ((1.0, True), (float("inf"), False)):
        (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 2.0, value))
        with WeightFiles(tmp_path) as files:
            assert files.slice("w")[:].tolist() == [2.0, value]
        if good:
            require_finite(tmp_path)
        else:
            with pytest.raises(ConfigError, match="w holds values"):
                require_finite(tmp_path)
