"""A tiny run's folder on the file system that test hosts share, and what is asked of its jobs."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosts import Hosts
from tiny_run import Workplace

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "examples" / "slurm" / "train.sbatch"
DEADLINE_S = 400
SHARED = Path("/var/tmp")
"""Shared by the hosts, which have /tmp for themselves."""


class Place(Workplace):
    """A Workplace for jobs of several hosts."""

    def environment(self) -> dict[str, str]:
        return {"ALPHAMED_PYTHON": sys.executable, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}

    def submit(
        self, hosts: Hosts, count: int, *overrides: str, options: tuple[str, ...] = (), environment: Mapping[str, str] = {}
    ) -> str:
        """sbatch of the project's own batch script; the job's number."""
        return hosts.sbatch(
            "-N",
            str(count),
            *options,
            str(BATCH),
            "run.yaml",
            *overrides,
            cwd=self.folder,
            environment=self.environment() | environment,
        )

    def launcher(self) -> None:
        """run.sh, which is one of the project's launchers: its configuration is run.yaml."""
        shutil.copy(ROOT / "examples" / "train_alphamed_70b.sh", self.folder / "run.sh")

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.log"
        return path.read_text() if path.exists() else ""

    def run(self, hosts: Hosts, count: int, root: str, *overrides: str, environment: Mapping[str, str] = {}) -> Path:
        """A job that ends well; its run directory."""
        job = self.submit(hosts, count, f"run.root={root}", *overrides, environment=environment)
        assert hosts.wait_for_end(job, DEADLINE_S) == "COMPLETED", self.log(job)
        require_nothing_left(hosts)
        return self.run_dir(root)


@contextmanager
def place(questions: int = 6, **sections: dict[str, Any]) -> Iterator[Place]:
    folder = Path(tempfile.mkdtemp(prefix="alphamed-place-", dir=SHARED))
    try:
        sections["cluster"] = {"device": "cpu", "ranks_per_host": 1, "join_deadline_s": 60} | sections.get("cluster", {})
        yield Place(folder, questions, **sections)
    finally:
        if not os.environ.get("ALPHAMED_KEEP"):
            shutil.rmtree(folder, ignore_errors=True)


def require_nothing_left(hosts: Hosts, but: tuple[str, ...] = ()) -> None:
    """No process and no shared memory on any host that lives, and no temporary folder of a run."""
    for name in hosts.names:
        if name not in but:
            hosts.wait_until(lambda: not hosts.processes(name), f"{name} is quiet: {hosts.processes(name)}", 45)
            assert hosts.on(name, "ls", "/dev/shm") == "", name
            assert [entry for entry in hosts.on(name, "ls", "/tmp").split() if entry.startswith("alphamed")] == [], name
