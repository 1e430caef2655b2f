"""Text to token ids and back, for Hugging Face fast tokenizers and SentencePiece models, from a local folder alone.

The tokenizers and sentencepiece libraries are used directly: transformers would read the same tokenizer.json, but
importing it costs 10 s and torch, which the command line and the rollout coordinator do without.

Control tokens (`<|im_end|>`, `</s>`, `<think>`) are single ids that steer the model. `encode` reads them wherever they
are written, as a rendered chat template needs. Text from outside goes through `plain` first, so that it cannot steer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alphamed.data.chat_template import Message, find_chat_template
from alphamed.errors import ConfigError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
CONTENT = {("user", 0): "1701411", ("assistant", 0): "1701412", ("user", 1): "1701413"}
"""(role, number) -> texts that a chat template is rendered with to see what it writes around them. Digits: no template that
changes case or quotes signs changes them."""
_FIX = "give a folder with tokenizer.json or a SentencePiece tokenizer.model"


class Backend(Protocol):
    """The interface of the two libraries."""

    size: int
    """One more than the largest id."""
    exact: bool
    """Only the texts of `control` become control tokens: no normalisation makes one of another text."""
    bos_ids: tuple[int, ...]
    """Put before a plain text."""

    @property
    def control(self) -> Mapping[str, int]:
        """Texts that are read as one control id."""
        ...

    @property
    def special(self) -> Mapping[str, str]:
        """bos_token, eos_token ... -> their texts."""
        ...

    def token_id(self, token: str) -> int | None: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool, keep_ids: Collection[int] = ()) -> str: ...


class Tokenizer:
    """The tokenizer of a model folder.

    `vocab` is one more than the largest token id, `model_vocab` the number of ids that the model has (config.json's
    vocab_size, None without that file), `bos_ids` what the model expects before a plain text (often nothing); a chat
    template writes its own. `eos_ids` are all ids that end an answer: `named_eos_ids`, those that the folder's files name,
    and `turn_end`, the token that the chat template writes right after an assistant's content (None where it writes none).
    """

    def __init__(self, folder: Path, backend: Backend, settings: Mapping[str, Any]):
        self.folder = folder
        self.vocab = backend.size
        self.bos_ids = backend.bos_ids
        self.model_vocab = _model_vocab(folder)
        self._backend = backend
        self._template = find_chat_template(folder, settings)
        unknown = backend.token_id(backend.special.get("unk_token", ""))  # may stand for any odd character
        self._control_ids = frozenset(backend.control.values()) - {unknown}
        self._control_text = _any_of(backend.control)
        self._kept_ids: frozenset[int] = frozenset()
        self.turn_end = self._turn_end()
        self.named_eos_ids = _eos_ids(folder, backend)
        ends = (*self.named_eos_ids, *(() if self.turn_end is None else (self.turn_end,)))
        if not ends:
            raise ConfigError(f"model.path: {folder} names no end-of-text token; add eos_token_id to generation_config.json")
        self.eos_ids = tuple(dict.fromkeys(self._require_known(ends, "ends an answer")))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def template_writes_date(self) -> bool:
        """Whether the chat template asks for today's date, which is always `chat_template.TEMPLATE_DATE`."""
        return self._template is not None and self._template.writes_date

    def stop_ids(self, stop: Sequence[str] = ()) -> tuple[int, ...]:
        """All ids that end a response: `eos_ids` and the tokens of `rollout.stop`. Raises ConfigError for a text that is not
        one token."""
        more = []
        for text in stop:
            ids = self.encode(text)
            if len(ids) != 1:
                raise ConfigError(
                    f"rollout.stop: {text!r} takes {len(ids)} tokens of the tokenizer of {self.folder}; a "
                    f"response ends at one token, so give a text that is a single token"
                )
            more += self._require_known(ids, "is in rollout.stop")
        return tuple(dict.fromkeys((*self.eos_ids, *more)))

    def require_known(self, ids: Sequence[int]) -> None:
        """Raises ConfigError where a prompt holds an id that the model does not have."""
        self._require_known(ids, "is in the prompt")

    def _require_known(self, ids: Sequence[int], role: str) -> Sequence[int]:
        if self.model_vocab is not None and ids and (largest := max(ids)) >= self.model_vocab:
            token = self.decode([largest], skip_special=False)
            raise ConfigError(
                f"model.path: {self.folder}: token {token!r}, id {largest}, {role}, but config.json has a "
                f"vocab_size of {self.model_vocab}; resize the model's embeddings, or take the tokenizer and "
                f"chat template that belong to it"
            )
        return ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; control tokens written in it become their ids, nothing is added before or after."""
        return self._backend.encode(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`. Ids beyond the vocabulary (padded columns) have no text."""
        return self._backend.decode([i for i in ids if 0 <= i < self.vocab], skip_special, self._kept_ids)

    def writes(self, text: str) -> bool:
        """Whether `text` is one of the control tokens, or in the chat template."""
        return text in self._backend.control or (self._template is not None and text in self._template.source)

    def keep(self, text: str) -> None:
        """From now on `decode` leaves the control tokens in place that `text` holds: those around a model's thinking."""
        self._kept_ids |= {i for token, i in self._backend.control.items() if token in text}

    def chat_text(self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> str:
        """The conversation as text, up to where the assistant's next answer begins. `variables`: prompt.template_variables.

        Raises ConfigError where there is no chat template, it refuses the conversation or does not use a variable.
        """
        if self._template is None:
            raise ConfigError(
                f"prompt.template: chat needs a chat template, which {self.folder} has not; set prompt.template=raw"
            )
        if unused := sorted(set(variables or ()) - self._template.variables):
            known = ", ".join(sorted(self._template.variables)) or "none"
            raise ConfigError(
                f"prompt.template_variables: {unused[0]!r} is not a variable of the chat template of "
                f"{self.folder}; it has: {known}"
            )
        return self._template.render(messages, self._backend.special, variables)

    def after_content(self) -> str:
        """What the chat template writes between an assistant's content and the next user's; empty without a template, or
        where it refuses such a conversation or leaves one of the two out."""
        if self._template is None:
            return ""
        try:
            text = self.chat_text(
                [
                    Message(role=role, content=CONTENT[role, number])
                    for role, number in (("user", 0), ("assistant", 0), ("user", 1))
                ]
            )
        except ConfigError:
            return ""
        after = text.partition(CONTENT["assistant", 0])[2]
        return after.partition(CONTENT["user", 1])[0] if CONTENT["user", 1] in after else ""

    def _turn_end(self) -> int | None:
        match = self._control_text.match(self.after_content().lstrip())
        token = self._backend.control[match[0]] if match else None
        return token if token in self._control_ids else None

    def hidden_in(self, text: str) -> str | None:
        """The first control token in `text` that steers and is no text of the model's own (`<|im_end|>`, not `<think>`)."""
        tokens = (match[0] for match in self._control_text.finditer(text))
        return next((token for token in tokens if not self.decode([self._backend.control[token]])), None)

    def without_control(self, text: str) -> str:
        """`text` without control tokens."""
        return self._control_text.sub("", text)

    def plain(self, text: str) -> str:
        """`text` with a space inserted into every control token (`<|im_end|>` -> `< |im_end|>`), so none is read as such.

        Ordinary text comes back unchanged. Raises ValueError where a control token would still be read, which takes a
        tokenizer whose normalisation makes one of other characters.
        """
        text = self._control_text.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        if self._backend.exact and not self._control_text.search(text):
            return text  # the usual case; encoding every question once more would double the time of a start
        if control_ids := self._control_ids.intersection(self.encode(text)):
            raise ValueError(
                f"text is read as control token {self.decode([min(control_ids)], skip_special=False)!r} by the "
                f"tokenizer of {self.folder}; reword it"
            )
        return text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a local model folder: tokenizer.json if there is one, else a SentencePiece model.

    Never uses the network. Raises ConfigError (a ValueError) where there is no tokenizer, it is broken, or it names no
    end-of-text token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"model.path: {folder} is not a folder; {_FIX}")
    settings = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(_read_json(folder / "special_tokens_map.json")) | _special_tokens(settings)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(folder, FastBackend(folder / "tokenizer.json", special), settings)
    models = [path for path in sorted(folder.glob("*.model")) if path.is_file()]
    named = [path for path in models if path.name == "tokenizer.model"] or models
    if len(named) != 1:
        content = f"{len(named)} .model files and no tokenizer.model" if named else "no tokenizer"
        raise ConfigError(f"model.path: {folder} holds {content}; {_FIX}")
    add_bos = settings.get("add_bos_token", True)  # Llama's default; tokenizer.json has its own rule
    backend = SentencePieceBackend(named[0], special, _added_tokens(folder, settings), add_bos)
    return Tokenizer(folder, backend, settings)


