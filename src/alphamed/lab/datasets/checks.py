"""What may be wrong with a set as a whole: repeats, conflicting keys, skewed answers, images that are not there."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alphamed.data.mcq import RowProblem
from alphamed.data.option_order import refers_to_options
from alphamed.data.reading import Reading
from alphamed.data.text import normalised, normalised_option, option_set
from alphamed.hashing import draw
from alphamed.lab.datasets.suspects import suspects
from alphamed.records import Question

FEWEST = 50  # questions below which a share says little
LETTER_EXCESS = 1.25  # of an even share
ANSWER_SHARE = 0.5
LONGEST_EXCESS = 1.5  # of what chance gives
EXAMPLES = 5
_IMAGE = re.compile(
    r"\b(?:images?|figures?|photographs?|pictures?|pictured|illustrations?)\b"
    r"|\b(?:shown|see) (?:below|above)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know of a set. `serious` findings spoil training or scores, the others explain them."""

    title: str
    text: str
    count: int
    examples: tuple[str, ...] = ()
    serious: bool = False


def check_set(
    questions: Sequence[Question], bad_rows: Sequence[RowProblem] = (), reading: Reading = Reading()
) -> list[Finding]:
    """All findings, serious ones first."""
    findings = [
        *_rows(bad_rows),
        *_read(reading, len(questions)),
        *_repeats(questions),
        *_conflicts(questions),
        *_answer_texts(questions),
        *_letters(questions),
        *_longest(questions),
        *_images(questions),
        *_references(questions),
    ]
    return sorted(findings, key=lambda finding: not finding.serious)


def _rows(bad_rows: Sequence[RowProblem]) -> Iterator[Finding]:
    if bad_rows:
        yield Finding(
            "Bad rows",
            "Rows that are no questions; they are in none of the numbers here.",
            len(bad_rows),
            tuple(map(str, bad_rows[:EXAMPLES])),
            serious=True,
        )


def _read(reading: Reading, count: int) -> Iterator[Finding]:
    if notes := reading.notes():
        yield Finding(
            "Read otherwise than it stands",
            f"The file is not in the form of the schema: {'; '.join(notes)}. `alphamed data build` writes what was read.",
            count,
        )


def _repeats(questions: Sequence[Question]) -> Iterator[Finding]:
    groups: dict[tuple, list[str]] = defaultdict(list)
    for q in questions:
        key = normalised_option(q.options[q.answer])
        groups[normalised(q.question), normalised(q.context or ""), option_set(q.options), key].append(q.id)
    repeats = [ids for ids in groups.values() if len(ids) > 1]
    if repeats:
        yield Finding(
            "Repeated questions",
            "The same stem, context, options and key under several ids; `alphamed data "
            "build` leaves them out with drop_repeats=true.",
            sum(len(ids) - 1 for ids in repeats),
            tuple(" = ".join(ids) for ids in repeats[:EXAMPLES]),
        )


def _conflicts(questions: Sequence[Question]) -> Iterator[Finding]:
    conflicts = suspects(questions, {})
    if conflicts:
        pairs = [
            f"{name}: {decision.evidence[0]['key']} / {decision.evidence[0]['other']}: {decision.evidence[0]['other_key']}"
            for name, decision in list(conflicts.items())[:EXAMPLES]
        ]
        yield Finding(
            "Conflicting keys",
            "The same question has different keys; `alphamed data suspects` lists them for a decision.",
            len(conflicts),
            tuple(pairs),
            serious=True,
        )


def _letters(questions: Sequence[Question]) -> Iterator[Finding]:
    by_size: dict[int, Counter[str]] = defaultdict(Counter)
    for q in questions:
        by_size[len(q.options)][q.answer] += 1
    for size, counts in sorted(by_size.items()):
        letter, most = counts.most_common(1)[0]
        if counts.total() >= FEWEST and most > LETTER_EXCESS / size * counts.total():
            yield Finding(
                "Skewed letters",
                f"{letter} is right in {most / counts.total():.0%} of the questions with {size} "
                f"options, chance is {1 / size:.0%}; training deals new letters every epoch, "
                f"`alphamed data build` does with shuffle_options=true.",
                most,
            )


def _answer_texts(questions: Sequence[Question]) -> Iterator[Finding]:
    by_source: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        by_source[(q.source or "unknown").partition("/")[0]][normalised_option(q.options[q.answer])] += 1
    for source, counts in sorted(by_source.items()):
        text, most = counts.most_common(1)[0]
        if counts.total() >= FEWEST and most > ANSWER_SHARE * counts.total():
            share = f"{most / counts.total():.0%}"
            yield Finding(
                "A constant answer pays",
                f"Always answering “{text}” is right in {share} of {source}; "
                f"`alphamed data build` cuts it down with balance.",
                most,
                serious=True,
            )


def _longest(questions: Sequence[Question]) -> Iterator[Finding]:
    """Where the key is often the longest option, length can be learnt in place of medicine."""
    hits, chance = 0, 0.0
    for q in questions:
        sizes = sorted((len(text) for text in q.options.values()), reverse=True)
        hits += len(q.options[q.answer]) == sizes[0] > sizes[1]
        chance += 1 / len(sizes)
    if len(questions) >= FEWEST and hits > LONGEST_EXCESS * chance:
        yield Finding(
            "Long keys",
            f"The right option is the longest one in {hits / len(questions):.0%} of the questions, "
            f"chance is at most {chance / len(questions):.0%}.",
            hits,
        )


def _images(questions: Sequence[Question]) -> Iterator[Finding]:
    ids = [q.id for q in questions if _IMAGE.search(q.question)]
    if ids:
        yield Finding(
            "Images that are not there",
            "The stem may speak of a picture; a filter.exclude pattern leaves such questions out.",
            len(ids),
            _some(ids),
        )


def _references(questions: Sequence[Question]) -> Iterator[Finding]:
    ids = [q.id for q in questions if refers_to_options(q)]
    if ids:
        yield Finding(
            "Options that refer to options",
            "“All of the above”, “both A and C”: shuffling leaves their order as it is.",
            len(ids),
            _some(ids),
        )


def _some(ids: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(ids, key=draw)[:EXAMPLES])
