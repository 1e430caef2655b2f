"""The section of supervised training, `alphamed sft`: what differs from reinforcement learning."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from alphamed.config.choices import LossOn
from alphamed.config.sections import Positive, PositiveFloat, Section

FIELDS = ("reasoning", "response", "letter")
_BRACED = re.compile(r"(\\[A-Za-z]+)?\{([A-Za-z_]+)\}")


def checked(pattern: str) -> str:
    """`pattern`, where each {name} is one of FIELDS; behind a command, as in \\text{name}, it is a text. ValueError says so."""
    for command, name in _BRACED.findall(pattern):
        if not command and name not in FIELDS:
            raise ValueError(f"{{{name}}} is none of {', '.join(f'{{{field}}}' for field in FIELDS)}")
    return pattern


class SftConfig(Section):
    """A configuration with this section trains on the responses in data.train (docs/sft.md)."""

    prompts_per_step: Positive = 32
    """Prompts of an optimizer step, each with all its responses."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over data.train, in place of run.steps."""
    loss_on: LossOn = LossOn.RESPONSES
    """Of conversations: the last assistant turn (`responses`), or each of them (`assistant_turns`)."""
    response_format: Annotated[str, AfterValidator(checked)] = "{reasoning}\n\n{response}"
    """How a row's `reasoning`, its response and, as `{letter}`, its `answer` become the text to imitate: of rows that have
    reasoning, or of all where it asks for the letter (`{reasoning} The answer is \\boxed{{letter}}`)."""