# -------------------------------------------------------------------------------------------------------- two libraries
class FastBackend:
    """tokenizer.json through the tokenizers library."""

    def __init__(self, file: Path, special: Mapping[str, str]):
        from tokenizers import Tokenizer as Core

        try:
            self._core = Core.from_buffer(file.read_bytes())  # takes no path that is not UTF-8
        except Exception as e:  # the library raises bare Exception for a broken file
            raise ConfigError(f"model.path: {file} is not a valid tokenizer ({_one_line(e)}); fetch it again") from None
        self._core.no_truncation()
        self._core.no_padding()
        added = {token.content for token in self._core.get_added_tokens_decoder().values()}
        self._core.add_special_tokens(
            [
                text
                for text in special.values()  # named in the settings only
                if text not in added and self._core.token_to_id(text) is not None
            ]
        )
        self.size = 1 + max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)
        control = {
            i: token for i, token in self._core.get_added_tokens_decoder().items() if token.special or _is_tag(token.content)
        }
        self.control = {token.content: i for i, token in control.items()}
        self._special = {i for i, token in control.items() if token.special}
        self.exact = self._core.normalizer is None or not any(token.normalized for token in control.values())
        self.special = special
        self.bos_ids = self._ids_in_front()

    def token_id(self, token: str) -> int | None:
        return self._core.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool, keep_ids: Collection[int] = ()) -> str:
        shown = [i for i in ids if i not in self._special or i in keep_ids] if skip_special else ids
        return self._core.decode(shown, skip_special_tokens=False)

    def _ids_in_front(self) -> tuple[int, ...]:
        """What the file's post-processor puts before a text (it may also put an end token after it)."""
        encoded = self._core.encode("a", add_special_tokens=True)
        marked = itertools.takewhile(lambda pair: pair[1], zip(encoded.ids, encoded.special_tokens_mask))
        return tuple(i for i, _ in marked)


