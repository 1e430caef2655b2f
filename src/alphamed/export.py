"""`alphamed export`: the last checkpoint of a run, or its best, as a Hugging Face folder with its card, in any layout.

One process holds the whole model, so this needs as much memory as the weights take. (A run that reaches its
last step has already exported its model, with all ranks.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from alphamed.cluster.environment import enter, without_torchrun
from alphamed.config.schema import Config
from alphamed.config.sections import ParallelConfig
from alphamed.errors import ConfigError


def main(run_dir: Path, out: Path, best: bool, write_card: Callable[[Path, Config, Path, int], None]) -> int:
    """Write the model to `out` (replaced if it exists) and print where it is; with `best` that of the checkpoint that did
    best on the development set. `write_card(run_dir, config, out, step)` writes its card. Raises ConfigError for a folder
    that is not a run, or has no such checkpoint."""
    from alphamed.megatron import checkpoint_folder
    from alphamed.model.shape import read_shape, resolve
    from alphamed.rundir.directory import config_of_run

    config = config_of_run(run_dir)
    last = (checkpoint_folder.best if best else checkpoint_folder.latest)(run_dir / "checkpoints")
    if last is None and best:
        raise ConfigError(f"run directory {run_dir}: no checkpoint is marked as the best; train with evaluation.development")
    if last is None:
        raise ConfigError(
            f"run directory {run_dir}: holds no checkpoint to export; let the run reach one (checkpoint.every)"
        )
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not free and not (out / "config.json").is_file():
        raise ConfigError(f"--out: {out} exists and is no model folder; name another")
    folder = resolve(config.model.path, config.model.revision, config.model.cache)
    if out.resolve() == folder.resolve():
        raise ConfigError(f"--out: {out} is the model that the run began with, which would be lost; name another")
    enter(without_torchrun(os.environ))  # variables of another torchrun job: this is a single process
    from alphamed.megatron import checkpoint, runtime
    from alphamed.megatron.policy import Reference
    from alphamed.weights.hf_save import save_hf

    shape = read_shape(folder)
    single = config.model_copy(update={"parallel": ParallelConfig()})
    rank = runtime.start(single)
    try:
        chunks = Reference(single, shape, rank).model_chunks()
        checkpoint.load_weights(last, chunks, shape, rank)
        save_hf(out, folder, chunks, shape, rank.layout, None, None)
        write_card(run_dir, config, out, int(last.name.removeprefix("step_")))
    finally:
        runtime.stop(rank)
    print(f"{last} -> {out}")
    return 0
