"""Builds the training sets of a study, each once: a set whose card has the same recipe is used as it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from alphamed.errors import ConfigError, DataError
from alphamed.hashing import file_sha256
from alphamed.lab.datasets import build, medfacts
from alphamed.lab.study.grid import PlannedRun, PlannedSet, medfacts_folder
from alphamed.lab.study.spec import MEDFACTS, MedFacts, Study


def check_sources(study: Study, runs: Iterable[PlannedRun]) -> None:
    """Refuse what cannot be built, as far as that can be checked without reading data. Raises ConfigError."""
    shipped = _shipped_questions(study)
    if shipped is not None:
        try:
            medfacts.check(shipped.levels, shipped.categories, shipped.facts)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    for training_set, _ in _first_runs(runs):
        for source in training_set.recipe.sources:
            build.source_of(source)
            is_shipped = shipped is not None and source.name == MEDFACTS
            if source.path is not None and not is_shipped and not source.path.exists():
                raise ConfigError(
                    f"data.sources: {source.name}: {source.path}: no such file or folder; give an existing one"
                )
            if source.levels is not None and not source.levels.exists():
                raise ConfigError(
                    f"data.sources: {source.name}: {source.levels}: no such file of levels; annotate the set "
                    f"(alphamed data difficulty)"
                )
        if not _is_built(training_set):
            _check_recipe(training_set, medfacts_folder(study.folder) if shipped is not None else None)


def _shipped_questions(study: Study) -> MedFacts | None:
    return study.data.medfacts if study.data is not None else None


def _check_recipe(training_set: PlannedSet, shipped: Path | None) -> None:
    """Check what the recipe reads besides its sources, and that it does not overwrite that. Benchmarks in the folder `shipped`
    are written later."""
    from alphamed.evaluation.benchmarks import check_names, local_copy

    for file in training_set.recipe.decisions:
        if not file.exists():
            raise ConfigError(f"data.recipe.decisions: {file}: no such file; give an existing one (alphamed data suspects)")
    try:
        check_names(
            [
                name
                for name in training_set.recipe.against
                if shipped is None or shipped.resolve() not in (local_copy(name) or Path()).resolve().parents
            ]
        )
        build.check(training_set.recipe, training_set.file, overwrite=True)  # an incomplete or outdated set is replaced
    except (ConfigError, DataError) as error:
        raise ConfigError(f"data.recipe: {error}") from None


def make_sets(study: Study, runs: Iterable[PlannedRun], command: str) -> list[Path]:
    """Write the sets that are not there yet; returns their files. Raises ConfigError and DataError naming the first run of a
    set that cannot be built; files that this call has created are removed then."""
    first_runs = _first_runs(runs)
    folder = medfacts_folder(study.folder)
    outputs = [
        *medfacts.files_of(folder).values(),
        *(path for planned, _ in first_runs for path in build.files_of(planned.file)),
    ]
    new = [path for path in outputs if not path.exists()]
    try:
        if (shipped := _shipped_questions(study)) is not None:
            _write_medfacts(shipped, folder)
        missing = [(training_set, run) for training_set, run in first_runs if not _is_built(training_set)]
        for training_set, run in missing:
            _build(training_set, run, command)
        return [training_set.file for training_set, _ in missing]
    except (ConfigError, DataError, OSError):
        for path in new:
            path.unlink(missing_ok=True)
        for parent in (folder, folder.parent):
            with contextlib.suppress(OSError):  # not empty, or never created
                parent.rmdir()
        raise


def _write_medfacts(settings: MedFacts, folder: Path) -> None:
    filters = {
        "levels": settings.levels,
        "categories": settings.categories,
        "facts": settings.facts,
        "copies": settings.copies,
    }
    try:
        medfacts.write(folder, settings.seed, **filters)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None


def _build(training_set: PlannedSet, run: PlannedRun, command: str) -> None:
    try:
        build.write(build.build(training_set.recipe), training_set.recipe, training_set.file, command)
    except (ConfigError, DataError) as error:
        raise type(error)(f"run {run.name}: {error}") from None


def _first_runs(runs: Iterable[PlannedRun]) -> list[tuple[PlannedSet, PlannedRun]]:
    """Each training set with the first run that uses it."""
    first: dict[Path, tuple[PlannedSet, PlannedRun]] = {}
    for run in runs:
        if run.training_set is not None:
            first.setdefault(run.training_set.file, (run.training_set, run))
    return list(first.values())


def _is_built(training_set: PlannedSet) -> bool:
    """Whether the file matches its card, and the card the files of the recipe as they are now."""
    try:
        card = json.loads(build.card_path(training_set.file).read_text(encoding="utf-8"))
        return card["file_sha256"] == file_sha256(training_set.file) and card["files"] == build.files_read(
            training_set.recipe
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
