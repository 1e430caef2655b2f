"""`alphamed plan --simulate`: two steps of the real program with a shrunken model, before the GPUs are booked.

The configuration is kept except for its sizes: a random model of the same family, every parallel axis cut to at most 2, two
engines, short responses, the questions that alphamed ships. `alphamed train` runs it as a child process, with all its ranks,
engines, grading, weight pushes and checkpoints; then the second step is run again from the first one's checkpoint. What is
left out: the user's own data, reward function and evaluation, CUDA, FP8 and speed.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphamed.cluster.hardware import cores
from alphamed.config.loading import build_config, dump_tree
from alphamed.config.schema import Config
from alphamed.lab.planner import miniature
from alphamed.lab.planner.topology import coordinates
from alphamed.model.shape import ModelShape
from alphamed.planner import parameters
from alphamed.planner.hardware import GIB
from alphamed.records import Layout

DEADLINE_S = 480.0
"""Of the whole simulation."""
STOP_DEADLINE_S = 60.0
"""What a child has to take its run down after SIGTERM; its guard ends what remains."""
POLL_S, MEMORY_POLL_S = 0.5, 3.0
STEPS = 2
PROMPT_TOKENS, RESPONSE_TOKENS, QUESTIONS, SAMPLES = 1024, 16, 4, 4
"""The longest prompt; questions of a data rank and update. A token of the small model's tokenizer is a byte."""
CHUNK_TOKENS = 64
MARKS = {None: "", True: "PASSED   ", False: "FAILED   "}
REWARD = '''
def share_of_vowels(question, text, letter):
    """A random model answers in random letters, of which some answers have more than others."""
    return sum(character in "aeiou" for character in text) / (1 + len(text))
'''


@dataclass(frozen=True, slots=True)
class ReportLine:
    """A line of the report. `passed` None: information only."""

    text: str
    passed: bool | None = None

    def __str__(self) -> str:
        return MARKS[self.passed] + self.text


def main(config: Config, shape: ModelShape) -> int:
    """Run the simulation and print what passed; 0 where all of it did, else 1. Nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="alphamed-simulation-") as scratch:
        passed = True
        for outcome in simulate(config, shape, Path(scratch)):
            print(outcome, flush=True)
            passed &= outcome.passed is not False
        return int(not passed)


def simulate(config: Config, shape: ModelShape, folder: Path) -> Iterator[ReportLine]:
    """Prepare and run in `folder`; yields the report line by line, a short one where training itself fails."""
    began = time.monotonic()
    small = small_config(config, shape, folder)
    small_shape = prepare(small, config, shape, folder)
    yield from (ReportLine(line) for line in layout_lines(config, small, small_shape))
    child = Child(folder, began + DEADLINE_S)
    failure = child.run("train", "--config", "simulation.yaml")
    if failure:
        yield ReportLine(f"train: {failure}", passed=False)
        return
    yield from judge(small)
    failure = child.run("replay", str(small.run_dir), "--step", str(STEPS), "--only", "update")
    yield ReportLine(
        f"replay: {failure}"
        if failure
        else f"checkpoint: step {STEPS} run again from the weights and optimizer "
        f"state that were saved after step {STEPS - 1} gives the same loss and gradient norm",
        passed=not failure,
    )
    yield ReportLine(f"{time.monotonic() - began:.0f} s, at most {child.peak_bytes / GIB:.1f} GiB of memory")


# ---------------------------------------------------------------------------------------------------------- what is run
def small_config(config: Config, shape: ModelShape, folder: Path) -> Config:
    """The configuration with its sizes cut and its files in `folder`. Raises ConfigError where it could not run."""
    tree, p, r = config.model_dump(mode="json"), config.parallel, config.rollout
    cut = {axis: min(2, getattr(p, axis)) for axis in ("tensor", "pipeline", "data", "context")}
    updates = min(2, config.algorithm.mini_batches)
    prompt = PROMPT_TOKENS + len((config.prompt.instruction + (config.prompt.system or "")).encode())
    tree["run"] |= {
        "name": "simulation",
        "root": str(folder / "runs"),
        "steps": STEPS,
        "stop_after": None,
        "time_limit_s": None,
    }
    tree["model"] |= {"path": str(folder / "model"), "revision": None, "fp8": False}
    tree["data"] |= {"train": [str(folder / "questions" / "train.jsonl")]}
    tree["prompt"] |= {"max_tokens": prompt, "shots": []}
    tree["rollout"] |= {
        "questions_per_step": QUESTIONS * cut["data"] * updates,
        "samples_per_question": SAMPLES,
        "max_response_tokens": RESPONSE_TOKENS,
        "engines": 2,
        "tensor_parallel": min(2, r.tensor_parallel, cores()),
        "kv_cache_bytes": 128 << 20,
        "max_concurrent_requests": 4 * SAMPLES,
        "replay": None,
        "max_staleness": min(1, r.max_staleness),
        "start_deadline_s": DEADLINE_S,
        "step_deadline_s": DEADLINE_S,
    }
    tree["dynamic_sampling"] |= {"refills": min(1, config.dynamic_sampling.refills)}
    tree["reward"] |= {
        "name": "simulated_reward:share_of_vowels",
        "signature": "alphamed",
        "truncated": "grade",
        "overlong_buffer_tokens": 0,
    }
    tree["algorithm"] |= {"mini_batches": updates, "constant_tokens": None}
    tree["parallel"] |= cut | {
        "virtual_pipeline": 2 if p.virtual_pipeline and cut["pipeline"] > 1 else None,
        "micro_batch_tokens": prompt + RESPONSE_TOKENS + 4,
        "logprob_chunk_tokens": CHUNK_TOKENS if p.logprob_chunk(shape.vocab) else 0,
    }
    tree["optimizer"] |= {"lr": 1e-3, "min_lr": 0.0, "warmup_steps": 0}
    tree["sync"] |= {"transport": "auto", "bucket_bytes": 64 << 10}
    tree["checkpoint"] |= {"every": 1, "keep": STEPS}
    tree["evaluation"] |= {"files": [], "decisions": [], "before": False, "after": False, "every": 0}
    tree["profile"] = {}
    tree["logging"] |= {"wandb": "off", "report": False, "export_hf": True, "rollout_files": True}
    tree["cluster"] |= {
        "device": "cpu",
        "trainer_threads": 1,
        "engine_cores": None,
        "heartbeat_timeout_s": 120.0,
        "rank_timeout_s": DEADLINE_S,
    }
    return build_config(tree)


def prepare(small: Config, config: Config, shape: ModelShape, folder: Path) -> ModelShape:
    """Write model, questions, reward and configuration; returns the small model's shape."""
    from alphamed.lab.datasets import medfacts

    p = small.parallel
    layers = max(2, p.pipeline * (p.virtual_pipeline or 1))
    small_shape = miniature.miniature(shape, config.parallel, layers, small.max_model_tokens)
    miniature.write_model(folder / "model", small_shape)
    medfacts.write(folder / "questions", seed=0, levels=[1], facts=12, copies=8)
    (folder / "simulated_reward.py").write_text(REWARD, encoding="utf-8")
    (folder / "simulation.yaml").write_text(dump_tree(small.model_dump(mode="json")), encoding="utf-8")
    return small_shape


