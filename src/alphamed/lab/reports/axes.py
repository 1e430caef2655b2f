"""Axes of charts: round ticks, linear and logarithmic scales, the area in which a chart is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Value = float | None
WIDTH, HEIGHT = 480, 250
LEFT, TOP, BOTTOM = 52, 14, 34  # margins for tick labels


@dataclass(frozen=True, slots=True)
class Axis:
    ticks: Sequence[float]
    pixel: Callable[[float], float]  # value -> y in pixels


@dataclass(frozen=True, slots=True)
class Plane:
    """The area of a chart: its x values and their pixels, its y axis, and the pixel at its right edge."""

    x: Sequence[float]
    pixel: Callable[[float], float]  # x value -> x in pixels
    y: Axis
    end: int


def plane_of(x: Sequence[float], y: Axis, width: int, right: int) -> Plane:
    low, high = min(x, default=0), max(x, default=1)
    if high == low:
        low, high = low - 0.5, high + 0.5
    pad = 0.5 * (high - low) / max(len(x), 2)  # keeps bars and points off the axes
    scale = (width - right - LEFT) / (high - low + 2 * pad)
    return Plane(x, lambda value: LEFT + (value - low + pad) * scale, y, width - right)


def linear_axis(values: Sequence[float], top: Value) -> Axis:
    low, high = min([0.0, *values]), max([0.0, *values]) if top is None else top
    if high == low:
        high = low + 1.0
    ticks = nice_ticks(low, high)
    low = min(low, ticks[0])
    high = max(high, ticks[-1])
    scale = (HEIGHT - TOP - BOTTOM) / (high - low)
    return Axis(ticks, lambda value: HEIGHT - BOTTOM - (min(value, high) - low) * scale)


def log_axis(values: Sequence[float]) -> Axis:
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)
    step = -(-(high - low) // 5)
    scale = (HEIGHT - TOP - BOTTOM) / (high - low)
    return Axis(
        [10.0**k for k in range(low, high + 1, step)],
        lambda value: HEIGHT - BOTTOM - (math.log10(max(value, 10.0**low)) - low) * scale,
    )


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that cover low..high."""
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]
