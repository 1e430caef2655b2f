"""Run the update of one recorded step again, from the checkpoint before it, on the recorded rollouts: `replay --only update`.

It is an ordinary training run without engines in its own directory, `RUN/replays/step_000012`. Overrides of layout, loss or
learning rate are thus compared with the recorded step on identical data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from alphamed.config.loading import build_config, load_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.rundir.metrics import read_rows
from alphamed.rundir.recorded_settings import require_recorded
from alphamed.rundir.rollout_files import rollout_path

COMPARED = (
    "policy/loss",
    "policy/kl",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/grad_norm",
    "policy/lr",
    "policy/logprob_diff_mean",
    "policy/logprob_diff_max",
)
RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Two runs of the same update differ by FP32 rounding only; other layouts stay within this."""


def main(run_dir: Path, step: int, overrides: Sequence[str], validate: Callable[[Config], object]) -> int:
    """`alphamed replay RUN --step N --only update [key=value ...]`: train the step again and compare its numbers with the
    recorded ones. 0 where they agree, 1 where they differ."""
    from alphamed.launch import single_host

    config = replay_config(run_dir, step, overrides)
    prepare(run_dir, step, config.run_dir)
    validate(config)
    status = single_host.train(config)
    if status:
        return status
    lines, same = compare(recorded_metrics(run_dir, step), recorded_metrics(config.run_dir, step))
    print(f"step {step} of {run_dir}: update run again in {config.run_dir}")
    print("\n".join(lines))
    return 0 if same else 1


def replay_config(run_dir: Path, step: int, overrides: Sequence[str] = ()) -> Config:
    """The run's configuration, its rollouts replayed, ending after `step`. Raises ConfigError."""
    config = load_config(run_dir / "config.yaml", tuple(overrides))
    tree = config.model_dump(mode="json")
    tree["run"] |= {"root": str(run_dir / "replays"), "name": f"step_{step:06d}", "stop_after": step, "time_limit_s": None}
    tree["rollout"] |= {"replay": str(run_dir)}
    tree["evaluation"] |= {"before": False, "after": False, "every": 0}
    tree["profile"] = {}
    tree["logging"] |= {"wandb": "off", "rollout_files": False, "report": False, "export_hf": False}
    replayed = build_config(tree)
    require_recorded(replayed, run_dir)  # before anything is written
    return replayed


def prepare(run_dir: Path, step: int, scratch: Path) -> None:
    """A fresh run directory that holds the checkpoint of the previous step (none for step 1: the model's own weights).

    Raises ConfigError where that checkpoint or the step's rollouts do not exist.
    """
    if not rollout_path(run_dir, step).is_file():
        raise ConfigError(f"--step: no rollouts of step {step} in {run_dir / 'rollouts'}; name a recorded step")
    before = run_dir / "checkpoints" / f"step_{step - 1:06d}"
    saved_steps = sorted(int(path.name.removeprefix("step_")) for path in before.parent.glob("step_*"))
    if step > 1 and step - 1 not in saved_steps:
        possible = ", ".join(str(n + 1) for n in [0, *saved_steps] if rollout_path(run_dir, n + 1).is_file())
        raise ConfigError(
            f"--step: {step} needs the checkpoint of step {step - 1}, which is not kept; steps that can be run "
            f"again: {possible} (checkpoint.every and checkpoint.keep decide)"
        )
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "checkpoints").mkdir(parents=True)
    if step > 1:  # links: a checkpoint's files are never changed, only replaced
        shutil.copytree(before, scratch / "checkpoints" / before.name, copy_function=os.link)
        (scratch / "checkpoints" / "latest").write_text(before.name + "\n", encoding="utf-8")


def recorded_metrics(run_dir: Path, step: int) -> dict[str, float | None]:
    for row in read_rows(run_dir / "metrics.jsonl"):
        if row["step"] == step:
            return row
    raise ConfigError(f"--step: {run_dir / 'metrics.jsonl'} holds no step {step}; name a recorded step")


def compare(recorded: Mapping[str, float | None], now: Mapping[str, float | None]) -> tuple[list[str], bool]:
    """A table of the update's metrics, and whether all of them agree."""
    lines, same = [f"  {'':<28}{'recorded':>16}{'now':>16}"], True
    for name in COMPARED:
        old, new = recorded.get(name), now.get(name)
        agree = old == new or (
            old is not None and new is not None and abs(old - new) <= ABSOLUTE + RELATIVE * max(abs(old), abs(new))
        )
        same &= agree
        shown = "".join(f"{'-' if value is None else format(value, '.8g'):>16}" for value in (old, new))
        lines.append(f"  {name:<28}{shown}{'' if agree else '  differs'}")
    return lines, same
