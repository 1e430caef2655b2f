"""The study file: settings shared by all runs, grids of axes, data, controls; frozen and validated like a run's configuration.

Paths are relative to the current directory, as in every configuration, except `base`, which is relative to the study file.
`{study}` in a setting is replaced by the study's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alphamed.config.sections import DottedName, NonNegative, Positive, PositiveFloat, Section, Seed
from alphamed.data.attributes import ATTRIBUTES
from alphamed.errors import ConfigError
from alphamed.lab.datasets.catalogue import PRESETS
from alphamed.lab.datasets.recipe import Level, SourceRecipe

DATA_AXES = ("sources", "sizes", *(attribute.axis for attribute in ATTRIBUTES))
"""The axes in which training sets differ, in the order of a run's name."""
All = Literal["all"]


class ControlKind(StrEnum):
    """The kinds of control runs, with which a gain is compared."""

    RANDOM_REWARD = "random_reward"
    FORMAT_REWARD = "format_reward"
    SHUFFLED_KEYS = "shuffled_keys"
    UNCHANGED = "unchanged"


MEDFACTS = "medfacts"
"""The source of the shipped questions."""
CONTROLS: dict[ControlKind, dict[str, Any]] = {
    ControlKind.RANDOM_REWARD: {"reward.name": "random", "reward.signature": "alphamed", "reward.overlong_buffer_tokens": 0},
    ControlKind.FORMAT_REWARD: {"reward.name": "format_only", "reward.signature": "alphamed"},
    ControlKind.SHUFFLED_KEYS: {"data.answer_keys": "shuffled"},
    # the model before training, evaluated with the same prompt and grader
    ControlKind.UNCHANGED: {
        "run.stop_after": 0,
        "evaluation.before": True,
        "evaluation.after": False,
        "evaluation.every": 0,
        "evaluation.development": None,
        "logging.export_hf": False,
    },
}
"""The settings of each kind, over those of the run that it is a control for."""


class Axes(Section):
    """The values that are crossed. `sources` names sets of `data`, several joined by +; `sizes`, `levels` and
    `informativeness` choose among their questions; `seeds` are those of the run and of the draws of its questions;
    `settings` holds any other key."""

    sources: tuple[str, ...] = ()
    sizes: tuple[Positive | All, ...] = ()
    levels: tuple[Annotated[tuple[Level, ...], Field(min_length=1)] | All, ...] = ()
    informativeness: tuple[Annotated[tuple[Positive, ...], Field(min_length=1)] | All, ...] = ()
    seeds: tuple[Seed, ...] = ()
    settings: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}


class Grid(Section):
    """Every combination of its axes is a run. A run that several grids contain is made once."""

    name: DottedName
    label: DottedName | None = None
    """In front of its runs' names, where they differ from other grids' in settings that are no axes."""
    axes: Axes = Axes()
    settings: dict[str, Any] = {}
    """For the runs of this grid, over those of the study. With `sft` they are supervised (`alphamed sft`)."""
    train: tuple[Path, ...] = ()
    """Files that its runs train on, in place of a set that `data` builds: examples of supervised training."""
    controls: tuple[ControlKind, ...] = ()
    """Added runs at the first value of every axis, with all seeds."""


class MedFacts(Section):
    """The shipped questions, written to {study}/data/medfacts; the name of their source is `medfacts`."""

    seed: NonNegative = 0
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] | None = None
    categories: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    facts: Positive | None = None
    copies: Positive | None = None


class StudyData(Section):
    sources: tuple[SourceRecipe, ...] = ()
    """Sets that the axis `sources` can name, in addition to the public ones and presets of `alphamed data sources`."""
    medfacts: MedFacts | None = None
    per_level: bool = False
    """Draw the same number of questions of each level (of `levels`, or 1 to 6) instead of a set's own mixture."""
    recipe: dict[str, Any] = {}
    """Further settings of `alphamed data build`: filter, balance, against, overlap, decisions, ..."""

    def problems(self) -> Iterator[str]:
        """One line per problem, beginning with the field; reported by the study."""
        for key in ("sources", "quotas", "size", "seed"):
            if key in self.recipe:
                yield f"data.recipe: {key} is set by the axes; remove it"
        if not isinstance(self.filter, Mapping):
            yield f"data.recipe.filter: {self.filter!r} is not valid; it is a section with settings of its own"
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                yield f"data.sources: {name} is listed twice; give each set a name of its own"
            if name == MEDFACTS and self.medfacts is not None:
                yield (
                    f"data.sources: {name} is the name of the shipped questions (data.medfacts); give yours another name, "
                    f"or remove data.medfacts"
                )
            if name in PRESETS:
                yield f"data.sources: {name} is the name of a preset; give yours another name"

    @property
    def filter(self) -> Any:
        return self.recipe.get("filter", {})


class SlurmSettings(Section):
    gpus_per_node: Positive | None = None
    """None: cluster.gpus_per_node of the run."""
    options: tuple[str, ...] = ()
    """Further #SBATCH lines: --partition=gpu, --account=..."""

    def problems(self) -> Iterator[str]:
        for option in self.options:  # text after a line break would be run as a command of the script
            if not option.isprintable():
                yield (
                    f"slurm.options: {option!r} holds a line break or another control character; give every option as an "
                    f"entry of its own"
                )


