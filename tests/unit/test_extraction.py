"""Extraction: a table of hand-written responses, and linear work on hostile ones."""

import re
import sys
import time
from pathlib import Path

import pytest

from alphamed.answers import extraction, folding
from alphamed.answers.extraction import extract_answer
from alphamed.answers.folding import fold, fold_characters

VITAMINS = {
    "A": "Vitamin A",
    "B": "Vitamin B12",
    "C": "Vitamin C (ascorbic acid)",
    "D": "Iron (II)",
    "E": "$\\beta$-carotene",
}
NUMBERS = {"A": "5 mmol/L", "B": "-5 mmol/L", "C": ".5 mg", "D": "virus", "E": "A virus"}
GROUPS = {"A": "AB", "B": "A", "C": "B", "D": "O"}
LABELLED = {"A": "A. Spleen", "B": "B. Liver", "C": "C. Thymus"}
GERMS = {"A": "C. difficile", "B": "B. cereus", "C": "A. fumigatus"}
TEN = {letter: f"finding {i}" for i, letter in enumerate("ABCDEFGHIJ")}

# (response, the letter it states for VITAMINS)
CASES = [
    # --- the plain box
    (r"\boxed{A}", "A"),
    (r"The answer is \boxed{C}.", "C"),
    ("Because of that, \\boxed{E}\nI hope this helps.", "E"),
    (r"no box at all: C", None),
    ("", None),
    (r"The answer is (C).", None),
    # --- what is a box
    (r"\boxed {C}", "C"),
    ("\\boxed \t\n {C}", "C"),
    (r"\boxed C", None),
    (r"\fbox{C}", None),
    (r"boxed{C}", None),
    (r"\boxedtext{C}", None),
    (r"\Boxed{C}", None),
    (r"\boxed(C)", None),
    (r"\boxed\{C\}", None),  # escaped braces are characters
    (r"\\boxed{C}", "C"),  # the model escaped its own backslash
    (r"\\\boxed{C}", "C"),  # a line break, then a box
    (r"\\boxed{\\text{C}}", "C"),
    (r"$\boxed{C}$", "C"),
    (r"{\boxed{C}}", "C"),
    (r"{ {\boxed{C}", "C"),  # braces that never close hold no box back
    (r"}} \boxed{C}", "C"),
    # --- the last closed box decides
    (r"\boxed{A} or \boxed{B}", "B"),
    (r"\boxed{A}\boxed{B}\boxed{A}", "A"),
    (r"\boxed{A}, so \boxed{B", "A"),  # never closes: no box
    (r"\boxed{A}, so \boxed{B \text{or} C", "A"),
    (r"\boxed{A}, so \boxed", "A"),
    (r"\boxed{A}, so \boxed{", "A"),
    (r"\boxed{A", None),
    (r"\boxed{A} and put it in \boxed{}", None),  # the last one is empty
    (r"\boxed{A} so \boxed{Vitamin A}", None),  # the last one states no letter
    (r"\boxed{Vitamin A} so \boxed{A}", "A"),
    (r"\boxed{B then \boxed{A}", "A"),  # the outer never closes, the inner does
    # --- nested boxes are read from the inside
    (r"\boxed{\boxed{A}}", "A"),
    (r"\boxed{\boxed{\boxed{\text{A}}}}", "A"),
    (r"\boxed{B \boxed{A}}", "A"),
    (r"\boxed{\boxed{A} B}", "A"),
    (r"\boxed{\boxed{A}\boxed{B}}", "B"),
    (r"\boxed{A \boxed{}}", None),
    # --- wrappers
    (r"\boxed{$A$}", "A"),
    (r"\boxed{$$A$$}", "A"),
    (r"\boxed{\text{A}}", "A"),
    (r"\boxed{\textbf{A}}", "A"),
    (r"\boxed{\mathbf{A}}", "A"),
    (r"\boxed{\mathrm{A}}", "A"),
    (r"\boxed{\text {A}}", "A"),
    (r"\boxed{\mathbf{\text{A}}}", "A"),
    (r"\boxed{$\mathrm{\textbf{(A)}}$.}", "A"),
    (r"\boxed{\text{$A$}}", "A"),
    (r"\boxed{\text{ A }}", "A"),
    (r"\boxed{\textit{A}}", None),
    (r"\boxed{\text A}", None),
    (r"\boxed{**A**}", None),
    (r"\boxed{$A}", None),
    # --- brackets and trailing punctuation
    (r"\boxed{(A)}", "A"),
    (r"\boxed{[A]}", "A"),
    (r"\boxed{{A}}", "A"),
    (r"\boxed{\{A\}}", "A"),
    (r"\boxed{\(A\)}", "A"),
    (r"\boxed{[({A})]}", "A"),
    (r"\boxed{\text{(A)}}", "A"),
    (r"\boxed{(\text{A})}", "A"),
    (r"\boxed{A.}", "A"),
    (r"\boxed{A)}", "A"),
    (r"\boxed{A:}", "A"),
    (r"\boxed{A).}", "A"),
    (r"\boxed{(A).}", "A"),
    (r"\boxed{(A.)}", "A"),
    (r"\boxed{\text{A}.}", "A"),
    (r"\boxed{ A }", "A"),
    ("\\boxed{\nA\n}", "A"),
    (r"\boxed{(A}", None),
    (r"\boxed{(A]}", None),
    (r"\boxed{.A}", None),
    (r"\boxed{A,}", None),
    (r"\boxed{A;}", None),
    (r"\boxed{A!}", None),
    (r"\boxed{'A'}", None),
    # --- full-width and lower-case
    (r"\boxed{a}", "A"),
    (r"\boxed{(c)}", "C"),
    ("\\boxed{\uff21}", "A"),  # fullwidth A
    ("\\boxed{\uff43}", "C"),  # fullwidth c
    ("\\boxed{\uff08\uff21\uff09}", "A"),  # fullwidth parentheses
    ("\\boxed{\uff21\uff0e}", "A"),  # fullwidth full stop
    ("\\boxed{\uff21\uff1aVitamin A}", "A"),  # fullwidth colon
    ("\\boxed{\u3000A\u3000}", "A"),  # ideographic spaces
    ("\\boxed{\u0410}", None),  # Cyrillic A
    ("\\boxed{\u24b6}", None),  # circled A
    # --- the letter, a separator, the option's own text
    (r"\boxed{A: Vitamin A}", "A"),
    (r"\boxed{A. Vitamin A}", "A"),
    (r"\boxed{A) Vitamin A}", "A"),
    (r"\boxed{(A) Vitamin A}", "A"),
    (r"\boxed{A - Vitamin A}", "A"),
    ("\\boxed{A \u2013 Vitamin A}", "A"),
    (r"\boxed{A, Vitamin A}", "A"),
    (r"\boxed{A Vitamin A}", "A"),
    (r"\boxed{A (Vitamin A)}", "A"),
    (r"\boxed{A.) Vitamin A.}", "A"),
    (r"\boxed{a: vitamin   a}", "A"),
    ("\\boxed{A:\nVitamin\nA}", "A"),
    (r"\boxed{\text{A: Vitamin A}}", "A"),
    (r"\boxed{\textbf{A}: \text{Vitamin A}}", "A"),
    (r"\boxed{$A$: Vitamin A}", "A"),
    (r"\boxed{C: Vitamin C (ascorbic acid)}", "C"),
    (r"\boxed{(C) Vitamin C (ascorbic acid).}", "C"),
    (r"\boxed{D. Iron (II)}", "D"),
    (r"\boxed{$E$: $\beta$-carotene}", "E"),
    (r"\boxed{AVitamin A}", None),  # no separator
    (r"\boxed{A:::: Vitamin A}", None),  # more than a separator
    (r"\boxed{A: Vitamin}", None),
    (r"\boxed{A: Vitamin A and B12}", None),
    (r"\boxed{A: Vitamin B12}", None),  # beside another option's text
    (r"\boxed{(B) Vitamin A}", None),
    (r"\boxed{Vitamin A (A)}", None),  # the letter comes first
    # --- what states no letter
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed{()}", None),
    (r"\boxed{$}", None),
    (r"\boxed{$$}", None),
    (r"\boxed{.}", None),
    (r"\boxed{\text{}}", None),
    (r"\boxed{A, B}", None),
    (r"\boxed{A B}", None),
    (r"\boxed{AB}", None),
    (r"\boxed{AA}", None),
    (r"\boxed{A or B}", None),
    (r"\boxed{A and B}", None),
    (r"\boxed{{A}{B}}", None),
    (r"\boxed{(A)(B)}", None),
    (r"\boxed{\text{A}\text{B}}", None),
    (r"\boxed{$A$B$}", None),
    (r"\boxed{F}", None),  # not among the options
    (r"\boxed{1}", None),
    (r"\boxed{F: Vitamin A}", None),
    (r"\boxed{Vitamin A}", None),  # option text alone
    (r"\boxed{\text{Vitamin B12}}", None),
    (r"\boxed{Answer: A}", None),
    (r"\boxed{Option A}", None),
    (r"\boxed{The answer is A}", None),
]

