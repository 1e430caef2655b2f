"""From a study to its runs: every combination of the axes with its name, configuration and training set (pure)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alphamed.config.loading import build_config, dump_tree, load_config_tree, put, require_sections, validated
from alphamed.config.schema import Config
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.mcq import LEVELS
from alphamed.errors import ConfigError
from alphamed.lab.datasets.catalogue import PRESETS, SOURCES
from alphamed.lab.datasets.recipe import BuildRecipe
from alphamed.lab.study.spec import CONTROLS, DATA_AXES, MEDFACTS, ControlKind, Grid, Study, StudyData

MAX_NAME = 100
"""Most characters of a run's name. Names of folders may have 255 bytes, and longer ones are made from a run's name."""
ALL = "all"


@dataclass(frozen=True, slots=True)
class PlannedSet:
    """A training set of the study. Its file is named after the recipe's hash, so that a changed recipe gets a new file."""

    file: Path
    recipe: BuildRecipe


@dataclass(frozen=True, slots=True)
class PlannedRun:
    name: str
    grids: tuple[str, ...]
    axes: Mapping[str, Any]
    """Axis -> value of this run; a comparison uses them as axes of its charts."""
    control: ControlKind | None
    config: Config
    training_set: PlannedSet | None


def plan_runs(study: Study) -> list[PlannedRun]:
    """All runs in the order of the file, controls after their grid. Raises ConfigError for an invalid run."""
    base = load_config_tree(study.base)
    runs: dict[str, PlannedRun] = {}
    name_of_content: dict[str, str] = {}
    for grid in study.grids:
        tree = _grid_settings(study, grid, base)
        for axes, control in _cells(grid, tree):
            run = _plan(study, grid, tree, axes, control)
            known = runs.get(run.name)
            if known is None:
                runs[run.name] = run
                other = name_of_content.setdefault(_content(run.config), run.name)
                if other != run.name:
                    raise ConfigError(
                        f"grids.{grid.name}: {run.name} and {other} are one run under two names; give "
                        f"each value once, and write it the same way in all grids"
                    )
            elif known.config == run.config:
                runs[run.name] = replace(known, grids=tuple(dict.fromkeys((*known.grids, grid.name))))
            else:
                raise ConfigError(
                    f"grids.{grid.name}: {run.name} is also the name of a run of {', '.join(known.grids)} "
                    f"with other settings; write what differs as an axis"
                )
    return list(runs.values())


def _content(config: Config) -> str:
    """What determines the results of a run: its configuration without the name."""
    tree = config.model_dump(mode="json")
    return json.dumps(tree | {"run": tree["run"] | {"name": None}}, sort_keys=True)


