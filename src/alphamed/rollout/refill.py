"""Which groups of a step are trained on and which are replaced: pure bookkeeping over graded groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from alphamed.records import DropReason, GenerationTask, ScoredGroup, StepQuestions


def graded_rewards(scored: ScoredGroup) -> list[float]:
    """The rewards of the group's responses, without those that could not be graded."""
    return [reward for reward, outcome in zip(scored.rewards, scored.outcomes, strict=True) if not outcome.failed]


def has_reward_variance(scored: ScoredGroup) -> bool:
    """Whether the rewards of the group differ. A group that is all right or all wrong carries no signal about answers, however
    long these are."""
    return len(set(graded_rewards(scored))) > 1


@dataclass(slots=True)
class GroupCounts:
    """What became of the groups of one step."""

    asked: int = 0
    graded: int = 0
    usable: int = 0  # with a signal, or trained on because nothing is replaced
    dropped: int = 0  # they carry no signal
    stale: int = 0  # sampled with weights that are too old when graded or later
    stale_tokens: int = 0  # of the responses of these
    stale_responses: int = 0
    stale_groups: list[ScoredGroup] = field(default_factory=list)
    refill_limit_reached: bool = False  # the step went on with groups that carry no signal
    rewards: float = 0.0  # sum over the graded groups of their mean rewards

    def count(self, scored: ScoredGroup, *, usable: bool = False, stale: bool = False) -> None:
        """Count a group that was graded now."""
        self.graded += 1
        self.rewards += sum(scored.rewards) / len(scored.rewards)
        if stale:
            self.drop_stale(scored)
        self.usable += usable and not stale
        self.dropped += not (usable or stale)

    def drop_stale(self, scored: ScoredGroup) -> None:
        """Count a group that is too old to be trained on."""
        self.stale += 1
        self.stale_groups.append(scored)
        self.stale_tokens += sum(len(rollout.response_token_ids) for rollout in scored.group.rollouts)
        self.stale_responses += len(scored.group.rollouts)

    def stale_metrics(self, trained: Sequence[ScoredGroup]) -> dict[str, float]:
        """What was dropped as too old, relative to the groups that the step trains on."""
        tokens = sum(len(rollout.response_token_ids) for scored in trained for rollout in scored.group.rollouts)
        metrics = {
            "staleness/dropped": float(self.stale),
            "staleness/dropped_share": self.stale / (self.stale + len(trained)),
            "staleness/dropped_tokens_share": self.stale_tokens / max(1, self.stale_tokens + tokens),
        }
        if self.stale:
            metrics["staleness/dropped_tokens_mean"] = self.stale_tokens / self.stale_responses
        return metrics

    def metrics(self, skipped: int) -> dict[str, float]:
        metrics: dict[str, float] = {
            "sampling/asked": self.asked,
            "sampling/kept": self.usable,
            "sampling/dropped": self.dropped,
            "sampling/refill_limit_reached": float(self.refill_limit_reached),
            "sampling/skipped": skipped,
        }
        if self.graded:
            metrics["sampling/reward_mean"] = self.rewards / self.graded
        if self.usable:
            metrics["sampling/groups_per_kept"] = self.graded / self.usable
        return metrics


def step_questions(
    tasks: Sequence[GenerationTask],
    trained: Sequence[ScoredGroup],
    replaced: Sequence[ScoredGroup],
    stale: Sequence[ScoredGroup],
    skipped: Mapping[DropReason, tuple[tuple[int, str], ...]],
) -> StepQuestions:
    """What a step did with its questions: `tasks` were asked in it, `replaced` groups carried no signal."""
    dropped: dict[DropReason, tuple[str, ...]] = {}
    for scored in replaced:
        reason = DropReason.NO_SIGNAL if graded_rewards(scored) else DropReason.FAILED
        dropped[reason] = (*dropped.get(reason, ()), scored.group.group_id)
    if stale:
        dropped[DropReason.TOO_STALE] = tuple(scored.group.group_id for scored in stale)
    return StepQuestions(
        {task.group_id: task.question.epoch or 0 for task in tasks},
        tuple(scored.group.group_id for scored in trained),
        dropped,
        skipped,
    )


def must_wait(step: int, limit: int, wanted: int, share: float, ready: Sequence[int], unfinished: Sequence[int]) -> bool:
    """Whether a step that took its `wanted` groups now would leave unfinished ones that no later step can take in time.

    A group is known by the step it was asked in, and must be trained on at most `limit` steps later. `ready`: of those that
    can be taken, oldest first; `unfinished`: of those still awaited, of which `share` are expected to have a signal. For each age, the
    groups at least that old must have room in the steps that may still take them.
    """
    left = ready[wanted:]
    for step_asked in range(step - limit, step):
        awaited = sum(asked <= step_asked for asked in unfinished)
        room = wanted * (step_asked + limit - step)
        if awaited and sum(asked <= step_asked for asked in left) + share * awaited > room:
            return True
    return False


class BatchSlots:
    """The places of a step. Each holds the group that was put there last; those without one that has a signal are open, and are
    filled again for at most `refills` rounds. So groups that carry no signal and stay at the end are spread over the step."""

    def __init__(self, wanted: int, refills: int):
        self._groups: list[ScoredGroup | None] = [None] * wanted
        self._refills, self._rounds = refills, 0
        self.counts = GroupCounts()

    def rounds(self) -> Iterator[int]:
        """How many groups to ask for in each round; `fill` must have taken those of one before the next."""
        while self._open() and self._rounds <= self._refills:
            self.counts.asked += len(self._open())
            yield len(self._open())
        self.counts.refill_limit_reached = bool(self._open())

    def fill(self, groups: Sequence[ScoredGroup]) -> None:
        """Put the groups of a round into the open places, in order."""
        self._rounds += 1
        for place, scored in zip(self._open(), groups, strict=True):
            self._groups[place] = scored
            self.counts.count(scored, usable=not self._refills or has_reward_variance(scored))

    def _open(self) -> list[int]:
        return [
            place
            for place, scored in enumerate(self._groups)
            if scored is None or (self._refills and not has_reward_variance(scored))
        ]

    @property
    def groups(self) -> tuple[ScoredGroup, ...]:
        groups = tuple(scored for scored in self._groups if scored is not None)
        assert len(groups) == len(self._groups), "a round is still to come"
        return groups
