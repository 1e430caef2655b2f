r"""Read the boxed answer letter out of a response: strict, pure, linear in the length of the text.

Which box. The `\boxed{...}` that opens last among those that close decides; white space may precede its brace. Of
nested boxes that is the inner one; a later box that never closes does not count. `\{` and `\}` are characters, not braces.

Its content. Characters are folded (folding.py: full-width forms, quotes, dashes, invisible ones), then `$...$`, `\text{}`,
`\textbf{}`, `\mathbf{}`, `\mathrm{}`, pairs of () [] {} (also `\{ \}`, `\( \)`, `\[ \]`) and a trailing `.`, `)` or `:` are
removed. What remains must be one letter of the question, in either case, or that letter, a separator and the option's own
text (case, the amount of white space, double quotes at the ends and the forms that folding.py knows do not count). All else
is no answer:

    \boxed{C}   \boxed {(c)}   \boxed{\text{C.}}   \boxed{C: Vitamin C}   \boxed{B} or \boxed{C}    -> C
    \boxed{}   \boxed{B, C}   \boxed{Vitamin C}   \boxed{C: Vitamin B}   \boxed C   \fbox{C}   boxed{C}   -> None
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from alphamed.answers.folding import fold, fold_characters

# What the search for boxes matches, in this order: the start of a box, an escaped brace, an escaped backslash (unless
# it belongs to `\\boxed`, which a model writes that escapes its own output), a brace.
_MARK = re.compile(r"(?P<box>\\boxed\s*\{)|\\[{}]|\\\\(?!boxed)|(?P<brace>[{}])")
_WRAPPER = re.compile(r"\\(?:textbf|text|mathbf|mathrm)\s*(?=\{)")
_ESCAPED = re.compile(r"\\(?=[()\[\]{}%&#_])")  # LaTeX writes `50\%`
_CLOSES = {"(": ")", "[": "]", "{": "}"}
_TRAILING = ".):"
_SEPARATORS = ".):,;-=\u3001"
_SURPLUS = 1_000  # a box that is so much longer than every option does not just repeat one
_MAX_SEPARATORS = 3  # as in `C.) - text`; a bound keeps the reading linear


def extract_answer(text: str, options: Mapping[str, str]) -> str | None:
    """The letter (a key of `options`) that the last closed box of `text` states, or None where it states none.

    `options` maps single letters to option texts. Never raises on any text; time and memory are linear in its length.
    """
    content = _last_box(text)
    return None if content is None else _read(content, options)


def boxed_text(text: str) -> str | None:
    """What the last closed box of `text` holds, folded and peeled, in lower case; None without a box. For answers that are
    no letters."""
    content = _last_box(text)
    return None if content is None else _canonical(content)


def _last_box(text: str) -> str | None:
    """The content of the closed box that opens last."""
    start, end = max(closed_boxes(text), default=(-1, -1))
    return None if start < 0 else text[start:end]


def closed_boxes(text: str) -> list[tuple[int, int]]:
    """(start, end) of the content of every box that closes, in the order of their ends. One pass: every brace is pushed
    and popped at most once."""
    boxes: list[tuple[int, int]] = []
    open_braces: list[int] = []  # where the content of a box starts, or -1 for a brace that opens no box
    first = text.find("\\boxed")  # no brace before it closes a box; most of a response precedes it
    for mark in _MARK.finditer(text, first) if first >= 0 else ():
        if mark["box"]:
            open_braces.append(mark.end())
        elif mark["brace"] == "{":
            open_braces.append(-1)
        elif mark["brace"] and open_braces:
            opened = open_braces.pop()
            if opened >= 0:
                boxes.append((opened, mark.start()))
    return boxes


def _read(content: str, options: Mapping[str, str]) -> str | None:
    """The letter that the content of a box states."""
    text = _fold(content)
    partner = _partners(text)
    low, high = _peel(text, partner, 0, len(text))
    if low == high:
        return None
    if high - low == 1:
        return _letter(text[low], options)
    head_end = _head_end(text, partner, low, high)
    head_low, head_high = _peel(text, partner, low, head_end)
    if head_high - head_low != 1 or (head_end - low == 1 and text[head_end].isalnum()):
        return None  # a longer head, or no separator between the letter and what follows
    letter = _letter(text[head_low], options)
    return letter if letter is not None and _states_own_text(text[low:high], head_end - low, letter, options) else None


def _letter(character: str, options: Mapping[str, str]) -> str | None:
    if not character.isascii():  # "\u017f".upper() is "S": foreign letters are not folded by accident
        return None
    return next((c for c in (character, character.upper(), character.lower()) if c in options), None)


def _states_own_text(text: str, head_end: int, letter: str, options: Mapping[str, str]) -> bool:
    """Whether `text`, a head of `head_end` characters that states `letter`, continues with a separator and the letter's
    own option text, or what follows the letter in it where the option carries its own ("B. Liver").

    The separators are taken off one by one and the first reading that is any option's text decides: "D: -5" names the
    option "-5" even where another option is "5". Where "A virus" as a whole is an option's text, it states no letter.
    """
    if len(text) > _SURPLUS + 4 * max(map(len, options.values())):
        return False
    texts = {key: _canonical(option) for key, option in options.items()}
    rest = text[head_end:]
    if _canonical(text) in texts.values():  # "B. Liver" where that is the text of B: letter and words are its own
        return texts[letter] == _canonical(text) and rest.lstrip()[:1] in (*_SEPARATORS,)
    own = _without_label(options[letter], letter)
    for _ in range(_MAX_SEPARATORS + 1):
        reading = _canonical(rest)
        if reading in texts.values():
            return texts[letter] == reading
        if reading and reading == own:
            return True
        rest = rest.lstrip()
        if not rest or rest[0] not in _SEPARATORS:
            return False
        rest = rest[1:]
    return False


def _without_label(option: str, letter: str) -> str | None:
    """An option's text, as it is compared, after the letter that it carries itself ("B. Liver"); None without one."""
    head, rest = _fold(option).strip()[:1], _fold(option).strip()[1:].lstrip()
    return _canonical(rest[1:]) if head.casefold() == letter.casefold() and rest[:1] in ".):" and rest[:1] else None


