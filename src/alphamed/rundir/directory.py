"""A run directory on disk: its paths, what a resume may change, and what it drops.

config.yaml  metrics.jsonl  questions.jsonl  provenance.json  report.html  report.json
rollouts/step_000012.parquet   evaluations/step_000000.json + step_000000.items.jsonl
launch.yaml  environment.json (what the last start read and found set)
checkpoints/   hf/   dumps/step_000012/   wandb/   finished.json (when nothing is left to do)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphamed.config.loading import build_config, dump_config, load_config, load_config_tree
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.files import replace_json, replace_json_lines, replace_text
from alphamed.model.shape import resolve
from alphamed.rundir import provenance, question_log
from alphamed.rundir.metrics import last_step, read_rows, step_of

CHANGEABLE = (
    "run.name",
    "run.root",
    "run.steps",
    "run.stop_after",
    "run.time_limit_s",
    "run.min_steps",
    "sft.epochs",
    "logging",
    "profile",
    "evaluation",
    "checkpoint",
    "parallel",
    "cluster",
    "sync",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.kv_cache_bytes",
    "rollout.gpu_memory_utilization",
    "rollout.max_concurrent_requests",
    "rollout.start_deadline_s",
    "rollout.step_deadline_s",
    "rollout.stragglers",
    "reward.timeout_s",
    "reward.workers",
    "reward.max_failure_share",
)
"""Fields and sections that a resume may set again: where and how long it runs, not what it computes."""
MODEL_PLACE = ("model.path", "model.revision", "model.cache")
"""Where the model is; the hashes in provenance.json identify it."""
PLACES = ("model.path", "model.cache", "data.train", "rollout.replay")
"""Settings that hold paths and are compared as such."""

FINISHED = "finished.json"


class RunDirectory:
    """The files of a run but for checkpoints. Its one writer is rank 0: whoever started the run keeps others out
    (`cluster.ledger.Lock`)."""

    def __init__(self, root: Path, changed: dict[str, tuple[Any, Any]]) -> None:
        self.root = root
        self.changed = changed
        self.metrics_file = root / "metrics.jsonl"
        self.evaluations = root / "evaluations"
        self.rollouts = root / "rollouts"

    @classmethod
    def open(cls, config: Config) -> RunDirectory:
        """Make the directory or take up an existing one, and write the resolved config into it.

        Raises ConfigError when the config does not fit what is in it.
        """
        changed = check_resume(config)
        try:
            replace_text(config.run_dir / "config.yaml", dump_config(config))
        except OSError as error:
            raise ConfigError(f"run.root: {config.run_dir} cannot be written ({error.strerror}); choose another") from None
        return cls(config.run_dir, changed)

    def set_finished(self, step: int | None) -> None:
        """Note that the run has ended well after `step`, its export, evaluation and report done; None: that it has not."""
        if step is None:
            (self.root / FINISHED).unlink(missing_ok=True)
        else:
            replace_json(self.root / FINISHED, {"step": step})

    def last_step(self) -> int:
        """The last step in metrics.jsonl, 0 without any."""
        return last_step(read_rows(self.metrics_file))

    def drop_after(self, step: int) -> None:
        """Forget the records of steps after `step`: they will be run again. Dumps stay, they are evidence."""
        earlier = [row for row in read_rows(self.metrics_file) if step_of(row) <= step]
        if self.metrics_file.exists():  # also without dropped rows: half a last line goes
            replace_json_lines(self.metrics_file, earlier)
        question_log.drop_after(self.root, step)
        for folder in (self.rollouts, self.evaluations):
            for file in sorted(folder.glob("step_*")):
                if _step_of(file) > step:
                    file.unlink()


def config_of_run(run_dir: Path) -> Config:
    """The configuration that a run directory was last started with. Raises ConfigError."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run directory {run_dir}: holds no config.yaml; give the directory of a run")
    tree = load_config_tree(path)
    try:
        return build_config(tree)
    except ConfigError as error:  # of a file that the user has not named
        raise ConfigError(f"config {path}: {error}") from None


