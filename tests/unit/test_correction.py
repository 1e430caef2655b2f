"""Truncated and masked importance sampling against numbers worked out by hand."""

import math

import pytest
import torch

from alphamed.algorithms.correction import importance_weights

HALF, QUARTER, TENTH = math.log(0.5), math.log(0.25), math.log(0.1)
OLD = torch.tensor([HALF, HALF, QUARTER, HALF])
ROLLOUT = torch.tensor([HALF, QUARTER, HALF, TENTH])
# 0.5/0.5 = 1;  0.5/0.25 = 2;  0.25/0.5 = 0.5;  0.5/0.1 = 5


def weights(kind, floor, cap, old=OLD, rollout=ROLLOUT, sequence=None):
    """As lists: the weights and which of them were changed."""
    sequence = torch.zeros(len(old), dtype=torch.int64) if sequence is None else torch.tensor(sequence)
    found, changed = importance_weights(old, rollout, sequence, kind, floor, cap)
    return pytest.approx(found.tolist(), nan_ok=True), changed.tolist()


def test_truncated_by_hand():
    assert weights("tis", 0.5, 3.0) == ([1.0, 2.0, 0.5, 3.0], [False, False, False, True])
    assert weights("tis", 0.5, 1.5) == ([1.0, 1.5, 0.5, 1.5], [False, True, False, True])
    assert weights("tis", 0.9, 0.5)[0] == [0.5, 0.5, 0.5, 0.5]  # the floor is none of its


def test_tokens_outside_the_bounds_are_masked():
    assert weights("mis", 0.4, 3.0) == ([1.0, 2.0, 0.5, 0.0], [False, False, False, True])
    assert weights("mis", 0.6, 6.0) == ([1.0, 2.0, 0.0, 5.0], [False, False, True, False])
    assert weights("mis", 0.0, 1.5) == ([1.0, 0.0, 0.5, 0.0], [False, True, False, True])


def test_responses_outside_the_bounds_are_masked_as_a_whole():
    # tokens 0, 2: 1 * 0.5 = 0.5; tokens 1, 3: 2 * 5 = 10
    assert weights("mis_sequence", 0.4, 3.0, sequence=[0, 1, 0, 1]) == ([0.5, 0.0, 0.5, 0.0], [False, True, False, True])
    assert weights("mis_sequence", 0.6, 11.0, sequence=[0, 1, 0, 1]) == ([0.0, 10.0, 0.0, 10.0], [True, False, True, False])
    # tokens 0..2: 1 * 2 * 0.5 = 1, although token 1 alone is beyond the cap
    assert weights("mis_sequence", 0.6, 1.5, sequence=[0, 0, 0, 1]) == ([1.0, 1.0, 1.0, 0.0], [False, False, False, True])


@pytest.mark.parametrize("kind", ["tis", "mis", "mis_sequence"])
def test_positions_outside_the_responses_have_no_part(kind):
    """Were token 3 (ratio 5) counted, the response's product would be 5."""
    found, changed = weights(kind, 0.4, 3.0, sequence=[0, -1, -1, -1])
    assert (found, changed) == ([1.0, 0.0, 0.0, 0.0], [False] * 4)


def test_has_no_gradient():
    old, rollout = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    assert not importance_weights(old, rollout, torch.zeros(2, dtype=torch.int64), "mis_sequence", 0.5, 2.0)[0].requires_grad


def test_large_differences_stay_finite():
    old = torch.tensor([0.0, -1e4, 0.0, -math.inf])
    rollout = torch.tensor([-1e4, 0.0, -math.inf, 0.0])
    assert weights("tis", 0.5, 2.0, old, rollout)[0] == [2.0, 0.0, 2.0, 0.0]
    assert weights("mis", 0.5, 2.0, old, rollout) == ([0.0] * 4, [True] * 4)


@pytest.mark.parametrize("kind", ["tis", "mis", "mis_sequence"])
def test_nan_shows(kind):
    assert weights(kind, 0.5, 2.0, torch.tensor([math.nan]), torch.zeros(1))[0] == [math.nan]


@pytest.mark.parametrize(
    "kind, floor, cap, message",
    [
        ("tis", 0.5, 0.0, "is not positive"),
        ("tis", 0.5, -1.0, "is not positive"),
        ("tis", 0.5, math.nan, "is not positive"),
        ("mis", 2.0, 2.0, "is not between 0 and the cap"),
        ("mis", -0.1, 2.0, "is not between 0 and the cap"),
        ("gis", 0.5, 2.0, "choose one of tis, mis, mis_sequence"),
    ],
)
def test_refused(kind, floor, cap, message):
    with pytest.raises(ValueError, match=message):
        weights(kind, floor, cap)
