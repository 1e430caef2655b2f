"""The card of a built set: what is in it, where from, under which licences, and the command that made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from alphamed.data.text import counted
from alphamed.lab.datasets.mixture import PoolItem


def licences(items: Iterable[PoolItem]) -> dict[str, dict[str, int]]:
    """Source of the recipe -> licence -> number of questions."""
    by_source: dict[str, Counter[str]] = {}
    for item in items:
        by_source.setdefault(item.origin, Counter())[item.licence] += 1
    return {name: dict(counts.most_common()) for name, counts in by_source.items()}


def markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    about = card["set"]
    words = about["words"]
    lines = [
        f"# {card['name']}",
        "",
        f"{about['questions']:,} multiple-choice questions, {words['median']:g} words in the median "
        f"({words['min']} to {words['max']}). Not for clinical use.",
        "",
        "## Made by",
        "",
        "```",
        card["command"],
        "```",
        "",
        f"alphamed {card['alphamed']}, {card['created']}. SHA-256 of the file: `{card['file_sha256']}`; of the "
        f"questions in their order, in any format: `{about['content_sha256']}`.",
        "",
        "## Sources and licences",
        "",
        "| source | read from | read | bad rows | in the set | licence |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {source['place']} | {source['read']:,} | {source['bad_rows']:,} | {source['kept']:,} | "
        f"{'; '.join(f'{licence} ({count:,})' for licence, count in source['licences'].items()) or '-'} |"
        for name, source in card["sources"].items()
    ]
    for title, key in (
        ("By source", "sources"),
        ("By level", "levels"),
        ("By informativeness", "informativeness"),
        ("By number of options", "options"),
        ("By answer", "answers"),
    ):
        lines += ["", f"## {title}", "", "| | questions | share |", "|---|---|---|"]
        lines += [f"| {name} | {count:,} | {count / max(about['questions'], 1):.1%} |" for name, count in about[key].items()]
    lines += ["", "## What was left out and changed", "", left_out(card), ""]
    lines += [f"- {text}" for text in card["steps"]]
    lines += [f"- note on {name}: {source['note']}" for name, source in card["sources"].items() if source["note"]]
    return "\n".join(lines) + "\n"


def left_out(card: Mapping[str, Any]) -> str:
    """How many questions were read, left out by which step, and kept, in one sentence that adds up."""
    counts = card["counts"]
    parts = {step: count for step, count in counts["left_out"].items() if count}
    by = f" ({', '.join(f'{step} {count:,}' for step, count in parts.items())})" if parts else ""
    bad = sum(source["bad_rows"] for source in card["sources"].values())
    more = f" {counted(bad, 'bad row')} {'is' if bad == 1 else 'are'} in none of these numbers." if bad else ""
    return (
        f"{counted(counts['read'], 'question')} read, {sum(parts.values()):,} left out{by}, {counts['kept']:,} kept.{more}"
    )
