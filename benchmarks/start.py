"""Seconds from `alphamed train` to the first response and to the end of the first step of a tiny model, and where they go.

    .venv/bin/python benchmarks/start.py [--repeats 3] [--against CHECKOUT] [key=value ...]

A random model of 0.2M parameters, so that what counts is the start of processes, imports and the first push. The reward
function notes when it is called, the first time after an engine has begun; the end of the first step is its line in
metrics.jsonl. Processes are sampled meanwhile: when each began, and its CPU-seconds up to the end of the first step.
`--against`: the same with the package of another checkout, in turn with this one. On a busy machine compare CPU-seconds, and
seconds only within one command. Numbers are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

from alphamed.lab.planner.miniature import write_model
from alphamed.model.shape import ModelShape

ROOT = Path(__file__).resolve().parents[1]
DEADLINE_S = 900.0
PERIOD_S = 0.1
SHAPE = ModelShape(
    family="llama",
    layers=4,
    hidden=64,
    ffn=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=509,
    tied=False,
    qkv_bias=False,
    qk_norm=False,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    max_positions=2048,
    bos_id=1,
    eos_ids=(2,),
    dtype="float32",
)
REWARD = """
import time

def share_of_a(question, text, letter):
    with open("calls", "a") as calls:
        print(time.monotonic(), file=calls)
    return text.count("a") / (1 + len(text))
"""
SETTINGS = {
    "run": {"name": "run", "steps": 1, "root": "."},
    "model": {"path": "model", "dtype": "fp32"},
    "data": {"train": ["questions.jsonl"]},
    "prompt": {"max_tokens": 160},
    "rollout": {
        "questions_per_step": 4,
        "samples_per_question": 4,
        "max_response_tokens": 16,
        "dtype": "fp32",
        "kv_cache_bytes": 64 << 20,
        "start_deadline_s": DEADLINE_S,
    },
    "reward": {"name": "start_rewards:share_of_a", "truncated": "grade"},
    "parallel": {"micro_batch_tokens": 512},
    "logging": {"wandb": "off", "report": False, "export_hf": False},
}
KINDS = (  # the first pattern that a process's command line holds names it
    ("alphamed train", r"alphamed\.cli train"),
    ("guard", r"launch\.guard"),
    ("torchrun", r"launch\.agent"),
    ("trainer rank", r"alphamed\.cli worker"),
    ("engine: actor", r"ray::RolloutEngine"),
    ("engine: EngineCore", r"VLLM::EngineCore"),
    ("engine: worker", r"VLLM::Worker"),
    ("engine: model registry", r"vllm\.model_executor\.models\.registry"),
    ("reward process", r"ray::RewardProcess"),
    ("coordinator", r"ray::RolloutCoordinator"),
    ("grader", r"grader_child"),
    ("engine: fork server", r"multiprocessing\.forkserver"),
    ("Ray's idle workers", r"ray::IDLE|default_worker\.py"),
    ("Ray's own", r"gcs_server|raylet|ray/"),
)


@dataclass
class Seen:
    """What was last known of a process. `began_s`: since the command."""

    kind: str
    began_s: float
    cpu_s: float


@dataclass
class Start:
    """One start, in seconds since the command."""

    first_response_s: float
    first_step_s: float
    processes: Sequence[Seen] = field(default_factory=tuple)


def main() -> int:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured in turn with this one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    checkouts = [*([options.against.resolve()] if options.against else []), ROOT]
    starts: dict[Path, list[Start]] = {checkout: [] for checkout in checkouts}
    for _ in range(options.repeats):
        for checkout in checkouts:
            with tempfile.TemporaryDirectory(prefix="start-") as folder:
                starts[checkout].append(measure(Path(folder), checkout, options.overrides))
    for checkout in checkouts:
        print_medians(checkout, starts[checkout])
    return 0


def measure(folder: Path, checkout: Path, overrides: Sequence[str]) -> Start:
    """Start a run below `folder` with the package of `checkout` and wait for its end."""
    write_model(folder / "model", SHAPE)
    rows = [
        {"id": f"q{i}", "question": f"Which is number {i}?", "answer": "ABC"[i % 3], "options": dict(zip("ABC", "xyz"))}
        for i in range(6)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "start_rewards.py").write_text(REWARD)
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = [sys.executable, "-m", "alphamed.cli", "train", "--config", "run.yaml", *overrides]
    environment = os.environ | {"PYTHONPATH": f"{checkout / 'src'}:{checkout}"}
    began, wall_clock = time.monotonic(), time.time()
    with open(folder / "output", "w+") as output:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        seen = watch_to_first_step(child, folder / "run" / "metrics.jsonl", wall_clock)
        first_step_s = time.monotonic() - began
        if child.wait(DEADLINE_S):
            output.seek(0)
            sys.exit(output.read())
    calls = [float(line) - began for line in (folder / "calls").read_text().splitlines()]
    engine_s = min(process.began_s for process in seen.values() if process.kind == "engine: actor")
    first_response_s = min(called_s for called_s in calls if called_s > engine_s)  # before that `train` tries the reward
    return Start(first_response_s, first_step_s, tuple(seen.values()))


def watch_to_first_step(child: subprocess.Popen, metrics: Path, began: float) -> dict[tuple[int, float], Seen]:
    """Sample the command's processes until the first step is written down, or the command has ended."""
    seen: dict[tuple[int, float], Seen] = {}
    root = psutil.Process(child.pid)
    while child.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                times, created = process.cpu_times(), process.create_time()
                kind = kind_of(" ".join(process.cmdline()))
                before = seen.get((process.pid, created))
                # a process that ends loses its command first
                kind = before.kind if before and kind == "other" else kind
                seen[process.pid, created] = Seen(kind, created - began, times.user + times.system)
        time.sleep(PERIOD_S)
    return seen


def kind_of(command: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, command)), "other")


def print_medians(checkout: Path, starts: Sequence[Start]) -> None:
    print(f"{checkout}: medians of {len(starts)}, seconds")
    total = statistics.median(sum(process.cpu_s for process in start.processes) for start in starts)
    print(f"  first response      {statistics.median(start.first_response_s for start in starts):6.1f}")
    print(f"  end of first step   {statistics.median(start.first_step_s for start in starts):6.1f}")
    print(f"  CPU until then      {total:6.1f}")
    print(f"  {'process':<24}{'number':>8}{'began':>8}{'CPU':>8}")
    kinds = {process.kind for start in starts for process in start.processes}
    rows = []
    for kind in kinds:
        members = [[process for process in start.processes if process.kind == kind] for start in starts]
        rows.append(
            (
                statistics.median(min(process.began_s for process in group) if group else 0.0 for group in members),
                kind,
                statistics.median(len(group) for group in members),
                statistics.median(sum(process.cpu_s for process in group) for group in members),
            )
        )
    for began_s, kind, number, cpu_s in sorted(rows):
        print(f"  {kind:<24}{number:>8.0f}{began_s:>8.1f}{cpu_s:>8.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
