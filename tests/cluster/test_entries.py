"""The other ways to start a run on several hosts: over ssh, and by hand with torchrun and `ray start`. Same files, same result."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from places import DEADLINE_S, ROOT, place, require_nothing_left
from tiny_run import metrics

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
TOKEN = "5ec7e7" * 8


def shell(here, *words: str, **variables: str) -> list[str]:
    """bash that runs `words` in the run's folder, as a user who has logged in to a host would."""
    exports = {"PATH": f"{ROOT / '.venv' / 'bin'}:/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **variables}
    return [
        "env",
        "-i",
        *(f"{name}={value}" for name, value in exports.items()),
        "bash",
        "-c",
        f"cd {shlex.quote(str(here.folder))} && exec {shlex.join(words)}",
    ]


def test_over_ssh(hosts):
    """Started on the first of them."""
    ssh = {"ALPHAMED_SSH": f"ssh -F {hosts.folder}/ssh/config"}
    with place() as here:
        words = (
            "alphamed",
            "launch",
            "--hosts",
            "node1,node2,node3",
            "--config",
            "run.yaml",
            "parallel.data=2",
            "run.root=ssh",
        )
        python = (sys.executable, "-m", "alphamed.cli", *words[1:])
        done = subprocess.run(
            hosts.command("node1", *shell(here, *python, "run.steps=2", **ssh)),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr
        assert sorted(metrics(here.run_dir("ssh"))) == [1, 2] and "step    2/2" in done.stdout
        require_nothing_left(hosts)
        process = subprocess.Popen(
            hosts.command("node1", *shell(here, *python, "run.steps=100000", **ssh)), stderr=subprocess.PIPE, text=True
        )
        hosts.wait_until(lambda: max(metrics(here.run_dir("ssh"))) >= 3, "step 3", DEADLINE_S)
        (starter,) = hosts.find("node1", f"{sys.executable} -m alphamed.cli launch")
        os.kill(starter, signal.SIGKILL)
        process.communicate(timeout=60)
        require_nothing_left(hosts)
        unknown = subprocess.run(
            hosts.command("node1", *shell(here, *python, "--hosts", "node1,node2,nohost", **ssh)),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert unknown.returncode == 1 and "run failed: host nohost: ssh could not start" in unknown.stderr
        require_nothing_left(hosts)


def test_by_hand_with_torchrun_and_ray(hosts):
    """docs/cluster.md, step by step: Ray on the hosts, then torchrun on those that train, given the first one's name."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with place() as here:
        here.launcher()
        ray = ("ray", "start", "--disable-usage-stats", "--temp-dir=/tmp/ray")
        try:
            hosts.on(
                "node1",
                *shell(
                    here,
                    *ray,
                    "--head",
                    "--node-ip-address=10.97.0.11",
                    "--port=6379",
                    "--num-gpus=0",
                    "--include-dashboard=false",
                    **token,
                ),
                timeout=120,
            )
            with pytest.raises(subprocess.SubprocessError):
                hosts.on(
                    "node3",
                    *shell(here, *ray, "--address=10.97.0.11:6379", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 48),
                    timeout=120,
                )
            hosts.on(
                "node3",
                *shell(here, *ray, "--address=10.97.0.11:6379", '--resources={"engine_slot": 1}', **token),
                timeout=120,
            )
            processes = [
                subprocess.Popen(
                    hosts.command(
                        name,
                        *shell(
                            here,
                            "torchrun",
                            "--nnodes",
                            "2",
                            "--node-rank",
                            str(rank),
                            "--nproc-per-node",
                            "1",
                            "--master-addr",
                            "node1",
                            "--master-port",
                            "29501",
                            "run.sh",
                            "parallel.data=2",
                            "run.root=hand",
                            "run.steps=2",
                            RAY_ADDRESS="10.97.0.11:6379",
                            **token,
                        ),
                    ),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank, name in enumerate(("node1", "node2"))
            ]
            words = [process.communicate(timeout=DEADLINE_S)[0] for process in processes]
            assert [process.returncode for process in processes] == [0, 0], words
            assert sorted(metrics(here.run_dir("hand"))) == [1, 2]
            assert "rank 0: 10.97.0.11 on eth0" in words[0] and "RAY_ADDRESS=10.97.0.11:6379" in words[0]
            assert "IFNAME" not in words[0], "what the run itself has chosen is not what the user has set"
        finally:
            for name in ("node1", "node3"):
                hosts.on(name, *shell(here, "ray", "stop"), timeout=60)
            time.sleep(1)
        require_nothing_left(hosts)


def test_a_host_may_come_late(hosts):
    """Launchers as Slurm would start them, the last one 8 s after the others."""
    with place() as here:
        processes = []
        for rank, name in enumerate(hosts.names):
            words = (
                sys.executable,
                "-m",
                "alphamed.cli",
                "launch",
                "--config",
                "run.yaml",
                "--nodes",
                ",".join(hosts.names),
                "--node-rank",
                str(rank),
                "--port",
                "29401",
                "parallel.data=2",
                "run.root=late",
                "run.steps=1",
            )
            time.sleep(8 if rank == 2 else 0)
            processes.append(
                subprocess.Popen(
                    hosts.command(name, *shell(here, *words, RAY_AUTH_TOKEN=TOKEN)), stderr=subprocess.PIPE, text=True
                )
            )
        words = [process.communicate(timeout=DEADLINE_S)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], words
        assert sorted(metrics(here.run_dir("late"))) == [1]
        require_nothing_left(hosts)
