"""docs/formats.md: every example on the page is read by the program's own reader and gives what the page says."""

import fnmatch
import re
from pathlib import Path

import pytest

from alphamed.config.loading import load_tree, validated
from alphamed.data.decisions import read_decisions
from alphamed.data.sources import load_questions
from alphamed.evaluation.benchmarks import load_benchmark
from alphamed.evaluation.command import _shots
from alphamed.lab.datasets.build import build
from alphamed.lab.datasets.read_sources import annotations_of
from alphamed.lab.datasets.recipe import BuildRecipe, SourceRecipe

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
MARK = re.compile(r"^<!-- example: (\S+) (\S+) -> (.*?) -->\n```(\w*)\n(.*?)^```$", re.M | re.S)
EXAMPLES = [pytest.param(*match.groups(), id=f"{match[1]}-{match[2]}") for match in MARK.finditer(PAGE.read_text("utf-8"))]


def answers(questions):
    return [f"{question.id}={question.answer}" for question in questions]


def source(file, name):
    recipe = BuildRecipe(sources=[SourceRecipe(name=name, path=file)], shuffle=False)
    return answers(item.question for item in build(recipe).items)


def levels(file, _):
    """The levels that a source gets from the file."""
    return [f"{name}={values['level']}" for name, values in annotations_of(file).items()]


def shots(file, _):
    return [f"{shot['question'].split()[0]}={len(shot['options'])}" for shot in _shots(file)]


def benchmark(file, name):
    loaded = load_benchmark(f"{name}={file}")
    assert loaded.problems == ()
    return answers(loaded.questions)


READERS = {
    "questions": lambda file, _: answers(load_questions([file]).questions),
    "set": source,
    "benchmark": benchmark,
    "levels": levels,
    "decisions": lambda file, _: [f"{decision.id}={decision.decision}" for decision in read_decisions(file).decisions],
    "shots": shots,
    "recipe": lambda file, _: [
        f"{source.name}={source.answer}" for source in validated(BuildRecipe, load_tree(file)).sources
    ],
}


@pytest.mark.parametrize("reader, name, result, language, content", EXAMPLES)
def test_an_example_of_the_page_is_read(reader, name, result, language, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if language == "python":
        exec(compile(content, f"{PAGE.name}: {name}", "exec"), {})
    else:
        Path(name).write_text(content, encoding="utf-8")
    kind, _, of = reader.partition(":")
    lines, expected = READERS[kind](Path(name), of), result.split()
    assert len(lines) == len(expected) and all(map(fnmatch.fnmatchcase, lines, expected)), lines


def test_every_example_is_marked():
    """A fenced block without a mark in front of it would be an example that nobody reads."""
    blocks = re.findall(r"^```\w+$", PAGE.read_text("utf-8"), re.M)
    assert len(blocks) == len(EXAMPLES) > 0
