"""Two evaluations of the same questions: which answers flipped, whether that is more than chance, where a gain comes from.

McNemar's exact test asks only of the questions on which the two differ: were both equally good, each of them would be as
likely to go one way as the other (McNemar 1947; exact binomial form). It is far sharper than two intervals side by side,
because what both get right or wrong does not blur it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphamed.evaluation.items import GradedAnswer, stats_of
from alphamed.evaluation.sampling import vote

Sets = Mapping[str, Mapping[str, Sequence[GradedAnswer]]]
"""Set -> question id -> its items in the order of samples."""


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
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)


def split_gain(boxed_before: float, accuracy_before: float, boxed_after: float, accuracy_after: float) -> Split:
    """accuracy = boxed x among, so the gain is exactly
    (boxed' - boxed) (among + among') / 2 + (among' - among) (boxed + boxed') / 2.

    Where one side boxes nothing it has no accuracy among boxed; it is given the other's: all of the gain is format then.
    """
    among_before = accuracy_before / boxed_before if boxed_before else None
    among_after = accuracy_after / boxed_after if boxed_after else None
    first = among_before if among_before is not None else among_after or 0.0
    second = among_after if among_after is not None else first
    return Split(
        accuracy_after - accuracy_before,
        (boxed_after - boxed_before) * (first + second) / 2,
        (second - first) * (boxed_before + boxed_after) / 2,
    )


def right(items: Sequence[GradedAnswer]) -> bool:
    """Whether a question counts as solved: the only sample is right, or the majority vote is, with no other as strong."""
    return vote([item.vote for item in items], items[0].asked.question.answer) == 1.0


def compare_sets(
    before: Mapping[str, Sequence[GradedAnswer]], after: Mapping[str, Sequence[GradedAnswer]]
) -> dict[str, Any]:
    """The comparison of two answered sets (question id -> its items). Questions that are in one of them only, or with
    another text or key, are left out and counted. ValueError where none is left."""
    shared = [i for i in before if i in after and _alike(before[i][0], after[i][0])]
    if not shared:
        raise ValueError("no question is the same in both")
    was, now = {i: right(before[i]) for i in shared}, {i: right(after[i]) for i in shared}
    gained = [i for i in shared if now[i] and not was[i]]
    lost = [i for i in shared if was[i] and not now[i]]
    old, new = _rates([before[i] for i in shared]), _rates([after[i] for i in shared])
    split = split_gain(*old, *new)
    return {
        "n": len(shared),
        "left_out": len(before.keys() | after.keys()) - len(shared),
        "before": {"accuracy": old[1], "boxed": old[0]},
        "after": {"accuracy": new[1], "boxed": new[0]},
        "gain": split.gain,
        "gain_from_boxed": split.from_boxed,
        "gain_from_accuracy_among_boxed": split.from_accuracy_among_boxed,
        "both_right": sum(was[i] and now[i] for i in shared),
        "gained": len(gained),
        "lost": len(lost),
        "both_wrong": sum(not was[i] and not now[i] for i in shared),
        "p_mcnemar": mcnemar(len(gained), len(lost)),
        "flipped": [_flip(i, before[i], after[i], "gained" if now[i] else "lost") for i in (*gained, *lost)],
    }


def compare(before: Sets, after: Sets) -> dict[str, dict[str, Any]]:
    """Set -> comparison, for the sets that both evaluations hold with some question in common."""
    return {
        name: compare_sets(before[name], other)
        for name, other in after.items()
        if any(i in other and _alike(items[0], other[i][0]) for i, items in before.get(name, {}).items())
    }


def line(name: str, comparison: Mapping[str, Any]) -> str:
    """One line for the terminal."""
    return (
        f"{name} (n = {comparison['n']:,}): {100 * comparison['before']['accuracy']:.1f}% -> "
        f"{100 * comparison['after']['accuracy']:.1f}%, {100 * comparison['gain']:+.1f} points = "
        f"{100 * comparison['gain_from_boxed']:+.1f} boxed more often "
        f"{100 * comparison['gain_from_accuracy_among_boxed']:+.1f} right among boxed; {comparison['gained']} gained, "
        f"{comparison['lost']} lost, McNemar p = {comparison['p_mcnemar']:.3g}"
        + (f"; {comparison['left_out']} questions are not in both" if comparison["left_out"] else "")
    )


def _alike(first: GradedAnswer, second: GradedAnswer) -> bool:
    """Whether two items answer the same question with the same key. A variant may have changed letters and options."""
    a, b = first.asked.question, second.asked.question
    same_key = a.options[a.answer] == b.options[b.answer] or first.asked.variant != second.asked.variant
    return same_key and (a.question, a.context) == (b.question, b.context)


def _rates(answers: Sequence[Sequence[GradedAnswer]]) -> tuple[float, float]:
    """(boxed share, accuracy) over all samples."""
    stats = stats_of(answer for of_question in answers for answer in of_question)
    return stats.share(stats.boxed), stats.accuracy


def _flip(i: str, before: Sequence[GradedAnswer], after: Sequence[GradedAnswer], way: str) -> dict[str, Any]:
    question = after[0].asked.question
    return {
        "id": i,
        "way": way,
        "question": question.question,
        "answer": question.options[question.answer],
        "before": [_answer(item) for item in before],
        "after": [_answer(item) for item in after],
    }


def _answer(item: GradedAnswer) -> dict[str, Any]:
    options = item.asked.question.options
    return {"outcome": str(item.outcome), "letter": item.letter, "option": options.get(item.letter or "")}
