"""What a run believes of each question: its pass rate, and how likely the rewards of a group of answers to it differ.

A pass rate p has a Beta(1/2 + r, 1/2 + w) distribution (Jeffreys' prior and r right, w wrong samples). The rewards that
answers earn have a Dirichlet distribution, which with two of them is the same. The level of a question counts as samples
from before the first step: 1 is 5 of 5 right, 6 is 0 of 5. Every observation fades, by half each `half_life_steps`, because
the policy it was made of is gone; what is left in the end is a question nothing is known of. Pure, without random numbers:
the same results give the same beliefs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from alphamed.config.sections import DynamicSamplingConfig
from alphamed.hashing import stable_hash
from alphamed.records import Question, ScoredGroup
from alphamed.response_stats import ResponseStats
from alphamed.rollout.refill import graded_rewards

JEFFREYS = 0.5
LEVELS = 6
MAX_REWARDS = 8
"""Different rewards of a question that are kept, the commonest ones. With more the chance that all of a group are the same
is next to nothing."""


@dataclass(slots=True)
class Evidence:
    """Samples of a question, as they counted at `step`, and how often it was skipped since it was asked last. `rewards`:
    reward -> samples that earned it, of `graded` in all."""

    right: float = 0.0
    wrong: float = 0.0
    step: int = 0
    passes: int = 0
    rewards: dict[float, float] = field(default_factory=dict)
    graded: float = 0.0


class PassRates:
    """The beliefs of a run whose groups hold `samples` answers. `earns`: what a right and what a wrong answer earns; None
    where the reward does not follow from that, so that levels carry no information about it."""

    def __init__(self, config: DynamicSamplingConfig, samples: int, earns: tuple[float, float] | None = (1.0, 0.0)):
        self._half_life, self._annotation, self._samples = config.half_life_steps, config.annotation_weight, samples
        self._earns, self._max_passes = earns, config.max_passes
        self._evidence: dict[str, Evidence] = {}
        self.of_unknown = signal_chance(0.0, 0.0, samples)
        """Chance that the group of an unknown question has a signal."""

    def chance(self, question: Question, step: int) -> float:
        """Chance that the rewards of a group asked in `step` differ."""
        rewards, graded = self._rewards(question, step)
        return differing_chance(rewards.values(), graded, self._samples)

    def _rewards(self, question: Question, step: int) -> tuple[dict[float, float], float]:
        """Reward -> samples that earned it, and all samples, with the weight that they have in `step`."""
        evidence = self._evidence.get(question.id, Evidence())
        fade = self._fade(step - evidence.step)
        rewards, graded = {reward: fade * count for reward, count in evidence.rewards.items()}, fade * evidence.graded
        if self._earns:
            for reward, count in zip(self._earns, self._annotated(question, step)):
                rewards[reward] = rewards.get(reward, 0.0) + count
                graded += count
        return rewards, graded

    def counts(self, question: Question, step: int) -> tuple[float, float]:
        """Right and wrong samples of the question, with the weight that they have in `step`."""
        right, wrong = self._annotated(question, step)
        if evidence := self._evidence.get(question.id):
            fade = self._fade(step - evidence.step)
            right, wrong = right + fade * evidence.right, wrong + fade * evidence.wrong
        return right, wrong

    def _annotated(self, question: Question, step: int) -> tuple[float, float]:
        """Right and wrong samples that the question's level counts as in `step`."""
        if question.level is None:
            return 0.0, 0.0
        weight, share = self._annotation * self._fade(step), (LEVELS - question.level) / (LEVELS - 1)
        return share * weight, (1 - share) * weight

    def observe(self, groups: Sequence[ScoredGroup], step: int) -> None:
        """Take in groups graded in `step`. An answer is right or it is not; those that could not be graded do not count."""
        for scored in groups:
            evidence = self._evidence.setdefault(scored.group.question.id, Evidence())
            fade = self._fade(step - evidence.step)
            stats = ResponseStats.of_groups([scored])
            right, wrong = stats.correct, stats.responses - stats.correct - stats.failed
            evidence.right, evidence.wrong, evidence.step = (
                fade * evidence.right + right,
                fade * evidence.wrong + wrong,
                step,
            )
            rewards = Counter({reward: fade * count for reward, count in evidence.rewards.items()})
            rewards.update(graded_rewards(scored))
            evidence.rewards, evidence.graded = (
                dict(rewards.most_common(MAX_REWARDS)),
                fade * evidence.graded + right + wrong,
            )

    def is_due(self, question_id: str) -> bool:
        """Whether the question was skipped too often to be skipped again: `max_passes` times, or some less (down to
        half), drawn for each question and each time, so that those skipped together are not all due together."""
        evidence = self._evidence.get(question_id)
        if not evidence:
            return False
        earlier = stable_hash("due", question_id, evidence.step) % (self._max_passes // 2 + 1)
        return evidence.passes >= self._max_passes - earlier

    def note_pass(self, question_id: str) -> None:
        self._evidence.setdefault(question_id, Evidence()).passes += 1

    def note_asked(self, question_id: str) -> None:
        if evidence := self._evidence.get(question_id):
            evidence.passes = 0

    def _fade(self, steps: int) -> float:
        return 0.5 ** (steps / self._half_life)

    def state(self) -> dict[str, Any]:
        """JSON-ready: about 100 bytes for each question that was asked or skipped, some more where rewards are many."""
        return {
            id: [
                evidence.right,
                evidence.wrong,
                evidence.step,
                evidence.passes,
                list(map(list, evidence.rewards.items())),
                evidence.graded,
            ]
            for id, evidence in self._evidence.items()
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._evidence = {
            id: Evidence(*values[:4], *((dict(map(tuple, values[4])), values[5]) if len(values) > 4 else ()))
            for id, values in state.items()
        }


def signal_chance(right: float, wrong: float, samples: int) -> float:
    """Chance that `samples` answers are neither all right nor all wrong: 1 - E[p^G] - E[(1 - p)^G] for
    p ~ Beta(1/2 + right, 1/2 + wrong), whose moments are E[p^G] = prod over i < G of (a + i) / (a + b + i)."""
    return differing_chance((right, wrong), right + wrong, samples)


def differing_chance(counts: Iterable[float], graded: float, samples: int) -> float:
    """Chance that `samples` answers do not all earn the same: 1 - sum over K rewards of E[p^G], where `counts` of the
    `graded` samples earned each of them and p ~ Dirichlet(1/K + counts). There are two rewards at least."""
    different = [*counts]
    different += [0.0] * (2 - len(different))
    prior = 2 * JEFFREYS / len(different)
    return 1.0 - sum(prod((prior + count + i) / (2 * JEFFREYS + graded + i) for i in range(samples)) for count in different)
