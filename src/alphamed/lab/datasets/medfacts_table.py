"""The table of medical facts behind the sample questions: what a row means, and how it is read from medfacts.yaml.

Per category the table has one relation ("which nerve supplies this muscle"), its wordings, and rows of
`subject | answer | also`. `also` lists the category's other answers that are true or arguable for the subject.

Every row was reviewed twice by reading, against general medical knowledge: when it was written, and again category by
category, asking of each row whether it is universally accepted, whether another answer of the category is also right
or arguable, and whether the wording is precise. About two thousand drawn false pairs and exceptions were read as well.
Rows that did not pass were reworded, given an `also`, or deleted. Then 15,495 public examination questions (MedMCQA,
MedQA, HEAD-QA) were searched for those that name a row's subject and offer its answer, or the reverse: of 177 hits, on
142 rows, 114 had it as the key; the other 63 were read, ask something else, and none contradicts the table. No
clinician has signed it: it is practice material for a language model, not a source for the care of patients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources

import yaml

FEWEST_OPTIONS = 4


@dataclass(frozen=True, slots=True)
class Fact:
    """`answer` is the one best answer for `subject`; the answers in `also` are true or arguable too."""

    category: str
    section: str
    subject: str
    answer: str
    also: frozenset[str]

    def __str__(self) -> str:
        return f"{self.category}/{self.subject}"

    def allows(self, answer: str) -> bool:
        """Whether `answer` may be true of the subject, so that it cannot serve as a wrong option."""
        return answer == self.answer or answer in self.also


class Form(StrEnum):
    """What a question asks. Options are answers (ASK), subjects (REVERSE, EXCEPT) or pairs of both (PAIRS)."""

    ASK = "ask"  # subject -> answer
    REVERSE = "reverse"  # answer -> subject
    EXCEPT = "except"  # several subjects share an answer; one does not
    PAIRS = "pairs"  # several true pairs; one is false


@dataclass(frozen=True, slots=True)
class Wordings:
    train: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Category:
    """One relation. `subjects`, `predicate` and `pair` are the phrases that the general wordings are filled with."""

    name: str
    subjects: str
    predicate: str
    pair: str
    wordings: Mapping[Form, Wordings]
    facts: tuple[Fact, ...]


@cache
def table() -> Mapping[str, Category]:
    """The shipped categories by name."""
    return parse(resources.files("alphamed.lab.datasets").joinpath("medfacts.yaml").read_text("utf-8"))


def parse(text: str) -> Mapping[str, Category]:
    """The categories of a table by name. ValueError names the category, the row and the fix."""
    tree = yaml.safe_load(text)
    general = {Form(form): _wordings(entry) for form, entry in tree["general"].items()}
    return {name: _category(name, entry, general) for name, entry in tree["categories"].items()}


def _category(name: str, entry: Mapping, general: Mapping[Form, Wordings]) -> Category:
    facts = tuple(
        _fact(name, section, row) for section, rows in entry["facts"].items() for row in rows.splitlines() if row.strip()
    )
    answers = {fact.answer for fact in facts}
    subjects: set[str] = set()
    for fact in facts:
        if fact.subject in subjects:
            raise ValueError(
                f"medfacts.yaml: {name}: {fact.subject}: has two rows; keep one, and name the other answer in its `also`"
            )
        subjects.add(fact.subject)
        if unknown := fact.also - answers:
            raise ValueError(
                f"medfacts.yaml: {name}: {fact.subject}: also {sorted(unknown)}: not an answer of this "
                f"category; spell it as in the rows that have it"
            )
    own = {form: _wordings(entry[form]) for form in (Form.ASK, Form.REVERSE)}
    return Category(name, entry["subjects"], entry["predicate"], entry["pair"], {**general, **own}, facts)


def _fact(category: str, section: str, row: str) -> Fact:
    cells = [cell.strip() for cell in row.split("|")]
    if len(cells) not in (2, 3) or not all(cells):
        raise ValueError(
            f"medfacts.yaml: {category}: {row.strip()}: write 'subject | answer' or 'subject | answer | also; also'"
        )
    also = frozenset(other.strip() for other in cells[2].split(";")) if len(cells) == 3 else frozenset()
    return Fact(category, section, cells[0], cells[1], also)


def _wordings(entry: Mapping[str, Sequence[str]]) -> Wordings:
    return Wordings(tuple(entry["train"]), tuple(entry["heldout"]))