def finished_step(run_dir: Path) -> int | None:
    """The step after which the run ended well, None where it has not. Raises ConfigError where the note is damaged."""
    path = run_dir / FINISHED
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["step"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ConfigError(f"{path}: not readable ({type(error).__name__}); remove it, and the run is continued") from None


def is_finished(config: Config) -> bool:
    """Whether the run directory holds all that `config` asks for: it ended well after the last step, or its time was up."""
    step = finished_step(config.run_dir)
    if step is not None and config.sft is not None and config.sft.epochs is not None:
        return step >= config_of_run(config.run_dir).run.last_step  # the length follows from data, which the run has read
    return step is not None and (step >= config.run.last_step or config.run.time_limit_s is not None)


def check_resume(config: Config) -> dict[str, tuple[Any, Any]]:
    """Whether `config` may continue what its run directory holds; writes nothing.

    Returns the fields that differ and may: name -> (old, new). Raises ConfigError naming the first field that may not,
    or a data file whose content has changed. A directory without config.yaml allows everything.
    """
    written = config.run_dir / "config.yaml"
    if not written.exists():
        return {}
    try:
        old = load_config(written)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; {config.run_dir} cannot be continued by this version, choose another run.name"
        ) from None
    before, after = config_leaves(old), config_leaves(config)
    changed = {name: (before.get(name), after.get(name)) for name in after | before if before.get(name) != after.get(name)}
    changed = {name: pair for name, pair in changed.items() if name not in PLACES or not _same_place(*pair)}
    moved = moved_places(config, changed)
    for name, (was, now) in changed.items():
        if name not in moved and not any(name == known or name.startswith(known + ".") for known in CHANGEABLE):
            place = "model" if name in MODEL_PLACE else "data" if name == "data.train" else None
            other = ", which held something else" if place and provenance.has_hashes(config.run_dir, place) else ""
            raise ConfigError(
                f"{name}: {now!r} but the run in {config.run_dir} was started with {was!r}{other}; "
                f"set it back or choose another run.name"
            )
    for path in provenance.changed_files(config.run_dir, config.data.train):
        problem = "has changed" if Path(path).exists() else "has gone"
        raise ConfigError(
            f"data.train: {path} {problem} since the run in {config.run_dir} was started; "
            f"restore it or choose another run.name"
        )
    return changed


def config_leaves(config: Config) -> dict[str, Any]:
    """All settings of a configuration by their dotted names; lists are values."""
    return _leaves(config.model_dump(mode="json"))


def moved_places(config: Config, changed: Mapping[str, Any]) -> set[str]:
    """Those of the changed settings that name another place of the same model or the same training files. A model that is
    not here is fetched; ConfigError where that fails."""
    run_dir, moved = config.run_dir, set()
    if (
        "data.train" in changed
        and provenance.has_hashes(run_dir, "data")
        and not provenance.changed_files(run_dir, config.data.train)
    ):
        moved.add("data.train")
    place = changed.keys() & set(MODEL_PLACE)
    if place and provenance.has_hashes(run_dir, "model"):
        folder = resolve(config.model.path, config.model.revision, config.model.cache)
        if not provenance.changed_model_files(run_dir, folder):
            moved |= place
    return moved


def check_same_model(run_dir: Path, folder: Path) -> None:
    """Raises ConfigError where the model in `folder` is not the one that the run in `run_dir` began with: changed in place,
    or fetched again after its author had changed it."""
    for name in provenance.changed_model_files(run_dir, folder):
        raise ConfigError(
            f"model.path: {folder / name} is not what the run in {run_dir} was started with; give that model "
            f"(model.revision names a commit) or choose another run.name"
        )


def _same_place(was: Any, now: Any) -> bool:
    """Whether paths, or lists of them, lead to the same files: ./m, m/ and a link to it."""
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_same_place, was, now))
    if not isinstance(was, str) or not isinstance(now, str):
        return was == now
    return os.path.realpath(os.path.expanduser(was)) == os.path.realpath(os.path.expanduser(now))


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; lists are values."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= _leaves(value, name + ".") if isinstance(value, dict) else {name: value}
    return leaves


def _step_of(file: Path) -> int:
    digits = file.name.removeprefix("step_").split(".")[0]
    return int(digits) if digits.isdigit() else 0