class SentencePieceBackend:
    """A SentencePiece model, with the control tokens that a Hugging Face folder may add to it.

    Text between two control tokens is encoded by itself, so each such piece gets the model's dummy prefix space, as
    in transformers with `legacy`.
    """

    exact = False  # the model's own normalisation comes before its user-defined pieces

    def __init__(self, file: Path, special: Mapping[str, str], added: Mapping[str, int], add_bos: bool):
        from sentencepiece import SentencePieceProcessor

        try:
            self._core = SentencePieceProcessor()
            self._core.load_from_serialized_proto(file.read_bytes())
        except (RuntimeError, OSError) as e:
            raise ConfigError(f"model.path: {file} is not a SentencePiece model ({_one_line(e)}); {_FIX}") from None
        core = self._core
        pieces = {core.id_to_piece(i): i for i in range(core.get_piece_size())}
        self.control = {
            piece: i
            for piece, i in pieces.items()
            if core.is_control(i) or (_is_tag(piece) and not core.is_byte(i) and not core.is_unknown(i))
        }
        self.control |= {text: i for text, i in added.items() if text not in pieces}
        self.size = max([core.get_piece_size(), *(i + 1 for i in self.control.values())])
        self._text_of = {i: text for text, i in self.control.items()}
        self._control_text = _any_of(self.control)
        own = {
            "bos_token": core.bos_id(),
            "eos_token": core.eos_id(),
            "unk_token": core.unk_id(),
            "pad_token": core.pad_id(),
        }
        self.special = {name: core.id_to_piece(i) for name, i in own.items() if i >= 0} | dict(special)
        self.bos_ids = (core.bos_id(),) if add_bos and core.bos_id() >= 0 else ()

    def token_id(self, token: str) -> int | None:
        return self.control.get(token)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._control_text.split(text)):
            ids += [self.control[part]] if i % 2 else self._core.encode(part)  # odd parts are the control tokens
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool, keep_ids: Collection[int] = ()) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if i not in self._text_of:
                run.append(i)
            elif not skip_special or i in keep_ids:
                parts += [self._core.decode(run), self._text_of[i]]
                run = []
        return "".join([*parts, self._core.decode(run)])


# ---------------------------------------------------------------------------------------------------- files of a folder
def _eos_ids(folder: Path, backend: Backend) -> tuple[int, ...]:
    """The tokenizer's own end token, then those of generation_config.json and config.json, each once."""
    own = backend.token_id(backend.special.get("eos_token", ""))
    ids = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        for i in value if isinstance(value, list) else [value]:
            if i is None:
                continue
            if type(i) is not int or not 0 <= i < backend.size:
                raise ConfigError(
                    f"model.path: eos_token_id {i!r} in {folder / name} is not an id of its tokenizer "
                    f"(0..{backend.size - 1}); fix the file"
                )
            ids.append(i)
    return tuple(dict.fromkeys(ids))


def _model_vocab(folder: Path) -> int | None:
    size = _read_json(folder / "config.json").get("vocab_size")
    return size if type(size) is int else None  # model.read_shape refuses what is no number


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and so on of a settings file; each is text or an object with `content`."""
    values = {name: settings.get(name) for name in SPECIAL_NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that the folder adds to its SentencePiece model: text -> id."""
    try:
        listed = {entry["content"]: int(i) for i, entry in settings.get("added_tokens_decoder", {}).items()}
        return listed | {text: int(i) for text, i in _read_json(folder / "added_tokens.json").items()}
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ConfigError(
            f"model.path: the added tokens in {folder} are not a table of tokens and ids; fetch its "
            "added_tokens.json and tokenizer_config.json again"
        ) from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts`, the longest that fits, as a group; nothing where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")


def _is_tag(text: str) -> bool:
    """Whether an added token looks like a control token (Qwen's <think> is not marked special), not like text."""
    return len(text) > 2 and text[0] == "<" and text[-1] == ">"


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where the file does not exist."""
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"model.path: {file} is not valid JSON ({_one_line(e)}); fetch it again") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"model.path: {file} is not a JSON object; fetch it again")
    return tree


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 120 else text[:117] + "..."
