"""Makes the training sets of a study, once: a set whose card tells of the same recipe is taken as it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from alphamed.errors import ConfigError, DataError
from alphamed.hashing import file_sha256
from alphamed.lab.datasets import build, medfacts
from alphamed.lab.study.grid import PlannedRun, Set, medfacts_folder
from alphamed.lab.study.spec import MEDFACTS, MedFacts, Study


def check_sources(study: Study, runs: Iterable[PlannedRun]) -> None:
    """Refuse what cannot be built, as far as it shows without reading data. Raises ConfigError."""
    if study.data is not None and study.data.medfacts is not None:
        try:
            medfacts.check(study.data.medfacts.levels, study.data.medfacts.categories, study.data.medfacts.facts)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    for one in _sets(runs):
        for wanted in one.recipe.sources:
            build.source_of(wanted)
            ours = study.data.medfacts is not None and wanted.name == MEDFACTS
            if wanted.path is not None and not ours and not wanted.path.exists():
                raise ConfigError(
                    f"data.sources: {wanted.name}: {wanted.path}: no such file or folder; give an existing one"
                )
            if wanted.levels is not None and not wanted.levels.exists():
                raise ConfigError(
                    f"data.sources: {wanted.name}: {wanted.levels}: no such file of levels; annotate the set "
                    f"(alphamed data difficulty)"
                )
        if not _is_made(one):
            _check_further(one, medfacts_folder(study.folder) if study.data is not None and study.data.medfacts else None)


def _check_further(one: Set, facts: Path | None) -> None:
    """What the recipe reads beside its sources, and that it is not written over. What lies in `facts` is made later."""
    from alphamed.evaluation.benchmarks import check_names, local_copy

    for file in one.recipe.decisions:
        if not file.exists():
            raise ConfigError(f"data.recipe.decisions: {file}: no such file; give an existing one (alphamed data suspects)")
    try:
        check_names(
            [
                name
                for name in one.recipe.against
                if facts is None or facts.resolve() not in (local_copy(name) or Path()).resolve().parents
            ]
        )
        build.check(one.recipe, one.file, overwrite=True)  # an old one of another recipe, or half a one
    except (ConfigError, DataError) as error:
        raise ConfigError(f"data.recipe: {error}") from None


def make_sets(study: Study, runs: Iterable[PlannedRun], command: str) -> list[Path]:
    """Write the sets that are not there yet; returns their files. Raises ConfigError and DataError naming the first run of a
    set that cannot be made; files that were not there before are gone then."""
    wanted = _first_of_each_set(runs)
    facts = medfacts_folder(study.folder)
    ours = [*medfacts.files_of(facts).values(), *(path for run in wanted for path in build.files_of(run.set.file))]
    new = [path for path in ours if not path.exists()]
    try:
        if study.data is not None and study.data.medfacts is not None:
            _write_medfacts(study.data.medfacts, facts)
        todo = [run for run in wanted if not _is_made(run.set)]
        for run in todo:
            _make(run, command)
        return [run.set.file for run in todo]
    except (ConfigError, DataError, OSError):
        for path in new:
            path.unlink(missing_ok=True)
        for folder in (facts, facts.parent):
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def _write_medfacts(wanted: MedFacts, folder: Path) -> None:
    filters = {"levels": wanted.levels, "categories": wanted.categories, "facts": wanted.facts, "copies": wanted.copies}
    try:
        medfacts.write(folder, wanted.seed, **filters)
    except ValueError as error:
        raise ConfigError(f"data.{error}") from None


def _make(run: PlannedRun, command: str) -> None:
    try:
        build.write(build.build(run.set.recipe), run.set.recipe, run.set.file, command)
    except (ConfigError, DataError) as error:
        raise type(error)(f"run {run.name}: {error}") from None


def _first_of_each_set(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    found: dict[Path, PlannedRun] = {}
    for run in runs:
        if run.set is not None:
            found.setdefault(run.set.file, run)
    return list(found.values())


def _sets(runs: Iterable[PlannedRun]) -> list[Set]:
    return [run.set for run in _first_of_each_set(runs)]


def _is_made(one: Set) -> bool:
    """Whether the file is there, whole by its card, and made of the files that are there now."""
    try:
        card = json.loads(build.card_path(one.file).read_text(encoding="utf-8"))
        return card["file_sha256"] == file_sha256(one.file) and card["files"] == build.files_read(one.recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False
