"""The annotated attributes of a question: what sets are filtered, varied and counted by, and answers grouped by.

Another attribute takes a field of `Question` that rows carry, a filter in lab/datasets/recipe.py, an axis in
lab/study/spec.py and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass

from alphamed.data.mcq import BINS, LEVELS, short
from alphamed.records import Question


@dataclass(frozen=True, slots=True)
class Attribute:
    """`field` is its name in questions and rows, `axis` in studies, filters and counts, `short` in the names of runs, `unit`
    that of one value in charts and tables; `scale` says what the numbers mean, of which there are `values`."""

    field: str
    axis: str
    short: str
    unit: str
    scale: str
    values: range

    def of(self, question: Question) -> int | None:
        return getattr(question, self.field)

    def checked(self, value: object) -> int:
        """The value as a whole number of the scale. ValueError where it is none."""
        whole = type(value) is int or type(value) is float and value.is_integer()  # true is 1 to Python, not to people
        if not whole or int(value) not in self.values:  # type: ignore[call-overload]
            raise ValueError(f"{self.field} {short(value)} is not a whole number from {self.values[0]} to {self.values[-1]}")
        return int(value)  # type: ignore[call-overload]


ATTRIBUTES = (
    Attribute("level", "levels", "l", "level", "1 easy to 6 hard", LEVELS),
    Attribute("informativeness", "informativeness", "i", "bin", "bins from 1, little, on", BINS),
)


def values_of(question: Question) -> dict[str, int | None]:
    """Field -> value of every attribute, as rows have them."""
    return {attribute.field: attribute.of(question) for attribute in ATTRIBUTES}
