"""What the loop of supervised training sees of its data: `next(step)` on every rank, the place in the examples on rank 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.config.loading import changed_config
from alphamed.config.schema import Config
from alphamed.data.example_tokens import ExampleEncoder, TokenExample, load_usable
from alphamed.data.prompts import PromptBuilder
from alphamed.data.stream import SeededStream
from alphamed.data.tokenizer import load_tokenizer
from alphamed.records import StepRollouts, TokenGroup

if TYPE_CHECKING:
    from torch import Tensor

    from alphamed.cluster.control import Control


def with_length(config: Config, folder: Path) -> Config:
    """The configuration with run.steps in place of sft.epochs, where that is set. Reads data.train; `folder`: the model."""
    if config.sft is None or config.sft.epochs is None:
        return config
    tokenizer = load_tokenizer(folder)
    encoder = ExampleEncoder(tokenizer, PromptBuilder(tokenizer, config.prompt), config)
    count = len(load_usable(config, encoder, check=False).examples)
    steps = math.ceil(config.sft.epochs * count / config.sft.prompts_per_step)
    return changed_config(config, [f"run.steps={steps}", "sft.epochs=null"])


class ExampleSupply:
    """The groups of each step for the loop: rank 0 takes examples in a seeded order that is another one every epoch, and
    shares their tokens with all ranks."""

    def __init__(self, config: Config, encoder: ExampleEncoder, control: Control):
        assert config.sft is not None
        self._count, self._encoder, self._control = config.sft.prompts_per_step, encoder, control
        self._stream = control.on_rank0(
            "loading the examples",
            lambda: SeededStream(load_usable(config, encoder, check=False).examples, config.run.seed, "example"),
        )

    def next(self, step: int) -> StepRollouts:
        """The examples of a step, on every rank."""
        tensors = self._control.on_rank0(f"the examples of step {step}", self._take)
        groups = unflatten(self._control.share_tensors(tensors))
        epochs = {} if self._stream is None else {"data/epochs": self._stream.epochs}
        return StepRollouts(step, groups, (), epochs)

    def _take(self) -> list[Tensor]:
        assert self._stream is not None
        return flatten([self._encoder.encode(example) for example in self._stream.take(self._count)])

    def state(self) -> dict[str, Any]:
        """Rank 0's place in the examples."""
        assert self._stream is not None, "only rank 0 moves through the examples"
        return self._stream.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        assert self._stream is not None, "only rank 0 moves through the examples"
        self._stream.load_state(state)


# ----------------------------------------------------------------------------------------------------------------- sharing
def flatten(examples: Sequence[TokenExample]) -> list[Tensor]:
    """Five flat tensors: per example [responses, prompt tokens], response lengths, prompt ids, response ids (int64), and
    which response tokens have a loss (int64, 0 or 1)."""
    import torch

    responses = [response for example in examples for response in example.responses]
    marks = [mark for example in examples for marks in example.trained for mark in marks]
    return [
        torch.tensor([(len(example.responses), len(example.prompt)) for example in examples], dtype=torch.int64),
        torch.tensor([len(response) for response in responses], dtype=torch.int64),
        torch.tensor([token for example in examples for token in example.prompt], dtype=torch.int64),
        torch.tensor([token for response in responses for token in response], dtype=torch.int64),
        torch.tensor(marks, dtype=torch.int64),
    ]


def unflatten(tensors: Sequence[Tensor]) -> tuple[TokenGroup, ...]:
    """The examples that `flatten` was given, as groups; log-probs and advantages, of no use here, are 0."""
    import torch

    counts, lengths, prompts, tokens, marks = tensors
    responses, trained = (iter(values.split(lengths.tolist())) for values in (tokens, marks.bool()))
    groups = []
    for count, prompt in zip(counts[:, 0].tolist(), prompts.split(counts[:, 1].tolist()), strict=True):
        own = tuple(next(responses) for _ in range(count))
        groups.append(
            TokenGroup(
                prompt=prompt,
                responses=own,
                rollout_logprobs=tuple(torch.zeros(len(response)) for response in own),
                advantages=torch.zeros(count),
                policy_version=0,
                trained=tuple(next(trained) for _ in own),
            )
        )
    return tuple(groups)
