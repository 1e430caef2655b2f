"""Rows of public sets of distilled reasoning -> rows that examples.py reads: one small function per layout.

A layout is recognised by its columns. Each adapter returns `question`, `prompt` or `messages`, `reasoning` where it is separate
from the answer, `response`, and the letter of the right option as `answer` where it is known; how they are joined is a setting
(sft.response_format). Values are not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Upstream = Mapping[str, Any]
_OPTION_LINE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def medical_o1(row: Upstream) -> dict[str, Any]:
    """FreedomIntelligence/medical-o1-reasoning-SFT, on which HuatuoGPT-o1 was trained."""
    return {"question": row["Question"], "reasoning": row["Complex_CoT"], "response": row["Response"]}


def medical_r1(row: Upstream) -> dict[str, Any]:
    """FreedomIntelligence/Medical-R1-Distill-Data."""
    return {
        "question": row["question"],
        "reasoning": row["reasoning (reasoning_content)"],
        "response": row["response (content)"],
    }


def m1k(row: Upstream) -> dict[str, Any]:
    """UCSC-VLAA/m1k-tokenized and m23k-tokenized: the prompt holds the options already."""
    return {
        "prompt": row["prompt"],
        "answer": row.get("answer_letter"),
        "reasoning": row["reasoning"],
        "response": row["distilled_answer_string"],
    }


def medreason(row: Upstream) -> dict[str, Any]:
    """UCSC-VLAA/MedReason: options are one text, an option a line; questions without any are open ones. The answer begins
    with the text of the right option, by the longest of which its letter is found."""
    lines = str(row.get("options") or "").splitlines()
    options = {match[1]: match[2] for line in lines if (match := _OPTION_LINE.match(line))}
    said = row["answer"].strip().casefold()
    right = max((len(text), letter) for letter, text in [("", ""), *options.items()] if _begins_with(said, text.casefold()))
    return {
        "question": row["question"],
        "options": options or None,
        "answer": right[1] or None,
        "reasoning": row["reasoning"],
        "response": row["answer"],
    }


def _begins_with(text: str, words: str) -> bool:
    """Whether `text` begins with `words` as whole words: "no" does not begin "nocturnal"."""
    return text.startswith(words) and not (words[-1:].isalnum() and text[len(words) : len(words) + 1].isalnum())


def sharegpt(row: Upstream) -> dict[str, Any]:
    """Conversations as `from` and `value`, a layout of many tools."""
    turns = [
        {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in row["conversations"]
    ]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": row["system"]})
    return {"messages": turns}


LAYOUTS: Mapping[frozenset[str], Callable[[Upstream], dict[str, Any]]] = {
    frozenset({"Question", "Complex_CoT", "Response"}): medical_o1,
    frozenset({"question", "reasoning (reasoning_content)", "response (content)"}): medical_r1,
    frozenset({"prompt", "reasoning", "distilled_answer_string"}): m1k,
    frozenset({"dataset_name", "question", "reasoning", "answer"}): medreason,
    frozenset({"conversations"}): sharegpt,
}
"""The columns that tell a layout -> its adapter."""


def adapt(row: Upstream) -> Mapping[str, Any]:
    """The row in the form of examples.py, without empty cells; itself where no layout has its columns. Raises ValueError for
    a row of a layout that lacks a part of it."""
    plain = {name: cell for name, cell in row.items() if cell is not None}
    for columns, adapter in LAYOUTS.items():
        if not columns <= row.keys() or "response" in plain or "messages" in plain:
            continue
        if empty := sorted(columns - plain.keys()):
            raise ValueError(f"{empty[0]} is empty")
        try:
            value = adapter(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not in the layout of {adapter.__name__} ({type(error).__name__}: {error})") from None
        named = {"id": plain["id"]} if "id" in plain else {}
        return named | {name: cell for name, cell in value.items() if cell is not None}
    return plain
