"""Two evaluations of the same questions: which answers flipped, whether that is more than chance, where a gain comes from.

McNemar's exact test asks only of the questions on which the two differ: were both equally good, each of them would be as
likely to go one way as the other (McNemar 1947; exact binomial form). It is far sharper than two intervals side by side,
because what both get right or wrong does not blur it.
"""
from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Split:
    """A gain in accuracy as the sum of two parts: more answers that are boxed at all (format), and more right ones among
    those boxed."""
    gain: float
    from_boxed: float
    from_accuracy_among_boxed: float


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p: of gained + lost fair coins, at most min(gained, lost) on one side, times two, at most 1."""
    n, fewer = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2 ** n)


def split_gain(boxed_before: float, accuracy_before: float, boxed_after: float, accuracy_after: float) -> Split:
    """accuracy = boxed x among, so the gain is exactly
    (boxed' - boxed) (among + among') / 2 + (among' - among) (boxed + boxed') / 2.

    Where one side boxes nothing it has no accuracy among boxed; it is given the other's: all of the gain is format then.
    """
    among_before = accuracy_before / boxed_before if boxed_before else None
    among_after = accuracy_after / boxed_after if boxed_after else None
    first = among_before if among_before is not None else among_after or 0.0
    second = among_after if among_after is not None else first
    return Split(accuracy_after - accuracy_before, (boxed_after - boxed_before) * (first + second) / 2,
                 (second - first) * (boxed_before + boxed_after) / 2)
