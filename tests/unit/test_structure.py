"""Import fences and the light start of the command line: the architecture, held by a test."""

import ast
import configparser
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "alphamed"

# package -> the only places that may import it (folders end with a slash)
FENCES = {
    "megatron": ("src/alphamed/megatron/", "src/alphamed/lab/planner/meta_build.py", "megatron_patches/"),
    "vllm": ("src/alphamed/rollout/engine.py", "src/alphamed/weights/receiver.py"),
    "ray": ("src/alphamed/cluster/", "src/alphamed/rollout/", "src/alphamed/reward/process.py"),
    "transformer_engine": (),  # Megatron-Core imports it
    "wandb": ("src/alphamed/rundir/sinks.py",),
}
# what a laptop's `alphamed --help` and the data tools must never wait for
HEAVY = ("torch", "transformers", "ray", "vllm", "megatron", "matplotlib", "wandb", "datasets")
LIGHT = (
    "alphamed.answers.extraction",
    "alphamed.answers.folding",
    "alphamed.cli",
    "alphamed.config.schema",
    "alphamed.data.mcq",
    "alphamed.data.prompts",
    "alphamed.data.sources",
    "alphamed.data.stream",
    "alphamed.data.tables",
    "alphamed.data.text",
    "alphamed.data.tokenizer",
    "alphamed.evaluation.benchmarks",
    "alphamed.evaluation.blind",
    "alphamed.evaluation.choices",
    "alphamed.jsonl",
    "alphamed.lab.bundle.pack",
    "alphamed.lab.bundle.reproduce",
    "alphamed.lab.datasets.build",
    "alphamed.lab.datasets.commands",
    "alphamed.lab.datasets.decontaminate",
    "alphamed.lab.datasets.form",
    "alphamed.lab.datasets.matching",
    "alphamed.lab.datasets.medfacts",
    "alphamed.lab.datasets.page",
    "alphamed.lab.datasets.suspects",
    "alphamed.lab.planner.forecast",
    "alphamed.lab.planner.main",
    "alphamed.lab.study.main",
    "alphamed.model.shape",
    "alphamed.records",
    "alphamed.reward.rules",
    "alphamed.rollout.curriculum",
    "alphamed.weights.routes",
)


def sources() -> list[Path]:
    return sorted([*SOURCE.rglob("*.py"), *(ROOT / "megatron_patches").rglob("*.py")])


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, `TYPE_CHECKING` blocks included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FENCES)
def test_a_library_is_imported_behind_its_fence_only(package):
    allowed = FENCES[package]
    strays = [
        name
        for path in sources()
        if package in imports(path)
        for name in [path.relative_to(ROOT).as_posix()]
        if not name.startswith(allowed)
    ]
    assert strays == []
    users = [path.relative_to(ROOT).as_posix() for path in sources() if package in imports(path)]
    unused = [place for place in allowed if not any(name.startswith(place) for name in users)]
    assert unused == [], "permissions that nobody uses"


def test_the_layers_hold():
    """.importlinter states them; a forbidden import fails here."""
    pytest.importorskip("importlinter", reason="import-linter is not installed (tests/requirements.txt)")
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run(
        [sys.executable, "-c", lint, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_linter_finds_nothing():
    """The settings are those of pyproject.toml."""
    pytest.importorskip("ruff", reason="ruff is not installed (tests/requirements.txt)")
    run = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    form = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert form.returncode == 0, form.stdout + form.stderr


def test_the_type_checker_finds_nothing():
    """The settings are those of pyproject.toml; the libraries are those of the interpreter that runs this."""
    pytest.importorskip("basedpyright", reason="basedpyright is not installed (tests/requirements.txt)")
    run = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "src"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_and_functions_stay_short():
    """A file over 400 lines, or a function over 60, asks to be split."""
    long = []
    for path in sources():
        text = path.read_text()
        if (lines := text.count("\n")) > 400:
            long.append(f"{path.name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []


def test_a_class_name_has_one_meaning():
    """A leading underscore makes no other name of it: `Sums` and `_Sums` are confused like two `Sums`."""
    places: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert len(places) > 100
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    code = f"import sys, {module}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_package_inits_are_empty():
    assert [p for p in sources() if p.name == "__init__.py" and p.read_text().strip()] == []


def test_every_module_says_what_it_is():
    without = [p for p in sources() if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text()))]
    assert without == []


def test_an_installed_package_holds_every_folder_and_data_file():
    """What a plain `pip install .` takes; an editable installation finds the rest as well and hides what is missing."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert set(setup["options"]["packages"].split()) == {
        ".".join(folder.relative_to(SOURCE.parent).parts) for folder in folders
    } | {"megatron_patches"}
    taken = {package: patterns.split(", ") for package, patterns in setup["options.package_data"].items()}
    left = [
        path.name
        for path in SOURCE.rglob("*")
        if path.is_file()
        and path.suffix not in (".py", ".pyc")
        and not any(path.match(pattern) for pattern in taken[".".join(path.parent.relative_to(SOURCE.parent).parts)])
    ]
    assert left == []
