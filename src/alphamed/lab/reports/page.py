"""Renders a page from a template: one HTML file with its styles inside and all values escaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alphamed.lab.reports.plots import PAGE_STYLE, STYLE


def render_page(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page; `filters` are functions that the template calls, `values` its variables. A variable that is not defined is an
    error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= filters
    style = PAGE_STYLE.read_text(encoding="utf-8")
    return environment.get_template(template.name).render(chart_style=STYLE, style=style, **values)
