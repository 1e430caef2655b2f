"""A model folder, checked whole: the one function that training, evaluation, difficulty, plans and `alphamed model` call.

Shape and keys of config.json, weight files, tokenizer, chat template, end tokens and the ids that prompts may hold. Whatever
is found is refused before a process is started, in one line naming file, value and fix. Imports neither torch nor
transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alphamed.config.choices import PromptTemplate
from alphamed.config.schema import Config
from alphamed.config.sections import PromptConfig
from alphamed.data.prompts import PromptBuilder
from alphamed.data.template_notes import Remarks, template_remarks
from alphamed.data.tokenizer import Tokenizer, load_tokenizer
from alphamed.errors import ConfigError
from alphamed.model.shape import ModelShape, read_shape, unread_keys
from alphamed.model.weight_files import SMALL_BYTES, check_weights, has_weights, require_finite, weight_bytes


@dataclass(frozen=True)
class ModelFolder:
    """A folder that can be used with a configuration."""

    folder: Path
    shape: ModelShape
    tokenizer: Tokenizer
    prompts: PromptBuilder
    stop_ids: tuple[int, ...]
    """All ids that end a response, in training and evaluation."""
    remarks: Remarks

    def print_remarks(self) -> None:
        for line in self.remarks.lines():
            print(line, file=sys.stderr, flush=True)


def check_model_folder(
    folder: Path, config: Config | None = None, fits: Callable[[ModelShape], object] | None = None
) -> ModelFolder:
    """Check a folder that a run starts from. Without a configuration prompts are the default ones, raw where the folder has
    no chat template. `fits` is called with the shape before any weight is read; it raises where the shape is of no use.
    Raises ConfigError.

    Weights of at most SMALL_BYTES are read for values that are not finite; of larger ones the headers. Their values are
    checked where they are read anyway: by the trainer's ranks (`hf_io.load_hf`) and the engines.
    """
    require_utf8("model.path", folder)
    shape = read_shape(folder)
    if fits is not None:
        fits(shape)
    check_weights(folder, shape)
    if weight_bytes(folder) <= SMALL_BYTES:
        require_finite(folder)
    return _with_text(folder, shape, config)


def check_present(folder: Path, config: Config) -> ModelShape:
    """Check what is there of a folder that is planned with, at least config.json. Raises ConfigError."""
    require_utf8("model.path", folder)
    shape = read_shape(folder)
    if has_weights(folder):
        check_weights(folder, shape)
    if (folder / "tokenizer.json").is_file() or any(folder.glob("*.model")):
        _with_text(folder, shape, config)
    return shape


def require_utf8(setting: str, path: Path) -> None:
    """Tokenizers, safetensors, Ray and Parquet files take paths as UTF-8 only. Raises ConfigError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{setting}: {str(path)!a} is not UTF-8, and libraries of a run take no other names; rename the folder"
        ) from None


def remarks_on(folder: Path, config: Config) -> Remarks:
    """Remarks on a folder that has been checked, for the records of a run."""
    return _with_text(folder, read_shape(folder), config).remarks


def _with_text(folder: Path, shape: ModelShape, config: Config | None) -> ModelFolder:
    tokenizer = load_tokenizer(folder)
    prompt = (
        config.prompt
        if config
        else PromptConfig(template=PromptTemplate.CHAT if tokenizer.has_chat_template else PromptTemplate.RAW)
    )
    prompts = PromptBuilder(tokenizer, prompt)
    stop_ids = tokenizer.stop_ids(config.rollout.stop if config else ())
    return ModelFolder(folder, shape, tokenizer, prompts, stop_ids, _remarks(folder, shape, tokenizer, prompt))


def _remarks(folder: Path, shape: ModelShape, tokenizer: Tokenizer, prompt: PromptConfig) -> Remarks:
    notes = []
    if unknown := unread_keys(folder):
        notes.append(
            f"config.json holds keys of which it is not known here whether they change the model: {', '.join(unknown)}"
        )
    if tokenizer.vocab > shape.vocab:
        notes.append(
            f"the tokenizer has {tokenizer.vocab} ids, the model {shape.vocab}: prompts that would hold one of the "
            f"last {tokenizer.vocab - shape.vocab} are refused"
        )
    if tokenizer.turn_end is not None and tokenizer.turn_end not in tokenizer.named_eos_ids:
        token = tokenizer.decode([tokenizer.turn_end], skip_special=False)
        notes.append(
            f"the chat template ends a turn with {token!r}, which the folder's files do not name as an end token; "
            f"it ends responses too"
        )
    if prompt.template == PromptTemplate.RAW:
        return Remarks(tuple(notes))
    remarks = template_remarks(tokenizer, prompt)
    return Remarks((*notes, *remarks.notes), remarks.warnings)


def main(path: str, revision: str | None, out: Path | None) -> int:
    """`alphamed model PATH [--out DIR]`: find or fetch a model, check it, print its shape, copy it."""
    from alphamed.config.sections import ModelConfig
    from alphamed.files import copy_folder
    from alphamed.model.shape import resolve

    folder = resolve(path, revision, ModelConfig.model_fields["cache"].default)
    checked = check_model_folder(folder)
    shape = checked.shape
    if out:
        copy_folder(folder, out)
        folder = out
    print(folder)
    print(
        f"{shape.family}, {shape.parameters:,} parameters: {shape.layers} layers, hidden {shape.hidden}, "
        f"FFN {shape.ffn}, {shape.heads} heads on {shape.kv_heads} KV heads of {shape.head_dim}, "
        f"vocabulary {shape.vocab:,}{' (tied)' if shape.tied else ''}, {shape.max_positions:,} positions"
    )
    checked.print_remarks()
    return 0
