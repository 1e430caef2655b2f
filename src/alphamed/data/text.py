"""How texts of questions are compared: normalised forms, words, and the fingerprint that names one version of a question.
Also counts in words."""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from alphamed.folding import fold
from alphamed.records import Question

_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")        # "7.4" is one word; underscores of fill-in blanks are none
STEM_LETTERS = 6
"""Words are compared by their first letters: hypertension and hypertensive agree, and no stemmer has to know medicine."""

# What a rewording changes without changing what is asked. Negations and numbers are kept: they change the answer.
STOP_WORDS = frozenset("""
a an the of in on at to for from by with as and or is are was were be been being has have had do does did it its this that
these those which what who whom whose when where how there he she his her him they their them most likely following patient
would will can could may might should one all you your
""".split())


def normalised(text: str) -> str:
    """The words of a text in lower case, one space between: punctuation, case, accents' encodings and white space do not
    count."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    return _WORD.findall(fold(text).lower())


def content_words(text: str) -> list[str]:
    """Words without stop words, cut to STEM_LETTERS."""
    return [word[:STEM_LETTERS] for word in words(text) if word not in STOP_WORDS]


def normalised_option(text: str) -> str:
    """An option's words, or the text itself where it has none (`+`, `-`, `>`)."""
    return normalised(text) or fold(text).strip()


def option_set(options: Mapping[str, str]) -> tuple[str, ...]:
    """Normalised option texts without letters and order."""
    return tuple(sorted(normalised_option(text) for text in options.values()))


def fingerprint(question: Question) -> str:
    """16 hex digits that name what is asked and which text is right, whatever the letters and the id are."""
    content = [question.question, question.context, sorted(question.options.values()), question.options[question.answer]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 bad row, 2 bad rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def draw(*parts: object) -> str:
    """A pseudo-random sort key that depends on its parts alone: choices made with it do not depend on file order or
    Python version."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()
