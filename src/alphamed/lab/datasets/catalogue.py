"""The public training sets by name, one row each, and the named mixtures of AlphaMed as presets.

Revisions are commits that several public projects load these sets at. Counts are of the rows that the adapter keeps. Adding
a set: a row here and, for a new layout, a function in adapters.py.
"""

from __future__ import annotations

from typing import Any

from alphamed.data import adapters
from alphamed.data.keys import AnswerForm
from alphamed.data.upstream import QuestionSource

_PUBMEDQA = ("qiaojin/PubMedQA", "9001f2853fb87cab8d220904e0de81ac6973b318")

SOURCES = {
    source.name: source
    for source in (
        QuestionSource(
            "medqa",
            "GBaker/MedQA-USMLE-4-options",
            "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
            None,
            "train",
            adapters.medqa,
            "MIT (jind11/MedQA); the hub's card says CC-BY-4.0; some rows are of exam-prep sites",
            expected=10_178,
        ),
        QuestionSource(
            "medmcqa",
            "openlifescienceai/medmcqa",
            "91c6572c454088bf71b679ad90aa8dffcd0d5868",
            None,
            "train",
            adapters.medmcqa,
            "Apache-2.0 (hub card); MIT (medmcqa/medmcqa)",
            expected=182_822,
            answer=AnswerForm.INDEX,
        ),
        QuestionSource(
            "pubmedqa_artificial",
            *_PUBMEDQA,
            "pqa_artificial",
            "train",
            adapters.pubmedqa,
            "MIT; abstracts belong to their publishers",
            expected=211_269,
            letters="ABC",
            context=True,
            note="Keys are derived from titles; there is no maybe. The set that PubMedQA's small mixture is drawn "
            "from: the labelled thousand is its benchmark.",
        ),
        QuestionSource(
            "headqa",
            "EleutherAI/headqa",
            None,
            "en",
            "train",
            adapters.headqa,
            "MIT (aghie/head-qa)",
            letters="ABCDE",
            note="Machine-translated from Spanish. No commit could be confirmed: set `revision`.",
        ),
    )
}


def _small(source: str) -> dict[str, Any]:
    return {"sources": [{"name": source}], "quotas": [{"source": source, "per_level": 200}]}


# Liu et al., arXiv 2505.17952: sizes and composition. Levels come from `alphamed data difficulty` (five samples of
# Llama-3.1-8B-Instruct a question) and are given as `levels` of a source, or are in a local file.
PRESETS: dict[str, dict[str, Any]] = {
    "alphamed19k": {
        "sources": [{"name": "medqa"}, {"name": "medmcqa"}],
        "quotas": [{"source": "medqa", "count": 10_178}, {"source": "medmcqa", "per_level": 1_500}],
    },
    "medqa1200": _small("medqa"),
    "medmcqa1200": _small("medmcqa"),
    "pubmedqa1200": _small("pubmedqa_artificial"),
}
