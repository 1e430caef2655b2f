"""Makes the training sets of a study, once: a set whose card tells of the same recipe is taken as it is."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path

from alphamed.config import ConfigError
from alphamed.data import build, medfacts
from alphamed.data.card import file_sha256
from alphamed.data.sources import DataError
from alphamed.study.grid import PlannedRun, Set, medfacts_folder
from alphamed.study.spec import MEDFACTS, Study


def check_sources(study: Study, runs: Iterable[PlannedRun]) -> None:
    """Refuse what can not be built, as far as it shows without reading data. Raises ConfigError."""
    if study.data is not None and study.data.medfacts is not None:
        try:
            medfacts.check(study.data.medfacts.levels, study.data.medfacts.categories)
        except ValueError as error:
            raise ConfigError(f"data.{error}") from None
    for one in _sets(runs):
        for wanted in one.recipe.sources:
            build.source_of(wanted)
            ours = study.data.medfacts is not None and wanted.name == MEDFACTS
            if wanted.path is not None and not ours and not wanted.path.exists():
                raise ConfigError(f"data.sources: {wanted.name}: {wanted.path}: no such file or folder; give an "
                                  f"existing one")
            if wanted.levels is not None and not wanted.levels.exists():
                raise ConfigError(f"data.sources: {wanted.name}: {wanted.levels}: no such file of levels; annotate the set "
                                  f"(alphamed data difficulty)")


def make_sets(study: Study, runs: Iterable[PlannedRun], command: str) -> list[Path]:
    """Write the sets that are not there yet; returns their files. Raises ConfigError and DataError naming the first run of a
    set that can not be made; what this call has written is gone then."""
    made: list[Path] = []
    written: list[Path] = []
    try:
        if study.data is not None and study.data.medfacts is not None:
            written += _write_medfacts(study)
        for run in _first_of_each_set(runs):
            if not _is_made(run.set):
                _make(run, command)
                written += build.files_of(run.set.file)
                made.append(run.set.file)
    except (ConfigError, DataError, OSError):
        for path in written:
            path.unlink(missing_ok=True)
        for folder in (medfacts_folder(study.folder), study.folder / "data"):
            with contextlib.suppress(OSError):              # not empty, or never made
                folder.rmdir()
        raise
    return made


def _write_medfacts(study: Study) -> list[Path]:
    """Write the shipped questions; returns the files that were not there before."""
    wanted, folder = study.data.medfacts, medfacts_folder(study.folder)
    before = set(folder.glob("*"))
    filters = {"levels": wanted.levels, "categories": wanted.categories, "facts": wanted.facts, "copies": wanted.copies}
    try:
        return [path for path in medfacts.write(folder, wanted.seed, **filters).values() if path not in before]
    except ValueError as error:
        raise ConfigError(f"data.medfacts: {error}") from None


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