def layout_lines(config: Config, small: Config, shape: ModelShape) -> Iterator[str]:
    """What is about to run: how sizes were cut, the position of every rank, what a push sends."""
    from alphamed.weights.routes import WIRE_DTYPE, make_plan
    from alphamed.weights.sync_plan import Wire

    p, full, r = small.parallel, config.parallel, small.rollout
    virtual = f", VPP {full.virtual_pipeline} -> {p.virtual_pipeline}" if p.virtual_pipeline else ""
    context = f"CP {full.context} -> {p.context}, " if full.context > 1 else ""
    yield (
        f"\nSIMULATION {config.run.name}: TP {full.tensor} -> {p.tensor}, PP {full.pipeline} -> {p.pipeline}{virtual}, "
        f"{context}DP {full.data} -> {p.data}; {r.engines} engines of TP {r.tensor_parallel}; {shape.family} of "
        f"{shape.layers} layers, {shape.parameters:,} parameters"
    )
    for rank in range(p.world):
        at = coordinates(rank, p)
        chunks = [
            parameters.layers_of(at.pipeline, chunk, shape.layers, p.pipeline, p.virtual_pipeline or 1)
            for chunk in range(p.virtual_pipeline or 1)
        ]
        yield (
            f"  rank {rank}: tensor {at.tensor}, {f'context {at.context}, ' if p.context > 1 else ''}data {at.data}, "
            f"stage {at.pipeline}, layers "
            f"{', '.join(f'{chunk.start}-{chunk.stop - 1}' for chunk in chunks)}"
        )
    plan = make_plan(
        shape,
        p,
        (r.tensor_parallel,) * r.engines,
        Wire(small.sync.mode, "gloo", WIRE_DTYPE[r.dtype], small.sync.bucket_bytes),
    )
    yield (
        f"  weight push ({plan.mode}): {len(plan.links)} links from ranks {', '.join(map(str, plan.sources))} to "
        f"{len(plan.members)} workers, {sum(len(link.buckets()) for link in plan.links)} buckets, {plan.bytes:,} bytes"
    )


