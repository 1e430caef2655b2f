"""How texts are compared: one folding of characters that look alike or are invisible. Standard library only.

Folded are quotes (curly, low, angled, primes), dashes and minus signs, spaces of every width, characters without width
(zero-width spaces and joiners, soft hyphens, byte order marks, direction marks), full-width forms, ligatures and the
other compatibility forms of Unicode, and accents written as separate characters. Both sides of a comparison are folded,
and nothing else is: what a model is shown, and what is written, is unchanged except for white space at the ends.
"""

from __future__ import annotations

import re
import unicodedata

_ALIKE = {
    "'": "\u2018\u2019\u201a\u201b\u2032\u2035\u02b9\u02bb\u02bc\u02bd\u00b4\u2039\u203a\u275b\u275c",
    '"': "\u201c\u201d\u201e\u201f\u2033\u2036\u02ba\u00ab\u00bb\u301d\u301e\u301f\u275d\u275e",
    "-": "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u02d7\u2043\u2796\u058a\u05be\u1806\u2e3a\u2e3b\u301c\u3030"
    "\ufe31\ufe32\ufe58\ufe63",
    ".": "\u3002\uff61",  # full stops of Chinese and Japanese
    "\u00b0": "\u00ba\u02da",  # degree: 38ºC
    "\u0394": "\u2206",  # delta: ∆G
}
_UNSEEN = (
    0x00AD,
    0x034F,
    0x061C,
    0x115F,
    0x1160,
    0x17B4,
    0x17B5,
    *range(0x180B, 0x180F),
    *range(0x200B, 0x2010),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    0x3164,
    *range(0xFE00, 0xFE10),
    0xFEFF,
    0xFFA0,
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE01F0),
)
_REPLACEMENTS: dict[int, str | None] = (
    {0xFF01 + i: chr(0x21 + i) for i in range(94)}  # U+FF01..U+FF5E are `!`..`~`
    | {ord(other): sign for sign, others in _ALIKE.items() for other in others}
    | dict.fromkeys(_UNSEEN)
)
# All that can change: characters beyond ASCII, and the letter before an accent. Ordering the accents in a long run of
# accents takes time quadratic in its length: runs are cut into pieces.
_FOREIGN, _ACCENT = re.compile(r"[^\x00-\x7f]{1,400}"), re.compile("[\u0300-\u036f]")
_FOREIGN_WITH_LETTER = re.compile(rf"[\x00-\x7f]?{_FOREIGN.pattern}")


def fold_characters(text: str) -> str:
    """`text` with plain quotes, dashes and full-width forms, without invisible characters. No letter becomes another."""
    return text if text.isascii() else _FOREIGN.sub(lambda piece: piece[0].translate(_REPLACEMENTS), text)


def fold(text: str) -> str:
    """`text` as it is compared. Case and the amount of white space are left to the caller. Linear in its length."""
    if text.isascii():
        return text
    return (_FOREIGN_WITH_LETTER if _ACCENT.search(text) else _FOREIGN).sub(_folded, text)


def _folded(piece: re.Match[str]) -> str:
    """Translated twice: a few compatibility forms consist of such characters."""
    return unicodedata.normalize("NFKC", piece[0].translate(_REPLACEMENTS)).translate(_REPLACEMENTS)
