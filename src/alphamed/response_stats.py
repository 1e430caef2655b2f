"""Counts over graded responses (right, boxed, truncated, ...) and their lengths: what metrics, scores and reports are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from alphamed.records import Outcome, ScoredGroup


@dataclass(frozen=True, slots=True)
class ResponseStats:
    """How many responses there are and how many of them were what. Two of these add up."""

    responses: int = 0
    correct: int = 0
    boxed: int = 0  # ended in time with a readable answer, right or wrong
    unparseable: int = 0  # ended in time without one
    truncated: int = 0  # cut by the token limit, whatever their outcome: `reward.truncated: grade` grades them
    failed: int = 0  # the grader crashed or ran out of time
    tokens: int = 0  # of all responses together
    tokens_max: int = 0

    @classmethod
    def of(cls, responses: Iterable[tuple[Outcome, int, bool]]) -> ResponseStats:
        """Count responses: the outcome of each, its length in tokens, and whether the token limit cut it."""
        columns = tuple(zip(*responses)) or ((), (), ())
        outcomes, tokens, truncated = columns
        return cls(
            responses=len(outcomes),
            correct=outcomes.count(Outcome.CORRECT),
            boxed=sum(outcome.boxed for outcome in outcomes),
            unparseable=outcomes.count(Outcome.UNPARSEABLE),
            truncated=sum(truncated),
            failed=sum(outcome.failed for outcome in outcomes),
            tokens=sum(tokens),
            tokens_max=max(tokens, default=0),
        )

    @classmethod
    def of_groups(cls, groups: Iterable[ScoredGroup]) -> ResponseStats:
        """Count all responses of graded groups."""
        return cls.of(
            (outcome, len(rollout.response_token_ids), rollout.finish_reason.truncated)
            for scored in groups
            for rollout, outcome in zip(scored.group.rollouts, scored.outcomes, strict=True)
        )

    def __add__(self, other: ResponseStats) -> ResponseStats:
        return ResponseStats(
            self.responses + other.responses,
            self.correct + other.correct,
            self.boxed + other.boxed,
            self.unparseable + other.unparseable,
            self.truncated + other.truncated,
            self.failed + other.failed,
            self.tokens + other.tokens,
            max(self.tokens_max, other.tokens_max),
        )

    def share(self, count: int) -> float:
        """A count as a share of all responses, of which there must be some."""
        return count / self.responses

    @property
    def accuracy(self) -> float:
        return self.share(self.correct)

    @property
    def accuracy_among_boxed(self) -> float | None:
        """None where nothing is boxed."""
        return self.correct / self.boxed if self.boxed else None

    @property
    def tokens_mean(self) -> float:
        return self.tokens / self.responses
