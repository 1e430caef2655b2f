"""McNemar's exact test and the split of a gain, against binomial sums by hand and the definition of an exact p value."""

from fractions import Fraction
from itertools import product
from math import comb

import pytest

from alphamed.evaluation.items import Asked, Grading, graded
from alphamed.evaluation.paired import compare, compare_sets, mcnemar, right, split_gain
from alphamed.evaluation.results import set_result
from alphamed.records import FinishReason, Question


@pytest.mark.parametrize(
    "gained, lost, p", [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (3, 1, 0.625), (8, 1, 20 / 512), (4, 4, 1.0)]
)
def test_mcnemar_by_hand(gained, lost, p):
    """3 and 1: 2 (C(4,0) + C(4,1)) / 16 = 0.625. 8 and 1: 2 (1 + 9) / 512."""
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p)


@pytest.mark.parametrize("gained, lost", [(12, 3), (100, 61), (7, 7), (700, 655)])
def test_mcnemar_is_the_chance_of_what_is_no_likelier(gained, lost):
    """The definition of an exact two-sided p: all outcomes of n fair coins that are at most as likely as the one seen."""
    n = gained + lost
    seen = comb(n, gained)
    assert mcnemar(gained, lost) == pytest.approx(
        float(Fraction(sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= seen), 2**n)), rel=1e-12
    )


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
def items(i, *texts, key="A", text="?", variant=None):
    question = Question(i, text, {"A": "a", "B": "b", "C": "c"}, key)
    return [graded(Asked("set", variant, question), j, one, FinishReason.STOP, 3, Grading()) for j, one in enumerate(texts)]


def test_flips_and_counts_by_hand():
    A, B, none = "\\boxed{A}", "\\boxed{B}", "none"
    before = {"1": items("1", A), "2": items("2", none), "3": items("3", B), "4": items("4", A), "5": items("5", none)}
    after = {"1": items("1", A), "2": items("2", A), "3": items("3", A), "4": items("4", B), "6": items("6", A)}
    found = compare_sets(before, after)
    assert (found["n"], found["left_out"]) == (4, 2)
    assert (found["both_right"], found["gained"], found["lost"], found["both_wrong"]) == (1, 2, 1, 0)
    assert [(flip["id"], flip["way"]) for flip in found["flipped"]] == [("2", "gained"), ("3", "gained"), ("4", "lost")]
    assert found["p_mcnemar"] == 1.0 and found["gain"] == pytest.approx(0.25)  # 2 of 4 -> 3 of 4
    # boxed 3/4 -> 1, among boxed 2/3 -> 3/4
    assert found["gain_from_boxed"] == pytest.approx(0.25 * (2 / 3 + 3 / 4) / 2)
    assert found["flipped"][0]["before"] == [{"outcome": "unparseable", "letter": None, "option": None}]


def test_another_text_or_key_is_another_question():
    one = {"1": items("1", "\\boxed{A}"), "2": items("2", "\\boxed{A}")}
    other = {"1": items("1", "\\boxed{A}", key="B"), "2": items("2", "\\boxed{A}", text="!")}
    assert compare({"set": one}, {"set": other}) == {} and compare({"set": one, "x": one}, {"set": one})["set"]["n"] == 2
    with pytest.raises(ValueError, match="no question is the same"):
        compare_sets(one, other)


def test_with_samples_the_vote_decides():
    assert right(items("1", "\\boxed{A}", "\\boxed{A}", "\\boxed{B}"))
    assert not right(items("1", "\\boxed{A}", "\\boxed{B}")) and not right(items("1", "none", "none"))


def test_without_options_texts_that_are_no_option_vote_too():
    """One right answer against two that agree on something else, and against two that do not agree."""
    assert not right(items("1", "\\boxed{a}", "\\boxed{Zinc}", "\\boxed{zinc.}", variant="free"))
    assert not right(items("1", "\\boxed{a}", "\\boxed{zinc}", "\\boxed{iron}", variant="free"))  # a tie
    assert right(items("1", "\\boxed{a}", "\\boxed{a}", "\\boxed{iron}", variant="free"))
    found = set_result([items("1", "\\boxed{a}", "\\boxed{Zinc}", "\\boxed{zinc.}", variant="free")])
    assert found["majority"]["accuracy"] == 0.0 and found["accuracy"] == pytest.approx(1 / 3)
