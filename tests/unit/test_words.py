"""Words that were replaced do not come back: plain technical English, the words an engineer of the field would search for."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPLACED = {
    r"\bmend(s|ed|ing)?\b": "fix, suggestions, fixed",
    r"\bcan not\b": "cannot",
    r"\banew\b": "again",
    r"\bculprits?\b": "component, failed component",
    r"\bdearest\b": "most expensive",
    r"\bwithered\b": "answers without reasoning",
    r"\bmurder(ed)?\b": "killed externally",
    r"\bobituary\b": "log tail",
    r"\breckons?\b": "assumes",
    r"\bin good order\b": "cleanly",
    r"\bof their own accord\b": "automatically",
    r"\bbound_hit\b": "refill_limit_reached",
    r"\bpassed_over\b": "skipped",
    r"\bbehind_stem\b": "attends_shared_prefix",
    r"\bstart_unfit\b": "skip_memory_check",
    r"\bhabits?\b": "response patterns",
    r"(?-i:\b(OnDemand|Chooser|Standing)\b)": "SyncRollouts, QuestionSampler, Priority",
    r"looks\.jsonl": "evaluations.jsonl",
}
UNIVERSAL = {"found", "given", "kept", "one", "thing", "told", "what"}
"""Names that fit any value: a value is named for what it is."""
ELSEWHERE = {
    "LICENSE",
    "CHANGELOG.md",
    "tests/unit/test_words.py",
    "src/alphamed/lab/datasets/medfacts.yaml",
    "tests/hard_outputs.yaml",
}


def test_replaced_words_do_not_come_back():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for name in files:
        path = ROOT / name
        if name in ELSEWHERE or not path.is_file() or path.suffix in {".svg", ".lock", ".txt"}:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern, better in REPLACED.items():
            found += [f"{name}: {match[0]!r}; write: {better}" for match in re.finditer(pattern, text, re.IGNORECASE)]
    assert found == []


def named(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that code gives, with their lines: variables, attributes, parameters, functions, classes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)) | ast.MatchMapping(rest=str(name)):
                yield name, node.lineno


CODE_WITH_NAMES = """
import json as told
class Thing:
    one: int = 0
def found(given, *, what=1, **kept):
    self._told = [thing for thing in (one := given)]
    try:
        pass
    except ValueError as kept:
        pass
    match given:
        case [found, *one]:
            print(what.found, one)
"""


def test_all_kinds_of_names_are_seen():
    assert sorted(name for name, _ in named(ast.parse(CODE_WITH_NAMES))) == sorted(
        "told Thing one found given what kept _told thing one kept found one".split()
    )


def test_values_are_named_for_what_they_are():
    universal = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "src").rglob("*.py"))
        for name, line in named(ast.parse(path.read_text()))
        if name.strip("_") in UNIVERSAL
    ]
    assert universal == []