def _canonical(text: str) -> str:
    """A text as it is compared: folded, peeled, without double quotes at its ends (one set of questions has a stray one
    there), lower case, white space collapsed."""
    text = _bare(_bare(_fold(fold(text))).strip('" \t\r\n'))
    return " ".join(text.casefold().split())


def _bare(text: str) -> str:
    low, high = _peel(text, _partners(text), 0, len(text))
    return text[low:high]


def _fold(text: str) -> str:
    """Characters folded, wrapper commands cut to their braces, escapes removed, `$$` to `$`."""
    return _ESCAPED.sub("", _WRAPPER.sub("", fold_characters(text))).replace("$$", "$")


def _partners(text: str) -> dict[int, int]:
    """Position of each bracket that has a partner -> position of that partner, both ways."""
    partner: dict[int, int] = {}
    opened: list[int] = []
    for i, character in enumerate(text):
        if character in _CLOSES:
            opened.append(i)
        elif character in ")]}" and opened and _CLOSES[text[opened[-1]]] == character:
            j = opened.pop()
            partner[i], partner[j] = j, i
    return partner


def _peel(text: str, partner: Mapping[int, int], low: int, high: int) -> tuple[int, int]:
    """Narrow [low, high) by white space, brackets and `$` around everything, and trailing punctuation.

    Only the two ends move, each at most once over the text, and the search for the partner of a `$` happens at most
    twice: it finds the last character, or the loop ends. A closing bracket that has its partner inside, as in
    "iron (II)", is part of the text and stays.
    """
    while low < high:
        first, last = text[low], text[high - 1]
        if first.isspace():
            low += 1
        elif last.isspace():
            high -= 1
        elif partner.get(low) == high - 1 or (first == last == "$" and text.find("$", low + 1, high) == high - 1):
            low, high = low + 1, high - 1
        elif last in _TRAILING and high - 1 not in partner:
            high -= 1
        else:
            break
    return low, high


def _head_end(text: str, partner: Mapping[int, int], low: int, high: int) -> int:
    """Where the first piece of text[low:high] ends: a bracket or `$...$` as a whole, else one character."""
    if low in partner:
        return min(partner[low] + 1, high)
    if text[low] == "$":
        return text.find("$", low + 1, high) + 1 or low + 1
    return low + 1
