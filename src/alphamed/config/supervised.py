"""The section of supervised training, `alphamed sft`: what differs from reinforcement learning."""

from __future__ import annotations

from alphamed.config.choices import LossOn
from alphamed.config.sections import Positive, PositiveFloat, Section


class SftConfig(Section):
    """A configuration with this section trains on the responses in data.train (docs/sft.md)."""

    prompts_per_step: Positive = 32
    """Prompts of an optimizer step, each with all its responses."""
    epochs: PositiveFloat | None = None
    """Length of the run in passes over data.train, in place of run.steps."""
    loss_on: LossOn = LossOn.RESPONSES
    """Of conversations: the last assistant turn (`responses`), or each of them (`assistant_turns`)."""
    response_format: str = "{reasoning}\n\n{response}"
    """How a row's `reasoning` and its response become the text to imitate. HuatuoGPT-o1's own: "## Thinking\\n\\n{reasoning}
    \\n\\n## Final Response\\n\\n{response}"; of models that think: "<think>\\n{reasoning}\\n</think>\\n\\n{response}"."""
