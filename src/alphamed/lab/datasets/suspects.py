"""Questions whose key may be wrong: duplicates with conflicting keys, and models that agree on another letter.

The program finds them, people decide (decisions.py). Two kinds of evidence:
  conflict   the same stem, or one at least NEAR similar with the same options, has another key elsewhere, and each one's key
             is among the other's options
  agreement  in the answers of at least `models` models, each one's favourite letter is the same other one, and together they
             gave it at least `share` of the time
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alphamed import jsonl
from alphamed.data.decisions import Decision
from alphamed.data.text import fingerprint, normalised, normalised_option, option_set
from alphamed.errors import DataError
from alphamed.records import Question

NEAR = 0.9
COMMON_STEM = 100
MODELS = 2
SHARE = 0.6


def suspects(
    questions: Sequence[Question],
    items: Mapping[str, Sequence[Mapping[str, Any]]],
    models: int = MODELS,
    share: float = SHARE,
) -> dict[str, Decision]:
    """Question id -> an open decision with its evidence. `items` are graded answers by model (see `read_models`)."""
    evidence_by_id: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, evidence in (*_conflicts(questions), *_agreements(questions, items, models, share)):
        evidence_by_id[name].append(evidence)
    by_id = {question.id: question for question in questions}
    return {
        name: Decision(id=name, fingerprint=fingerprint(by_id[name]), evidence=tuple(evidence))
        for name, evidence in evidence_by_id.items()
    }


# ----------------------------------------------------------------------------------------------------------- conflicts
def _conflicts(questions: Sequence[Question]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, evidence) for both sides of every pair of duplicates with conflicting keys."""
    pairs: dict[tuple[int, int], float] = {}
    by_stem: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        by_stem[normalised(question.question)].append(place)
    for places in _comparable(by_stem.values(), questions):
        pairs |= {(i, j): 1.0 for k, i in enumerate(places) for j in places[k + 1 :]}
    for i, j, similarity in _near(questions):
        pairs.setdefault((i, j), similarity)
    for (i, j), similarity in pairs.items():
        if questions[i].context == questions[j].context and _conflict(questions[i], questions[j]):
            for side, other in ((questions[i], questions[j]), (questions[j], questions[i])):
                yield (
                    side.id,
                    {
                        "kind": "conflict",
                        "similarity": round(similarity, 4),
                        "key": side.options[side.answer],
                        "other": other.id,
                        "other_key": other.options[other.answer],
                        "other_question": other.question,
                    },
                )


def _comparable(groups: Iterable[list[int]], questions: Sequence[Question]) -> Iterator[list[int]]:
    """Groups of questions with one stem, small enough to compare all pairs: a stem that more than COMMON_STEM share is a
    template ("Which pair is false?"), and only those with the same options are compared."""
    for places in groups:
        if len(places) <= COMMON_STEM:
            yield places
            continue
        by_options: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place in places:
            by_options[option_set(questions[place].options)].append(place)
        yield from (part[:COMMON_STEM] for part in by_options.values())


def _near(questions: Sequence[Question]) -> Iterator[tuple[int, int, float]]:
    """Pairs with near stems and the same options, by place. Only questions whose options another one has are compared."""
    from alphamed.lab.datasets.matching import similar_pairs

    sets = [option_set(question.options) for question in questions]
    shared = Counter(sets)
    places = [place for place, options in enumerate(sets) if 1 < shared[options]]
    stems = [questions[place].question for place in places]
    for pair in similar_pairs(stems, stems, NEAR):
        i, j = places[pair.base], places[pair.query]
        if i < j and sets[i] == sets[j]:
            yield i, j, pair.similarity


def _conflict(first: Question, second: Question) -> bool:
    """Whether one's key is among the other's options without being its key, and vice versa."""
    return _denied(first, second) and _denied(second, first)


def _denied(question: Question, other: Question) -> bool:
    key = normalised_option(question.options[question.answer])
    return key in option_set(other.options) and key != normalised_option(other.options[other.answer])


# ---------------------------------------------------------------------------------------------------------- agreements
def read_models(paths: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Model -> its graded answers, from the items.jsonl files of evaluations. A row's `model` names its model, else the
    file does: its folder where it is called items.jsonl. Raises DataError where a row is no graded answer, or a file
    is given twice: its answers would count twice."""
    answers: dict[str, list[dict[str, Any]]] = {}
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise DataError(f"--items: {path} is given twice; give every file once")
        seen.add(path.resolve())
        default = path.resolve().parent.name if path.name == "items.jsonl" else path.name.removesuffix(".jsonl")
        for number, row in _rows(path):
            if not _is_answer(row):
                raise DataError(
                    f"{path}:{number}: no graded answer (it needs id, letter or null, and options as letter -> "
                    f"text); give an items.jsonl of `alphamed eval`"
                )
            if not row.get("variant"):  # a variant of a question says nothing about its key
                answers.setdefault(str(row.get("model") or default), []).append(row)
    return answers


def _is_answer(row: Any) -> bool:
    """Whether a row has what `_agreements` reads, and in the form it reads it."""
    if not isinstance(row, dict) or not {"id", "letter", "options"} <= row.keys():
        return False
    options = row["options"]
    return (
        isinstance(row["id"], str)
        and isinstance(row["letter"], str | None)
        and isinstance(options, dict)
        and all(isinstance(text, str) for text in options.values())
    )


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its value)."""
    number = 0
    try:
        for number, line in enumerate(jsonl.byte_lines(path), start=1):
            if not jsonl.is_blank(line):
                yield number, jsonl.parse(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name an existing items.jsonl") from None
    except ValueError as error:
        raise DataError(f"{path}:{number}: {error}; give an items.jsonl of `alphamed eval`") from None


def _agreements(
    questions: Sequence[Question], items: Mapping[str, Sequence[Mapping[str, Any]]], models: int, share: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, evidence) where enough models agree on another option. Options are compared as texts: an evaluation may have
    shuffled them."""
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for model, rows in items.items():
        for row in rows:
            text = row["options"].get(row["letter"]) if row["letter"] else None
            answers[row["id"]][model][normalised_option(text) if text is not None else ""] += 1
    for question in questions:
        by_model = answers.get(question.id)
        if by_model is None or len(by_model) < models:
            continue
        favourites = {_favourite(counts) for counts in by_model.values()}
        other = next(iter(favourites))
        right = normalised_option(question.options[question.answer])
        votes = sum((counts for counts in by_model.values()), Counter())
        if len(favourites) == 1 and other not in (None, right) and votes[other] >= share * votes.total():
            letter = next((k for k, text in question.options.items() if normalised_option(text) == other), None)
            if letter is not None:
                yield (
                    question.id,
                    {
                        "kind": "agreement",
                        "key": question.options[question.answer],
                        "models_say": question.options[letter],
                        "share": round(votes[other] / votes.total(), 4),
                        "answers": votes.total(),
                        "models": sorted(by_model),
                    },
                )


def _favourite(counts: Counter[str]) -> str | None:
    """The option a model gave most, None where two lead or it named none."""
    (text, most), *others = counts.most_common(2)
    return None if text == "" or any(count == most for _, count in others) else text
