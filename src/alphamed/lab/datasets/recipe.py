"""What a training set is made of: the settings of `alphamed data build`, frozen and validated like a run's."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from alphamed.config.choices import BadRows
from alphamed.config.sections import DottedName, NonNegative, Positive, Section
from alphamed.data.keys import AnswerForm

Level = Annotated[int, Field(ge=1, le=6)]


class Overlap(StrEnum):
    """What to do with training questions that a benchmark holds too."""

    REFUSE = "refuse"
    DROP = "drop"
    FLAG = "flag"


class Conflicts(StrEnum):
    """What to do with a question that the sources hold with different keys."""

    REFUSE = "refuse"
    DROP = "drop"


class Short(StrEnum):
    """What to do where a quota asks for more questions than exist."""

    REFUSE = "refuse"
    TAKE = "take"


class SourceRecipe(Section):
    name: DottedName
    """A known set (`alphamed data sources`) or a name of your own for a file of the schema."""
    path: Path | None = None
    """A local copy: a folder in the hub's layout, or a file in the hub's or the schema's layout."""
    hub: str | None = None
    """owner/name of a hub set whose rows are in the schema, for names that are not known."""
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    answer: AnswerForm | None = None
    """How the file marks the right option; not set: inferred from all of its keys, and refused where they can be read in two
    ways."""
    licence: str | None = None
    """For sets that are not known; rows with their own licence keep it."""
    levels: Path | None = None
    """A file of rows with `id`, `level` and, where known, `informativeness`, over what the questions carry: what `alphamed
    data difficulty` writes."""


class FilterRecipe(Section):
    sources: tuple[str, ...] = ()
    """Keep questions whose own `source` is or begins with one of these (`headqa/medicine`, `medqa`); empty: all."""
    min_words: NonNegative = 0
    max_words: Positive | None = None
    """Words of question, context and options together; in scripts without spaces between words (Chinese, Japanese, Thai,
    Lao, Khmer, Burmese) every character counts as one."""
    min_options: Annotated[int, Field(ge=2)] = 2
    max_options: Annotated[int, Field(ge=2)] = 26
    levels: tuple[Level, ...] = ()
    """Empty: all, questions without a level too."""
    informativeness: tuple[Positive, ...] = ()
    """Bins of `alphamed data difficulty`; empty: all, questions without one too."""
    exclude: tuple[str, ...] = ()
    """Leave out questions whose text matches one of these regular expressions, without regard to case."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_options > self.max_options:
            raise ValueError(
                f"filter.min_options: {self.min_options} is above filter.max_options ({self.max_options}); lower it"
            )
        for text in self.exclude:
            try:
                re.compile(text)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"filter.exclude: {text!r} is no regular expression ({error}); fix it") from None
        if self.max_words is not None and self.min_words > self.max_words:
            raise ValueError(f"filter.min_words: {self.min_words} is above filter.max_words ({self.max_words}); lower it")
        return self


class QuotaRecipe(Section):
    """So many questions of a source, drawn by seed: `count` in all, or `per_level` of each level."""

    source: str
    count: Positive | None = None
    per_level: Positive | None = None
    levels: tuple[Level, ...] = ()
    """Restrict to these levels; with `per_level` empty means 1 to 6."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.count is None) == (self.per_level is None):
            raise ValueError(f"quotas: {self.source} needs either count or per_level; give one of them")
        return self


class BalanceRecipe(Section):
    """Cut the commonest answers of a source down until none makes up more than `max_share` of it. Answers are texts: for
    sets whose options are always the same (yes, no, maybe), where new letters change nothing."""

    source: str
    max_share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class BuildRecipe(Section):
    sources: tuple[SourceRecipe, ...] = Field(min_length=1)
    bad_rows: BadRows = BadRows.REFUSE
    filter: FilterRecipe = FilterRecipe()
    balance: tuple[BalanceRecipe, ...] = ()
    quotas: tuple[QuotaRecipe, ...] = ()
    """Empty: all questions. A source without a quota is left out where there are any."""
    short: Short = Short.REFUSE
    size: Positive | None = None
    """At most this many questions in all, drawn by seed after quotas."""
    seed: NonNegative = 0
    drop_repeats: bool = False
    """Keep one of questions with the same stem, context, options and key. The published sets hold a few."""
    conflicts: Conflicts = Conflicts.REFUSE
    """Of a question (context and options included) that has another key elsewhere in the sources after decisions: `drop`
    leaves out all versions, since nothing says which key is right."""
    shuffle: bool = True
    """Put the questions in an order by seed; false: sources one after the other, as read."""
    shuffle_options: bool = False
    """New letters by seed, the answer dealt evenly over them. Training does so every epoch anyway."""
    against: tuple[str, ...] = ()
    """Benchmarks (names, NAME=PATH, or files) that must not share questions with the set."""
    overlap: Overlap = Overlap.REFUSE
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Stems at least this similar are compared further (see decontaminate.py)."""
    decisions: tuple[Path, ...] = ()
    """Files of decisions on suspects, see `alphamed data suspects`."""
    decisions_version: Positive | None = None
    """The version that the (one) file of decisions must have."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self):
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                yield f"sources: {name} occurs twice; give every source once, or two names to two files"
        for kind, parts in (("quotas", self.quotas), ("balance", self.balance)):
            for part in parts:
                if part.source not in names:
                    yield f"{kind}: {part.source!r} is none of the sources {', '.join(names)}; name one of them"
        if self.overlap in (Overlap.DROP, Overlap.FLAG) and not self.against:
            yield (
                f"overlap: {self.overlap} checks nothing without against; name the benchmarks there (--against), or "
                f"leave overlap out"
            )
        if self.decisions_version is not None and len(self.decisions) != 1:
            yield (
                f"decisions_version: {self.decisions_version} is the version of one file, {len(self.decisions)} are "
                f"given; give one"
            )