class Study(Section):
    name: DottedName
    root: Path = Path("studies")
    base: Path
    """The configuration that all runs share."""
    settings: dict[str, Any] = {}
    """Dotted settings over those of `base`."""
    data: StudyData | None = None
    """None: data.train of the configuration."""
    grids: tuple[Grid, ...] = Field(min_length=1)
    deadline_s: PositiveFloat = 86_400.0
    """A run that takes longer is stopped and counts as failed; it can be resumed."""
    slurm: SlurmSettings = SlurmSettings()

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        if not str(self.root).isprintable():  # it is part of batch scripts
            yield f"root: {str(self.root)!r} holds a line break or another control character; choose another"
        yield from self.slurm.problems()
        if self.data is not None:
            yield from self.data.problems()
        names = [grid.name for grid in self.grids]
        filtered = self.data.filter if self.data else {}
        for grid in self.grids:
            if names.count(grid.name) > 1:
                yield f"grids: {grid.name} is listed twice; give each a name of its own"
            for axis in DATA_AXES:
                if getattr(grid.axes, axis) and self.data is None:
                    yield f"grids.{grid.name}.axes.{axis}: needs data, which builds the sets; add it or remove the axis"
            for axis in ("seeds", *DATA_AXES):
                if axis in grid.axes.model_fields_set and not getattr(grid.axes, axis):
                    yield f"grids.{grid.name}.axes.{axis}: [] leaves no value to run; give at least one, or remove the axis"
            if grid.train and (axis := next((axis for axis in DATA_AXES if getattr(grid.axes, axis)), None)):
                yield f"grids.{grid.name}.train: and axes.{axis} both say what its runs train on; remove one of the two"
            if self.data is not None and not grid.axes.sources and not grid.train:
                yield f"grids.{grid.name}.axes.sources: missing; name the sets that its runs are trained on"
            for axis in (attribute.axis for attribute in ATTRIBUTES):
                if getattr(grid.axes, axis) and filtered.get(axis):
                    yield (
                        f"data.recipe.filter.{axis}: {filtered[axis]!r} and grids.{grid.name}.axes.{axis} both choose "
                        f"questions; keep one of the two"
                    )
            yield from self._reserved(f"grids.{grid.name}.settings", {key: [value] for key, value in grid.settings.items()})
            yield from self._reserved(f"grids.{grid.name}.axes.settings", grid.axes.settings)
            for key in grid.axes.settings:
                for other in grid.axes.settings:
                    if other.startswith(f"{key}."):
                        yield f"grids.{grid.name}.axes.settings: {key} holds {other}, another axis; keep one of the two"
        yield from self._reserved("settings", {key: [value] for key, value in self.settings.items()})
        yield from _repeated_values(self.grids)

    def _reserved(self, where: str, settings: Mapping[str, Iterable[Any]]) -> Iterator[str]:
        """Problems with settings (key -> its values) that the study sets itself, written dotted or as a section."""
        reserved = _RESERVED | ({"data.train": "is set by data; use the axis sources, or remove data"} if self.data else {})
        for key, values in settings.items():
            for name, fix in reserved.items():
                if (
                    key == name
                    or key.startswith(f"{name}.")
                    or name.startswith(f"{key}.")
                    and any(_holds(value, name[len(key) + 1 :]) for value in values)
                ):
                    yield f"{where}: {name} {fix}"


_RESERVED = {
    "run.name": "is set by the study; remove it",
    "run.root": "is set by the study; use root",
    "run.seed": "is the axis seeds; use that",
}


def _holds(value: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return False
        value = value[name]
    return True


def _repeated_values(grids: Iterable[Grid]) -> Iterator[str]:
    """Values of the data axes that name the same set in another order, or one part twice: each would be a run."""
    first_form: dict[tuple[str, Any], tuple[str, Any]] = {}
    for grid in grids:
        for axis in DATA_AXES:
            where, values = f"grids.{grid.name}.axes.{axis}", getattr(grid.axes, axis)
            for value in values:
                text = json.dumps(value)
                parts = value.split("+") if axis == "sources" else value if isinstance(value, tuple) else (value,)
                if len(set(parts)) < len(parts):
                    yield f"{where}: {text} names a part twice; name it once"
                grid_name, other = first_form.setdefault((axis, frozenset(parts)), (grid.name, value))
                if value != other:
                    fix = "give each value once" if grid_name == grid.name else f"write it as grids.{grid_name} does"
                    yield f"{where}: {text} is {json.dumps(other)} in another order; {fix}"


def load_study(path: Path) -> Study:
    """Read and check a study file. Raises ConfigError."""
    from alphamed.config.loading import load_tree, validated

    tree = load_tree(path)
    try:
        json.dumps(tree)
    except TypeError as error:  # YAML types !!binary and !!set are not settings of a run
        raise ConfigError(
            f"config {path}: holds a value that is neither text, number, list nor mapping ({error}); write it "
            f"as one of these"
        ) from None
    study = validated(Study, tree)
    return study.model_copy(update={"base": path.parent / study.base})