# (response, options, letter): what depends on the options
OTHER_OPTIONS = [
    (r"\boxed{I}", TEN, "I"),
    (r"\boxed{J. finding 9}", TEN, "J"),
    (r"\boxed{K}", TEN, None),
    (r"\boxed{A: 5 mmol/L}", NUMBERS, "A"),
    (r"\boxed{B: -5 mmol/L}", NUMBERS, "B"),  # the first reading that is an option's text decides
    (r"\boxed{B - -5 mmol/L}", NUMBERS, "B"),
    (r"\boxed{A: -5 mmol/L}", NUMBERS, None),
    (r"\boxed{A -5 mmol/L}", NUMBERS, None),
    (r"\boxed{A - 5 mmol/L}", NUMBERS, "A"),
    (r"\boxed{C: .5 mg}", NUMBERS, "C"),
    (r"\boxed{D: virus}", NUMBERS, "D"),
    (r"\boxed{a virus}", NUMBERS, None),  # the text of E alone, not letter A and the text of D
    (r"\boxed{E: a virus}", NUMBERS, "E"),
    (r"\boxed{A}", GROUPS, "A"),  # a letter is a letter, even where it is another option's text
    (r"\boxed{B: A}", GROUPS, "B"),
    (r"\boxed{A, B}", GROUPS, None),
    (r"\boxed{AB}", GROUPS, None),
    (r"\boxed{O}", GROUPS, None),
    ("\\boxed{\u017f}", {"S": "sodium", "K": "potassium"}, None),  # long s and the Kelvin sign have S and K as cases
    ("\\boxed{\u212a}", {"S": "sodium", "K": "potassium"}, None),
    (r"\boxed{A: x}", {"A": "x.", "B": "y"}, "A"),  # trailing punctuation of an option's text does not count
    (r"\boxed{A}", {}, None),
    ("\\boxed{B\u3002}", {"A": "\u9ad8\u76d0", "B": "\u4f4e\u76d0"}, "B"),
    ("\\boxed{B\u3001\u4f4e\u76d0\u3002}", {"A": "\u9ad8\u76d0", "B": "\u4f4e\u76d0"}, "B"),
    ("\\boxed{B\u3001\u9ad8\u76d0}", {"A": "\u9ad8\u76d0", "B": "\u4f4e\u76d0"}, None),
    ("\\boxed{A\u3001B}", {"A": "x", "B": "y"}, None),
    (r"\boxed{B. Liver}", {"A": "Spleen", "B": "Liver"}, "B"),
    (r"\boxed{B: Spleen}", {"A": "Spleen", "B": "Liver"}, None),
    (r"\boxed{B. Liver}", LABELLED, "B"),
    (r"\boxed{B: Liver}", LABELLED, "B"),
    (r"\boxed{(b) liver}", LABELLED, "B"),
    (r"\boxed{B: B. Liver}", LABELLED, "B"),
    (r"\boxed{B: A. Spleen}", LABELLED, None),
    (r"\boxed{B. Spleen}", LABELLED, None),
    (r"\boxed{C. difficile}", GERMS, None),  # the text of A, and no statement of the letter C
    (r"\boxed{C: A. fumigatus}", GERMS, "C"),
    (r"\boxed{C. fumigatus}", GERMS, None),
    (r"\boxed{B. cereus}", GERMS, "B"),
]


