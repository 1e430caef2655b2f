"""Tiny random models with a tokenizer, made in a second: what every test uses in place of a real model.

`tiny_hf(folder, family, ...)` writes a complete Hugging Face folder (config, safetensors, byte-level tokenizer with a
ChatML template, generation_config) and returns it. The weights are random but not zero anywhere (biases and norms
included), so that a forgotten tensor shows. The vocabulary defaults to 509, a prime, which no tensor parallelism
divides.

In pytest: `from tiny import tiny_hf` (tests/ is on the path by setup.cfg). A script that torchrun starts gets the
folder from its test, or puts tests/ on its own path.
"""

from __future__ import annotations

import json
from pathlib import Path

from alphamed.lab.planner.miniature import write_tokenizer


def tiny_hf(
    folder: Path,
    family: str = "llama",
    *,
    vocab: int = 509,
    tied: bool = False,
    layers: int = 4,
    hidden: int = 64,
    ffn: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    max_positions: int = 2048,
    llama3_rope: bool = False,
    dtype: str = "float32",
    scale: float = 0.1,
    seed: int = 0,
    max_shard_size: str | None = None,
) -> Path:
    """Write a random model of `family` ("llama", "qwen2", "qwen3") into `folder` and return it.

    Weights are N(0, scale^2), norms 1 + N(0, scale^2). `head_dim` defaults to hidden / heads, for qwen3 to twice that
    (its real models differ there too). `llama3_rope` switches Llama 3's frequency scaling on with numbers at which
    every branch of it is taken. `max_shard_size` ("50KB") splits the weights over several files with an index.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    head_dim = head_dim or hidden // heads * (2 if family == "qwen3" else 1)
    config = _config(
        family,
        dict(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_positions,
            tie_word_embeddings=tied,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        head_dim,
        llama3_rope,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1.0 if "norm" in name else noise)
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    tiny_tokenizer(folder, vocab)
    return folder


def tiny_tokenizer(folder: Path, vocab: int = 509) -> Path:
    """Write the byte-level tokenizer of `alphamed plan --simulate`, of exactly `vocab` ids, into `folder`."""
    write_tokenizer(Path(folder), vocab)
    return Path(folder)


def _config(family: str, common: dict, head_dim: int, llama3_rope: bool):
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    rope = {"rope_theta": 10_000.0, "rope_type": "default"}
    if llama3_rope:
        rope = {
            "rope_theta": 10_000.0,
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    own_head_dim = {} if family == "qwen2" else {"head_dim": head_dim}
    return kinds[family](**common, **own_head_dim, rope_parameters=rope)


def edit_config(folder: Path, **changes) -> Path:
    """Change (or, with None, remove) entries of `folder/config.json`."""
    path = Path(folder) / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    return Path(folder)
