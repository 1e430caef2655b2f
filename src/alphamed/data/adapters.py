"""Rows of public question sets -> rows of the schema (`mcq.py`): one small function per layout.

An adapter takes an upstream row and returns a row with the schema's fields, or None where the row does not belong to the set
(another subject). Options may still be a list, and the answer the `Keys` that the row states: their form is inferred from
the whole file (`keys.py`), never assumed here. Sets without ids get ids from the content, elsewhere. What the schema checks
is not checked here: a missing or wrong value becomes a reported bad row there. A broken layout raises KeyError or TypeError,
which the reader reports as a wrong schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from alphamed.data.keys import AnswerForm, Keys
from alphamed.hashing import draw

Upstream = Mapping[str, Any]
Adapter = Callable[[Upstream], dict[str, Any] | None]

YES_NO_MAYBE = {"A": "yes", "B": "no", "C": "maybe"}
MMLU_MEDICAL = frozenset(
    {"anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "professional_medicine"}
)
# MedXpertQA repeats its options at the end of the question.
_REPEATED_OPTIONS = re.compile(r"\s*Answer Choices:\s*\(A\).*\Z", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------- public sets
def medqa(row: Upstream) -> dict[str, Any]:
    """MedQA-USMLE as in GBaker/MedQA-USMLE-4-options and jind11/MedQA (4 or 5 options): the key as letter and as text."""
    stated = {name: row[name] for name in ("answer_idx", "answer") if row.get(name) is not None}
    if not stated:
        raise KeyError("answer_idx")
    return {
        "id": row.get("id"),
        "question": row["question"],
        "options": row["options"],
        "answer": Keys(stated),
        "source": "medqa",
    }


def medmcqa(row: Upstream) -> dict[str, Any]:
    """MedMCQA. Its authors' files count `cop` from 1, the hub's copy from 0; its test split has no keys (cop = -1)."""
    return {
        "id": f"medmcqa-{row['id']}",
        "question": row["question"],
        "options": [row["opa"], row["opb"], row["opc"], row["opd"]],
        "answer": Keys({"cop": row["cop"]}),
        "source": "medmcqa",
    }


def pubmedqa(row: Upstream) -> dict[str, Any]:
    """PubMedQA as in qiaojin/PubMedQA, or as its authors publish it (ori_pqal.json, whose keys are the ids): the abstract
    without its conclusion is the context."""
    if "QUESTION" in row:
        row = {
            "pubid": row["id"],
            "question": row["QUESTION"],
            "context": {"contexts": row["CONTEXTS"]},
            "final_decision": row["final_decision"],
        }
    answers = {text: letter for letter, text in YES_NO_MAYBE.items()}
    return {
        "id": f"pubmedqa-{row['pubid']}",
        "question": row["question"],
        "options": YES_NO_MAYBE,
        "answer": answers.get(row["final_decision"], row["final_decision"]),
        "context": "\n".join(row["context"]["contexts"]),
        "source": "pubmedqa",
    }


def openlife(row: Upstream) -> dict[str, Any]:
    """The official 500 test questions of PubMedQA as in openlifescienceai/pubmedqa."""
    data = row["data"]
    return {
        "id": f"pubmedqa-{row['id']}",
        "question": data["Question"],
        "options": data["Options"],
        "answer": data["Correct Option"],
        "context": "\n".join(data["Context"]),
        "source": "pubmedqa",
    }


def headqa(row: Upstream) -> dict[str, Any] | None:
    """HEAD-QA; questions that ask about an image are left out, since a text model cannot see it. Options have their
    own numbers (`aid`), which show how `ra` counts."""
    if row.get("image"):
        return None
    numbers = [int(answer["aid"]) for answer in row["answers"]]
    forms = {0: AnswerForm.INDEX, 1: AnswerForm.INDEX1}
    if numbers[0] not in forms or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"options are numbered {numbers}, not 1, 2, 3 ...")
    return {
        "id": f"headqa-{row['name']}-{row['qid']}",
        "question": row["qtext"],
        "options": [answer["atext"] for answer in row["answers"]],
        "answer": Keys({"ra": row["ra"]}, forms[numbers[0]]),
        "source": f"headqa/{row['category']}",
    }


def mmlu_pro_medical(row: Upstream) -> dict[str, Any] | None:
    """MMLU-Pro, health and biology: up to 10 options; "N/A" stands for an option that is none. The key: index and letter."""
    if row["category"] not in ("health", "biology"):
        return None
    stated = {"answer_index": row["answer_index"], "answer": row.get("answer")}
    return {
        "id": f"mmlu_pro-{row['question_id']}",
        "question": row["question"],
        "options": [None if text == "N/A" else text for text in row["options"]],
        "answer": Keys({name: value for name, value in stated.items() if value is not None}),
        "source": f"mmlu_pro/{row['category']}",
    }


def gpqa_medical(row: Upstream) -> dict[str, Any] | None:
    """GPQA, genetics and molecular biology. Upstream the right answer stands first; here a hash of the record places it."""
    if row["Subdomain"] not in ("Genetics", "Molecular Biology"):
        return None
    texts = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: draw(row["Record ID"], i))
    return {
        "id": f"gpqa-{row['Record ID']}",
        "question": row["Question"],
        "options": [texts[i] for i in order],
        "answer": "ABCD"[order.index(0)],
        "source": f"gpqa/{row['Subdomain'].lower().replace(' ', '_')}",
    }


def medxpertqa(row: Upstream) -> dict[str, Any]:
    """MedXpertQA Text: ten options; reasoning and understanding are distinguished by source. Copies for benchmark harnesses
    have the options in the question alone, which the schema's check refuses."""
    options = row.get("options")
    return {
        "id": f"medxpertqa-{row['id']}",
        "options": options,
        "answer": Keys({"label": row["label"]}),
        "question": _REPEATED_OPTIONS.sub("", row["question"]) if options else row["question"],
        "source": f"medxpertqa/{row.get('question_type', 'text').lower()}",
    }


def mmlu_medical(row: Upstream) -> dict[str, Any] | None:
    """The six medical subjects of MMLU."""
    if row["subject"] not in MMLU_MEDICAL:
        return None
    return {
        "question": row["question"],
        "options": row["choices"],
        "answer": Keys({"answer": row["answer"]}),
        "source": f"mmlu/{row['subject']}",
    }


def schema(row: Any) -> Any:
    """A row that is already in the schema."""
    return row
