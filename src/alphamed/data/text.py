"""How texts of questions are compared: normalised forms, words, and the fingerprint that names one version of a question.
Also counts as text.

Chinese, Japanese, Thai, Lao, Khmer and Burmese put no spaces between words: there a character (with its marks) counts as
a word, so that stems are compared by characters and pairs of neighbours. A text may mix both kinds of script.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence

from alphamed.answers.folding import fold
from alphamed.records import Question

_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")  # "7.4" is one word; underscores of fill-in blanks are none


def _of(kinds: str, *blocks: tuple[int, int]) -> str:
    """The characters of these blocks whose category begins with one of `kinds`, for a class of a regular expression."""
    return "".join(
        chr(code) for first, end in blocks for code in range(first, end) if unicodedata.category(chr(code))[0] in kinds
    )


_FAR = re.compile("[\u0e00-\u1fff\u2e80-\U0003fffd]")  # where such scripts are: a quick test for other texts


_BLOCKS = (
    (0x0E00, 0x0F00),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
    (0x3005, 0x3008),
    (0x3040, 0x3100),
    (0x31F0, 0x3200),
    (0xA9E0, 0xAA00),
    (0xAA60, 0xAA80),
)  # Thai and Lao, Burmese, Khmer, Japanese, Burmese
_UNSPACED = _of("LN", *_BLOCKS) + "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
_MARKS = _of("M", *_BLOCKS)
_CHARACTER = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
_MIXED = re.compile(rf"{_CHARACTER.pattern}|[^\W_{_UNSPACED}]+(?:\.\d+)?")
_PIECE = re.compile(rf"{_CHARACTER.pattern}|[^\s{_UNSPACED}]+")
_BETWEEN = re.compile(f"(?<=[{_UNSPACED}{_MARKS}]) (?=[{_UNSPACED}])")
STEM_LETTERS = 6
"""Words are compared by their first letters: hypertension and hypertensive agree, and no stemmer has to know medicine."""

# Words that a rewording changes without changing the question. Negations and numbers are kept: they change the answer.
STOP_WORDS = frozenset(
    """
a an the of in on at to for from by with as and or is are was were be been being has have had do does did it its this that
these those which what who whom whose when where how there he she his her him they their them most likely following patient
would will can could may might should one all you your
""".split()
)
# The same in Chinese and Japanese. They are searched in the text, since no space marks where a word ends.
_STOP_PHRASES = re.compile(
    "|".join(
        sorted(
            """
下列 以下 关于 關於 有关 有關 哪一项 哪一項 哪项 哪項 哪一种 哪一種 哪种 哪種 哪一个 哪一個 哪个 哪個 哪些 哪
何者 何种 什么 什麼 患者 病人 一名 一位
最可能 可能 的 是 了 在 为 為 有 和 与 與 及 或 其 该 該 此 次のうち どれか どれ の は が を に で と
""".split(),
            key=len,
            reverse=True,
        )
    )
)


def normalised(text: str) -> str:
    """The words of a text in lower case, one space between (none between characters of scripts without spaces): punctuation,
    case, accents' encodings and white space do not count."""
    text = " ".join(words(text))
    return _BETWEEN.sub("", text) if is_unspaced(text) else text


def words(text: str) -> list[str]:
    """Words in their order; of scripts without spaces single characters."""
    return _words(fold(text))


def _words(folded: str) -> list[str]:
    return (_MIXED if is_unspaced(folded) else _WORD).findall(folded.lower())


def is_unspaced(text: str) -> bool:
    """Whether a text has characters of a script that puts no spaces between words."""
    return not text.isascii() and _FAR.search(text) is not None and _CHARACTER.search(text) is not None


def pieces(text: str) -> list[str]:
    """Pieces between spaces; of scripts without spaces single characters, and no punctuation alone."""
    if not is_unspaced(text):
        return text.split()
    return [piece for piece in _PIECE.findall(text) if any(map(str.isalnum, piece))]


def word_count(text: str) -> int:
    """Words as people count them, separated by spaces; of scripts without spaces every character counts as one."""
    return len(pieces(text))


def content_words(text: str) -> list[str]:
    """Words without stop words, cut to STEM_LETTERS; of scripts without spaces characters without those of stop phrases."""
    text = fold(text)
    if is_unspaced(text):
        text = _STOP_PHRASES.sub(" ", text)
    return [word[:STEM_LETTERS] for word in _words(text) if word not in STOP_WORDS]


def content_length(content: Sequence[str]) -> float:
    """Length in words of a stem with these content words: a character counts half, as words of two characters are usual."""
    if "".join(content).isascii():
        return len(content)
    return len(content) - sum(map(is_unspaced, content)) / 2


def normalised_option(text: str) -> str:
    """An option's words, or the text itself where it has none (`+`, `-`, `>`)."""
    return normalised(text) or fold(text).strip()


def option_set(options: Mapping[str, str]) -> tuple[str, ...]:
    """Normalised option texts without letters and order."""
    return tuple(sorted(normalised_option(text) for text in options.values()))


def fingerprint(question: Question) -> str:
    """16 hex digits that identify the question and its right text, independent of letters and id."""
    content = [question.question, question.context, sorted(question.options.values()), question.options[question.answer]]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 bad row, 2 bad rows."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