@pytest.mark.parametrize("text, letter", CASES, ids=[repr(text) for text, _ in CASES])
def test_table(text, letter):
    assert extract_answer(text, VITAMINS) == letter


@pytest.mark.parametrize("text, options, letter", OTHER_OPTIONS, ids=[repr(case[0]) for case in OTHER_OPTIONS])
def test_table_of_other_options(text, options, letter):
    assert extract_answer(text, options) == letter


def test_the_box_may_stand_anywhere_in_a_long_response():
    reasoning = "Scurvy follows from a lack of ascorbic acid {see above} $x$. " * 500
    assert extract_answer(reasoning + r"\boxed{\text{c) Vitamin C (ascorbic acid)}}" + reasoning, VITAMINS) == "C"


# ------------------------------------------------------------------------------------------------------- hostile inputs
HOSTILE = {
    "boxes that never close": (lambda n: "\\boxed{" * n, None),
    "boxes nested": (lambda n: "\\boxed{" * n + "A" + "}" * n, "A"),
    "boxes one after the other": (lambda n: "\\boxed{A}" * n, "A"),
    "boxes without a brace": (lambda n: "\\boxed " * n, None),
    "box and spaces": (lambda n: "\\boxed" + " " * n, None),
    "open braces": (lambda n: "{" * n, None),
    "closed braces": (lambda n: "}" * n + r"\boxed{A}", "A"),
    "braces around the letter": (lambda n: r"\boxed{" + "{" * n + "A" + "}" * n + "}", "A"),
    "parentheses around the letter": (lambda n: r"\boxed{" + "(" * n + "A" + ")" * n + "}", "A"),
    "brackets that never close": (lambda n: r"\boxed{" + "([" * n + "A}", None),
    "brackets opened only on the right": (lambda n: r"\boxed{A" + ")" * n + "}", "A"),
    "backslashes": (lambda n: "\\" * (2 * n) + r"\boxed{A}", "A"),
    "backslashes in the box": (lambda n: r"\boxed{A" + "\\" * (2 * n) + "}", None),
    "wrappers around the letter": (lambda n: r"\boxed{" + r"\text{" * n + "A" + "}" * n + "}", "A"),
    "wrapper commands and spaces": (lambda n: r"\boxed{" + r"\text  " * n + "}", None),
    "dollars": (lambda n: r"\boxed{" + "$" * n + "}", None),
    "dollars around the letter": (lambda n: r"\boxed{" + "$" * (2 * n) + "A" + "$" * (2 * n) + "}", None),
    "dollar and full stops": (lambda n: r"\boxed{$" + "A" * n + "." * n + "}", None),
    "full stops": (lambda n: r"\boxed{A" + "." * n + "}", "A"),
    "spaces": (lambda n: r"\boxed{" + " " * n + "A" + " " * n + "}", "A"),
    "letter and spaces": (lambda n: r"\boxed{A" + " " * n + "x}", None),
    "letter and separators": (lambda n: r"\boxed{A" + " -" * n + " Vitamin A}", None),
    "long text after the letter": (lambda n: r"\boxed{A: " + "Vitamin " * n + "}", None),
    "full-width": (lambda n: r"\boxed{" + "\uff08" * n + "\uff21" + "\uff09" * n + "}", "A"),
    "accents out of order": (lambda n: r"\boxed{A" + "\u0301\u0327" * n + "}", None),
    "ligatures of eighteen letters": (lambda n: r"\boxed{A: " + "\ufdfa" * n + "}", None),
    "signs that are not seen": (lambda n: r"\boxed{" + "\u200b" * n + "A" + "\u00ad" * n + "}", "A"),
    "quotes": (lambda n: r"\boxed{A: " + "\u201c" * n + "Vitamin A" + "\u201d" * n + "}", None),  # too long
    "zero bytes": (lambda n: "\0" * n + r"\boxed{A}", "A"),
}