# -------------------------------------------------------------------------------------------------------------- running
class Child:
    """Runs verbs of the program in `folder`, one after another, all of them before `deadline` (time.monotonic)."""

    def __init__(self, folder: Path, deadline: float) -> None:
        self.folder, self.deadline, self.peak_bytes = folder, deadline, 0

    def run(self, *arguments: str) -> str | None:
        """Run `alphamed ARGUMENTS`; None where it succeeds, else the error in one or several lines."""
        command = [sys.executable, "-m", "alphamed.cli", *arguments]
        search = [str(Path(part).resolve()) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        with open(self.folder / "output.txt", "w+", encoding="utf-8") as output:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(search), "CUDA_VISIBLE_DEVICES": ""},
            )
            try:
                over = self._wait(process)
            finally:
                _stop(process)
            output.seek(0)
            lines = output.read().splitlines()
        if over:
            return f"not done {DEADLINE_S:.0f} s after the simulation began; the end of its output:\n" + "\n".join(
                lines[-5:]
            )
        return None if process.returncode == 0 else f"exit code {process.returncode}\n" + "\n".join(lines[-40:])

    def _wait(self, process: subprocess.Popen) -> bool:
        """Whether the deadline passed before the process ended."""
        measured = 0.0
        while process.poll() is None:
            now = time.monotonic()
            if now > self.deadline:
                return True
            if now - measured > MEMORY_POLL_S:
                measured, self.peak_bytes = now, max(self.peak_bytes, memory_of(process.pid))
            time.sleep(POLL_S)
        return False


def _stop(process: subprocess.Popen) -> None:
    """Terminate a child that still runs; it ends its own children."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # its guard ends what it started
        process.wait()


def memory_of(pid: int) -> int:
    """Bytes of a process and all its descendants, shared pages in proportion."""
    import psutil

    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


# -------------------------------------------------------------------------------------------------------------- judging
def judge(small: Config) -> Iterator[ReportLine]:
    """Check the records of a run that ended cleanly."""
    from alphamed.rundir.metrics import read_rows

    wrong = _misplaced(small)
    yield ReportLine(
        "ranks: " + ("; ".join(wrong) if wrong else f"all {small.parallel.world} are at their planned positions"),
        passed=not wrong,
    )
    rows = read_rows(small.run_dir / "metrics.jsonl")
    yield ReportLine(
        f"steps: {len(rows)} of {STEPS} recorded, rollouts sampled by weights "
        f"{', '.join(_shown(row.get('policy_version')) for row in rows)}",
        passed=len(rows) == STEPS,
    )
    for row in rows:
        yield _step_outcome(row, small.resolved.max_logprob_diff)
    checkpoints = sorted(path.name for path in small.run_dir.glob("checkpoints/step_*"))
    yield ReportLine(f"checkpoints: {', '.join(checkpoints) or 'none'}", passed=len(checkpoints) == STEPS)
    exported = (small.run_dir / "hf" / "config.json").is_file()
    yield ReportLine(f"export: the trained model is {'' if exported else 'not '}a Hugging Face folder", passed=exported)


def _misplaced(small: Config) -> list[str]:
    """Ranks whose logs do not show the position that the plan gives them."""
    p, wrong = small.parallel, []
    for rank in range(p.world):
        at = coordinates(rank, p)
        expected = Layout(
            p.tensor,
            p.pipeline,
            p.data,
            p.virtual_pipeline,
            p.sequence,
            at.tensor,
            at.pipeline,
            at.data,
            p.context,
            at.context,
        )
        log = small.run_dir / "logs" / f"rank_{rank}.log"
        if not log.is_file() or str(expected) not in log.read_text(encoding="utf-8", errors="replace"):
            wrong.append(f"rank {rank} is not at {expected}")
    return wrong


def _step_outcome(row: dict[str, Any], limit: float) -> ReportLine:
    """A step moved the policy by a finite gradient, and the engines computed what the policy computes."""
    loss, norm, difference = (row.get(f"policy/{name}") for name in ("loss", "grad_norm", "logprob_diff_mean"))
    finite = all(value is not None and math.isfinite(value) for value in (loss, norm, difference))
    return ReportLine(
        f"step {row['step']}: loss {_shown(loss)}, gradient norm {_shown(norm)}, engines' log-probs differ by "
        f"{_shown(difference)} on average (limit {limit:g}), {_shown(row.get('batch/micro_batches'))} "
        f"micro-batches a data rank, push {_shown(row.get('time/sync_s'))} s",
        passed=finite and (norm or 0.0) > 0 and (difference or 0.0) <= limit,
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
