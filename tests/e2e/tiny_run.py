"""A folder from which tests start tiny real runs with `alphamed train`: model, questions, a reward that differs by answer."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_hf

from alphamed.files import read_json_lines

DEADLINE_S = 1500
"""For a run of seconds: a machine on which others work as well must not decide what a test says."""
REWARDS = '''
def share_of_a(question, text, letter):
    """Random models answer in random letters: some say more of this one than others."""
    return text.count("a") / (1 + len(text))
'''
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"name": "tiny", "steps": 4},
    "model": {"path": "model", "dtype": "fp32"},
    "data": {"train": ["questions.jsonl"]},
    "prompt": {"max_tokens": 160},
    "rollout": {
        "questions_per_step": 4,
        "samples_per_question": 4,
        "max_response_tokens": 16,
        "dtype": "fp32",
        "kv_cache_bytes": 64 << 20,
        "start_deadline_s": 1200.0,
    },
    "reward": {"name": "tiny_rewards:share_of_a", "truncated": "grade"},
    "parallel": {"micro_batch_tokens": 512},
    "logging": {"wandb": "off", "report": False, "export_hf": False},
    "cluster": {"device": "cpu", "heartbeat_timeout_s": 300.0},
}


class Workplace:
    """`questions`: how many there are. `sections` are merged over SETTINGS."""

    def __init__(self, folder: Path, questions: int = 6, **sections: dict[str, Any]):
        self.folder, self.model = folder, folder / "model"
        tiny_hf(self.model, head_dim=32)  # vLLM has no CPU kernel for smaller heads
        rows = [
            {
                "id": f"q{i}",
                "question": f"Which is number {i}?",
                "answer": "ABC"[i % 3],
                "options": {"A": f"this {i}", "B": f"that {i}", "C": f"other {i}"},
            }
            for i in range(questions)
        ]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "tiny_rewards.py").write_text(REWARDS)
        self.settings = {name: SETTINGS.get(name, {}) | sections.get(name, {}) for name in SETTINGS | sections}
        (folder / "run.yaml").write_text(yaml.safe_dump(self.settings))

    def run_dir(self, root: str) -> Path:
        return self.folder / root / self.settings["run"]["name"]

    def command(self, verb: str, root: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "alphamed.cli", verb, "--config", "run.yaml", f"run.root={root}", *overrides]

    def train(self, root: str, *overrides: str) -> Path:
        return self.run("train", root, *overrides)

    def run(self, verb: str, root: str, *overrides: str) -> Path:
        """Start or continue the run below `root` and wait for its good end; returns its directory."""
        with clean_temporary() as environment:
            done = subprocess.run(
                self.command(verb, root, *overrides),
                cwd=self.folder,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                env=environment,
            )
        assert done.returncode == 0, f"{root} {overrides}:\n{done.stdout}{done.stderr}"
        return self.run_dir(root)


@contextlib.contextmanager
def clean_temporary() -> Iterator[dict[str, str]]:
    """This process's environment with a new temporary folder, in which nothing may be left when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: paths of unix sockets end at 107 bytes
    try:
        yield os.environ | {"TMPDIR": str(folder)}
        left = [str(path) for path in folder.rglob("*")]
        assert left == [], f"left in the temporary folder: {left}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """Step -> its line of metrics.jsonl; every step stands there once."""
    rows = read_json_lines(run_dir / "metrics.jsonl")
    found = {row["step"]: row for row in rows}
    assert len(found) == len(rows), f"steps {[row['step'] for row in rows]}"
    return found
