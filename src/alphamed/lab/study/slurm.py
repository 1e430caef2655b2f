"""A study as Slurm jobs: one batch script per run, and a script that submits them and a last job that collects the results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import alphamed
from alphamed.cluster.hardware import wants_cuda
from alphamed.cluster.hosts import plan_nodes
from alphamed.config.schema import Config
from alphamed.errors import ConfigError
from alphamed.lab.study.grid import PlannedRun
from alphamed.lab.study.spec import Study

MAX_NODES = 1024


def scripts(study: Study, study_file: Path, runs: Sequence[PlannedRun], configs: Mapping[str, Path]) -> dict[Path, str]:
    """Path -> text of every script; `configs` holds each run's configuration file. Raises ConfigError.

    Paths are relative to the folder where the jobs are submitted: the repository, as for examples/slurm/train.sbatch.
    """
    folder = study.folder / "slurm"
    launcher = _launcher()
    batch = {folder / f"{run.name}.sbatch": _script(study, run, launcher, configs[run.name]) for run in runs}
    after = {path: _needed(run, runs) for path, run in zip(batch, runs)}
    return batch | {folder / "submit.sh": _submit(study, study_file, after)}


def _needed(run: PlannedRun, runs: Sequence[PlannedRun]) -> str | None:
    """The run whose export this one starts from, if that is still to be made."""
    start = Path(run.config.model.path)
    return next((other.name for other in runs if start.is_relative_to(other.config.run_dir)), None)


def nodes_of(config: Config, gpus_per_node: int) -> int:
    """The smallest number of nodes with room for the run's ranks and engines. Raises ConfigError where MAX_NODES are too few."""
    if not wants_cuda(config):
        return 1
    for count in range(1, MAX_NODES):
        try:
            plan_nodes(config, [f"node{i}" for i in range(count)], gpus_per_node)
            return count
        except ConfigError as error:
            if "present are" not in str(error):  # more nodes help only if there were too few
                raise
    raise ConfigError(f"parallel: more than {MAX_NODES} nodes of {gpus_per_node} GPUs would be needed; lower it")


def _script(study: Study, run: PlannedRun, launcher: Path, config: Path) -> str:
    gpus = study.slurm.gpus_per_node or run.config.cluster.gpus_per_node
    minutes = max(1, round(study.deadline_s / 60))
    cuda = wants_cuda(run.config)
    lines = [
        f"--job-name={run.name}",
        f"--nodes={nodes_of(run.config, gpus)}",
        "--ntasks-per-node=1",
        *([f"--gpus-per-node={gpus}"] if cuda else []),
        "--exclusive",
        f"--time={minutes}",
        f"--output={study.folder / 'logs' / f'{run.name}.log'}",
        "--open-mode=append",
        *study.slurm.options,
    ]
    head = "".join(f"#SBATCH {line}\n" for line in lines)
    return f"#!/usr/bin/env bash\n{head}exec bash {shlex.quote(str(launcher))} {shlex.quote(str(config))}\n"


def _submit(study: Study, study_file: Path, after: Mapping[Path, str | None]) -> str:
    """Bash that submits every script, then a job that collects the results once all have ended, successfully or not.
    `after`: script -> the run that must have ended well before it starts."""
    log = study.folder / "logs" / "collect.log"
    collect = shlex.join(["alphamed", "study", str(study_file), "--collect"])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "# Run this in the repository: paths are relative to it.",
            "set -euo pipefail",
            f"mkdir -p {shlex.quote(str(log.parent))}",
            "jobs=",
            "declare -A job",
            "submit() {  # NAME SCRIPT [RUN whose end it waits for]",
            '    job[$1]=$(sbatch --parsable ${3:+--dependency=afterok:${job[$3]} --kill-on-invalid-dep=yes} "$2" | cut -d ";" -f 1)',
            "    jobs=$jobs:${job[$1]}",
            "}",
            *(
                shlex.join(["submit", script.stem, str(script), *([needed] if needed else [])])
                for script, needed in after.items()
            ),
            f"sbatch --dependency=afterany$jobs --job-name={study.name}-collect --output={shlex.quote(str(log))} "
            f"--wrap={shlex.quote(f'PATH=.venv/bin:$PATH {collect}')}",
            "",
        ]
    )


def _launcher() -> Path:
    launcher = Path(alphamed.__file__).resolve().parents[2] / "examples" / "slurm" / "train.sbatch"
    if not launcher.is_file():
        raise ConfigError(
            f"--slurm: {launcher} does not exist; --slurm needs a checkout of the repository, not an installed package"
        )
    return launcher.relative_to(Path.cwd()) if launcher.is_relative_to(Path.cwd()) else launcher
