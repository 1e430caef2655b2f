"""The annotated attributes of a question: what sets are filtered, varied and counted by, and answers grouped by.

A further one is a field of `Question` that rows carry, a filter in data/recipe.py, an axis in study/spec.py and a line here.
"""
from __future__ import annotations

from dataclasses import dataclass

from alphamed.data.mcq import LEVELS
from alphamed.records import Question


@dataclass(frozen=True, slots=True)
class Attribute:
    """`field` is its name in questions and rows, `axis` in studies, filters and counts, `short` in the names of runs, `unit`
    that of one value in charts and tables; `scale` says what the numbers mean, of which `highest` is the last (None: there
    is none). They begin with 1."""
    field: str
    axis: str
    short: str
    unit: str
    scale: str
    highest: int | None = None

    def of(self, question: Question) -> int | None:
        return getattr(question, self.field)

    def checked(self, value: object) -> int:
        """The value as a whole number of the scale. ValueError where it is none."""
        number = int(value)                                 # type: ignore[call-overload]
        if number != float(value) or not 1 <= number <= (self.highest or number):      # type: ignore[arg-type]
            end = f"to {self.highest}" if self.highest else "on"
            raise ValueError(f"{self.field} {value!r} is not a whole number from 1 {end}")
        return number


ATTRIBUTES = (Attribute("level", "levels", "l", "level", "1 easy to 6 hard", LEVELS[-1]),
              Attribute("informativeness", "informativeness", "i", "bin", "bins from 1, little, on"))


def values_of(question: Question) -> dict[str, int | None]:
    """Field -> value of every attribute, as rows have them."""
    return {one.field: one.of(question) for one in ATTRIBUTES}
