"""Small charts as SVG text: lines, stacked bars and before/after intervals, readable in light and dark.

Colours are CSS classes (`STYLE`), so that a chart follows the reader's colour scheme inside report.html as well as in a file
of its own. Untrusted text appears in labels only, and these are escaped.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from alphamed.lab.reports.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    TOP,
    WIDTH,
    Plane,
    Value,
    linear_axis,
    log_axis,
    nice_ticks,
    plane_of,
)

PAGE_STYLE = Path(__file__).with_name("report.css")
"""The style of all pages: reports, comparisons, data sets, plans."""
NAMED, UNNAMED = 92, 16  # pixels to the right of the curves, with and without their names
MAX_HOVERS = 400
"""Hover texts of a chart; in longer runs neighbouring steps share one."""

STYLE = """
svg{--ink:#1c1c1a;--soft:#64635e;--grid:#e7e6e1;--surface:#fff;
--s0:#2463c5;--s1:#d06a0b;--s2:#12805a;--s3:#9a3bbd;--s4:#85847d;--s5:#c2387f;--up:#12805a;--down:#bd3a2b}
@media (prefers-color-scheme:dark){svg{--ink:#efeee9;--soft:#a6a59e;--grid:#363530;--surface:#1e1e1c;
--s0:#6da7fb;--s1:#f29d49;--s2:#4bbd88;--s3:#cc8ae8;--s4:#96958d;--s5:#ee80b4;--up:#4bbd88;--down:#f0806f}}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;fill:var(--soft)}
svg .strong{fill:var(--ink);font-weight:600}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .faint{fill:none;stroke-width:1;opacity:.35}
svg .hover{fill:transparent}svg .hover:hover{fill:var(--soft);fill-opacity:.12}
""" + "".join(
    f"svg .l{i}{{stroke:var(--s{i})}}svg .f{i}{{fill:var(--s{i})}}svg text.f{i}{{fill:var(--s{i})}}\n" for i in range(6)
)


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: a name, a value per x (None where there is none), optional intervals per x, and a colour 0..5 (None: its index
    among the curves)."""

    name: str
    values: Sequence[Value]
    intervals: Sequence[tuple[float, float]] | None = None
    colour: int | None = None


# --------------------------------------------------------------------------------------------------------------- charts
def line_chart(
    x: Sequence[float],
    series: Sequence[Series],
    *,
    unit: str = "",
    smooth: int = 1,
    top: Value = None,
    log: bool = False,
    x_title: str = "step",
) -> str:
    """Curves over `x`. With `smooth` > 1 each is drawn thin, and bold as the centred mean of that many points. The y axis
    starts at 0 (or the lowest value, if negative) and ends at `top` or the highest value; `log`: powers of ten."""
    drawn = [value for curve in series for value in curve.values if value is not None]
    drawn += [end for curve in series for interval in curve.intervals or () for end in interval]
    y = log_axis(drawn) if log else linear_axis(drawn, top)
    plane = plane_of(x, y, WIDTH, NAMED if any(curve.name for curve in series) else UNNAMED)
    parts = [_frame(plane, unit, x_title)]
    ends: list[tuple[float, int, str]] = []
    for i, curve in _coloured(series):
        points = _points(plane, curve.values)
        bold = _points(plane, smoothed(curve.values, smooth))
        if smooth > 1:
            parts.append(f'<path class="faint l{i}" d="{_path(points)}"/>')
        parts.append(f'<path class="line l{i}" d="{_path(bold)}"/>')
        for at, (low, high) in zip(x, curve.intervals or ()):
            parts.append(_whisker(plane.pixel(at), y.pixel(low), y.pixel(high), i))
        if len(points) <= 3 or curve.intervals:
            parts += [f'<circle class="f{i}" cx="{px:.1f}" cy="{py:.1f}" r="3.5"/>' for px, py in points if py is not None]
        last = next((py for _, py in reversed(bold) if py is not None), None)
        if last is not None:
            ends.append((last, i, curve.name))
    parts += _end_labels(plane, ends)
    parts += _hovers(plane, series, unit)
    return _svg(parts, WIDTH, HEIGHT, ", ".join(curve.name for curve in series))


def stacked_bars(x: Sequence[float], series: Sequence[Series], *, unit: str = "s", width: int = 2 * WIDTH) -> str:
    """One bar per x, its parts on top of each other in the order of `series`; None counts as 0."""
    totals = [sum(part.values[k] or 0.0 for part in series) for k in range(len(x))]
    y = linear_axis(totals, None)
    plane = plane_of(x, y, width, NAMED)
    bar_width = min(28.0, max(1.0, (plane.end - LEFT) / max(len(x), 1) * 0.78))
    parts = [_frame(plane, unit, "step")]
    for k, at in enumerate(x):
        base = 0.0
        for i, part in _coloured(series):
            value = part.values[k] or 0.0
            if value > 0:
                upper, lower, left = y.pixel(base + value), y.pixel(base), plane.pixel(at) - bar_width / 2
                parts.append(
                    f'<rect class="f{i}" x="{left:.1f}" y="{upper:.1f}" width="{bar_width:.1f}" '
                    f'height="{max(lower - upper - 0.6, 0.2):.1f}"/>'
                )
            base += value
    labels, base = [], 0.0
    for i, part in _coloured(series):  # names are next to their part of the last bar
        value = (part.values[-1] or 0.0) if x else 0.0
        labels.append((y.pixel(base + value / 2), i, part.name))
        base += value
    parts += _end_labels(plane, labels)
    parts += _hovers(plane, series, unit)
    return _svg(parts, width, HEIGHT, ", ".join(part.name for part in series))


def _coloured(series: Sequence[Series]) -> list[tuple[int, Series]]:
    return [(index if curve.colour is None else curve.colour, curve) for index, curve in enumerate(series)]


def interval_rows(rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], chance: Value = None) -> str:
    """Several shares before and after on one axis 0..100%: `rows` is (label, {"before"|"after": (value, low,
    high)}); `chance` is a dotted line."""
    left, right, row_height, width = 168, 30, 46, 720
    height = row_height * len(rows) + 40

    def pixel(value: float) -> float:
        return left + value * (width - left - right)

    parts: list[str] = []
    for tick in range(0, 101, 20):
        at = pixel(tick / 100)
        parts.append(
            f'<line class="grid" x1="{at}" x2="{at}" y1="6" y2="{height - 30}"/>'
            f'<text x="{at}" y="{height - 12}" text-anchor="middle">{tick}%</text>'
        )
    if chance is not None:
        at = pixel(chance)
        parts.append(
            f'<line class="axis" stroke-dasharray="2 4" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{height - 30}">'
            f"<title>picking letters at random: {100 * chance:.1f}%</title></line>"
        )
    for k, (label, shares) in enumerate(rows):
        middle = 6 + row_height * (k + 0.5)
        parts.append(f'<text class="strong" x="{left - 14}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>')
        for name, colour, offset in (("before", 4, -8), ("after", 0, 8)):
            if name in shares:
                value, low, high = shares[name]
                at = middle + offset if len(shares) > 1 else middle
                text = f"{name}: {number(value, 'share')} [{number(low, 'share')}, {number(high, 'share')}]"
                parts.append(
                    f'<line class="line l{colour}" x1="{pixel(low):.1f}" x2="{pixel(high):.1f}" y1="{at}" '
                    f'y2="{at}"/><circle class="f{colour}" cx="{pixel(value):.1f}" cy="{at}" r="5">'
                    f"<title>{text}</title></circle>"
                )
    return _svg(parts, width, height, "before and after")


def gain_rows(rows: Sequence[tuple[str, float, float, float, bool]]) -> str:
    """Changes of a share with their intervals on one axis in percentage points: `rows` is (label, value, low, high, whether
    it is a control); controls are grey."""
    left, right, row_height, width = 248, 84, 34, 720
    height = row_height * len(rows) + 40
    ticks = nice_ticks(
        100 * min([0.0, *(low for _, _, low, _, _ in rows)]), 100 * max([0.05, *(high for *_, high, _ in rows)])
    )
    scale = (width - left - right) / (ticks[-1] - ticks[0])

    def pixel(value: float) -> float:
        return left + (100 * value - ticks[0]) * scale

    parts = []
    for tick in ticks:
        at = pixel(tick / 100)
        parts.append(
            f'<line class="{"grid" if tick else "axis"}" x1="{at:.1f}" x2="{at:.1f}" y1="6" y2="{height - 30}"/>'
            f'<text x="{at:.1f}" y="{height - 12}" text-anchor="middle">{f"{tick:+g}" if tick else "0"}</text>'
        )
    for k, (label, value, low, high, control) in enumerate(rows):
        at, colour = 6 + row_height * (k + 0.5), 4 if control else 0
        shown = label if len(label) <= 28 else label[:27] + "…"
        parts.append(
            f'<text class="strong" x="{left - 14}" y="{at + 4}" text-anchor="end">{escape(shown)}</text>'
            f'<line class="line l{colour}" x1="{pixel(low):.1f}" x2="{pixel(high):.1f}" y1="{at}" y2="{at}"/>'
            f'<circle class="f{colour}" cx="{pixel(value):.1f}" cy="{at}" r="5"><title>{escape(label)}: '
            f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]</title></circle>"
            f'<text x="{width - right + 14}" y="{at + 4}">{100 * value:+.1f}</text>'
        )
    return _svg(parts, width, height, "gains in percentage points")


def scatter(points: Sequence[tuple[str, float, float, float, float, bool]], x_title: str, chance: Value = None) -> str:
    """Shares with intervals against `x`: `points` is (label, x, value, low, high, whether it is a control). Points of equal x are
    drawn side by side; `chance` is a dotted line."""
    y = linear_axis([0.0, 1.0], 1.0)
    plane = plane_of(sorted({x for _, x, *_ in points}), y, WIDTH, UNNAMED)  # points of equal x share its space
    parts = [_frame(plane, "share", x_title)]
    if chance is not None and math.isfinite(chance):
        parts.append(
            f'<line class="axis" stroke-dasharray="2 4" x1="{LEFT}" x2="{plane.end}" y1="{y.pixel(chance):.1f}" '
            f'y2="{y.pixel(chance):.1f}"/>'
        )
    drawn_at: Counter[float] = Counter()
    for label, x, value, low, high, control in points:
        k = drawn_at[x]  # the first in the middle, then alternately to the right and left
        drawn_at[x] += 1
        at, colour = plane.pixel(x) + (k + 1) // 2 * 17 * (1 if k % 2 else -1), 4 if control else 0
        parts.append(
            _whisker(at, y.pixel(low), y.pixel(high), colour)
            + f'<circle class="f{colour}" cx="{at:.1f}" cy="{y.pixel(value):.1f}" r="4.5"><title>{escape(label)}, '
            f"{x:g}: {number(value, 'share')} [{number(low, 'share')}, {number(high, 'share')}]</title></circle>"
            f'<text class="f{colour}" x="{at + 7:.1f}" y="{y.pixel(value) - 6:.1f}">{escape(label)}</text>'
        )
    return _svg(parts, WIDTH, HEIGHT, x_title)


def histogram(edges: Sequence[float], counts: Sequence[int], x_title: str) -> str:
    """Bars between neighbouring edges: counts[k] values are in edges[k] .. edges[k + 1]."""
    y = linear_axis(counts, None)
    plane = plane_of(list(edges), y, WIDTH, UNNAMED)
    parts = [_frame(plane, "", x_title)]
    for low, high, count in zip(edges, edges[1:], counts):
        left, right, top = plane.pixel(low), plane.pixel(high), y.pixel(count)
        parts.append(
            f'<rect class="f0" x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 0.5):.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{low:g} to {high:g}: {count:,}</title></rect>'
        )
    return _svg(parts, WIDTH, HEIGHT, x_title)


def ranked_bars(rows: Sequence[tuple[str, int]], total: int) -> str:
    """One horizontal bar per row with its count and share of `total`; `rows` is (label, count)."""
    left, right, row_height = 176, 96, 26
    height, most = row_height * len(rows) + 12, max((count for _, count in rows), default=1)
    parts = []
    for k, (label, count) in enumerate(rows):
        middle, length = 6 + row_height * (k + 0.5), count / max(most, 1) * (WIDTH - left - right)
        shown = label if len(label) <= 24 else label[:23] + "…"
        parts.append(
            f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end">{escape(shown)}'
            f'<title>{escape(label)}</title></text><rect class="f0" x="{left}" y="{middle - 8}" '
            f'width="{max(length, 1):.1f}" height="16" rx="2"/>'
            f'<text x="{left + length + 8:.1f}" y="{middle + 4}"><tspan class="strong">{count:,}</tspan> '
            f"{number(count / max(total, 1), 'share')}</text>"
        )
    return _svg(parts, WIDTH, height, "counts")


def sheet(charts: Sequence[tuple[str, str]], title: str, columns: int = 2) -> str:
    """Charts with titles as one SVG document, for a README or a slide."""
    rows = -(-len(charts) // columns)
    width, height, gap, head = columns * (WIDTH + 24) + 24, 48, 24, 26
    parts = [f'<text class="strong" style="font-size:17px" x="{gap}" y="32">{escape(title)}</text>']
    for k, (name, chart) in enumerate(charts):
        x, y = gap + k % columns * (WIDTH + gap), height + k // columns * (HEIGHT + head + gap)
        parts.append(
            f'<text class="strong" style="font-size:14px" x="{x}" y="{y + 14}">{escape(name)}</text>'
            f'<g transform="translate({x} {y + head})">{chart}</g>'
        )
    full = height + rows * (HEIGHT + head + gap)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {full}" width="{width}" height="{full}">'
        f'<style>{STYLE}</style><rect width="100%" height="100%" style="fill:var(--surface)"/>'
        f"{''.join(parts)}</svg>"
    )


def smoothed(values: Sequence[Value], window: int) -> list[Value]:
    """Centred mean over `window` values, those that are None not counted; None where the value itself is None."""
    half, means = window // 2, []
    for k, value in enumerate(values):
        near = [v for v in values[max(0, k - half) : k + half + 1] if v is not None]
        means.append(None if value is None else sum(near) / len(near))
    return means


# ---------------------------------------------------------------------------------------------------------------- frame
def _frame(plane: Plane, unit: str, x_title: str) -> str:
    parts = []
    for tick in plane.y.ticks:
        at = plane.y.pixel(tick)
        kind = "axis" if tick in (0, plane.y.ticks[0]) else "grid"
        parts.append(
            f'<line class="{kind}" x1="{LEFT}" x2="{plane.end}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick, unit)}</text>'
        )
    below = HEIGHT - BOTTOM + 19
    parts += [
        f'<text x="{plane.pixel(tick):.1f}" y="{below}" text-anchor="middle">{tick}</text>' for tick in _whole_ticks(plane.x)
    ]
    parts.append(f'<text x="{LEFT - 7}" y="{below}" text-anchor="end">{escape(x_title)}</text>')
    return "".join(parts)


def _whole_ticks(x: Sequence[float]) -> list[int]:
    if not x:
        return []
    if len(x) <= 3:
        return [round(at) for at in x]
    low, high = math.ceil(min(x)), math.floor(max(x))
    return [round(tick) for tick in nice_ticks(low, high, 6) if low <= tick <= high and tick == round(tick)]


# ---------------------------------------------------------------------------------------------------------------- marks
def _points(plane: Plane, values: Sequence[Value]) -> list[tuple[float, Value]]:
    """Pixels of a curve's values; y is None where there is no value."""
    return [(plane.pixel(at), None if value is None else plane.y.pixel(value)) for at, value in zip(plane.x, values)]


def _path(points: Sequence[tuple[float, Value]]) -> str:
    """Line segments through the points, interrupted where y is None."""
    commands, drawing = [], False
    for px, py in points:
        if py is not None:
            commands.append(f"{'L' if drawing else 'M'}{px:.1f} {py:.1f}")
        drawing = py is not None
    return "".join(commands)


def _whisker(x: float, low: float, high: float, colour: int) -> str:
    return f'<line class="line l{colour}" style="opacity:.5" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _end_labels(plane: Plane, ends: Sequence[tuple[float, int, str]]) -> list[str]:
    """Names at the ends of curves, at least 15 pixels apart and above the axis."""
    ordered = sorted(end for end in ends if end[2])
    lowest = HEIGHT - BOTTOM - 2
    heights: list[float] = []
    for at, _, _ in ordered:
        heights.append(max(at, heights[-1] + 15) if heights else at)
    for k in reversed(range(len(heights))):
        heights[k] = min(heights[k], lowest - 15 * (len(heights) - 1 - k))
    return [
        f'<text class="f{i}" x="{plane.end + 8}" y="{at + 4:.1f}">{escape(name)}</text>'
        for at, (_, i, name) in zip(heights, ordered)
    ]


def _hovers(plane: Plane, series: Sequence[Series], unit: str) -> list[str]:
    """Invisible columns that show the numbers of a step under the pointer."""
    x = plane.x
    every = max(1, -(-len(x) // MAX_HOVERS))
    column_width = (plane.end - LEFT) / max(len(x), 1) * every
    columns = []
    for k in range(0, len(x), every):
        text = "\n".join(
            f"{curve.name or 'value'}: {number(curve.values[k], unit)}" for curve in series if curve.values[k] is not None
        )
        columns.append(
            f'<rect class="hover" x="{plane.pixel(x[k]) - column_width / 2:.1f}" y="{TOP}" width="{column_width:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"><title>step {x[k]:g}\n{escape(text)}</title></rect>'
        )
    return columns


def _svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def number(value: Value, unit: str = "") -> str:
    """A tick or hover text: shares as percent, the rest with at most three significant digits."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{100 * value:.0f}%" if abs(100 * value - round(100 * value)) < 1e-6 else f"{100 * value:.1f}%"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
