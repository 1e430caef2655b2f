"""Models, batches and one torchrun of worker.py over them: what the parity tests on CPU and on GPUs start with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import oracle
import torch
from tiny import tiny_hf
from worker import Case

HERE = Path(__file__).parent


def make_job(root: Path, models: dict[str, dict], **shape) -> dict:
    """Tiny models in `root`, by name, and a fixed batch for each; `shape` goes to all of them."""
    folders = {name: tiny_hf(root / name, **options, **shape) for name, options in models.items()}
    data = {name: oracle.make_data(folder) for name, folder in folders.items()}
    return {"root": root, "folders": {name: str(folder) for name, folder in folders.items()}, "data": data}


def run_cases(
    job: dict,
    name: str,
    world: int,
    cases: Sequence[Case],
    behaviours: Sequence[str] = (),
    timeout_s: float = 600,
    **environment: str,
) -> Path:
    """Run the cases on `world` ranks; returns the folder of what each has found. Nothing of it lives on."""
    results, job_file = job["root"] / name, job["root"] / f"{name}.job.pt"
    results.mkdir()
    torch.save(
        {
            "folders": job["folders"],
            "data": job["data"],
            "cases": [asdict(c) for c in cases],
            "behaviours": tuple(behaviours),
        },
        job_file,
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
        str(HERE / "worker.py"),
        str(job_file),
        str(results),
    ]
    search = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    with open(job["root"] / f"{name}.errors", "w+") as errors:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": search} | environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # torchrun's ranks too
            process.wait()
        errors.seek(0)
        assert status == 0, f"{name}: torchrun with {world} ranks failed:\n{errors.read()[-6000:]}"
    return results
