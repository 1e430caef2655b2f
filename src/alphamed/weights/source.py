"""Where a push takes its tensors from: the small protocol that WeightSync knows, and the Megatron policy behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from alphamed.model.shape import ModelShape
from alphamed.weights.hf_io import hf_parts, hf_tensors
from alphamed.weights.routes import make_plan, trainer_rank
from alphamed.weights.sync_plan import Slice, SyncPlan, Wire

if TYPE_CHECKING:
    from alphamed.megatron.policy import Policy


class WeightSource(Protocol):
    """One rank's view of the trainer's weights."""

    rank: int  # in the trainer
    exports: bool  # whether this rank takes part in `tensors` (the first of those that hold the same)
    scores: bool  # whether it hands over the probe's log-probs (one rank of the last stage)

    def plan(self, engines: Sequence[int], wire: Wire) -> SyncPlan:
        """The push to engines of these tensor-parallel sizes; the same on every rank."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        """Hugging Face names and whole tensors of this stage, in the plan's order (None where the rank is not the stage's
        source). The exporting ranks of a stage iterate together."""
        ...

    def parts(self) -> Iterator[tuple[Slice, Tensor]]:
        """What this rank holds of the Hugging Face tensors, as views, without communication."""
        ...


class PolicySource:
    """The weights of a Megatron policy."""

    def __init__(self, policy: Policy, shape: ModelShape):
        layout = policy.layout
        self._policy, self._shape, self._parallel = policy, shape, policy.config.parallel
        self.rank = trainer_rank(
            self._parallel, layout.pipeline_rank, layout.data_rank, layout.tensor_rank, layout.context_rank
        )
        self.exports = layout.first_replica
        self.scores = self.exports and layout.tensor_rank == 0 and layout.pipeline_rank == layout.pipeline - 1

    def plan(self, engines: Sequence[int], wire: Wire) -> SyncPlan:
        return make_plan(self._shape, self._parallel, engines, wire)

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        return hf_tensors(self._policy.model_chunks(), self._shape, self._policy.layout, self._policy.tensor_group)

    def parts(self) -> Iterator[tuple[Slice, Tensor]]:
        return hf_parts(self._policy.model_chunks(), self._shape, self._policy.layout)
