"""From a study to its runs: every combination of the axes with its name, configuration and training set (pure)."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.config.loading import build_config, dump_tree, load_config_tree, put, require_sections, validated
from alphamed.config.schema import Config
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.mcq import LEVELS
from alphamed.errors import ConfigError
from alphamed.lab.datasets.catalogue import PRESETS, SOURCES
from alphamed.lab.datasets.recipe import BuildRecipe
from alphamed.lab.study.spec import CONTROLS, DATA_AXES, MEDFACTS, Control, Grid, Study, StudyData

MAX_NAME = 100
"""Characters of a run's name. A folder's name may have 255 bytes, and others are made from it."""
ALL = "all"


@dataclass(frozen=True, slots=True)
class Set:
    """A training set of the study. Its file is named by content, so that another recipe never meets an old file."""

    file: Path
    recipe: BuildRecipe


@dataclass(frozen=True, slots=True)
class PlannedRun:
    name: str
    grids: tuple[str, ...]
    axes: Mapping[str, Any]
    """Axis -> its value of this run: what a comparison puts on its axes."""
    control: Control | None
    config: Config
    set: Set | None


def plan_runs(study: Study) -> list[PlannedRun]:
    """All runs in the order of the file, controls after their grid. Raises ConfigError where one is not valid."""
    base = load_config_tree(study.base)
    found: dict[str, PlannedRun] = {}
    named: dict[str, str] = {}
    for grid in study.grids:
        shared = _shared(study, grid, base)
        for axes, control in _cells(grid, shared):
            run = _plan(study, grid, shared, axes, control)
            known = found.get(run.name)
            if known is None:
                found[run.name] = run
                other = named.setdefault(_content(run.config), run.name)
                if other != run.name:
                    raise ConfigError(
                        f"grids.{grid.name}: {run.name} and {other} are one run under two names; give "
                        f"each value once, and write it alike in all grids"
                    )
            elif known.config == run.config:
                grids = tuple(dict.fromkeys((*known.grids, grid.name)))
                found[run.name] = PlannedRun(run.name, grids, known.axes, known.control, known.config, known.set)
            else:
                raise ConfigError(
                    f"grids.{grid.name}: {run.name} is the name of another run of {', '.join(known.grids)} "
                    f"too, with other settings; write what differs as an axis"
                )
    return list(found.values())


def _content(config: Config) -> str:
    """All that a run computes: its configuration but for the name."""
    tree = config.model_dump(mode="json")
    return json.dumps(tree | {"run": tree["run"] | {"name": None}}, sort_keys=True)


def _shared(study: Study, grid: Grid, base: Mapping[str, Any]) -> dict[str, Any]:
    """What all runs of a grid begin with: the base with the settings of study and grid."""
    tree = copy.deepcopy(dict(base))
    for where, settings in (("settings", study.settings), (f"grids.{grid.name}.settings", grid.settings)):
        for key, value in settings.items():
            put(tree, key, _with_folder(value, study.folder))
        require_sections(tree, f"{where}: ")
    return tree


def _cells(grid: Grid, shared: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Control | None]]:
    """(axis -> value, control) of every run. Where seeds do not choose the evaluation questions, one unchanged model stands
    for all seeds."""
    drawn = (shared.get("evaluation") or {}).get("questions") is not None
    axes = {name: values for name in DATA_AXES if (values := getattr(grid.axes, name))}
    axes |= grid.axes.settings
    seeds = grid.axes.seeds or ((shared.get("run") or {}).get("seed"),)
    for name, values in (*axes.items(), ("seeds", seeds)):
        keys = [json.dumps(value) for value in values]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise ConfigError(f"grids.{grid.name}.axes.{name}: {repeated} stands twice; give each value once")
    for values in itertools.product(*axes.values()):
        for seed in seeds:
            yield dict(zip(axes, values)) | ({} if seed is None else {"seeds": seed}), None
    first = {name: values[0] for name, values in axes.items()}
    for control in grid.controls:
        for seed in seeds[:1] if control == Control.UNCHANGED and not drawn else seeds:
            yield first | ({} if seed is None else {"seeds": seed}), control


def _plan(study: Study, grid: Grid, shared: Mapping[str, Any], axes: dict[str, Any], control: Control | None) -> PlannedRun:
    name = run_name(axes, control, grid.label)
    tree = copy.deepcopy(dict(shared))
    for key, value in axes.items():
        if key in grid.axes.settings:
            put(tree, key, _with_folder(value, study.folder))
    for key, value in (CONTROLS[control] if control else {}).items():
        put(tree, key, value)
    built = None
    try:
        if grid.train:
            put(tree, "data.train", [_with_folder(str(file), study.folder) for file in grid.train])
        elif study.data is not None:
            built = _set_of(study.folder, study.data, axes)
            put(tree, "data.train", [str(built.file)])
        run = {"root": str(study.folder / "runs"), "name": name} | ({"seed": axes["seeds"]} if "seeds" in axes else {})
        for key, value in run.items():
            put(tree, f"run.{key}", value)
        config = build_config(tree)
    except ConfigError as error:
        raise ConfigError(f"grids.{grid.name}: run {name}: {error}") from None
    return PlannedRun(name, (grid.name,), axes, control, config, built)


def _with_folder(value: Any, folder: Path) -> Any:
    """The value with {study} replaced in every text."""
    if isinstance(value, str):
        return value.replace("{study}", str(folder))
    if isinstance(value, Mapping):
        return {key: _with_folder(one, folder) for key, one in value.items()}
    return [_with_folder(one, folder) for one in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------------------------- names
def run_name(axes: Mapping[str, Any], control: Control | None, label: str | None = None) -> str:
    """What is said of a run in its folder's name: `medqa+medmcqa-n1200-l1.2-i3-lr1e-05-s1-random_reward`, with . for +."""
    said = {"sources": "", "sizes": "n", "seeds": "s"} | {one.axis: one.short for one in ATTRIBUTES}
    parts = [
        said.get(key, key.rpartition(".")[2].replace("_", "")) + _said(value)
        for key, value in axes.items()
        if not (key in DATA_AXES and key != "sources" and value == ALL)
    ]
    text = "-".join([*([label] if label else []), *parts, *([str(control)] if control else [])]) or "run"
    if len(text) > MAX_NAME:
        text = f"{text[: MAX_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ".".join(map(_said, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() and letter.isascii() or letter in "._-" else "." for letter in text)


