"""Which questions an evaluation asks: benchmarks and their variants, decisions and the part chosen by seed applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alphamed.config.choices import BadRows
from alphamed.config.schema import Config
from alphamed.data.overlap import refuse_overlap
from alphamed.data.sources import load_questions
from alphamed.errors import ConfigError, DataError
from alphamed.evaluation.benchmarks import LoadedBenchmark, check_name, load_benchmark
from alphamed.evaluation.items import Asked
from alphamed.evaluation.variants import VARIANTS
from alphamed.hashing import draw
from alphamed.records import Question


def asked_sets(
    names: Sequence[str], variants: Sequence[str], config: Config
) -> tuple[list[Asked], dict[str, dict[str, Any]]]:
    """All questions of all sets, and per set where it is from: place, expected and available count, complaint (None where
    all is as expected), bad rows that were left out (data.bad_rows: skip), how it was read, the number of questions that
    have no such variant, decisions, the ids that are asked.

    Raises ConfigError and DataError.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ConfigError(f"--variants: {variant!r} is not known; choose from {', '.join(VARIANTS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--benchmarks: {next(n for n in names if names.count(n) > 1)!r} is given twice; give each once")
    for name in names:
        check_name(name)  # all of them, before the first is fetched
    asked: list[Asked] = []
    sets: dict[str, dict[str, Any]] = {}
    for name in names:
        loaded = load_benchmark(name, config.data.bad_rows)
        if loaded.name in sets:  # two files of the same name
            loaded = replace(loaded, name=name)
        questions, decisions = _chosen(loaded, config)
        origin = {
            "place": loaded.place,
            "expected": loaded.source.expected if loaded.source else None,
            "available": len(loaded.questions),
            "complaint": loaded.complaint,
            "decisions": decisions,
            "bad_rows": [str(problem) for problem in loaded.problems],
            "reading": loaded.reading.plain(),
            "notes": loaded.reading.notes(),
        }
        for variant in (None, *dict.fromkeys(variants)):
            changed = list(_changed(loaded.name, variant, questions, config.run.seed))
            if not changed:
                raise DataError(
                    f"{loaded.name}: none of its {len(questions)} questions has a variant {variant}; leave it out"
                )
            asked += changed
            sets[changed[0].set] = origin | {
                "benchmark": loaded.name,
                "variant": variant,
                "without_variant": len(questions) - len(changed),
                "ids": [item.question.id for item in changed],
            }
    return asked, sets


def _chosen(loaded: LoadedBenchmark, config: Config) -> tuple[list[Question], list[Any]]:
    """The questions that decisions leave, at most evaluation.questions of them, by seed and id as in training."""
    from alphamed.data.decisions import apply_files

    settings = config.evaluation
    questions, applied = apply_files(loaded.questions, settings.decisions)
    if not questions:
        raise DataError(f"{loaded.name}: evaluation.decisions leave none of its {len(loaded.questions)} questions; fix them")
    ids = {q.id for q in sorted(questions, key=lambda q: draw(config.run.seed, q.id))[: settings.questions]}
    return [q for q in questions if q.id in ids], list(applied)


def _changed(name: str, variant: str | None, questions: Sequence[Question], seed: int) -> Iterator[Asked]:
    for question in questions:
        changed = VARIANTS[variant].change(question, seed) if variant else question
        if changed is not None:
            yield Asked(name, variant, changed)


def refuse_trained_on(asked: Sequence[Asked], trained_on: Sequence[Path]) -> None:
    """Raise ConfigError where the model was trained on questions of a benchmark. Absent files are skipped."""
    files = [file for file in trained_on if file.is_file()]
    if files:
        trained = load_questions(files, BadRows.SKIP).questions
        refuse_overlap(trained, [item.question for item in asked if item.variant is None])


def trained_on(model: Path) -> tuple[Path, ...]:
    """The training files of the run whose exported model this is (RUN/hf, RUN/hf-best); none for other folders."""
    from alphamed.rundir.directory import config_of_run

    run = model.parent
    return config_of_run(run).data.train if model.name.startswith("hf") and (run / "config.yaml").is_file() else ()
