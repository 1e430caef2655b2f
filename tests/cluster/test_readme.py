"""The README's section "On a cluster": its commands, one after the other, as they stand there."""

import re
import shlex

import pytest
from places import DEADLINE_S, ROOT, place, require_nothing_left
from test_failures import wait_for_step
from tiny_run import metrics

pytestmark = [pytest.mark.slow, pytest.mark.matrix]


def commands() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("## On a cluster")[2].partition("\n## ")[0]
    return [
        line.partition("#")[0].strip()
        for block in re.findall(r"```\n(.*?)```", section, re.S)
        for line in block.splitlines()
    ]


def test_every_command_of_the_section_works(hosts):
    slurm_preview, submit, status, cancel, submit_again, over_ssh = commands()
    with place(parallel={"micro_batch_tokens": 512, "data": 2}, run={"name": "tiny", "steps": 1000, "root": "runs"}) as here:
        (here.folder / "examples").symlink_to(ROOT / "examples")
        variables = {
            **here.environment(),
            "PATH": f"{ROOT / '.venv' / 'bin'}:/usr/bin:/bin",
            "SLURM_CONF": f"{hosts.folder}/slurm.conf",
            "ALPHAMED_SSH": f"ssh -F {hosts.folder}/ssh/config",
        }

        def on_node1(command: str, **words: str) -> str:
            for name, word in ({"CONFIG.yaml": "run.yaml", "RUN": "runs/tiny"} | words).items():
                command = command.replace(name, word)
            exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
            return hosts.on("node1", "bash", "-c", f"export {exports}; {command}", cwd=here.folder, timeout=DEADLINE_S)

        assert "# sbatch -N 3 " in on_node1(slurm_preview)
        job = re.search(r"\d+", on_node1(submit))[0]
        wait_for_step(hosts, here, job, 2)
        assert "running (rank 0 is pid" in on_node1(status)
        on_node1(cancel, JOB=job)
        assert hosts.wait_for_end(job, 60) == "CANCELLED"
        require_nothing_left(hosts)
        assert "not running" in on_node1(status)
        done = max(metrics(here.run_dir("runs")), default=0)
        (here.folder / "run.yaml").write_text(
            (here.folder / "run.yaml").read_text().replace("steps: 1000", f"steps: {done + 2}")
        )
        job = re.search(r"\d+", on_node1(submit_again))[0]
        assert hosts.wait_for_end(job, DEADLINE_S) == "COMPLETED", here.log(job)
        (here.folder / "run.yaml").write_text(
            (here.folder / "run.yaml").read_text().replace(f"steps: {done + 2}", f"steps: {done + 3}")
        )
        on_node1(over_ssh)
        assert max(metrics(here.run_dir("runs"))) == done + 3
        require_nothing_left(hosts)
