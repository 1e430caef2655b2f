"""Counts over graded responses, by hand."""

from alphamed.records import FinishReason, Outcome, Question, Rollout, RolloutGroup, ScoredGroup
from alphamed.response_stats import ResponseStats

C, W, U, T = Outcome.CORRECT, Outcome.WRONG, Outcome.UNPARSEABLE, Outcome.TRUNCATED


def test_every_outcome_is_counted_under_its_name():
    outcomes = [C, C, W, U, T, Outcome.CRASH, Outcome.TIMEOUT]
    stats = ResponseStats.of((outcome, n, outcome == T) for n, outcome in enumerate(outcomes, start=1))
    assert stats == ResponseStats(
        responses=7, correct=2, boxed=3, unparseable=1, truncated=1, failed=2, tokens=28, tokens_max=7
    )
    assert (stats.accuracy, stats.accuracy_among_boxed, stats.tokens_mean) == (2 / 7, 2 / 3, 4.0)
    assert stats.share(stats.boxed) == 3 / 7


def test_a_response_that_was_cut_and_graded_is_both():
    """`reward.truncated: grade`; an abort counts as cut as well."""
    question = Question("q", "?", {"A": "a", "B": "b"}, "A")
    ends = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT)
    rollouts = tuple(Rollout("g", "q", j, (1,) * (j + 1), (0.0,) * (j + 1), "", end, 1) for j, end in enumerate(ends))
    scored = ScoredGroup(RolloutGroup("g", question, (5,), rollouts), (W, C, T), (0.0,) * 3, (0.0,) * 3, (None,) * 3)
    assert ResponseStats.of_groups([scored, scored]) == ResponseStats(
        responses=6, correct=2, boxed=4, truncated=4, tokens=12, tokens_max=3
    )


def test_counts_add_up():
    first, second = ResponseStats.of([(C, 3, False), (U, 9, False)]), ResponseStats.of([(T, 4, True)])
    assert first + second == ResponseStats.of([(C, 3, False), (U, 9, False), (T, 4, True)])
    assert ResponseStats() + first == first and ResponseStats.of([]) == ResponseStats()
    assert second.accuracy_among_boxed is None
