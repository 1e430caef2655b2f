"""How graded responses choose among the options: whether text and boxed letter agree, how evenly letters and texts are chosen.

A model that has learnt the form of an answer and nothing else boxes always, boxes the letter of the option that its text
names, chooses every letter and every text equally often, and is right as often as chance. Pure; no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alphamed.answers.extraction import closed_boxes
from alphamed.answers.folding import fold
from alphamed.data.text import normalised_option
from alphamed.evaluation.score import Share, percent
from alphamed.records import Outcome, ScoredGroup


@dataclass(frozen=True, slots=True)
class Response:
    """A graded response to a question. `letter` is the boxed one, None where the response counts as not boxed."""

    question_id: str
    options: Mapping[str, str]
    key: str
    text: str
    letter: str | None


@dataclass(frozen=True, slots=True)
class Entropy:
    """Of a distribution of choices, in bits: as observed (with Miller's correction for few cases) and as it is when every
    option of every question is chosen equally often."""

    bits: float
    even_bits: float

    @property
    def share(self) -> float:
        """Of the entropy of an even choice; 1 where there is no choice."""
        return self.bits / self.even_bits if self.even_bits else 1.0


@dataclass(frozen=True, slots=True)
class Choices:
    """Statistics of the responses to one set. `agree`: the text names the option whose letter is boxed, among boxed responses
    that name one; `letters`: letter -> (share of boxed responses, share under even choice); `same`: of pairs of boxed
    responses to one question those that choose the same option, and `same_chance` what even choice gives (None without
    pairs)."""

    boxed: Share
    agree: Share
    right: Share
    chance: float
    letters: Mapping[str, tuple[float, float]]
    letter_entropy: Entropy
    text_entropy: Entropy
    same: float | None
    same_chance: float | None

    def plain(self) -> dict[str, Any]:
        return {
            "boxed": _plain(self.boxed),
            "text_and_letter_agree": _plain(self.agree),
            "right": _plain(self.right),
            "chance": self.chance,
            "letters": {letter: {"share": share, "even": even} for letter, (share, even) in self.letters.items()},
            "letter_entropy_bits": self.letter_entropy.bits,
            "letter_entropy_even_bits": self.letter_entropy.even_bits,
            "text_entropy_bits": self.text_entropy.bits,
            "text_entropy_even_bits": self.text_entropy.even_bits,
            "same_choice": self.same,
            "same_choice_chance": self.same_chance,
        }


def choices_of_groups(groups: Iterable[ScoredGroup]) -> Choices | None:
    """The statistics of graded groups; None as `choices`."""
    return choices(
        [
            Response(
                scored.group.question.id,
                scored.group.question.options,
                scored.group.question.answer,
                rollout.text,
                letter if outcome in (Outcome.CORRECT, Outcome.WRONG) else None,
            )
            for scored in groups
            for rollout, letter, outcome in zip(scored.group.rollouts, scored.letters, scored.outcomes, strict=True)
        ]
    )


def choices(responses: Sequence[Response]) -> Choices | None:
    """None without responses or where one has no options."""
    if not responses or not all(response.options for response in responses):
        return None
    boxed = [response for response in responses if response.letter is not None]
    named = [(response, named_option(response.text, response.options)) for response in boxed]
    letters = Counter(str(response.letter) for response in boxed)
    even = _even(list(response.options) for response in boxed)
    texts = Counter(normalised_option(response.options[str(response.letter)]) for response in boxed)
    even_texts = _even([[normalised_option(text) for text in response.options.values()] for response in boxed])
    same, same_chance = _same(boxed)
    return Choices(
        Share(len(boxed), len(responses)),
        Share(sum(name == response.letter for response, name in named), sum(name is not None for _, name in named)),
        Share(sum(response.letter == response.key for response in responses), len(responses)),
        sum(1 / len(response.options) for response in responses) / len(responses),
        {letter: (letters[letter] / len(boxed), even[letter] / len(boxed)) for letter in sorted(even)},
        Entropy(_bits(letters), _bits(even, few_cases=False)),
        Entropy(_bits(texts), _bits(even_texts, few_cases=False)),
        same,
        same_chance,
    )


def _even(options: Iterable[Sequence[str]]) -> dict[str, float]:
    """How often each letter or text is chosen when every option of a response's question is equally likely."""
    expected: dict[str, float] = defaultdict(float)
    for of_response in options:
        for name in of_response:
            expected[name] += 1 / len(of_response)
    return expected


def _bits(counts: Mapping[str, float], few_cases: bool = True) -> float:
    """Entropy of a distribution. `few_cases` adds Miller's correction (1955), (number of kinds - 1) / 2n nats."""
    total = sum(counts.values())
    if not total:
        return 0.0
    nats = -sum(count / total * math.log(count / total) for count in counts.values() if count)
    kinds = sum(count > 0 for count in counts.values())
    corrected = min(nats + (kinds - 1) / (2 * total), math.log(kinds)) if few_cases else nats
    return corrected / math.log(2)


def _same(boxed: Sequence[Response]) -> tuple[float | None, float | None]:
    by_question: dict[str, list[Response]] = defaultdict(list)
    for response in boxed:
        by_question[response.question_id].append(response)
    pairs, same, chance = 0, 0, 0.0
    for responses in by_question.values():
        of_question = math.comb(len(responses), 2)
        pairs += of_question
        same += sum(math.comb(count, 2) for count in Counter(response.letter for response in responses).values())
        chance += of_question / len(responses[0].options)
    return (same / pairs, chance / pairs) if pairs else (None, None)


# ---------------------------------------------------------------------------------------------------- what a text names
def named_option(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option whose text is mentioned last before the last box of `text` (in all of it without a box); None
    where none is. A mention inside that of a longer option does not count. Case, white space and look-alike signs do not."""
    start = max(closed_boxes(text), default=(len(text), 0))[0]
    before = text[: text.rfind("\\boxed", 0, start)] if start < len(text) else text
    folded = _folded(before)
    spans = [
        (match.start(), match.end(), letter)
        for letter, option in options.items()
        if _folded(option)
        for match in _mention(_folded(option)).finditer(folded)
    ]
    free = [
        span
        for span in spans
        if not any(other[0] <= span[0] and span[1] <= other[1] and other[:2] != span[:2] for other in spans)
    ]
    return max(free, key=lambda span: span[1])[2] if free else None


def _folded(text: str) -> str:
    return " ".join(fold(text).casefold().split())


def _mention(option: str) -> re.Pattern[str]:
    """The option as whole words; letters of scripts without blanks have no such bounds."""
    return re.compile(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])")


# ------------------------------------------------------------------------------------------------------------ in words
def line(numbers: Mapping[str, Any]) -> str:
    """The statistics (as `plain`) but for boxed and right, in one line for the terminal."""
    agree = numbers["text_and_letter_agree"]
    parts = [
        f"text and letter agree in {percent(agree['share'])} of {agree['n']:,} boxed answers that name an option"
        if agree["n"]
        else "no boxed answer names an option in words"
    ]
    if numbers["letters"]:
        shares = ", ".join(f"{letter} {percent(of_letter['share'])}" for letter, of_letter in numbers["letters"].items())
        parts.append(
            f"letters {shares}, entropy {numbers['letter_entropy_bits']:.2f} of {numbers['letter_entropy_even_bits']:.2f} bits "
            f"(option texts {numbers['text_entropy_bits']:.2f} of {numbers['text_entropy_even_bits']:.2f})"
        )
    if numbers["same_choice"] is not None:
        parts.append(
            f"two answers to a question choose the same option in {percent(numbers['same_choice'])} of pairs "
            f"(even choice: {percent(numbers['same_choice_chance'])})"
        )
    return "; ".join(parts)


def _plain(share: Share) -> dict[str, Any]:
    low, high = share.interval
    return {"share": share.value if share.total else None, "ci_low": low, "ci_high": high, "n": share.total}
