"""README and docs: links lead somewhere, commands are ones that the program takes, YAML sections are ones that it knows."""

import re
import shlex
from enum import StrEnum
from pathlib import Path

import pytest
import yaml

from alphamed.cli import _parse
from alphamed.config import choices
from alphamed.config.loading import _known_keys
from alphamed.config.schema import Config
from alphamed.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+\s+(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page):
    text = FENCE.sub("", page.read_text())
    broken = []
    for target in (a or b for a, b in LINK.findall(text)):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def command_lines(text: str) -> list[str]:
    """Commands of the program in fenced blocks, continued lines joined, comments cut. A synopsis is a block of ```text."""
    lines = []
    for language, block in FENCE.findall(text):
        if language not in ("", "bash", "sh", "console"):
            continue
        for line in re.sub(r" *\\\n\s*", " ", block).splitlines():
            line = re.split(r"\s+#|\s{2,}", line.strip().removeprefix("$ "))[0]  # a comment, or a second column
            if line.startswith("alphamed "):
                lines.append(line)
    return lines


COMMANDS = [(name_of(page), line) for page in PAGES for line in command_lines(page.read_text())]


def test_commands_are_found():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("page, line", COMMANDS, ids=[f"{page}:{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_commands_are_ones_that_the_program_takes(page, line):
    """Verbs and options exist; whether files exist is not asked."""
    try:
        _parse(shlex.split(re.sub(r"\bN\b", "1", line))[1:])
    except ConfigError as error:
        pytest.fail(f"{page}: {line}: {error}")


def test_the_page_of_settings_has_every_section_and_every_named_value():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert [name for name in Config.model_fields if f"\n## {name}\n\n::: alphamed.config." not in page] == []
    enums = [kind for kind in vars(choices).values() if isinstance(kind, type) and issubclass(kind, StrEnum)]
    rows = [f"| `{kind.__name__}` | {', '.join(f'`{value.value}`' for value in kind)} |" for kind in enums if len(kind)]
    assert len(rows) > 10 and [row for row in rows if row not in page] == []


def yaml_blocks() -> list[tuple[str, str]]:
    return [
        (name_of(page), block) for page in PAGES for language, block in FENCE.findall(page.read_text()) if language == "yaml"
    ]


@pytest.mark.parametrize("page, block", yaml_blocks(), ids=[page for page, _ in yaml_blocks()])
def test_settings_in_yaml_blocks_exist(page, block):
    """Sections of a run's configuration hold only keys that it has; other YAML must be readable."""
    tree = yaml.safe_load(block)
    assert tree
    if not isinstance(tree, dict) or not tree.keys() <= Config.model_fields.keys():
        return
    unknown = [
        f"{section}.{key}"
        for section, value in tree.items()
        if isinstance(value, dict)
        for key in value
        if key not in _known_keys(Config, (section,))
    ]
    assert unknown == []
