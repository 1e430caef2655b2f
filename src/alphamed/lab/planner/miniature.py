"""A model of the same family that is small enough for a laptop: a complete Hugging Face folder with random weights.

Everything that decides how a model is sharded, gathered and named is preserved: the family, tied or separate embeddings,
grouped heads (and whether there are fewer KV heads than tensor ranks), rotary scaling, a vocabulary that tensor ranks do not
divide."""

from __future__ import annotations

import itertools
import json
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

from alphamed.config.sections import ParallelConfig
from alphamed.model.shape import ARCHITECTURES, ModelShape

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, HEAD_DIM, FFN, VOCAB = 4, 32, 256, 509
"""vLLM has no CPU kernel for heads smaller than 32; 509 is a prime."""
SCALE = 0.1
"""Standard deviation of the weights: large enough that different contexts get different answers."""


def miniature(shape: ModelShape, parallel: ParallelConfig, layers: int, max_positions: int) -> ModelShape:
    """The shape of a small model like `shape`. `parallel`: the layout that `shape` is planned with."""
    kv_heads = (
        HEADS if shape.kv_heads == shape.heads else 1 if shape.kv_heads < parallel.tensor * parallel.context else HEADS // 2
    )
    return replace(
        shape,
        layers=layers,
        hidden=HEADS * HEAD_DIM,
        ffn=FFN,
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        vocab=VOCAB,
        max_positions=max_positions,
        bos_id=1,
        eos_ids=(2,),
        dtype="bfloat16",
    )


def write_model(folder: Path, shape: ModelShape, seed: int = 0) -> None:
    """Write configuration, random weights (norms near 1, nothing 0) and a tokenizer of `shape.vocab` ids."""
    import torch
    from safetensors.torch import save_file

    from alphamed.model.families import hf_shapes

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=1) + "\n", encoding="utf-8")
    generator, kind = torch.Generator().manual_seed(seed), getattr(torch, shape.dtype or "float32")
    tensors = {
        name: (torch.randn(size, generator=generator) * SCALE + ("norm" in name)).to(kind)
        for name, size in hf_shapes(shape).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, shape.vocab)


def config_json(shape: ModelShape) -> dict[str, Any]:
    """The config.json that `model.read_shape` and transformers read as `shape`."""
    rope: dict[str, Any] = {"rope_theta": shape.rope_theta, "rope_type": "default"}
    if (scaling := shape.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "dtype": shape.dtype,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": shape.norm_eps,
        "hidden_act": "silu",
        "rope_parameters": rope,
        "bos_token_id": shape.bos_id,
        "eos_token_id": shape.eos_ids[0],
        "pad_token_id": 0,
    }


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a byte-level tokenizer of exactly `vocab` ids (at least 259) with a ChatML template into `folder`: 3 special
    tokens, 256 bytes, then letter groups ("aa", "ab", ...) that decode to text but are never produced by encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert vocab >= 259, f"a byte-level vocabulary needs 259 ids, {vocab} given"
    groups = ("".join(p) for n in itertools.count(2) for p in itertools.product(string.ascii_lowercase, repeat=n))
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += itertools.islice(groups, vocab - len(words))
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
