"""Folders in the layout that public sets have on the hub, with questions of our own: what `datasets` loads in tests.

Column names and types are those of the sets' dataset cards; every row was written for these tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[Mapping[str, Any]]

MEDQA: Rows = (
    {
        "question": "A sailor has bleeding gums. Which vitamin is missing?",
        "answer": "Vitamin C",
        "options": {"A": "Vitamin A", "B": "Vitamin B12", "C": "Vitamin C", "D": "Vitamin D"},
        "meta_info": "step1",
        "answer_idx": "C",
        "metamap_phrases": ["sailor", "bleeding gums"],
    },
    {
        "question": "Which organ makes insulin?",
        "answer": "Pancreas",
        "options": {"A": "Pancreas", "B": "Liver", "C": "Spleen", "D": "Kidney"},
        "meta_info": "step1",
        "answer_idx": "A",
        "metamap_phrases": [],
    },
)
MEDMCQA: Rows = (
    {
        "id": "e1",
        "question": "Largest artery of the body?",
        "opa": "Aorta",
        "opb": "Femoral artery",
        "opc": "Radial artery",
        "opd": "Carotid artery",
        "cop": 0,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": None,
    },
    {
        "id": "e2",
        "question": "Cranial nerve of smell?",
        "opa": "II",
        "opb": "I",
        "opc": "VII",
        "opd": "X",
        "cop": 1,
        "choice_type": "single",
        "exp": "First nerve.",
        "subject_name": "Anatomy",
        "topic_name": None,
    },
    {
        "id": "e3",
        "question": "A question of the test split?",
        "opa": "a",
        "opb": "b",
        "opc": "c",
        "opd": "d",
        "cop": -1,
        "choice_type": "single",
        "exp": None,
        "subject_name": "Anatomy",
        "topic_name": None,
    },
)
PUBMEDQA: Rows = (
    {
        "pubid": 101,
        "question": "Does walking help?",
        "context": {
            "contexts": ["We let 10 people walk.", "They felt better."],
            "labels": ["METHODS", "RESULTS"],
            "meshes": ["Walking"],
        },
        "long_answer": "It does.",
        "final_decision": "yes",
    },
    {
        "pubid": 102,
        "question": "Does priority help?",
        "context": {"contexts": ["We let 10 people stand."], "labels": ["METHODS"], "meshes": []},
        "long_answer": "Unclear.",
        "final_decision": "maybe",
    },
)
OPENLIFE: Rows = (
    {
        "id": "201",
        "data": {
            "Question": "Does sleep help?",
            "Options": {"A": "yes", "B": "no", "C": "maybe"},
            "Context": ["We let 10 people sleep.", "They felt worse."],
            "Correct Option": "B",
            "Correct Answer": "no",
            "Long Answer": "It does not.",
        },
        "subject_name": None,
    },
)
HEADQA: Rows = (
    {
        "name": "Cuaderno_2013_1_B",
        "year": "2013",
        "category": "biology",
        "qid": "7",
        "qtext": "The cell's power plant:",
        "ra": 2,
        "image": None,
        "answers": [
            {"aid": 1, "atext": "Ribosome"},
            {"aid": 2, "atext": "Mitochondrion"},
            {"aid": 3, "atext": "Nucleus"},
            {"aid": 4, "atext": "Golgi"},
            {"aid": 5, "atext": "Lysosome"},
        ],
    },
    {
        "name": "Cuaderno_2013_1_M",
        "year": "2013",
        "category": "medicine",
        "qid": "1",
        "qtext": "What does image 1 show?",
        "ra": 1,
        "image": {"bytes": b"x", "path": "1.png"},
        "answers": [{"aid": 1, "atext": "A lung"}, {"aid": 2, "atext": "A heart"}],
    },
)
MMLU_PRO: Rows = (
    {
        "question_id": 1,
        "question": "Which bone is in the thigh?",
        "options": ["Tibia", "N/A", "Femur", "Ulna"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": "health",
        "src": "ori",
    },
    {
        "question_id": 2,
        "question": "Who wins a tort suit?",
        "options": ["Plaintiff", "Defendant"],
        "answer": "A",
        "answer_index": 0,
        "cot_content": "",
        "category": "law",
        "src": "ori",
    },
    {
        "question_id": 3,
        "question": "What carries heredity?",
        "options": ["Fat", "Sugar", "DNA"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": "biology",
        "src": "ori",
    },
)
GPQA: Rows = tuple(
    {
        "Question": f"Question {i} about genes?",
        "Correct Answer": "right",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
        "Subdomain": subdomain,
        "High-level domain": "Biology",
        "Record ID": f"rec{i}",
    }
    for i, subdomain in enumerate(["Genetics", "Molecular Biology", "Quantum Mechanics", "Genetics", "Genetics"])
)
MEDXPERTQA: Rows = (
    {
        "id": "Text-0",
        "question": "What comes next?\nAnswer Choices: (A) o0 (B) o1 (C) o2 (D) o3 (E) o4 (F) o5 (G) o6 (H) o7 "
        "(I) o8 (J) o9",
        "options": {letter: f"o{i}" for i, letter in enumerate("ABCDEFGHIJ")},
        "label": "J",
        "medical_task": "Treatment",
        "body_system": "Skeletal",
        "question_type": "Reasoning",
    },
    {
        "id": "Text-1",
        "question": "What is it?\nAnswer Choices: (A) p0 (B) p1",
        "options": {letter: f"p{i}" for i, letter in enumerate("ABCDEFGHIJ")},
        "label": "A",
        "medical_task": "Basic Science",
        "body_system": "Nervous",
        "question_type": "Understanding",
    },
)
MMLU: Rows = (
    {
        "question": "Which ion makes bones hard?",
        "subject": "anatomy",
        "choices": ["Sodium", "Calcium", "Iron", "Iodine"],
        "answer": 1,
    },
    {
        "question": "Who wrote the Republic?",
        "subject": "philosophy",
        "choices": ["Plato", "Kant", "Hume", "Mill"],
        "answer": 0,
    },
)


def hub_folder(folder: Path, config: str | None, split: str, rows: Rows, form: str = "parquet") -> Path:
    """A data set folder as on the hub: a card that names configurations and files, and the file of one split."""
    name = f"{config or 'data'}/{split}-00000-of-00001.{form}"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n  - split: {split}\n    path: {name}\n---\n"
    )
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
