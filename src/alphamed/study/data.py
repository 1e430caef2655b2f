"""Makes the training sets of a study, once: a set whose card tells of the same recipe is taken as it is."""
from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from alphamed.config import ConfigError
from alphamed.data import build, medfacts
from alphamed.data.card import file_sha256
from alphamed.data.sources import DataError
from alphamed.study.grid import PlannedRun, Set, medfacts_folder
from alphamed.study.spec import Study


def check_sources(study: Study, runs: Iterable[PlannedRun]) -> None:
    """Refuse what can not be built, as far as it shows without reading data. Raises ConfigError."""
    for one in _sets(runs):
        for wanted in one.recipe.sources:
            build.source_of(wanted)
            ours = study.data.medfacts is not None and wanted.name == "medfacts"
            if wanted.path is not None and not ours and not wanted.path.exists():
                raise ConfigError(f"data.sources: {wanted.name}: {wanted.path}: no such file or folder; give an "
                                  f"existing one")
            if wanted.levels is not None and not wanted.levels.exists():
                raise ConfigError(f"data.sources: {wanted.name}: {wanted.levels}: no such file of levels; annotate the set "
                                  f"(alphamed data difficulty)")


def make_sets(study: Study, runs: Iterable[PlannedRun], command: str) -> list[Path]:
    """Write the sets that are not there yet; returns their files. Raises ConfigError and DataError naming the run."""
    if study.data is not None and study.data.medfacts is not None:
        wanted = study.data.medfacts
        filters = {"levels": wanted.levels, "categories": wanted.categories, "facts": wanted.facts, "copies": wanted.copies}
        try:
            medfacts.write(medfacts_folder(study.folder), wanted.seed, **filters)
        except ValueError as error:
            raise ConfigError(f"data.medfacts: {error}") from None
    made = []
    for one in _sets(runs):
        if not _is_made(one):
            try:
                build.write(build.build(one.recipe), one.recipe, one.file, command)
            except DataError as error:
                raise DataError(f"{one.file.stem}: {error}") from None
            made.append(one.file)
    return made


def _sets(runs: Iterable[PlannedRun]) -> list[Set]:
    return list({run.set.file: run.set for run in runs if run.set is not None}.values())


def _is_made(one: Set) -> bool:
    """Whether the file is there, whole by its card, and made of the files that are there now."""
    try:
        card = json.loads(build.card_path(one.file).read_text(encoding="utf-8"))
        return card["file_sha256"] == file_sha256(one.file) and card["files"] == build.files_read(one.recipe)
    except (OSError, ValueError, KeyError, TypeError):
        return False
