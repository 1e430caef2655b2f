"""What a study file says: settings shared by all runs, grids of axes, data, controls; frozen and validated like a run's.

Paths in it count from where the command is given, as in every configuration, but `base` from the study file. `{study}` in a
setting stands for the study's folder.
"""
from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from alphamed.config_sections import DottedName, NonNegative, Positive, PositiveFloat, Section, Seed
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.recipe import Level, SourceRecipe

DATA_AXES = ("sources", "sizes", *(one.axis for one in ATTRIBUTES))
"""What training sets differ in, in the order of a run's name."""
All = Literal["all"]


class Control(StrEnum):
    """What a claimed gain is held against."""
    RANDOM_REWARD = "random_reward"
    FORMAT_REWARD = "format_reward"
    SHUFFLED_KEYS = "shuffled_keys"
    UNCHANGED = "unchanged"


CONTROLS: dict[Control, dict[str, Any]] = {
    Control.RANDOM_REWARD: {"reward.name": "random", "reward.overlong_buffer_tokens": 0},
    Control.FORMAT_REWARD: {"reward.name": "format_only"},
    Control.SHUFFLED_KEYS: {"data.answer_keys": "shuffled"},
    # the model as it is, asked with the same prompt and graded by the same grader
    Control.UNCHANGED: {"run.stop_after": 0, "evaluation.before": True, "evaluation.after": False, "evaluation.every": 0,
                        "evaluation.development": None, "logging.export_hf": False},
}
"""Each preset's settings, over those of the run that it is a control of."""


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
    """Every combination of its axes is a run. Of the same run in several grids there is one."""
    name: DottedName
    axes: Axes = Axes()
    settings: dict[str, Any] = {}
    """For the runs of this grid, over those of the study."""
    controls: tuple[Control, ...] = ()
    """Runs beside the grid's, at the first value of every axis but with all seeds."""


class MedFacts(Section):
    """The shipped questions, written to {study}/data/medfacts; their source is called `medfacts`."""
    seed: NonNegative = 0
    levels: tuple[Level, ...] | None = None
    categories: tuple[str, ...] | None = None
    facts: Positive | None = None
    copies: Positive | None = None


class StudyData(Section):
    sources: tuple[SourceRecipe, ...] = ()
    """Sets that the axis `sources` can name, beside the public ones and presets of `alphamed data sources`."""
    medfacts: MedFacts | None = None
    per_level: bool = False
    """Draw as many questions of each level (of `levels`, or 1 to 6) in place of a set's own mixture."""
    recipe: dict[str, Any] = {}
    """Further settings of `alphamed data build`: filter, balance, against, overlap, decisions, ..."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("sources", "quotas", "size", "seed"):
            if key in self.recipe:
                raise ValueError(f"data.recipe: {key} is what the axes decide; remove it")
        return self


class SlurmSettings(Section):
    gpus_per_node: Positive | None = None
    """None: cluster.gpus_per_node of the run."""
    options: tuple[str, ...] = ()
    """Further #SBATCH lines: --partition=gpu, --account=..."""


class Study(Section):
    name: DottedName
    root: Path = Path("studies")
    base: Path
    """The configuration that all runs share."""
    settings: dict[str, Any] = {}
    """Dotted settings over it."""
    data: StudyData | None = None
    """None: data.train of the configuration."""
    grids: tuple[Grid, ...] = Field(min_length=1)
    deadline_s: PositiveFloat = 86_400.0
    """A run that takes longer is stopped, and counts as failed; it can be continued."""
    slurm: SlurmSettings = SlurmSettings()

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self):
        names = [grid.name for grid in self.grids]
        for grid in self.grids:
            if names.count(grid.name) > 1:
                yield f"grids: {grid.name} stands twice; give each a name of its own"
            for axis in DATA_AXES:
                if getattr(grid.axes, axis) and self.data is None:
                    yield f"grids.{grid.name}.axes.{axis}: needs data, which builds the sets; add it or remove the axis"
            if self.data is not None and not grid.axes.sources:
                yield f"grids.{grid.name}.axes.sources: missing; name the sets that its runs are trained on"
            for key, where in [(key, "settings") for key in grid.settings] + [(key, "axes.settings")
                                                                              for key in grid.axes.settings]:
                if key in _OWN:
                    yield f"grids.{grid.name}.{where}: {key} {_OWN[key]}"
        for key in self.settings:
            if key in _OWN:
                yield f"settings: {key} {_OWN[key]}"


_OWN = {"run.name": "is given by the study; remove it", "run.root": "is given by the study; use root",
        "run.seed": "is the axis seeds; use that"}


def load_study(path: Path) -> Study:
    """Read and check a study file. Raises ConfigError."""
    from alphamed.config_file import load_tree, validated

    study = validated(Study, load_tree(path))
    return study.model_copy(update={"base": path.parent / study.base})
