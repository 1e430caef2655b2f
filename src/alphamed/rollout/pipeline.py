"""What the training loop sees of rollouts: `next(step)` on every rank, from engines or from the record of another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from alphamed.cluster.failure import StopRequested
from alphamed.config.schema import Config
from alphamed.data.prompts import PromptBuilder
from alphamed.data.stream import QuestionStream
from alphamed.records import ScoredGroup, StepRollouts, TokenGroup
from alphamed.reward.rules import earns_of
from alphamed.reward.shaping import Overlong, with_advantages
from alphamed.rollout.choice import QuestionSampler
from alphamed.rollout.supply import AsyncRollouts, Gathered, SyncRollouts
from alphamed.rundir.profiling import stage

if TYPE_CHECKING:
    from torch import Tensor

    from alphamed.cluster.control import Control
    from alphamed.rollout.coordinator import Coordinator, Progress
    from alphamed.rollout.pace import Pace


class LiveRollouts:
    """Rollouts sampled now, or ahead of the policy by at most rollout.max_staleness steps. `coordinator` is there on rank 0
    and None elsewhere; `stream` is advanced on rank 0 only. `pace`, where there is one, sizes the steps."""

    def __init__(
        self,
        config: Config,
        stream: QuestionStream,
        prompts: PromptBuilder,
        coordinator: Coordinator | None,
        control: Control,
        on_progress: Callable[[Progress], None] | None = None,
        pace: Pace | None = None,
    ):
        self._control = control
        self._supply: SyncRollouts | AsyncRollouts | None = None  # on rank 0 alone
        if coordinator is None:
            return
        r = config.rollout
        sampler = QuestionSampler(
            config.dynamic_sampling,
            stream,
            r.samples_per_question,
            r.questions_per_step,
            config.data.levels,
            config.run.seed,
            earns_of(config.reward.name),
        )
        if r.max_staleness:
            self._supply = AsyncRollouts(config, sampler, prompts, coordinator, on_progress)
        else:
            self._supply = SyncRollouts(config, sampler, prompts, coordinator, on_progress, pace)

    @stage("rollouts")
    def next(self, step: int) -> StepRollouts | None:
        """The graded rollouts of the next questions; None where the run was asked to stop meanwhile. No rank waits in a
        collective while they are generated."""
        gathered = Gathered((), {})  # rank 0's; the texts stay there

        def gather() -> bool:
            nonlocal gathered
            try:
                gathered = self._rank0().gather(step)
            except StopRequested:
                return False
            return True

        if not self._control.from_rank0(f"the rollouts of step {step}", gather):
            return None
        groups = share_groups(gathered.groups, self._control)
        return StepRollouts(step, groups, gathered.groups, gathered.metrics, gathered.questions)

    def state(self) -> dict[str, Any]:
        """Rank 0's place in the questions, what is known of them, and what is under way."""
        return self._rank0().state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue on rank 0 where `state()` was taken."""
        self._rank0().load_state(state)

    def _rank0(self) -> SyncRollouts | AsyncRollouts:
        assert self._supply is not None, "only rank 0 takes groups from the engines"
        return self._supply


class ReplayedRollouts:
    """Rollouts recorded by another run, with their rewards; advantages are this run's. Rank 0 reads them."""

    def __init__(self, config: Config, control: Control):
        assert config.rollout.replay is not None, "rollout.replay names no run to replay"
        self._run_dir, self._control = config.rollout.replay, control
        self._advantage, self._overlong = str(config.algorithm.advantage), Overlong.of(config)

    @stage("rollouts")
    def next(self, step: int) -> StepRollouts:
        """The rollouts recorded for this step. Raises RunFailed (a user's error) where there are none."""
        recorded = self._control.on_rank0(f"the recorded rollouts of step {step}", lambda: self._read(step)) or ()
        return StepRollouts(step, share_groups(recorded, self._control), tuple(recorded))

    def _read(self, step: int) -> Sequence[ScoredGroup]:
        from alphamed.rundir.rollout_files import read_rollouts, rollout_path

        groups = read_rollouts(rollout_path(self._run_dir, step))
        return [with_advantages(scored, self._advantage, self._overlong) for scored in groups]

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the step number is all of it."""


# ----------------------------------------------------------------------------------------------------------------- sharing
def share_groups(groups: Sequence[ScoredGroup], control: Control) -> tuple[TokenGroup, ...]:
    """Rank 0's groups, as tensors, on every rank; the other ranks pass none. A group whose rewards do not differ stays in: its
    advantages are 0."""
    tensors = flatten(groups) if groups else None
    return unflatten(control.share_tensors(tensors))


def flatten(groups: Sequence[ScoredGroup]) -> list[Tensor]:
    """Six flat tensors: per group [responses, prompt tokens, oldest version], response lengths, prompt ids, response ids
    (int64); log-probs, advantages (float32)."""
    import torch

    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    sizes = [
        (
            len(scored.group.rollouts),
            len(scored.group.prompt_token_ids),
            min(rollout.policy_version for rollout in scored.group.rollouts),
        )
        for scored in groups
    ]
    return [
        torch.tensor(sizes, dtype=torch.int64),
        torch.tensor([len(rollout.response_token_ids) for rollout in rollouts], dtype=torch.int64),
        torch.tensor([token for scored in groups for token in scored.group.prompt_token_ids], dtype=torch.int64),
        torch.tensor([token for rollout in rollouts for token in rollout.response_token_ids], dtype=torch.int64),
        torch.tensor([value for rollout in rollouts for value in rollout.logprobs], dtype=torch.float32),
        torch.tensor([value for scored in groups for value in scored.advantages], dtype=torch.float32),
    ]


def unflatten(tensors: Sequence[Tensor]) -> tuple[TokenGroup, ...]:
    """The groups that `flatten` was given."""
    sizes, lengths, prompts, responses, logprobs, advantages = tensors
    counts, prompt_lengths, versions = sizes.unbind(1)
    per_group = zip(
        versions.tolist(),
        prompts.split(prompt_lengths.tolist()),
        advantages.split(counts.tolist()),
        counts.tolist(),
        strict=True,
    )
    tokens, values = iter(responses.split(lengths.tolist())), iter(logprobs.split(lengths.tolist()))
    return tuple(
        TokenGroup(
            prompt=prompt,
            responses=tuple(next(tokens) for _ in range(count)),
            rollout_logprobs=tuple(next(values) for _ in range(count)),
            advantages=advantage,
            policy_version=version,
        )
        for version, prompt, advantage, count in per_group
    )
