"""The endless, seeded order in which training sees its questions, with new letters for their options every epoch.

Order and letters are sorted hashes of (seed, epoch, id), so they need no generator state, do not depend on file order
or Python version, and any position can be returned to exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar

from alphamed.config.choices import Spread
from alphamed.errors import DataError
from alphamed.records import Question

# Options that refer to other options by position ("all of the above", "both A and B", "none") lose their meaning elsewhere.
# One match leaves the whole question in its order; a false alarm ("hepatitis B and C") costs only that.
_OTHERS = r"above|previous|preceding|foregoing|following|these|those|them|other|options?|answers?|choices?|statements?"
_LETTER = r"""(?: (?-i: \b[A-J]\b ) | ["'(][a-j]["')] )"""
_REFERS = re.compile(
    rf"""
      \b(?:all|none|any|anyone|both|neither|either|no|two|three|only)\b [\w\s,]{{0,20}}? \b(?:{_OTHERS})\b
    | \b(?:options?|answers?|choices?)\b [\w\s]{{0,20}}? (?:\b(?:correct|true|false|right|wrong)\b|{_LETTER}|[1-9]\b)
    | ^\W* (?:all|any|none|both|neither|either|everything|nothing) \W*$
    | ^\W* (?:all|none|both|neither|either) \s+ (?:of|is|are|true|false|correct|incorrect|right|wrong) \b
    | {_LETTER} \s* (?:,|/|&|\+|\band\b|\bor\b) [\s,]* (?:and\s+|or\s+)? {_LETTER}
    | (?:\bonly\s+|\bsame\s+as\s+|\bsimilar\s+to\s+) {_LETTER} | {_LETTER} \s+ only\b
    | ^\W* (?:all\s+|both\s+)? [1-9] (?:\s*,\s*[1-9])* [\s,]* (?:and|or|&) \s* [1-9] \W* (?:(?:is|are|only)\b.*)? $
    | ^\W* (?:only\s+[1-9] | [1-9]\s+only) \W*$
    """,
    re.IGNORECASE | re.VERBOSE,
)
_STEM_REFERS = re.compile(r"\b(?i:options?|choices?|answers?)\s*\(?[A-J]\b")


class WithId(Protocol):
    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=WithId)


class SeededStream(Generic[Item]):
    """An endless stream: every epoch yields every item once, in its own order.

    `take(n)` may cross epochs, so a small data set can give the same item twice in one step. `kind` is the items' name in
    messages.
    """

    def __init__(self, items: Sequence[Item], seed: int, kind: str):
        if not items:
            raise DataError(f"no {kind} to train on; give data.train a file with {kind}s")
        self._items = {item.id: item for item in items}
        assert len(self._items) == len(items), f"{len(items)} {kind}s with {len(self._items)} ids"
        self._seed, self._kind = seed, kind
        self._fingerprint = _digest("ids", *sorted(self._items)).hex()
        self._epoch, self._position = 0, 0
        self._begin_epoch()

    def take(self, n: int) -> list[Item]:
        """The next n items."""
        if n < 1:
            raise ValueError(f"n: {n} {self._kind}s cannot be taken; ask for at least one")
        taken: list[Item] = []
        while len(taken) < n:
            ids = self._order[self._position : self._position + n - len(taken)]
            taken += [self._presented(self._items[i]) for i in ids]
            self._position += len(ids)
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._begin_epoch()
        return taken

    @property
    def epochs(self) -> float:
        """Passes over the items so far."""
        return self._epoch + self._position / len(self._order)

    def state(self) -> dict[str, Any]:
        """The position in the stream as JSON values, a few hundred bytes."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "fingerprint": self._fingerprint}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. Raises DataError where the items or the seed differ."""
        if state["fingerprint"] != self._fingerprint:
            raise DataError(
                f"data.train: these {len(self._items)} {self._kind}s are not the ones that the run was "
                "started with (other ids); restore the files or start a new run with another run.name"
            )
        if state["seed"] != self._seed:
            raise DataError(
                f"run.seed: {self._seed} is not the {state['seed']} that the run was started with; set it "
                "back or start a new run with another run.name"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._begin_epoch()
        assert 0 <= self._position < len(self._order), f"position {self._position} of {len(self._order)} {self._kind}s"

    def _begin_epoch(self) -> None:
        self._order = sorted(self._items, key=lambda i: _digest("order", self._seed, self._epoch, i))

    def _presented(self, item: Item) -> Item:
        """The item as this epoch shows it."""
        return item


class QuestionStream(SeededStream[Question]):
    """The stream of questions to answer, their options with new letters every epoch. `spread`: what is spread evenly over an
    epoch, the right answers' texts or the sources of questions."""

    def __init__(
        self, questions: Sequence[Question], seed: int, shuffle_options: bool = True, spread: Spread = Spread.NOTHING
    ):
        self._reletter, self._spread = shuffle_options, spread
        self._fixed = {question.id for question in questions if refers_to_options(question)}
        super().__init__(questions, seed, "question")

    def _begin_epoch(self) -> None:
        super()._begin_epoch()
        if self._spread != Spread.NOTHING:
            self._order = self._spread_evenly(self._order)
        self._places = self._deal_places() if self._reletter else {}

    def _spread_evenly(self, order: Sequence[str]) -> list[str]:
        """The n questions of a kind at a place of their own in each nth of the epoch: with k kinds of as many questions each,
        any k neighbours from a multiple of k on are one of each kind. Kinds of one question stay in random order."""
        kinds: dict[str | None, list[str]] = {}
        for i in order:
            question = self._items[i]
            kind = question.source if self._spread == Spread.SOURCE else question.options[question.answer]
            kinds.setdefault(kind, []).append(i)
        places = {
            i: (number + _fraction("spread", self._seed, self._epoch, i)) / len(ids)
            for ids in kinds.values()
            for number, i in enumerate(ids)
        }
        return sorted(order, key=places.__getitem__)

    def _deal_places(self) -> dict[str, int]:
        """Question id -> where its answer goes this epoch, for the questions that may be relettered.

        Among n neighbours with n options the answer is at every position once. So a step holds every letter about equally
        often, and always boxing the same one earns nothing: with letters drawn at random the few questions of a small step
        often favour one, and a run that follows such accidents ends up boxing a single letter.
        """
        dealt: dict[str, int] = {}
        decks: dict[int, list[int]] = {}
        for number, i in enumerate(self._order):
            size = len(self._items[i].options)
            if i not in self._fixed:
                if not decks.get(size):
                    decks[size] = sorted(
                        range(size), key=lambda place: _digest("places", self._seed, self._epoch, number, place)
                    )
                dealt[i] = decks[size].pop()
        return dealt

    def _presented(self, item: Question) -> Question:
        if item.id not in self._places:
            return item
        return shuffle_options(item, self._seed, self._epoch, self._places[item.id])


def shuffle_options(question: Question, seed: int, epoch: int, place: int | None = None) -> Question:
    """The question with its option texts in an order that depends on (seed, epoch, id) and `place` alone.

    Letters stay A, B, C ...; the answer follows its text, to the letter number `place` (from 0) where that is given. A
    question whose options refer to others is left unchanged.
    """
    if refers_to_options(question):
        return question
    letters = list(question.options)
    order = sorted(letters, key=lambda letter: _digest("options", seed, epoch, question.id, letter))
    if place is not None:
        order.remove(question.answer)
        order.insert(place, question.answer)
    return replace(
        question,
        options={new: question.options[old] for new, old in zip(letters, order)},
        answer=letters[order.index(question.answer)],
    )


def refers_to_options(question: Question) -> bool:
    """Whether an option (or the question itself) refers to options by their position; in doubt, yes."""
    return bool(_STEM_REFERS.search(question.question)) or any(map(_REFERS.search, question.options.values()))


def _fraction(*parts: object) -> float:
    """A pseudo-random number from 0 up to 1."""
    return int.from_bytes(_digest(*parts)[:6], "big") / 2**48


def _digest(*parts: object) -> bytes:
    """A hash of the parts; their lengths are in it, so that ("ab", "c") and ("a", "bc") differ."""
    text = "".join(f"{len(str(part))}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
