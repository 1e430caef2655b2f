"""The conversion of a GGUF file, on a tiny one that is written here tensor by tensor."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alphamed.lab.planner.miniature import CHATML, SPECIAL
from alphamed.model.fetch import convert_gguf
from alphamed.model.shape import read_shape
from alphamed.model.weight_files import check_weights

HIDDEN, FFN, HEADS, KV_HEADS = 32, 64, 2, 1


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A two-layer tied Llama with a tokenizer of SmolLM2's kind, through a GGUF file; its folder and its embedding."""
    import gguf
    from tokenizers import pre_tokenizers

    root = tmp_path_factory.mktemp("gguf")
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    random = np.random.default_rng(0)
    draw = lambda *size: random.standard_normal(size).astype(np.float32)
    writer = gguf.GGUFWriter(root / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_block_count(2), writer.add_context_length(128), writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN), writer.add_head_count(HEADS), writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS), writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(words)), writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2"), writer.add_tokenizer_pre("smollm"), writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3)), writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_pad_token_id(2), writer.add_unk_token_id(0)
    writer.add_chat_template(CHATML)
    embedding = draw(len(words), HIDDEN)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", draw(HIDDEN))
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(2):
        for name, size in (
            ("attn_norm", (HIDDEN,)),
            ("attn_q", (HIDDEN, HIDDEN)),
            ("attn_k", (kv, HIDDEN)),
            ("attn_v", (kv, HIDDEN)),
            ("attn_output", (HIDDEN, HIDDEN)),
            ("ffn_norm", (HIDDEN,)),
            ("ffn_gate", (FFN, HIDDEN)),
            ("ffn_up", (FFN, HIDDEN)),
            ("ffn_down", (HIDDEN, FFN)),
        ):
            writer.add_tensor(f"blk.{layer}.{name}.weight", draw(*size))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    convert_gguf(root / "tiny.gguf", root / "model")
    return root / "model", torch.from_numpy(embedding)


def test_it_is_a_model_that_can_be_trained(converted):
    folder, embedding = converted
    shape = read_shape(folder)
    assert (shape.family, shape.layers, shape.heads, shape.kv_heads, shape.tied) == ("llama", 2, HEADS, KV_HEADS, True)
    assert (shape.rope_theta, shape.max_positions, shape.dtype, shape.eos_ids) == (5000.0, 128, "bfloat16", (2,))
    check_weights(folder, shape)
    assert torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], embedding.bfloat16())


def test_its_tokenizer_splits_digits_off(converted):
    """As SmolLM2's own does: white space before a number is a token of its own, digits stand alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("dose: 3.5 mg\n\n2. µg")) == "dose: 3.5 mg\n\n2. µg"
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_its_configuration_names_no_place_of_this_machine(converted):
    folder, _ = converted
    text = "".join(path.read_text() for path in folder.glob("*.json") if path.name != "tokenizer.json")
    assert str(folder.parent) not in text
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
