"""Majority vote, pass@k and bootstrap intervals against hand counts and closed forms."""

import itertools
import math

import pytest

from alphamed.evaluation.sampling import bootstrap_mean, bootstrap_mean_of_means, pass_at_k, shown_ks, vote


@pytest.mark.parametrize("right, samples, k", [(0, 5, 2), (1, 5, 2), (3, 5, 3), (5, 5, 1), (2, 7, 4), (6, 7, 2)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(right, samples, k):
    """Its definition, by going through every subset."""
    subsets = list(itertools.combinations([1] * right + [0] * (samples - right), k))
    assert pass_at_k([right], samples, k) == pytest.approx(sum(any(one) for one in subsets) / len(subsets))


def test_pass_at_k_is_unbiased():
    """Its mean over 6 draws of a coin with p = 0.3 is 1 - 0.7^k exactly."""
    for k in (1, 2, 4, 6):
        mean = sum(math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) * pass_at_k([c], 6, k) for c in range(7))
        assert mean == pytest.approx(1 - 0.7**k)


def test_pass_at_k_is_the_mean_over_questions():
    assert pass_at_k([0, 2, 4], 4, 2) == pytest.approx((0 + 5 / 6 + 1) / 3)  # 2 of 4: 1 - C(2,2)/C(4,2)


@pytest.mark.parametrize("k", [0, 6])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k}: needs 1 to 5"):
        pass_at_k([1], 5, k)


def test_the_k_that_are_shown():
    assert [shown_ks(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    "letters, share",
    [("AAB", 1), ("ABB", 0), ("AB", 0.5), ("ABC", 1 / 3), ("BBCC", 0), ([None, None, "A"], 1), ([None, None], 0), ([], 0)],
)
def test_votes(letters, share):
    assert vote(list(letters), "A") == pytest.approx(share)


def test_bootstrap_of_many_values_nears_the_normal_interval():
    """400 of 1,000: 0.4 -+ 1.96 sqrt(0.24 / 1000) = 0.4 -+ 0.0304."""
    low, high = bootstrap_mean([1.0] * 400 + [0.0] * 600)
    assert (low, high) == pytest.approx((0.4 - 0.0304, 0.4 + 0.0304), abs=0.003)


def test_bootstrap_of_means_shrinks_with_the_groups():
    """The mean of four such benchmarks has half the spread, for every group is drawn by itself."""
    low, high = bootstrap_mean_of_means([[1.0] * 400 + [0.0] * 600] * 4)
    assert high - low == pytest.approx(0.0304, abs=0.003)


def test_one_value_has_no_spread_and_none_is_refused():
    assert bootstrap_mean([0.25]) == (0.25, 0.25)
    with pytest.raises(ValueError, match="at least one value in every group"):
        bootstrap_mean_of_means([[0.5], []])


def test_intervals_depend_on_the_seed_alone():
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
