"""Decisions on questions whose key is in doubt: keep, fix or quarantine; by whom, when and why; applied by version.

A file of decisions is YAML that people edit:

  version: 3                    # rises by one whenever the program or a person changes the file
  decisions:
  - id: medqa-00017
    fingerprint: 0c5e...        # of the question as reviewed (text.py): a revised question is left alone
    decision: fix               # open | keep | fix | quarantine
    answer: Acute pancreatitis  # for fix: the text of the right option
    who: A. Reader
    when: 2026-01-31
    why: The key contradicts the vignette's lipase.
    evidence: [...]             # what `alphamed data suspects` found

`build` and `eval` leave quarantined questions out and correct fixed ones, and record the file's version and hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from alphamed.config.loading import dump_tree, load_tree, validated
from alphamed.config.sections import Positive, Section
from alphamed.data.text import fingerprint, normalised_option
from alphamed.errors import ConfigError
from alphamed.records import Question


class Verdict(StrEnum):
    OPEN = "open"
    KEEP = "keep"
    FIX = "fix"
    QUARANTINE = "quarantine"


class Decision(Section):
    id: str
    fingerprint: str = Field(pattern=r"^[0-9a-f]{16}$")
    decision: Verdict = Verdict.OPEN
    answer: str | None = None
    who: str | None = None
    when: str | None = None
    why: str | None = None
    evidence: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decision == Verdict.FIX and not self.answer:
            raise ValueError(f"decisions: {self.id}: fix needs answer, the text of the right option; give it")
        if self.decision != Verdict.OPEN and not (self.who and self.when and self.why):
            raise ValueError(f"decisions: {self.id}: {self.decision} needs who, when and why; give all three")
        return self


class Decisions(Section):
    version: Positive
    decisions: tuple[Decision, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [decision.id for decision in self.decisions]
        if repeated := next((i for i in ids if ids.count(i) > 1), None) if len(set(ids)) < len(ids) else None:
            raise ValueError(f"decisions: {repeated} occurs twice; keep one decision a question")
        return self


@dataclass(frozen=True, slots=True)
class DecisionFile:
    path: Path
    version: int
    sha256: str
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """The questions after decisions, and the ids they touched. `stale` are decisions on questions whose text has changed;
    `open` ones wait for a person."""

    questions: tuple[Question, ...]
    fixed: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    open: tuple[str, ...] = ()


def read_decisions(path: Path, version: int | None = None) -> DecisionFile:
    """A file of decisions, of exactly this version where one is given. Raises ConfigError."""
    if path.exists() and not path.is_file():  # it is read twice
        raise ConfigError(f"decisions {path}: is not a regular file; give a YAML file")
    tree = load_tree(path, kind="decisions")
    try:
        content = validated(Decisions, tree)
    except ConfigError as error:
        raise ConfigError(f"decisions {path}: {error}") from None
    if version is not None and content.version != version:
        raise ConfigError(
            f"decisions {path}: has version {content.version}, {version} is required; give the file of that "
            f"version or change decisions_version"
        )
    return DecisionFile(path, content.version, hashlib.sha256(path.read_bytes()).hexdigest(), content.decisions)


def apply_decisions(questions: Sequence[Question], decisions: Iterable[Decision]) -> Applied:
    """Leave quarantined questions out, correct the keys of fixed ones. Raises ConfigError where a fix names no option."""
    by_id = {decision.id: decision for decision in decisions}
    remaining: list[Question] = []
    touched: dict[str, list[str]] = {name: [] for name in ("fixed", "quarantined", "stale", "open")}
    for question in questions:
        decision = by_id.get(question.id)
        if decision is None or decision.decision == Verdict.KEEP:
            remaining.append(question)
        elif decision.decision == Verdict.OPEN:
            touched["open"].append(question.id)
            remaining.append(question)
        elif decision.fingerprint != fingerprint(question):
            changed = decision.decision == Verdict.FIX and _right(question) == normalised_option(decision.answer or "")
            touched["fixed" if changed else "stale"].append(question.id)
            remaining.append(question)
        elif decision.decision == Verdict.QUARANTINE:
            touched["quarantined"].append(question.id)
        else:
            touched["fixed"].append(question.id)
            remaining.append(_fixed(question, decision))
    return Applied(tuple(remaining), **{name: tuple(ids) for name, ids in touched.items()})


def apply_files(
    questions: Sequence[Question], paths: Iterable[Path], version: int | None = None
) -> tuple[tuple[Question, ...], tuple[dict[str, Any], ...]]:
    """The questions after the decisions of all files, and per file its version, hash and what it changed: what a card or a
    result records. `absent` counts decisions on questions that do not exist: of another set, or with ids that
    changed."""
    summaries, ids = [], {question.id for question in questions}
    for path in paths:
        file = read_decisions(path, version)
        applied = apply_decisions(questions, file.decisions)
        questions = applied.questions
        counts = {name: len(getattr(applied, name)) for name in ("fixed", "quarantined", "stale", "open")}
        absent = sum(decision.id not in ids for decision in file.decisions)
        summaries.append({"file": str(path), "version": file.version, "sha256": file.sha256} | counts | {"absent": absent})
    return tuple(questions), tuple(summaries)


def merged(path: Path, suspects: Mapping[str, Decision]) -> str:
    """The text of a file of decisions with the suspects added: decisions on the same version of a question stay, open and
    outdated ones are renewed. A file that changes gets the next version."""
    before = validated(Decisions, load_tree(path)) if path.exists() else None
    by_id = {decision.id: decision for decision in before.decisions} if before else {}
    for name, suspect in suspects.items():
        old = by_id.get(name)
        if old is None or old.decision == Verdict.OPEN or old.fingerprint != suspect.fingerprint:
            by_id[name] = suspect
    tree = [decision.model_dump(mode="json", exclude_none=True) for decision in by_id.values()]
    same = before is not None and tree == [
        decision.model_dump(mode="json", exclude_none=True) for decision in before.decisions
    ]
    version = before.version + (not same) if before else 1
    return dump_tree({"version": version, "decisions": tree})


def _right(question: Question) -> str:
    return normalised_option(question.options[question.answer])


def _fixed(question: Question, decision: Decision) -> Question:
    right_text = normalised_option(decision.answer or "")
    letters = [letter for letter, text in question.options.items() if normalised_option(text) == right_text]
    if len(letters) != 1:
        raise ConfigError(
            f"decisions: {question.id}: answer {decision.answer!r} is {len(letters)} of its options, not one; "
            f"give the text of one option"
        )
    return replace(question, answer=letters[0])
