"""Settings of supervised training (`alphamed sft`) that reinforcement learning does not have."""

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
    """Prompts per optimizer step, each with all its responses."""
    epochs: PositiveFloat | None = None
    """Passes over data.train, instead of run.steps."""
    loss_on: LossOn = LossOn.RESPONSES
    """In conversations, train on the last assistant turn (`responses`) or on each one (`assistant_turns`)."""
    response_format: Annotated[str, AfterValidator(checked)] = "{reasoning}\n\n{response}"
    """How a row's `reasoning`, `response` and, as `{letter}`, `answer` are joined. Applies to rows with reasoning, or to all
    rows if it contains the letter (`{reasoning} The answer is \\boxed{{letter}}`)."""