def _grid_settings(study: Study, grid: Grid, base: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that all runs of a grid start from: the base with the settings of study and grid."""
    tree = copy.deepcopy(dict(base))
    for where, settings in (("settings", study.settings), (f"grids.{grid.name}.settings", grid.settings)):
        for key, value in settings.items():
            put(tree, key, _with_folder(value, study.folder))
        require_sections(tree, f"{where}: ")
    return tree


def _cells(grid: Grid, tree: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], ControlKind | None]]:
    """(axis -> value, control) of every run. Unless seeds choose the evaluation questions, one run of the unchanged model is
    enough for all seeds."""
    questions_drawn = (tree.get("evaluation") or {}).get("questions") is not None
    axes = {name: values for name in DATA_AXES if (values := getattr(grid.axes, name))}
    axes |= grid.axes.settings
    seeds = grid.axes.seeds or ((tree.get("run") or {}).get("seed"),)
    for name, values in (*axes.items(), ("seeds", seeds)):
        keys = [json.dumps(value) for value in values]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise ConfigError(f"grids.{grid.name}.axes.{name}: {repeated} is listed twice; give each value once")
    for values in itertools.product(*axes.values()):
        for seed in seeds:
            yield dict(zip(axes, values)) | ({} if seed is None else {"seeds": seed}), None
    first = {name: values[0] for name, values in axes.items()}
    for control in grid.controls:
        for seed in seeds[:1] if control == ControlKind.UNCHANGED and not questions_drawn else seeds:
            yield first | ({} if seed is None else {"seeds": seed}), control


def _plan(
    study: Study, grid: Grid, base: Mapping[str, Any], axes: dict[str, Any], control: ControlKind | None
) -> PlannedRun:
    name = run_name(axes, control, grid.label)
    tree = copy.deepcopy(dict(base))
    for key, value in axes.items():
        if key in grid.axes.settings:
            put(tree, key, _with_folder(value, study.folder))
    for key, value in (CONTROLS[control] if control else {}).items():
        put(tree, key, value)
    training_set = None
    try:
        if grid.train:
            put(tree, "data.train", [_with_folder(str(file), study.folder) for file in grid.train])
        elif study.data is not None:
            training_set = _training_set(study.folder, study.data, axes)
            put(tree, "data.train", [str(training_set.file)])
        run_settings = {"root": str(study.folder / "runs"), "name": name} | (
            {"seed": axes["seeds"]} if "seeds" in axes else {}
        )
        for key, value in run_settings.items():
            put(tree, f"run.{key}", value)
        config = build_config(tree)
    except ConfigError as error:
        raise ConfigError(f"grids.{grid.name}: run {name}: {error}") from None
    return PlannedRun(name, (grid.name,), axes, control, config, training_set)


def _with_folder(value: Any, folder: Path) -> Any:
    """The value with {study} replaced in every text."""
    if isinstance(value, str):
        return value.replace("{study}", str(folder))
    if isinstance(value, Mapping):
        return {key: _with_folder(item, folder) for key, item in value.items()}
    return [_with_folder(item, folder) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------- names
def run_name(axes: Mapping[str, Any], control: ControlKind | None, label: str | None = None) -> str:
    """The name of a run and its folder, made of its axes: `medqa+medmcqa-n1200-l1.2-i3-lr1e-05-s1-random_reward`, with . for +."""
    prefixes = {"sources": "", "sizes": "n", "seeds": "s"} | {attribute.axis: attribute.short for attribute in ATTRIBUTES}
    parts = [
        prefixes.get(key, key.rpartition(".")[2].replace("_", "")) + _name_part(value)
        for key, value in axes.items()
        if not (key in DATA_AXES and key != "sources" and value == ALL)
    ]
    text = "-".join([*([label] if label else []), *parts, *([str(control)] if control else [])]) or "run"
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def _name_part(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ".".join(map(_name_part, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() and letter.isascii() or letter in "._-" else "." for letter in text)


# ----------------------------------------------------------------------------------------------------------------- data
def _training_set(folder: Path, data: StudyData, axes: Mapping[str, Any]) -> PlannedSet:
    size, seed = axes.get("sizes", ALL), axes.get("seeds", 0)
    filters = {attribute.axis: axes[attribute.axis] for attribute in ATTRIBUTES if axes.get(attribute.axis, ALL) != ALL}
    recipe = recipe_of(data, folder, axes["sources"], None if size == ALL else size, filters, seed)
    slug = run_name({key: axes[key] for key in (*DATA_AXES, "seeds") if key in axes}, None)
    digest = hashlib.sha256(dump_tree(recipe.model_dump(mode="json")).encode()).hexdigest()[:8]
    return PlannedSet(folder / "data" / f"{slug}-{digest}.jsonl", recipe)


def recipe_of(
    data: StudyData, folder: Path, sources: str, size: int | None, filters: Mapping[str, tuple[int, ...]], seed: int
) -> BuildRecipe:
    """The recipe of `alphamed data build` for one combination of the axes. Raises ConfigError.

    `sources` is a preset, or names joined by +, each of which contributes the same number of questions; with `per_level` the
    same number of each level too. `filters`: axis of an attribute -> the values that questions may have.
    """
    own = {source.name: source.model_dump(mode="json") for source in data.sources}
    if data.medfacts is not None:
        own[MEDFACTS] = {"name": MEDFACTS, "path": str(medfacts_folder(folder) / "train.jsonl"), "licence": "this project's"}
    tree = _with_folder(copy.deepcopy(data.recipe), folder)
    if sources in PRESETS:
        tree |= copy.deepcopy(PRESETS[sources]) | ({"size": size} if size else {})
        names = [source["name"] for source in tree["sources"]]
    else:
        names = sources.split("+")
    for name in names:
        if name not in own and name not in SOURCES:
            raise ConfigError(
                f"sources: {name!r} is not known; choose from {', '.join([*own, *SOURCES, *PRESETS])}, or "
                f"add it to data.sources"
            )
    tree["sources"] = [_with_folder(own.get(name, {"name": name}), folder) for name in names]
    if filters:
        tree["filter"] = tree.get("filter", {}) | {axis: list(values) for axis, values in filters.items()}
    if sources not in PRESETS and size:
        tree["quotas"] = _quotas(names, size, filters.get("levels", ()), data.per_level)
    return validated(BuildRecipe, tree | {"seed": seed})


def _quotas(names: list[str], size: int, levels: tuple[int, ...], per_level: bool) -> list[dict[str, Any]]:
    quota_levels = (levels or tuple(LEVELS)) if per_level else levels
    parts = len(names) * (len(quota_levels) if per_level else 1)
    if size % parts:
        parts_text = f"{len(names)} source{'s' * (len(names) > 1)}" + (f" x {len(quota_levels)} levels" if per_level else "")
        raise ConfigError(f"sizes: {size} cannot be divided evenly among {parts_text}; choose a multiple of {parts}")
    quota = {"per_level" if per_level else "count": size // parts, "levels": list(quota_levels)}
    return [{"source": name} | quota for name in names]


def medfacts_folder(folder: Path) -> Path:
    return folder / "data" / "medfacts"
