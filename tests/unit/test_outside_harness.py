"""Agreement with an outside harness: hard outputs labelled by hand for our strict rule and for an exact regex scorer.

The scorer here is written from lm-evaluation-harness's documentation of RegexFilter (findall, group_select, the first group
that is not empty, stripped, "[invalid]" where nothing matches) and of exact_match with ignore_case and ignore_punctuation.
"""

import re
import string
from pathlib import Path

import pytest
import yaml

from alphamed.evaluation.items import Asked, Grading, graded
from alphamed.records import FinishReason, Outcome, Question

FIXTURE = yaml.safe_load((Path(__file__).parents[1] / "hard_outputs.yaml").read_text(encoding="utf-8"))
CASES = FIXTURE["cases"]
PATTERN = re.compile(r"\\boxed\{\(?([A-J])\)?\}|answer is:? \(?([A-J])\)?")
GROUP_SELECT, FALLBACK = 0, "[invalid]"
KINDS = {
    "several boxes",
    "box amid reasoning",
    "LaTeX",
    "full width",
    "lower case",
    "option text",
    "refusal",
    "negation",
    "truncated",
    "injected",
    "ten letters",
}


def harness_filter(text):
    found = PATTERN.findall(text)
    if not found:
        return FALLBACK
    match = found[GROUP_SELECT]
    if isinstance(match, tuple):
        match = next(group for group in match if group)
    return match.strip()


def harness_exact_match(text, key):
    def plain(one):
        return one.lower().translate(str.maketrans("", "", string.punctuation))

    return plain(harness_filter(text)) == plain(key)


def ours(case, key="A"):
    question = Question("q", "Which?", FIXTURE["options"][case["of"]], key)
    finish = FinishReason(case.get("finish", "stop"))
    return graded(Asked("set", None, question), 0, case["text"], finish, 9, Grading())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}: {case['text'][:40]}")
def test_both_scorers_say_what_the_label_says(case):
    item = ours(case)
    assert (item.letter if item.outcome.boxed else None) == case["ours"]
    assert harness_filter(case["text"]) == (case["harness"] or FALLBACK)
    assert bool(case.get("why")) == (case["ours"] != case["harness"]), "a reason is for a disagreement"


def test_where_the_extraction_agrees_the_scores_are_equal():
    """For every key that a question could have: right and wrong are the same in both scorers, so the accuracies are."""
    agreeing = [case for case in CASES if case["ours"] == case["harness"]]
    assert len(agreeing) >= 30
    for case in agreeing:
        for key in FIXTURE["options"][case["of"]]:
            assert (ours(case, key).outcome == Outcome.CORRECT) == harness_exact_match(case["text"], key)


def test_the_fixture_is_as_broad_as_it_claims():
    assert len(CASES) >= 60 and KINDS <= {case["kind"] for case in CASES}
    assert len({(case["text"], case["of"]) for case in CASES}) == len(CASES)