# ----------------------------------------------------------------------------------------------------------------- data
def _set_of(folder: Path, data: StudyData, axes: Mapping[str, Any]) -> Set:
    size, seed = axes.get("sizes", ALL), axes.get("seeds", 0)
    wanted = {one.axis: axes[one.axis] for one in ATTRIBUTES if axes.get(one.axis, ALL) != ALL}
    recipe = recipe_of(data, folder, axes["sources"], None if size == ALL else size, wanted, seed)
    slug = run_name({key: axes[key] for key in (*DATA_AXES, "seeds") if key in axes}, None)
    digest = hashlib.sha256(dump_tree(recipe.model_dump(mode="json")).encode()).hexdigest()[:8]
    return Set(folder / "data" / f"{slug}-{digest}.jsonl", recipe)


def recipe_of(
    data: StudyData, folder: Path, sources: str, size: int | None, wanted: Mapping[str, tuple[int, ...]], seed: int
) -> BuildRecipe:
    """What `alphamed data build` is told for one combination of the axes. Raises ConfigError.

    `sources` is a preset, or names joined by +, of which each gives the same number of questions; with `per_level` the same
    number of each level too. `wanted`: axis of an attribute -> the values that questions may have.
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
    if wanted:
        tree["filter"] = tree.get("filter", {}) | {axis: list(values) for axis, values in wanted.items()}
    if sources not in PRESETS and size:
        tree["quotas"] = _quotas(names, size, wanted.get("levels", ()), data.per_level)
    return validated(BuildRecipe, tree | {"seed": seed})


def _quotas(names: list[str], size: int, levels: tuple[int, ...], per_level: bool) -> list[dict[str, Any]]:
    wanted = (levels or tuple(LEVELS)) if per_level else levels
    parts = len(names) * (len(wanted) if per_level else 1)
    if size % parts:
        many = f"{len(names)} source{'s' * (len(names) > 1)}" + (f" x {len(wanted)} levels" if per_level else "")
        raise ConfigError(f"sizes: {size} cannot be dealt evenly to {many}; choose a multiple of {parts}")
    amount = {"per_level" if per_level else "count": size // parts, "levels": list(wanted)}
    return [{"source": name} | amount for name in names]


def medfacts_folder(folder: Path) -> Path:
    return folder / "data" / "medfacts"
