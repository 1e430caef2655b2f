"""McNemar's exact test and the split of a gain, against binomial sums by hand and scipy's binomial test."""
from itertools import product

import pytest

from alphamed.config_choices import TruncatedReward
from alphamed.evaluation.items import Asked, graded
from alphamed.evaluation.paired import compare, compare_sets, mcnemar, right, split_gain
from alphamed.records import FinishReason, Question


@pytest.mark.parametrize("gained, lost, p", [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (3, 1, 0.625), (8, 1, 20 / 512),
                                             (4, 4, 1.0)])
def test_mcnemar_by_hand(gained, lost, p):
    """3 and 1: 2 (C(4,0) + C(4,1)) / 16 = 0.625. 8 and 1: 2 (1 + 9) / 512."""
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_is_scipys_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for gained, lost in [(12, 3), (100, 61), (700, 655), (2000, 1800)]:
        assert mcnemar(gained, lost) == pytest.approx(stats.binomtest(gained, gained + lost, 0.5).pvalue, rel=1e-9)


def test_the_split_adds_up_exactly():
    shares = [i / 7 for i in range(8)]
    for boxed, among, boxed2, among2 in product(shares, repeat=4):
        found = split_gain(boxed, boxed * among, boxed2, boxed2 * among2)
        assert found.from_boxed + found.from_accuracy_among_boxed == pytest.approx(found.gain, abs=1e-12)


def test_the_split_by_hand():
    """Boxed 0.5 -> 1, among boxed 0.4 -> 0.6: 0.2 -> 0.6, half a box more at 0.5 in the mean, 0.2 more at 0.75 boxed."""
    found = split_gain(0.5, 0.2, 1.0, 0.6)
    assert (found.gain, found.from_boxed, found.from_accuracy_among_boxed) == pytest.approx((0.4, 0.25, 0.15))


def test_a_model_that_boxed_nothing_gains_by_format_alone():
    assert split_gain(0, 0, 0.8, 0.4).from_boxed == pytest.approx(0.4) and split_gain(0, 0, 0, 0).gain == 0
    assert split_gain(0.8, 0.4, 0, 0).from_boxed == pytest.approx(-0.4)


# ----------------------------------------------------------------------------------------------------------------- sets
def items(i, *texts, key="A", text="?"):
    question = Question(i, text, {"A": "a", "B": "b", "C": "c"}, key)
    return [graded(Asked("set", None, question), j, one, FinishReason.STOP, 3, TruncatedReward.NOTHING)
            for j, one in enumerate(texts)]


def test_flips_and_counts_by_hand():
    A, B, none = "\\boxed{A}", "\\boxed{B}", "none"
    before = {"1": items("1", A), "2": items("2", none), "3": items("3", B), "4": items("4", A), "5": items("5", none)}
    after = {"1": items("1", A), "2": items("2", A), "3": items("3", A), "4": items("4", B), "6": items("6", A)}
    found = compare_sets(before, after)
    assert (found["n"], found["left_out"]) == (4, 2)
    assert (found["both_right"], found["gained"], found["lost"], found["both_wrong"]) == (1, 2, 1, 0)
    assert [(flip["id"], flip["way"]) for flip in found["flipped"]] == [("2", "gained"), ("3", "gained"), ("4", "lost")]
    assert found["p_mcnemar"] == 1.0 and found["gain"] == pytest.approx(0.25)           # 2 of 4 -> 3 of 4
    # boxed 3/4 -> 1, among boxed 2/3 -> 3/4
    assert found["gain_from_boxed"] == pytest.approx(0.25 * (2 / 3 + 3 / 4) / 2)
    assert found["flipped"][0]["before"] == [{"outcome": "unparseable", "letter": None, "option": None}]


def test_another_text_or_key_is_another_question():
    one = {("set", "1"): items("1", "\\boxed{A}"), ("set", "2"): items("2", "\\boxed{A}")}
    other = {("set", "1"): items("1", "\\boxed{A}", key="B"), ("set", "2"): items("2", "\\boxed{A}", text="!")}
    assert compare(one, other) == {} and compare(one, one)["set"]["n"] == 2
    with pytest.raises(ValueError, match="no question is the same"):
        compare_sets({"1": one["set", "1"]}, {"1": other["set", "1"]})


def test_with_samples_the_vote_decides():
    assert right(items("1", "\\boxed{A}", "\\boxed{A}", "\\boxed{B}"))
    assert not right(items("1", "\\boxed{A}", "\\boxed{B}")) and not right(items("1", "none", "none"))
