"""`alphamed status RUN`: how far a run is, whether its parts are alive, where its logs are, why its last start ended.

Reads the run directory only, so it works from any machine that sees it, on a live run and on a dead one.
"""

from __future__ import annotations

import fcntl
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alphamed.cluster.cluster_job import ClusterJob
from alphamed.cluster.failure import ENDED_FILE, recorded
from alphamed.cluster.ledger import LOCK_FILE
from alphamed.cluster.pulse import BEAT_S, PULSE_FILE
from alphamed.config.loading import load_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.rundir.directory import config_of_run, finished_step
from alphamed.rundir.metrics import read_rows
from alphamed.rundir.sinks import spoken_time

FRESH_S = 6 * BEAT_S
RECENT_STEPS = 10
LAUNCH_FILE, JOB_FILE = "launch.yaml", "job.json"


def main(run_dir: Path, watch: bool) -> int:
    """Print the status, with `watch` again and again until the run has ended."""
    while True:
        lines = list(status(run_dir, time.time()))
        if watch and sys.stdout.isatty():
            print("\x1b[2J\x1b[H", end="")
        print(*lines, sep="\n", flush=True)
        if not watch or not is_running(run_dir, read_pulse(run_dir), time.time()):
            return 0
        time.sleep(BEAT_S)


def status(run_dir: Path, now: float) -> Iterator[str]:
    """The lines. `now`: seconds since the epoch. Raises ConfigError where this is no run directory."""
    if not run_dir.is_dir():
        raise ConfigError(f"run directory {run_dir}: is not there; give the directory of a run")
    config, pulse = _config(run_dir), read_pulse(run_dir)
    running = is_running(run_dir, pulse, now)
    yield f"{run_dir}: {'running' if running else 'not running'}{_where(pulse) if running else ''}"
    yield from _progress(config, read_rows(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else [])
    if running:
        yield f"now      {pulse['activity'] if pulse else 'starting'}"
    else:
        yield f"ended    {why_ended(run_dir, pulse, now)}"
    yield from _hosts(run_dir)
    yield from _heard(pulse, now, running)
    yield f"logs     {run_dir / 'logs'}: {', '.join(sorted(path.name for path in (run_dir / 'logs').glob('*'))) or 'none yet'}"


def read_pulse(run_dir: Path) -> dict[str, Any] | None:
    """Rank 0's last sign of life; None without one."""
    return _read(run_dir / PULSE_FILE)


def is_running(run_dir: Path, pulse: Mapping[str, Any] | None, now: float) -> bool:
    """Whether somebody holds the run's lock, or has given a sign of life lately: a file system may keep locks to one host. A sign
    that came before a failure counts no more: rank 0's host may be dead, and another one have written why."""
    if (run_dir / ENDED_FILE).exists():
        return False
    return _is_locked(run_dir / LOCK_FILE) or (
        pulse is not None and now - pulse["time"] < FRESH_S and recorded(run_dir) is None
    )


def why_ended(run_dir: Path, pulse: Mapping[str, Any] | None, now: float) -> str:
    """How the last start ended, as text."""
    ended = _read(run_dir / ENDED_FILE)
    when = f", {spoken_time(now - ended['time'])} ago" if ended else ""
    if (step := finished_step(run_dir)) is not None:
        return f"finished after step {step}{when}"
    if ended:
        return f"{ended['how']}{when}"
    if (failure := recorded(run_dir)) is not None:
        return f"failed: {failure}"
    if pulse:
        return (
            f"without a record (killed, or its host was lost); its last sign of life came {spoken_time(now - pulse['time'])} "
            f"ago, at: {pulse['activity']}"
        )
    return "before it gave a sign of life; see the logs"


def _config(run_dir: Path) -> Config:
    launch = run_dir / LAUNCH_FILE
    if not (run_dir / "config.yaml").is_file() and launch.is_file():
        return load_config(launch)  # it has not come so far as to write its own
    return config_of_run(run_dir)


def _where(pulse: Mapping[str, Any] | None) -> str:
    if not pulse:
        return ""
    job = f", Slurm job {pulse['slurm_job']}" if pulse["slurm_job"] else ""
    return f" (rank 0 is pid {pulse['pid']} on {pulse['host']}{job})"


def _progress(config: Config, rows: list[dict[str, Any]]) -> Iterator[str]:
    last = config.run.last_step
    if not rows:
        yield f"step     0 of {last}"
        return
    row = rows[-1]
    seconds = statistics.median(recent["time/step_s"] for recent in rows[-RECENT_STEPS:])
    left = spoken_time(seconds * max(0, last - row["step"]))
    tokens = row.get("throughput/generated_tokens_per_s")
    speed = f", {tokens:.0f} tokens/s generated" if tokens else ""
    yield f"step     {row['step']} of {last}, {seconds:.1f} s a step{speed}, {left} left"
    yield f"reward   {row['reward/mean']:.3f}, correct {row['reward/correct']:.0%}, boxed {row['reward/boxed']:.0%}"


def _hosts(run_dir: Path) -> Iterator[str]:
    if (tree := _read(run_dir / JOB_FILE)) is None:
        return
    for place in ClusterJob.from_json(json.dumps(tree)).places:
        parts = [
            f"{count} {kind}{'s' * (count > 1)}"
            for count, kind in ((place.ranks, "rank"), (place.engine_slots, "engine worker"))
            if count
        ]
        yield f"host     {place.name} ({place.address}): {', '.join(parts)}"


def _heard(pulse: Mapping[str, Any] | None, now: float, running: bool) -> Iterator[str]:
    if not pulse:
        return
    # what rank 0 knew when it wrote that: after its end, ages count from there
    then = now if running else pulse["time"]
    for name, at in pulse["heard"].items():
        age = max(0.0, then - at)
        yield (
            f"heard    {name}: {spoken_time(age)} ago"
            + (" (late)" if age > FRESH_S else "")
            + ("" if running else ", at the end")
        )


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
