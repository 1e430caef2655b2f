"""The built wheel in an environment of its own: what it needs comes with it, and it works outside the checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT_S

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=LIMIT_S, **options)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done


def test_the_wheel_works_alone(tmp_path):
    """`pip install` of it brings what planning and the data tools need, and every data file."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    source = tmp_path / "source"  # a build leaves folders behind
    run("git", "clone", "--quiet", ROOT, source)
    wheels = tmp_path / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, source, env=environment)
    (wheel,) = wheels.glob("*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env")
    run(tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet", wheel, env=environment)
    alphamed = tmp_path / "env/bin/alphamed"
    row = {"question": "Which organ makes bile?", "options": ["Spleen", "Liver"], "answer": "B"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    planned = run(
        alphamed,
        "plan",
        "--config",
        ROOT / "examples/recipes/llama31_8b_1node.yaml",
        "--html",
        "plan.html",
        cwd=tmp_path,
        env=environment,
    )
    assert planned.stdout.rstrip().endswith("It fits.") and (tmp_path / "plan.html").stat().st_size > 1000
    run(alphamed, "data", "inspect", "q.jsonl", cwd=tmp_path, env=environment)
    assert "Which organ makes bile?" in (tmp_path / "q.html").read_text()
    run(
        tmp_path / "env/bin/python",
        "-m",
        "alphamed.lab.datasets.medfacts",
        "facts",
        "--levels",
        "1",
        "--facts",
        "4",
        cwd=tmp_path,
        env=environment,
    )
    doctor = subprocess.run([alphamed, "doctor"], capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert doctor.returncode == 1 and doctor.stderr == ""  # it names what training still needs
    assert re.search(r"^torch +absent +not installed", doctor.stdout, re.MULTILINE)
