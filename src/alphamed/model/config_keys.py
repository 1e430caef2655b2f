"""The keys of a config.json: those that are read, those that change nothing here, those that change what a model computes.

A key that the trainer does not implement must not pass in silence: the policy would be another model than the engines', or
than the one that was published. So what is known to change the computation is refused by name, and what is in no table is
listed once (`unknown_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READ = frozenset(
    {
        "architectures",
        "model_type",
        "dtype",
        "torch_dtype",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "bos_token_id",
        "eos_token_id",
        "attention_bias",
        "mlp_bias",
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "partial_rotary_factor",
        "quantization_config",
        "is_causal",
    }
)
"""What `model.read_shape` reads or refuses itself."""

HARMLESS = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "unk_token_id",
        "transformers_version",
        "use_cache",
        "pad_token_id",
        "initializer_range",
        "pretraining_tp",
        "problem_type",
        "id2label",
        "label2id",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "is_encoder_decoder",
        "torchscript",
        "chunk_size_feed_forward",
        "attention_dropout",
        "hidden_dropout",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "task_specific_params",
        "finetuning_task",
        "tokenizer_class",
        "transformers.js_config",
        "unsloth_version",
        "unsloth_fixed",
        "model_max_length",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "seq_length",
        "max_length",
        "mlp_hidden_act",
    }
)
"""What changes nothing that the trainer or the engines compute. Dropout is for pre-training: policy gradients take none."""

CHANGES = {
    "dual_chunk_attention_config": ("attention in chunks of the context", ()),
    "attention_chunk_size": ("attention in chunks of the context", ()),
    "attn_temperature_tuning": ("attention scaled by position", (0,)),
    "no_rope_layers": ("layers without rotary embeddings", ()),
    "no_rope_layer_interval": ("layers without rotary embeddings", (0,)),
    "attn_logit_softcapping": ("capped attention scores", ()),
    "attn_logit_cap": ("capped attention scores", ()),
    "final_logit_softcapping": ("capped logits", ()),
    "logit_softcapping": ("capped logits", ()),
    "logit_scale": ("scaled logits", (1,)),
    "logits_scaling": ("scaled logits", (1,)),
    "query_pre_attn_scalar": ("attention with another scale", ()),
    "attention_multiplier": ("attention with another scale", ()),
    "residual_multiplier": ("scaled residuals", (1,)),
    "embedding_multiplier": ("scaled embeddings", (1,)),
    "scale_emb": ("scaled embeddings", (1,)),
    "scale_depth": ("scaled residuals", ()),
    "clip_qkv": ("clipped queries, keys and values", ()),
    "qk_norm": ("normalised queries and keys", (0,)),
    "use_qk_norm": ("normalised queries and keys", (0,)),
    "qk_layernorm": ("normalised queries and keys", (0,)),
    "use_parallel_residual": ("attention and MLP in parallel", (0,)),
    "parallel_attn": ("attention and MLP in parallel", (0,)),
    "bias": ("biases in attention", (0,)),
    "use_bias": ("biases", (0,)),
    "rope_interleaved": ("rotary embeddings of neighbouring pairs", (0,)),
    "use_mrope": ("positions of images", (0,)),
    "rotary_pct": ("rotary embeddings on a part of the head", (1,)),
    "rotary_dim": ("rotary embeddings on a part of the head", ()),
    "sliding_window_pattern": ("sliding windows", ()),
    "num_experts": ("mixtures of experts", (0, 1)),
    "num_local_experts": ("mixtures of experts", (0, 1)),
    "n_routed_experts": ("mixtures of experts", (0, 1)),
    "num_nextn_predict_layers": ("layers that predict further tokens", (0,)),
    "kv_lora_rank": ("compressed keys and values", ()),
    "compression_config": ("quantised weights", ()),
    "quantization": ("quantised weights", ()),
}
"""Key -> what it brings into a model, which the trainer does not compute; its values that bring nothing. Null, false and
empty values bring nothing either."""
SAME_IN = {"qk_norm": "qwen3", "use_qk_norm": "qwen3", "qk_layernorm": "qwen3"}
"""Key of CHANGES -> the family that has it anyway."""


def changing(tree: Mapping[str, Any], family: str) -> list[tuple[str, str]]:
    """(key, what it means) for each key of a config.json that changes the computation in a way that is not implemented."""
    return [
        (key, meaning)
        for key, (meaning, neutral) in CHANGES.items()
        if not _empty(tree.get(key)) and tree[key] not in neutral and SAME_IN.get(key) != family
    ]


def unknown_keys(tree: Mapping[str, Any]) -> list[str]:
    """Keys in no table whose value is not empty: it is not known whether they change the computation."""
    return sorted(key for key, value in tree.items() if key not in READ | HARMLESS | CHANGES.keys() and not _empty(value))


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})
