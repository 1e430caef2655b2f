"""How responses choose: which option a text names, agreement, entropies and pairs worked out by hand."""

import math

import pytest

from alphamed.evaluation.choices import Response, choices, line, named_option

VITAMINS = {"A": "vitamin B1", "B": "vitamin B12", "C": "iron", "D": "iron and zinc"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" vitamin B12 (B) \\boxed{B}", "B"),
        (" Vitamin  b1 (A) \\boxed{B}", "A"),  # case and white space do not count, nor what the box says
        (" iron and zinc (D) \\boxed{D}", "D"),  # "iron" is inside
        ("It is iron and zinc, no: iron. \\boxed{C}", "C"),  # the last mention
        ("Not iron; vitamin B12. \\boxed{B} or iron", "B"),  # behind the box is not before it
        ("\\boxed{A} iron \\boxed{B}", "C"),  # the last box counts
        ("environment \\boxed{C}", None),  # inside a word
        ("(C) \\boxed{C}", None),
        ("iron", "C"),  # no box: all of it
        ("iron \\boxed{", "C"),
        ("", None),
    ],
)
def test_the_option_that_a_text_names(text, letter):
    assert named_option(text, VITAMINS) == letter


def test_signs_and_scripts_do_not_hide_a_mention():
    assert named_option("缺乏维生素乙所致 \\boxed{B}", {"A": "维生素甲", "B": "维生素乙"}) == "B"
    assert named_option("so β-blocker – again \\boxed{A}", {"A": "β‑blocker", "B": "x"}) == "A"
    assert named_option("raised (2+) \\boxed{A}", {"A": "(2+)", "B": "+"}) == "A"


OPTIONS = {"A": "iron", "B": "zinc"}


def response(question, letter, text="", key="A", options=OPTIONS):
    return Response(question, options, key, text, letter)


def test_statistics_of_five_responses_by_hand():
    found = choices(
        [
            response("q", "A", " iron (A) \\boxed{A}"),
            response("q", "A", " zinc (B) \\boxed{A}"),
            response("q", "B", " zinc (B) \\boxed{B}"),
            response("r", "B", "\\boxed{B}", key="B", options={"A": "zinc", "B": "liver"}),
            response("r", None, "iron"),
        ]
    )
    assert (found.boxed.count, found.boxed.total) == (4, 5)
    assert (found.agree.count, found.agree.total) == (2, 3)  # the fourth names none
    assert (found.right.count, found.right.total) == (3, 5) and found.chance == 0.5
    assert found.letters == {"A": (0.5, 0.5), "B": (0.5, 0.5)}
    assert (found.letter_entropy.bits, found.letter_entropy.even_bits) == (pytest.approx(1.0), pytest.approx(1.0))
    # texts: iron 2, zinc 1, liver 1 of 4; even choice: iron 3/2, zinc 3/2 + 1/2, liver 1/2
    observed = 1.5 + 2 / (2 * 4) / math.log(2)
    assert found.text_entropy.bits == pytest.approx(min(observed, math.log2(3)))
    expected = -(0.375 * math.log2(0.375) + 0.5 * math.log2(0.5) + 0.125 * math.log2(0.125))
    assert found.text_entropy.even_bits == pytest.approx(expected)
    assert found.same == 1 / 3 and found.same_chance == 0.5  # of the three pairs of q one is the same


def test_one_letter_for_all_is_no_entropy():
    found = choices([response(f"q{i}", "C", options=VITAMINS, key="ABCD"[i % 4]) for i in range(40)])
    assert found.letter_entropy.bits == 0 and found.letter_entropy.even_bits == pytest.approx(2.0)
    assert found.letters["C"] == (1.0, 0.25) and found.letters["A"] == (0.0, 0.25)
    assert found.same is None and found.right.value == 0.25


def test_few_cases_are_corrected_for():
    """8 choices of 4 letters as 3, 2, 2, 1: 1.906 bits as they are, Miller adds 3 / 16 nats = 0.271, and 2 is the most."""
    letters = "AAABBCCD"
    found = choices([response(f"q{i}", letter, options=VITAMINS) for i, letter in enumerate(letters)])
    assert found.letter_entropy.bits == pytest.approx(2.0)
    # 80 choices as 60, 20: 0.8113 bits + 1 / 160 nats
    found = choices([response(f"q{i}", "AAAB"[i % 4]) for i in range(80)])
    assert found.letter_entropy.bits == pytest.approx(0.811278 + 1 / 160 / math.log(2))


def test_nothing_to_choose_from_has_no_statistics():
    assert choices([]) is None and choices([response("q", "A", options={})]) is None


def test_the_line_for_the_terminal():
    found = choices([response("q", "A", "iron \\boxed{A}"), response("q", "B", "iron \\boxed{B}")]).plain()
    assert line(found) == (
        "text and letter agree in 50.0% of 2 boxed answers that name an option; letters A 50.0%, B 50.0%, entropy 1.00 of "
        "1.00 bits (option texts 1.00 of 1.00); two answers to a question choose the same option in 0.0% of pairs (even choice: "
        "50.0%)"
    )
    assert line(choices([response("q", None)]).plain()) == "no boxed answer names an option in words"
