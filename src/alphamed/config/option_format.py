"""How an option is written in a prompt: a format string of `prompt.option_format` with {letter} and {text}."""

from __future__ import annotations

from string import Formatter
from typing import Annotated

from pydantic import AfterValidator

FIELDS = ("letter", "text")


def checked(pattern: str) -> str:
    """`pattern`, where it holds {letter} and {text} once each and no other field. ValueError says what it takes."""
    try:
        parts = [part for part in Formatter().parse(pattern) if part[1] is not None]
    except ValueError:  # a single brace
        parts = []
    plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    if sorted(str(name) for _, name, _, _ in parts) != sorted(FIELDS) or not plain:
        raise ValueError(
            "it takes text with {letter} and {text}, once each and no other braces, as '{letter}: {text}' or '{text} ({letter})'"
        )
    return pattern


OptionFormat = Annotated[str, AfterValidator(checked)]
