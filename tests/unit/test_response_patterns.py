"""Patterns of single responses: what counts as a box, as reasoning after the answer, as repetition."""

import pytest

from alphamed.answers.extraction import closed_boxes
from alphamed.lab.reports.response_patterns import ResponsePattern, outermost, repetition, response_patterns
from alphamed.records import Outcome

B, A, S, R = ResponsePattern.BARE, ResponsePattern.AFTERWARDS, ResponsePattern.SEVERAL, ResponsePattern.REPEATS
TEN = "one two three four five six seven eight nine ten"


@pytest.mark.parametrize(
    "text, contents",
    [
        ("so \\boxed{A}", ["A"]),
        ("\\boxed{A} or \\boxed {B}", ["A", "B"]),
        ("\\boxed{\\text{C}}", ["\\text{C}"]),
        ("{a} } { \\boxed{D}", ["D"]),
        ("\\boxed{\\boxed{A}}", ["A", "\\boxed{A}"]),
        ("\\boxed{A", []),
        ("boxed{A} {}", []),
        ("\\\\boxed{E}", ["E"]),
        ("\\{ \\boxed{a\\}b}", ["a\\}b"]),
    ],
)
def test_closed_boxes_in_the_order_of_their_ends(text, contents):
    assert [text[start:end] for start, end in closed_boxes(text)] == contents


def test_a_box_in_a_box_is_one():
    boxes = closed_boxes("\\boxed{\\boxed{A}} \\boxed{B}")
    assert len(boxes) == 3 and len(outermost(boxes)) == 2


@pytest.mark.parametrize(
    "text, outcome, patterns",
    [
        ("The answer is \\boxed{A}", Outcome.CORRECT, {B}),  # 3 words before the box
        ("The answer is \\boxed{A}", Outcome.TRUNCATED, set()),  # not a boxed answer
        (f"{TEN} \\boxed{{A}}", Outcome.WRONG, set()),
        (f"It is \\boxed{{A}} {TEN}", Outcome.CORRECT, {B, A}),  # 10 words after, 2 before
        ("It is \\boxed{A} as was said before", Outcome.CORRECT, {B}),  # 4 words after are no reasoning
        (f"{TEN} and so \\boxed{{A}} {TEN}", Outcome.CORRECT, set()),  # 12 before, 10 after
        (f"{TEN} \\boxed{{A}} or \\boxed{{B}}", Outcome.WRONG, {S}),
        ("no box " + "and so on " * 20, Outcome.UNPARSEABLE, {R}),
        ("", Outcome.UNPARSEABLE, set()),
    ],
)
def test_patterns_are_found_in_the_text(text, outcome, patterns):
    assert response_patterns(text, outcome) == patterns


def test_repetition_counts_four_grams_that_occurred_before():
    # 20 words of period 4: 17 4-grams, 4 of them different
    assert repetition("a b c d " * 5) == pytest.approx(13 / 17)
    assert repetition(" ".join(map(str, range(50)))) == 0.0
    assert repetition("x " * 14) == 0.0  # 11 4-grams: too short to tell
    assert repetition("x " * 15) == pytest.approx(11 / 12)


def test_only_the_end_of_a_long_text_is_searched():
    fresh = " ".join(f"w{i}" for i in range(300))
    assert repetition("again " * 5000 + fresh) == 0.0
    assert repetition(fresh + " again" * 400) == pytest.approx(296 / 297)
