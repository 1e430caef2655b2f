"""A quickstart-sized run that is killed again and again and still ends: what died, how it was told, what came of it.

    .venv/bin/python benchmarks/endurance.py [--steps 40] [--victims engine rank reward] [key=value ...]

Starts `examples/quickstart.sh`, waits until a third (or what follows from the number of victims) of the steps is done, sends
SIGKILL to one process of the run, checks that the run ends within a minute, names the failed component and leaves no process, and
starts the same command again. At last the steps are counted and the closing words of the run printed. Exit code 1 where
something was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from alphamed.cluster import processes
from alphamed.cluster.ledger import run_id

ROOT = Path(__file__).parents[1]
STEP_S, END_S = 600.0, 60.0
VICTIMS = {  # pattern of the process's command -> what the last line must name
    "engine": (r"EngineCore", r"engine 0"),
    "actor": (r"^ray::RolloutEngine", r"engine 0"),
    "rank": (r"-u -m alphamed\.cli worker", r"rank 0"),  # its agent's command ends with the worker's
    "agent": (r"alphamed\.cluster\.agent", r"torchrun's agent"),
    "reward": (r"^ray::RewardProcess", r"reward"),
}


@dataclass
class Start:
    """One start of the command, until it ends or something in it is killed."""

    command: list[str]
    run_dir: Path

    def __post_init__(self) -> None:
        self.log = self.run_dir.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def said(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")

    def end(self) -> None:
        """Have the run's supervisor end it, where it still lives."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(2 * END_S)

    def own(self) -> dict[int, processes.Process]:
        living = processes.everything()
        return processes.descendants((self.process.pid,), living) | processes.tagged(run_id(self.run_dir), living)

    def kill(self, name: str) -> list[str]:
        """Kill one process of the run; returns what was not as it should be."""
        pattern, component = VICTIMS[name]
        own = self.own()
        victim = next(process for process in own.values() if re.search(pattern, process.command))
        began = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return [f"{name}: the run did not end within {END_S:g} s"]
        seconds = time.monotonic() - began
        last = next((line for line in reversed(self.said().splitlines()) if line.startswith("run failed: ")), "")
        print(f"  killed {name} (pid {victim.pid}): ended after {seconds:.1f} s: {last}", flush=True)
        left = [process.command[:60] for process in own.values() if processes.is_alive(process)]
        return (
            [f"{name}: exit code {self.process.returncode}"] * (self.process.returncode != 1)
            + [f"{name}: the failed component is not named"] * (not re.search(component, last))
            + [f"{name}: left {left}"] * bool(left)
        )


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for_step(start: Start, step: int) -> None:
    seen, until = steps_done(start.run_dir), time.monotonic() + STEP_S
    while (done := steps_done(start.run_dir)) < step:
        if done != seen:
            seen, until = done, time.monotonic() + STEP_S
        if start.process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"no step {seen + 1} within {STEP_S:g} s:\n{start.said()[-2000:]}")
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=["engine", "rank", "reward"])
    parser.add_argument("--name", default="endurance")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    run_dir = ROOT / "runs" / options.name
    if run_dir.exists():
        parser.error(f"{run_dir} exists; remove it or give another --name")
    command = [
        "bash",
        "examples/quickstart.sh",
        f"run.name={options.name}",
        f"run.steps={options.steps}",
        "run.time_limit_s=7200",
        "checkpoint.every=5",
        *options.overrides,
    ]
    problems, began = [], time.monotonic()
    for number, name in enumerate(options.victims, 1):
        start = Start(command, run_dir)
        try:
            # with the default settings one step after a checkpoint: something is lost and has to be done again
            wait_for_step(start, options.steps * number // (len(options.victims) + 1) + 1)
            print(f"step {steps_done(run_dir)}", flush=True)
            problems += start.kill(name)
        finally:
            start.end()
    last = Start(command, run_dir)
    try:
        code = last.process.wait(2 * STEP_S + STEP_S * options.steps)
    finally:
        last.end()
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    problems += [f"the last start ended with {code}"] * bool(code)
    problems += [f"recorded steps: {steps}"] * (steps != list(range(1, options.steps + 1)))
    print(f"{len(steps)} steps, {len(options.victims)} kills, {(time.monotonic() - began) / 60:.1f} min")
    print("\n".join(last.said().splitlines()[-25:]))
    print("\n".join(f"NOT AS IT SHOULD BE: {problem}" for problem in problems) or "every kill was named, nothing was left")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