def _lines_run(text):
    """How many lines of the module run on `text`: an exact count of the work done in Python, not a time."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != extraction.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        extract_answer(text, VITAMINS)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", HOSTILE)
def test_a_megabyte_of_anything_is_read(name):
    make, letter = HOSTILE[name]
    n = 1_000_000 // max(1, (len(make(11)) - len(make(1))) // 10)
    text = make(n)
    assert len(text) > 900_000
    assert extract_answer(text, VITAMINS) == letter


@pytest.mark.parametrize("name", HOSTILE)
def test_the_work_grows_linearly(name):
    make, _ = HOSTILE[name]
    small, large = _lines_run(make(200)), _lines_run(make(800))
    assert large <= 4 * small + 200  # four times the input, at most four times the lines (plus a constant part)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_regular_expression_backtracks(name):
    """A line may hide a quadratic search in C: at a 64-fold input a linear one takes about 64 times as long, a
    quadratic one 4096 times. 1,000 stands between them with room for a busy machine (CPU time, best of two)."""
    make, _ = HOSTILE[name]
    texts = make(500), make(32_000)

    def best(text):
        def once():
            start = time.process_time()
            extract_answer(text, VITAMINS)
            return time.process_time() - start

        return min(once() for _ in range(2))

    assert best(texts[1]) < 1_000 * max(best(texts[0]), 1e-4)


def test_one_hundred_thousand_nested_boxes_need_no_recursion():
    limit = sys.getrecursionlimit()
    assert extract_answer("\\boxed{" * 100_000 + "(B)" + "}" * 100_000, VITAMINS) == "B"
    assert sys.getrecursionlimit() == limit


def test_imports_only_the_standard_library():
    def imported(module):
        return set(re.findall(r"^\s*(?:from|import)\s+([\w.]+)", Path(module.__file__).read_text("utf-8"), flags=re.M))

    assert imported(extraction) == {"__future__", "re", "collections.abc", "alphamed.answers.folding"}
    assert imported(folding) == {"__future__", "re", "unicodedata"}


SIGNS = {"A": "50% dextrose", "B": "HLA-B_27 & others", "C": "#3 suture", "D": "50"}


@pytest.mark.parametrize(
    "text, letter",
    [
        (r"\boxed{\text{A. 50\% dextrose}}", "A"),
        (r"\boxed{50\% dextrose}", None),
        (r"\boxed{A: 50% dextrose}", "A"),
        (r"\boxed{B. HLA-B\_27 \& others}", "B"),
        (r"\boxed{(C) \#3 suture}", "C"),
        (r"\boxed{A. 50\%}", None),
        (r"\boxed{B. 50\% dextrose}", None),
    ],
)
def test_signs_that_latex_escapes_are_those_of_the_option(text, letter):
    """Inside a box `%`, `&`, `#` and `_` must be escaped to be valid."""
    assert extract_answer(text, SIGNS) == letter


# -------------------------------------------------------------------------------------------- signs that look alike
PLAIN = {
    "'": "\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4\u2039\u203a\uff07",
    '"': "\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d",
    " ": "\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u205f\u3000",
    "": "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\ufe0f\u202a\u2066",
    "fi": "\ufb01",
    "ffl": "\ufb04",
    "A": "\uff21",
    "9": "\uff19",
    "%": "\uff05",
    "\u00b0C": "\u2103",
    "mg": "\u338e",
    "\u03bc": "\u00b5",
    ".": "\u3002\uff0e\uff61",
    "2": "\u00b2\u2082",
    "\u00e9": ("e\u0301",),
    "...": "\u2026",
}


@pytest.mark.parametrize("plain, sign", [(plain, sign) for plain, signs in PLAIN.items() for sign in signs])
def test_each_sign_is_folded_to_its_plain_form_and_so_in_options_and_boxes(plain, sign):
    assert fold(f"x{sign}y") == f"x{plain}y" == fold(f"x{plain}y")
    typeset, typed = {"A": f"one{sign}two", "B": "other"}, {"A": f"one{plain}two", "B": "other"}
    for options in (typeset, typed):
        for texts in (typeset, typed):
            assert extract_answer(f"\\boxed{{A: {texts['A']}}}", options) == "A"
            assert extract_answer(f"\\boxed{{B: {texts['A']}}}", options) is None


def test_folding_twice_is_folding_once():
    everything = " x ".join(map(chr, (*range(0xD800), *range(0xE000, 0x3_0000))))
    assert fold(fold(everything)) == fold(everything) and fold_characters(fold_characters(everything)) == fold_characters(
        everything
    )


@pytest.mark.parametrize(
    "box, letter",
    [
        ("A: Graves' disease", "A"),
        ("B: Tay-Sachs disease", "B"),
        ("C: Stress fracture", "C"),
        ("D: Gout", "D"),
        ("D. \u201cGout\u201d", "D"),
        ("E: I feel fine", "E"),
        ('E: "I feel fine."', "E"),
        ("D: Graves' disease", None),
        ("\u200bC\ufeff", "C"),
        ("B \u2212 Tay\u2010Sachs disease", "B"),
        ("'A'", None),
        ('"A"', None),
        ("\u201cA\u201d", None),
    ],
)
def test_options_with_typographic_signs_stray_quotes_and_signs_without_width(box, letter):
    options = {
        "A": "Graves\u2019 disease",
        "B": "Tay\u2013Sachs disease",
        "C": "Stress \u200bfracture",
        "D": 'Gout\n"',
        "E": '"I feel fine."""',
    }
    assert extract_answer(f"\\boxed{{{box}}}", options) == letter


def test_a_minus_sign_is_a_minus():
    """Two options that differ by the sign only stay two, however it is typeset."""
    options = {"A": "5 mmol/L", "B": "\u22125 mmol/L"}
    assert [
        extract_answer(f"\\boxed{{{box}}}", options)
        for box in ("B: -5 mmol/L", "B: \u20135 mmol/L", "A: 5 mmol/L", "A: -5 mmol/L")
    ] == ["B", "B", "A", None]
