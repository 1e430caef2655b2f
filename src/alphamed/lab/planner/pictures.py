"""Pictures of a plan as SVG text: the cluster's GPUs, memory by cause, and where a step's time goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from alphamed.lab.planner.text_report import PART_NAMES
from alphamed.lab.planner.time import StepTime
from alphamed.lab.planner.topology import Seat, Topology
from alphamed.planner.hardware import GIB
from alphamed.planner.job import PlannedJob
from alphamed.planner.memory import Use

WIDTH = 960
CELL, CELL_HEIGHT, GAP, LABEL = 104, 54, 6, 64
MAX_NODES = 32
COLOURS = 6
PART_COLOURS = {"generate": 0, "logprobs": 1, "update": 2, "sync": 3, "other": 4, "handover": 5}
STYLE = """
svg .cell{stroke:var(--surface);stroke-width:1}
svg .idle{fill:var(--grid)}
svg .t text,svg text.on{fill:var(--surface)}
svg .limit{stroke:var(--down);stroke-width:2;stroke-dasharray:5 3}
svg .p0{opacity:1}svg .p1{opacity:.8}svg .p2{opacity:.62}svg .p3{opacity:.48}
svg .edge{fill:none;stroke:var(--soft);stroke-width:1}
"""


def cluster(job: PlannedJob, topology: Topology) -> str:
    """A row per node, a cell per GPU: trainer ranks in a colour per pipeline stage, engines framed; where they share a GPU,
    one below the other."""
    nodes = min(topology.nodes, MAX_NODES)
    per_row = min(job.gpus_per_node, 8)
    deep = max(Counter((seat.node, seat.gpu) for seat in topology.seats).values())
    rows_per_node = -(-job.gpus_per_node // per_row) * deep
    tall = rows_per_node * (CELL_HEIGHT + GAP) + 8
    several = job.parallel.context > 1
    parts = []
    for node in range(nodes):
        top = node * tall + 4
        parts.append(f'<text class="strong" x="0" y="{top + 22}">node {node}</text>')
        drawn: Counter[int] = Counter()
        for seat in (seat for seat in topology.seats if seat.node == node):
            column, row = seat.gpu % per_row, seat.gpu // per_row * deep + drawn[seat.gpu]
            drawn[seat.gpu] += 1
            parts.append(_cell(seat, LABEL + column * (CELL + GAP), top + row * (CELL_HEIGHT + GAP), several))
    height = nodes * tall + (24 if topology.nodes > nodes else 0)
    if topology.nodes > nodes:
        parts.append(f'<text x="{LABEL}" y="{height - 6}">and {topology.nodes - nodes} more nodes</text>')
    return _svg(parts, LABEL + per_row * (CELL + GAP), height, "which GPU holds what")


def _cell(seat: Seat, x: int, y: int, with_context: bool) -> str:
    if seat.role == "idle":
        return (
            f'<rect class="idle" x="{x}" y="{y}" width="{CELL}" height="{CELL_HEIGHT}" rx="5"/>'
            f'<text x="{x + 10}" y="{y + 32}">idle</text>'
        )
    if seat.role == "engine":
        hover = f"engine {seat.engine}, worker {seat.worker}"
        return (
            f'<g><title>{hover}</title><rect class="edge" x="{x + 0.5}" y="{y + 0.5}" width="{CELL - 1}" '
            f'height="{CELL_HEIGHT - 1}" rx="5"/><text class="strong" x="{x + 10}" y="{y + 22}">engine {seat.engine}'
            f'</text><text x="{x + 10}" y="{y + 40}">tensor {seat.worker}</text></g>'
        )
    assert seat.pipeline is not None
    shade = f"f{seat.pipeline % COLOURS} p{seat.pipeline // COLOURS % 4}"
    layers = ", ".join(f"{first}-{last}" for first, last in seat.layers)
    context = f" C{seat.context}" if with_context else ""
    return (
        f'<g class="t"><title>rank {seat.rank}: tensor {seat.tensor}, context {seat.context}, data {seat.data}, '
        f"stage {seat.pipeline}, layers {layers}</title>"
        f'<rect class="cell {shade}" x="{x}" y="{y}" width="{CELL}" height="{CELL_HEIGHT}" rx="5"/>'
        f'<text x="{x + 10}" y="{y + 22}">rank {seat.rank}</text>'
        f'<text x="{x + 10}" y="{y + 40}">T{seat.tensor}{context} D{seat.data} P{seat.pipeline}</text></g>'
    )


def memory(uses: Sequence[Use]) -> str:
    """One bar per role, its causes side by side, the limit dashed; causes are named below."""
    left, bar, tall = 84, 34, 118
    scale = (WIDTH - left - 20) / max(max(use.total, use.limit) for use in uses)
    parts = []
    for i, use in enumerate(uses):
        top, x, named = i * tall + 22, float(left), 0
        parts.append(f'<text class="strong" x="0" y="{top + 22}">{escape(use.role)}</text>')
        for colour, (cause, amount) in enumerate(item for item in use.causes.items() if item[1]):
            wide = amount * scale
            shade = f"f{colour % COLOURS} p{colour // COLOURS % 4}"
            parts.append(
                f'<rect class="{shade}" x="{x:.1f}" y="{top}" width="{max(wide - 1, 0.5):.1f}" height="{bar}">'
                f"<title>{escape(cause)}: {amount / GIB:.2f} GiB</title></rect>"
            )
            at, line = left + named % 4 * 216, named // 4
            parts.append(
                f'<rect class="{shade}" x="{at}" y="{top + bar + 12 + line * 18}" width="10" height="10"/>'
                f'<text x="{at + 15}" y="{top + bar + 21 + line * 18}">{escape(cause)} {amount / GIB:.1f}</text>'
            )
            x, named = x + wide, named + 1
        at = left + use.limit * scale
        parts.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 6}" y2="{top + bar + 4}"/>'
            f'<text x="{at:.1f}" y="{top - 9}" text-anchor="end">{use.total / GIB:.1f} of {use.limit / GIB:.1f} '
            f"GiB</text>"
        )
    return _svg(parts, WIDTH, len(uses) * tall + 6, "memory by cause")


def step(time: StepTime) -> str:
    """The parts of a step along one axis; overlapping generation has its own lane."""
    left, bar, top, lane = 84, 30, 24, 46
    scale = (WIDTH - left - 20) / max(time.total, 1e-9)
    parts, at = [], {0: 0.0, 1: 0.0}
    for part, seconds in time.parts().items():
        if not seconds:
            continue
        on = 1 if time.overlapped and part == "generate" else 0
        x, wide, y = left + at[on] * scale, seconds * scale, top + on * lane
        parts.append(
            f'<rect class="f{PART_COLOURS[part]}" x="{x:.1f}" y="{y}" width="{max(wide - 1, 0.5):.1f}" '
            f'height="{bar}"><title>{PART_NAMES[part]}: {seconds:.1f} s</title></rect>'
        )
        name = f"{PART_NAMES[part]} {seconds:.0f} s"
        if wide > 7.2 * len(name) + 10:
            parts.append(f'<text class="on" x="{x + 7:.1f}" y="{y + 20}">{name}</text>')
        elif wide > 34:
            parts.append(f'<text class="on" x="{x + 5:.1f}" y="{y + 20}">{seconds:.0f} s</text>')
        at[on] += seconds
    parts.append(f'<text class="strong" x="0" y="{top + 20}">{"trainer" if time.overlapped else "step"}</text>')
    lanes = 2 if time.overlapped else 1
    if time.overlapped:
        parts.append(f'<text class="strong" x="0" y="{top + lane + 20}">engines</text>')
    parts.append(f'<text x="{WIDTH - 20}" y="14" text-anchor="end">{time.total:.0f} s</text>')
    shown = [part for part, seconds in time.parts().items() if seconds]
    for i, part in enumerate(shown):
        x = left + i * 140
        parts.append(
            f'<rect class="f{PART_COLOURS[part]}" x="{x}" y="{top + lanes * lane}" width="10" height="10"/>'
            f'<text x="{x + 15}" y="{top + lanes * lane + 9}">{PART_NAMES[part]} {time.parts()[part]:.1f} s</text>'
        )
    return _svg(parts, WIDTH, top + lanes * lane + 18, "where a step's time goes")


def _svg(parts: Sequence[str], width: int, height: int, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
