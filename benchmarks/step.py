"""Time one GRPO step on this machine, by part, with CPU seconds and peak memory; with `--peer trl` against TRL, in turn.

    .venv/bin/python benchmarks/step.py [--steps 5] [--peer trl] [key=value ...]

SmolLM2-135M, 4 questions x 8 samples, two-shot prompts, up to 64 new tokens (benchmarks/step.yaml). The first step is a
warm-up and not counted. The numbers are medians; the ratios compare medians of one run on one machine. The peer runs in an
environment of its own, `.cache/peer-trl`, which the first `--peer trl` makes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "benchmarks" / "step.yaml"
RUN = ROOT / "runs" / "benchmarks" / "step"
PARTS = ("time/generate_s", "time/reward_s", "time/logprobs_s", "time/update_s", "time/sync_s", "time/step_s")
POLL_S = 0.2
DEADLINE_S = 3600.0


@dataclass(frozen=True)
class Steps:
    """What was seen of a training process and its descendants: one row of metrics and CPU seconds a step, peak memory."""

    rows: list[dict[str, float]]
    cpu_s: list[float]
    peak_bytes: int

    def median(self, name: str) -> float:
        return statistics.median(row.get(name, 0.0) for row in self.rows[1:])

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu_s[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps (default 5)")
    parser.add_argument("--peer", choices=("trl",))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    questions = ROOT / ".cache" / "medfacts"
    if not (questions / "train.jsonl").is_file():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "alphamed.lab.datasets.medfacts",
                questions,
                "--levels",
                "1",
                "--facts",
                "12",
                "--copies",
                "20",
            ],
            check=True,
            cwd=ROOT,
        )
    ours = measure_ours(options.steps + 1, options.overrides)
    show("alphamed", ours, PARTS)
    if options.peer:
        theirs = measure_trl(options.steps + 1)
        show("trl", theirs, ("time/step_s",))
        print(
            f"trl / alphamed: wall {theirs.median('time/step_s') / ours.median('time/step_s'):.2f}, "
            f"CPU {theirs.median_cpu_s / ours.median_cpu_s:.2f}, memory {theirs.peak_bytes / ours.peak_bytes:.2f}"
        )
    return 0


def measure_ours(steps: int, overrides: list[str]) -> Steps:
    shutil.rmtree(RUN, ignore_errors=True)
    return watch(
        [sys.executable, "-m", "alphamed.cli", "train", "--config", str(CONFIG), f"run.steps={steps}", *overrides],
        RUN / "metrics.jsonl",
    )


def measure_trl(steps: int) -> Steps:
    from alphamed.config.loading import load_config
    from alphamed.model.shape import resolve

    config = load_config(CONFIG)
    folder = resolve(config.model.path, None, config.model.cache)
    home = ROOT / ".cache" / "peer-trl"
    python = home / "bin" / "python"
    if not python.exists():
        print("making the peer's environment in", home, flush=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, "torch==2.13.0"], check=True)  # first: nothing may draw another build of torch
        subprocess.run([*install, "-r", ROOT / "benchmarks" / "peer-trl.txt"], check=True)
    rows = ROOT / "runs" / "benchmarks" / "trl.jsonl"
    rows.unlink(missing_ok=True)
    prompts = rows.with_suffix(".prompts.json")
    prompts.write_text(json.dumps(peer_prompts(config, folder)), encoding="utf-8")
    return watch(
        [str(python), str(ROOT / "benchmarks" / "peer_trl.py"), str(folder), str(prompts), str(rows), str(steps)], rows
    )


def peer_prompts(config, folder: Path) -> list[dict[str, str]]:
    """The rendered prompts and answers of our training questions, for the peer to train on."""
    from alphamed.data.prompts import PromptBuilder
    from alphamed.data.sources import load_questions
    from alphamed.data.tokenizer import load_tokenizer

    builder = PromptBuilder(load_tokenizer(folder), config.prompt)
    return [
        {"prompt": builder.text(question), "answer": question.answer}
        for question in load_questions(config.data.train, config.data.bad_rows).questions
    ]


def watch(command: list[str], rows_file: Path) -> Steps:
    """Run a training process to its end; CPU seconds and memory (proportional share) are those of all its descendants."""
    spent, peak, marks = {}, 0, []
    end = time.monotonic() + DEADLINE_S
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"{command[:4]} is not done after {DEADLINE_S:.0f} s")
            memory = sample(process.pid, spent)
            peak = max(peak, memory)
            count = sum(1 for _ in rows_file.open()) if rows_file.exists() else 0
            marks += [sum(spent.values())] * (count - len(marks))
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:5])} ended with {process.returncode}: {process.stderr.read()[-2000:]}")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    return Steps(rows, [b - a for a, b in zip([marks[0], *marks], marks)], peak)


def sample(pid: int, spent: dict[int, float]) -> int:
    """Update CPU seconds by process; return the bytes of memory that all of them use now."""
    memory = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            times = process.cpu_times()
            spent[process.pid] = times.user + times.system
            memory += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return memory


def show(name: str, steps: Steps, parts: tuple[str, ...]) -> None:
    print(f"{name}: medians of {len(steps.rows) - 1} steps")
    for part in parts:
        print(f"  {part:<18}{steps.median(part):9.2f}")
    tokens = steps.median("throughput/generated_tokens_per_s")
    if tokens:
        print(f"  {'generated tokens/s':<18}{tokens:9.0f}")
        print(f"  {'trained tokens/s':<18}{steps.median('throughput/trained_tokens_per_s'):9.0f}")
    print(
        f"  {'CPU seconds':<18}{steps.median_cpu_s:9.2f}\n  {'peak memory GB':<18}{steps.peak_bytes / 1e9:9.2f}", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
