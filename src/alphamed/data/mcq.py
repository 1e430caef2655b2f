"""The schema of a multiple-choice question: one row of data becomes a `Question` or a plain statement of what is wrong.

A row is an object with `id`, `question`, `options` (letter -> text, letters A, B, C ... in this order), `answer` (one
of the letters) and, where known, `context`, `source`, `level` (1 easy .. 6 hard) and `informativeness` (a bin, 1 .. 1000).
Optional keys may be null. Other keys are allowed and ignored: public data sets carry licence, split, origin and the like.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from alphamed.answers.folding import fold_characters
from alphamed.records import Question

LEVELS = range(1, 7)
BINS = range(1, 1001)
"""Of informativeness. Far more than anyone will distinguish: a larger number is a mistake."""
MIN_OPTIONS = 2
MAX_OPTIONS = len(string.ascii_uppercase)
_OPTIONS_IN_TEXT = re.compile(r"(?s)(?:^|\W)\(?A[).:]\s.*\W\(?B[).:]\s")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them (\ud800), UTF-8 cannot encode them


class QuestionError(ValueError):
    """One row is not a question. `problem` says why in a short phrase, the message puts the place before it."""

    def __init__(self, where: str, problem: str):
        super().__init__(where, problem)
        self.where, self.problem = where, problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A bad row: its file, its line (its row in a Parquet file, from 1) and what is wrong with it."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read: its place and its value, or, where it could not even be read, the `problem`."""

    file: str
    line: int
    value: Any = None
    problem: str | None = None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class NoKey:
    """In place of the answer of a row whose key names none of its options; `problem` says why."""

    problem: str


def parse_question(row: object, where: str) -> Question:
    """The question in `row`; white space around texts is dropped. Raises QuestionError with the first problem."""
    for problem in _problems(row):
        raise QuestionError(where, problem)
    assert isinstance(row, Mapping)
    return Question(
        id=row["id"].strip(),
        question=row["question"].strip(),
        options={letter: text.strip() for letter, text in row["options"].items()},
        answer=row["answer"],
        context=(row.get("context") or "").strip() or None,
        source=(row.get("source") or "").strip() or None,
        level=row.get("level"),
        informativeness=row.get("informativeness"),
    )


def check_questions(rows: Iterable[RawRow]) -> tuple[list[Question], list[RowProblem]]:
    """Parse all rows and split them into questions and problems. An id that an earlier good row has is a problem."""
    questions: list[Question] = []
    problems: list[RowProblem] = []
    first_place: dict[str, str] = {}
    for row in rows:
        try:
            if row.problem is not None:
                raise QuestionError(row.where, row.problem)
            question = parse_question(row.value, row.where)
            if question.id in first_place:
                place = first_place[question.id]
                raise QuestionError(row.where, f"duplicate id {short(question.id)}, first at {place}")
        except QuestionError as e:
            problems.append(RowProblem(row.file, row.line, e.problem))
            continue
        first_place[question.id] = row.where
        questions.append(question)
    return questions, problems


def short(value: object, limit: int = 60) -> str:
    """`value` as Python writes it, on one line, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ----------------------------------------------------------------------------------------------------------- the checks
def _problems(row: object) -> Iterator[str]:
    """What is wrong with a row, in order: each check may rely on the ones before it."""
    if not isinstance(row, Mapping):
        yield f"not an object of keys and values but {_kind(row)}"
        return
    yield from _text_problems(row, "id")
    yield from _text_problems(row, "question")
    yield from _options_problems(row.get("options"), row["question"])
    if isinstance(row.get("answer"), NoKey):
        yield row["answer"].problem
    yield from _text_problems(row, "answer")
    if row["answer"] not in row["options"]:
        yield f"answer {short(row['answer'])} is not among the options {_letters(row['options'])}"
    yield from _text_problems(row, "context", optional=True)
    yield from _text_problems(row, "source", optional=True)
    for key, scale in (("level", LEVELS), ("informativeness", BINS)):
        value = row.get(key)
        if value is not None and (type(value) is not int or value not in scale):
            yield f"{key} {short(value)} is not a whole number from {scale[0]} to {scale[-1]}"


def _text_problems(row: Mapping[str, Any], key: str, optional: bool = False) -> Iterator[str]:
    value = row.get(key)
    if value is None:
        if not optional:
            yield f"no {key}"
    elif not isinstance(value, str):
        yield f"{key} is {_kind(value)}, not text"
    elif not fold_characters(value).strip() and not optional:
        yield f"{key} is empty"
    elif _LONE_SURROGATE.search(value):
        yield f"{key} holds half a surrogate pair, which is not valid Unicode"


def _options_problems(options: object, question: str) -> Iterator[str]:
    if options is None:
        yield (
            "no options: they are in the text of the question; take them out of it and give them as options (letter -> text)"
            if _OPTIONS_IN_TEXT.search(question)
            else "no options"
        )
    if isinstance(options, list) and len(options) > MAX_OPTIONS:
        yield f"{len(options)} options, at most {MAX_OPTIONS} can have a letter"
    if isinstance(options, list):
        for wrong in (text for text in options if text is not None and not isinstance(text, str)):
            yield f"an option is {_kind(wrong)} ({short(wrong)}), not text"
    if not isinstance(options, Mapping):
        yield f"options are {_kind(options)}, not letter -> text"
        return
    if len(options) < MIN_OPTIONS:
        yield f"{len(options)} option{'s' * (len(options) != 1)}, at least {MIN_OPTIONS} are needed"
    if list(options) != list(string.ascii_uppercase[: len(options)]):
        yield f"option letters are {_letters(options)}, not A, B, C ... in order"
    first_letter: dict[str, str] = {}
    for letter, text in options.items():
        if not isinstance(text, str):
            yield f"option {letter} is {_kind(text)}, not text"
        if not fold_characters(text).strip():  # a text without visible characters cannot be chosen
            yield f"option {letter} is empty"
        if _LONE_SURROGATE.search(text):
            yield f"option {letter} holds half a surrogate pair, which is not valid Unicode"
        same = " ".join(fold_characters(text).split())  # case counts: genotypes `Aa` and `aa` differ
        if same in first_letter:
            yield f"options {first_letter[same]} and {letter} are the same: {short(same)}"
        first_letter[same] = letter


def _letters(options: Mapping[object, object]) -> str:
    shown = ", ".join(str(letter) for letter in options)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    return {
        "NoneType": "nothing",
        "str": "text",
        "int": "a number",
        "float": "a number",
        "list": "a list",
        "dict": "an object",
        "bytes": "bytes",
    }.get(type(value).__name__, type(value).__name__)
