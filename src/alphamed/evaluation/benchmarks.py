"""The benchmarks as data: source, revision, split, expected count, letters, licence; loaded from the hub or local copies.

Adding one: a row here, a function in data/adapters.py where the layout is new, and a fixture in its test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alphamed.config.choices import BadRows
from alphamed.data import adapters
from alphamed.data.keys import AnswerForm, form_of
from alphamed.data.mcq import RowProblem, check_questions
from alphamed.data.reading import Reading, interpret
from alphamed.data.sources import load_questions
from alphamed.data.tables import KINDS, bare_name, kind_of
from alphamed.data.text import counted
from alphamed.data.upstream import QuestionSource, read_upstream
from alphamed.errors import DataError
from alphamed.records import Question

# Commits that several independent public projects load these sets at, where not noted otherwise.
BENCHMARKS = {
    source.name: source
    for source in (
        QuestionSource(
            "medqa",
            "GBaker/MedQA-USMLE-4-options",
            "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18",
            None,
            "test",
            adapters.medqa,
            "MIT (jind11/MedQA); the hub's card says CC-BY-4.0",
            expected=1_273,
        ),
        QuestionSource(
            "medmcqa",
            "openlifescienceai/medmcqa",
            "91c6572c454088bf71b679ad90aa8dffcd0d5868",
            None,
            "validation",
            adapters.medmcqa,
            "Apache-2.0 (hub card); MIT (medmcqa/medmcqa)",
            expected=4_183,
            answer=AnswerForm.INDEX,
            note="The keys of its test split are not public.",
        ),
        QuestionSource(
            "pubmedqa",
            "openlifescienceai/pubmedqa",
            "50fc41dcd0bd6eb63c18d436d854c6f9e8f3c7e2",
            None,
            "test",
            adapters.openlife,
            "MIT; abstracts belong to their publishers",
            expected=500,
            letters="ABC",
            context=True,
            note="The official test split. One public project was found to load this commit.",
        ),
        QuestionSource(
            "pubmedqa1000",
            "qiaojin/PubMedQA",
            "9001f2853fb87cab8d220904e0de81ac6973b318",
            "pqa_labeled",
            "train",
            adapters.pubmedqa,
            "MIT; abstracts belong to their publishers",
            expected=1_000,
            letters="ABC",
            context=True,
            note="All labelled questions, the official test split among them.",
        ),
        QuestionSource(
            "mmlu_pro",
            "TIGER-Lab/MMLU-Pro",
            "3373e0b32277875b8db2aa555a333b78a08477ea",
            None,
            "test",
            adapters.mmlu_pro_medical,
            "MIT (hub card); Apache-2.0 (repository)",
            expected=1_535,
            letters="ABCDEFGHIJ",
            answer=AnswerForm.INDEX,
            note="Health (818) and biology (717).",
        ),
        QuestionSource(
            "gpqa",
            "Idavidrein/gpqa",
            "90b8e5be2b1d3d2dbfe016cdab47981150600c4a",
            "gpqa_main",
            "train",
            adapters.gpqa_medical,
            "CC-BY-4.0; its authors ask not to publish examples",
            expected=78,
            note="Genetics and molecular biology. Access is granted on the hub. Report five runs: 78 questions are few.",
        ),
        QuestionSource(
            "medxpertqa",
            "TsinghuaC3I/MedXpertQA",
            "7e7c465a68eb2b866926bfa59c8c9d17a8daba65",
            "Text",
            "test",
            adapters.medxpertqa,
            "MIT",
            expected=2_450,
            letters="ABCDEFGHIJ",
            note="Reasoning (1,861) and understanding (589) are sources of their own.",
        ),
        QuestionSource(
            "mmlu_medical",
            "cais/mmlu",
            "c30699e8356da336a370243923dbaf21066bb9fe",
            "all",
            "test",
            adapters.mmlu_medical,
            "MIT",
            expected=1_089,
            answer=AnswerForm.INDEX,
            note="Six subjects.",
        ),
        QuestionSource(
            "headqa",
            "EleutherAI/headqa",
            None,
            "en",
            "test",
            adapters.headqa,
            "MIT (aghie/head-qa)",
            letters="ABCDE",
            note="No commit and no count without image questions could be confirmed: both are "
            "recorded as found. 2,742 with them.",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class LoadedBenchmark:
    """The questions of a benchmark. `complaint` says in words where they are not what was expected; whoever reports a score
    prints it, too."""

    name: str
    source: QuestionSource | None  # None for a file of the user's own
    place: str  # the hub name with its revision, or the path
    questions: tuple[Question, ...]
    problems: tuple[RowProblem, ...] = ()  # bad rows that were left out
    complaint: str | None = None
    reading: Reading = Reading()


def load_benchmark(name: str, bad_rows: BadRows = BadRows.REFUSE) -> LoadedBenchmark:
    """A benchmark by NAME (from the hub), NAME=PATH (a local copy, in the hub's layout or in the schema), or a file of the
    schema; :FORM after a path declares the form of its keys. DataError where it cannot be read, or has bad rows that are
    not to be skipped."""
    check_name(name)
    place, answer = form_of(name)
    known = place.partition("=")[0]
    if known in BENCHMARKS:
        return _known(BENCHMARKS[known], local_copy(name), answer, bad_rows)
    loaded = load_questions([place], BadRows.SKIP, answer)
    _refuse_bad_rows(loaded.skipped, bad_rows)
    return LoadedBenchmark(
        bare_name(place), None, place, loaded.questions, loaded.skipped, _complaint(loaded.skipped), *loaded.readings
    )


def load_benchmarks(names: Sequence[str], bad_rows: BadRows = BadRows.REFUSE) -> list[LoadedBenchmark]:
    """Several of them, each under a name of its own. Raises DataError."""
    check_names(names)
    return [load_benchmark(name, bad_rows) for name in names]


def check_names(names: Sequence[str]) -> None:
    """`check_name` for all; two of one name are refused too, since results are stored by name. Raises DataError."""
    first: dict[str, str] = {}
    for name in names:
        check_name(name)
        called = name.partition("=")[0] if name.partition("=")[0] in BENCHMARKS else bare_name(form_of(name)[0])
        if called in first:
            raise DataError(
                f"against: two benchmarks are called {called} ({first[called]} and {name}); give each once, or rename a file"
            )
        first[called] = name


def local_copy(name: str) -> Path | None:
    """The file or folder that a benchmark is read from; None where that is the hub."""
    name = form_of(name)[0]
    known, _, path = name.partition("=")
    return Path(path) if path else None if known in BENCHMARKS else Path(name)


def check_name(name: str) -> None:
    """Refuse, without asking a network, a name that is not known and a file or copy that is not there. Raises DataError."""
    name = form_of(name)[0]
    known, equals, path = name.partition("=")
    if equals and known not in BENCHMARKS:
        raise DataError(
            f"benchmark {known!r} is not known; choose from {', '.join(BENCHMARKS)}, or name a file without NAME="
        )
    if known not in BENCHMARKS and not kind_of(name):
        raise DataError(
            f"benchmark {name!r} is neither known ({', '.join(BENCHMARKS)}) nor a file ({KINDS}); name one of these"
        )
    if equals and not path:
        raise DataError(f"benchmark {name!r} names no file or folder; give one after =, or {known} for the hub's")
    place = local_copy(name)
    if place is not None and not place.exists():
        raise DataError(f"{place}: no such file or folder; name an existing one")


def _known(source: QuestionSource, local: Path | None, answer: AnswerForm | None, bad_rows: BadRows) -> LoadedBenchmark:
    place = str(local) if local else f"{source.hub}@{source.revision or 'newest'}"
    rows, reading = interpret(read_upstream(source, local), answer or (None if local else source.answer))
    questions, problems = check_questions(rows)
    if not questions:
        reason = f"all {len(problems)} rows are bad, the first: {problems[0]}" if problems else "it holds none"
        raise DataError(f"{source.name}: {place} gives no question ({reason}); fetch it again or give another copy")
    _refuse_bad_rows(problems, bad_rows)
    return LoadedBenchmark(
        source.name, source, place, tuple(questions), tuple(problems), _complaint(problems, source, questions), reading
    )


def _refuse_bad_rows(problems: Sequence[RowProblem], bad_rows: BadRows) -> None:
    if problems and bad_rows == BadRows.REFUSE:
        more = f"; {counted(len(problems) - 1, 'more bad row')}" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}; fix the data, or leave bad rows out with --bad-rows skip (in a recipe "
            f"bad_rows: skip); their number is given with the result"
        )


def _complaint(problems, source: QuestionSource | None = None, questions=()) -> str | None:
    complaints = []
    if source and source.expected is not None and len(questions) != source.expected:
        complaints.append(f"{len(questions):,} questions, {source.expected:,} were expected")
    most = max((len(question.options) for question in questions), default=0)
    if source and most > len(source.letters):
        complaints.append(f"{most} options in a question, at most {len(source.letters)} were expected")
    if problems:
        complaints.append(f"{counted(len(problems), 'bad row')} left out (the first: {problems[0]})")
    return "; ".join(complaints) or None
