"""Settings of supervised training (`alphamed sft`) that reinforcement learning does not have."""

from __future__ import annotations

from alphamed.config.choices import LossOn
from alphamed.config.sections import Positive, PositiveFloat, Section


class SftConfig(Section):
    """A configuration with this section trains on the responses in data.train (docs/sft.md)."""

    prompts_per_step: Positive = 32
    """Prompts per optimizer step, each with all its responses."""
    epochs: PositiveFloat | None = None
    """Passes over data.train, instead of run.steps."""
    loss_on: LossOn = LossOn.RESPONSES
    """In conversations, train on the last assistant turn (`responses`) or on each one (`assistant_turns`)."""
    response_format: str = "{reasoning}\n\n{response}"
    """How a row's `reasoning`, `response` and, as `{letter}`, `answer` are joined. Applies to rows with reasoning, or to all
    rows if it contains the letter (`{reasoning} The answer is \\boxed{{letter}}`)."""
