"""Finds the chat template of a model folder and renders messages with it, as transformers does but without it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypedDict

from alphamed.errors import ConfigError

# Some templates (Llama 3.2) write today's date into the prompt, which would give a resumed run other prompts than the
# first start. The date is fixed at Llama 3.1's own default.
TEMPLATE_DATE = date(2024, 7, 26)
RESERVED = frozenset(
    {
        "messages",
        "add_generation_prompt",
        "tools",
        "documents",
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
    }
)
"""Variables that users cannot set."""


class Message(TypedDict):
    role: str  # "system", "user" or "assistant"
    content: str


class ChatTemplate:
    """A compiled Jinja template, run in a sandbox. `folder` is named in errors."""

    def __init__(self, source: str, folder: Path):
        from jinja2 import TemplateSyntaxError, meta, nodes
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.source = source
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=TEMPLATE_DATE.strftime)
        # {% generation %} marks the assistant's tokens for training in transformers; it prints nothing
        source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
        source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except TemplateSyntaxError as e:
            raise ConfigError(
                f"model.path: the chat template of {folder} is broken in line {e.lineno} ({e.message}); fix or remove it"
            ) from None
        self._folder = folder
        self.variables = frozenset(meta.find_undeclared_variables(tree) - RESERVED)
        """Names that a user can set; unset ones are undefined."""
        self.writes_date = any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))

    def render(
        self, messages: Sequence[Message], special_tokens: Mapping[str, str], variables: Mapping[str, Any] | None = None
    ) -> str:
        """The text of the conversation up to where the assistant's next answer begins. `special_tokens` are the
        variables `bos_token`, `eos_token` and so on. Raises ConfigError where the template refuses the messages."""
        try:
            return self._template.render(
                **(variables or {}),
                **special_tokens,
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except Exception as e:  # templates are code of the model's author
            raise ConfigError(
                f"prompt: the chat template of {self._folder} refuses this conversation "
                f"({' '.join(str(e).split())}); remove prompt.system or prompt.shots, or set "
                "prompt.template=raw"
            ) from None


def find_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template in chat_template.jinja, else in tokenizer_config.json (of several, the one named "default")."""
    file = folder / "chat_template.jinja"
    source: Any = tokenizer_config.get("chat_template")
    try:
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        elif isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    except (UnicodeDecodeError, KeyError, TypeError):
        source = False  # neither text nor absent
    if source is not None and not isinstance(source, str):
        raise ConfigError(f"model.path: the chat template of {folder} is not UTF-8 text; fix or remove it")
    return ChatTemplate(source, folder) if source else None


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own `tojson` escapes <, > and &, which would change the prompt."""
    import json

    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
