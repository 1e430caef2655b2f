"""Every setting is read by the program: a key that is accepted and then ignored would be a lie.

Judged from the source: `config.rollout.engines` is a read of rollout.engines, and so is `r.engines` where the file says
`r = config.rollout` or `r: RolloutConfig`. The checks across fields do not count: they read a value only to refuse it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import alphamed
from alphamed.config.loading import _section as section_of
from alphamed.config.schema import Config

PACKAGE = Path(alphamed.__file__).parent
SECTIONS = {name: section_of(field.annotation) for name, field in Config.model_fields.items()}
KINDS = {model.__name__: section for section, model in SECTIONS.items()}
CHECKS = "_problems"


def reads(source: str) -> set[str]:
    """`section.name` for everything that a source file reads of sections, calls aside."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for _ in range(2):  # a name may be given to what has got its own name only below
        known |= dict(_names_of_sections(tree, known))
    found = set(_read_in(tree, known))
    for node in ast.walk(tree):  # the sections themselves: what follows from a section's own fields
        if isinstance(node, ast.ClassDef) and node.name in KINDS:
            found |= set(_read_in(node, {"self": KINDS[node.name]}))
    return found


def _read_in(tree: ast.AST, known: dict[str, str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == CHECKS:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and not _is_called(node, tree):
            if section := _section(node.value, known):
                yield f"{section}.{node.attr}"
        yield from _read_in(node, known)


def _is_called(node: ast.Attribute, parent: ast.AST) -> bool:
    return isinstance(parent, ast.Call) and parent.func is node


def _section(node: ast.expr, known: dict[str, str]) -> str | None:
    """The section that an expression stands for: `<anything>.rollout`, or a name (`r`, `self._r`) that was given to one."""
    if isinstance(node, ast.Attribute):
        return node.attr if node.attr in SECTIONS else known.get(node.attr)
    return known.get(node.id) if isinstance(node, ast.Name) else None


def _names_of_sections(tree: ast.Module, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None and ast.unparse(node.annotation) in KINDS:
            yield node.arg, KINDS[ast.unparse(node.annotation)]
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, given in zip(target.elts, value.elts) if both else [(target, value)]:
                if section := _section(given, known):
                    yield getattr(name, "id", None) or name.attr, section


def test_the_reader_knows_the_ways_to_read_a_setting():
    assert reads("""
def train(config, mine: RewardConfig):
    limit, wanted = 3, config.evaluation
    r = config.rollout
    self._given = mine
    use(config.run.seed, r.engines, wanted.files[0], self._given.workers, run.steps(), config.run_dir.name)
    config.data.train = 3
class SyncConfig:
    def derived(self):
        return self.probe
def _problems(self):
    return self.model.fp8
""") == {"run.seed", "rollout.engines", "evaluation.files", "reward.workers", "sync.probe"}


@pytest.fixture(scope="module")
def read() -> set[str]:
    return set().union(*(reads(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_read(section, read):
    assert [leaf for leaf in SECTIONS[section].model_fields if f"{section}.{leaf}" not in read] == []
