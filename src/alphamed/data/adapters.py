"""Rows of public question sets -> rows of the schema (`mcq.py`): one small function per layout.

An adapter takes an upstream row and its position and returns a row of the schema, or None where the row is no part of the
set (another subject, no key). It checks nothing that the schema checks: a missing or wrong value becomes a reported bad row
there. A broken layout shows as KeyError or TypeError, which the reader reports as a wrong schema.
"""
from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from alphamed.data.text import draw, normalised_option

Upstream = Mapping[str, Any]
Adapter = Callable[[Upstream, int], dict[str, Any] | None]

YES_NO_MAYBE = {"A": "yes", "B": "no", "C": "maybe"}
MMLU_MEDICAL = frozenset({"anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics",
                          "professional_medicine"})
# MedXpertQA repeats its options at the end of the question.
_REPEATED_OPTIONS = re.compile(r"\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)


def lettered(texts: Sequence[Any]) -> dict[str, Any]:
    """Letter -> text for a list of options."""
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"options are text, not a list: {texts!r}")
    return dict(zip(string.ascii_uppercase, texts))


def _letter(index: Any) -> str:
    """The letter of an index from 0. A class label that says "none" (-1) becomes a letter that no option has."""
    return string.ascii_uppercase[index] if 0 <= index < 26 else "?"


# ---------------------------------------------------------------------------------------------------------- public sets
def medqa(row: Upstream, number: int) -> dict[str, Any]:
    """MedQA-USMLE as in GBaker/MedQA-USMLE-4-options and jind11/MedQA (4 or 5 options)."""
    return {"id": f"medqa-{number:05d}", "question": row["question"], "options": _present(row["options"]),
            "answer": row["answer_idx"], "source": "medqa"}


def medmcqa(row: Upstream, number: int) -> dict[str, Any]:
    """MedMCQA; its test split has no keys (cop = -1)."""
    return {"id": f"medmcqa-{row['id']}", "question": row["question"],
            "options": lettered([row["opa"], row["opb"], row["opc"], row["opd"]]), "answer": _letter(row["cop"]),
            "source": "medmcqa"}


def pubmedqa(row: Upstream, number: int) -> dict[str, Any]:
    """PubMedQA as in qiaojin/PubMedQA, or as its authors publish it (ori_pqal.json, whose keys are the ids): the abstract
    without its conclusion is the context."""
    if "QUESTION" in row:
        row = {"pubid": row["id"], "question": row["QUESTION"], "context": {"contexts": row["CONTEXTS"]},
               "final_decision": row["final_decision"]}
    answers = {text: letter for letter, text in YES_NO_MAYBE.items()}
    return {"id": f"pubmedqa-{row['pubid']}", "question": row["question"], "options": YES_NO_MAYBE,
            "answer": answers.get(row["final_decision"], row["final_decision"]),
            "context": "\n".join(row["context"]["contexts"]), "source": "pubmedqa"}


def openlife(row: Upstream, number: int) -> dict[str, Any]:
    """The official 500 test questions of PubMedQA as in openlifescienceai/pubmedqa."""
    data = row["data"]
    return {"id": f"pubmedqa-{row['id']}", "question": data["Question"], "options": _present(data["Options"]),
            "answer": data["Correct Option"], "context": "\n".join(data["Context"]), "source": "pubmedqa"}


def headqa(row: Upstream, number: int) -> dict[str, Any] | None:
    """HEAD-QA; questions that ask about an image are left out, since a text model can not see it."""
    if row.get("image"):
        return None
    order = [answer["aid"] for answer in row["answers"]]
    right = int(row["ra"])
    return {"id": f"headqa-{row['name']}-{row['qid']}", "question": row["qtext"],
            "options": lettered([answer["atext"] for answer in row["answers"]]),
            "answer": _letter(order.index(right)) if right in order else "?", "source": f"headqa/{row['category']}"}


def mmlu_pro_medical(row: Upstream, number: int) -> dict[str, Any] | None:
    """MMLU-Pro, health and biology: up to 10 options; "N/A" stands for an option that is none."""
    if row["category"] not in ("health", "biology"):
        return None
    kept = [text for text in row["options"] if text != "N/A"]
    answer = row["options"][row["answer_index"]]
    return {"id": f"mmlu_pro-{row['question_id']}", "question": row["question"], "options": lettered(kept),
            "answer": _letter(kept.index(answer)), "source": f"mmlu_pro/{row['category']}"}


def gpqa_medical(row: Upstream, number: int) -> dict[str, Any] | None:
    """GPQA, genetics and molecular biology. Upstream the right answer stands first; here a hash of the record places it."""
    if row["Subdomain"] not in ("Genetics", "Molecular Biology"):
        return None
    texts = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: draw(row["Record ID"], i))
    return {"id": f"gpqa-{row['Record ID']}", "question": row["Question"], "options": lettered([texts[i] for i in order]),
            "answer": _letter(order.index(0)), "source": f"gpqa/{row['Subdomain'].lower().replace(' ', '_')}"}


def medxpertqa(row: Upstream, number: int) -> dict[str, Any]:
    """MedXpertQA Text: ten options; reasoning and understanding are told apart by source."""
    return {"id": f"medxpertqa-{row['id']}", "question": _REPEATED_OPTIONS.sub("", row["question"]),
            "options": _present(row["options"]), "answer": row["label"],
            "source": f"medxpertqa/{row['question_type'].lower()}"}


def mmlu_medical(row: Upstream, number: int) -> dict[str, Any] | None:
    """The six medical subjects of MMLU."""
    if row["subject"] not in MMLU_MEDICAL:
        return None
    return {"id": f"mmlu-{number:05d}", "question": row["question"], "options": lettered(row["choices"]),
            "answer": _letter(row["answer"]), "source": f"mmlu/{row['subject']}"}


def _present(options: Upstream) -> dict[str, Any]:
    """Arrow fills letters that a row does not have with None."""
    return {letter: text for letter, text in options.items() if text is not None}


# ---------------------------------------------------------------------------------------------------------- the schema
class AnswerForm(StrEnum):
    """How a file of the schema names the right option."""
    LETTER = "letter"
    INDEX = "index"          # from 0
    INDEX1 = "index1"        # from 1
    TEXT = "text"            # the option's text, as it stands there but for case, punctuation and white space


def schema(form: AnswerForm) -> Adapter:
    """Row -> row with options as letter -> text and the answer as a letter. What does not fit is left as it is, so that
    the schema's own check names it."""
    def adapt(row: Any, number: int) -> Any:
        if not isinstance(row, Mapping):
            return row
        options = row.get("options")
        if isinstance(options, list) and all(isinstance(text, str) for text in options):
            options = lettered(options)
        if not isinstance(options, Mapping):
            return row
        options = _present(options)
        return {**row, "options": options, "answer": _answer(row.get("answer"), options, form)}
    return adapt


def _answer(answer: Any, options: Mapping[str, Any], form: AnswerForm) -> Any:
    letters = list(options)
    if form in (AnswerForm.INDEX, AnswerForm.INDEX1) and type(answer) is int:
        at = answer - (form == AnswerForm.INDEX1)
        return letters[at] if 0 <= at < len(letters) else str(answer)
    if form == AnswerForm.TEXT and isinstance(answer, str):
        same = [letter for letter, text in options.items() if isinstance(text, str)
                and normalised_option(text) == normalised_option(answer)]
        return same[0] if len(same) == 1 else answer
    return answer
