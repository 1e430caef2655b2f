"""The launchers of several hosts: how they meet, agree, refuse and notice a loss; what each one runs."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from alphamed.cluster import addresses, placement
from alphamed.cluster.cluster_job import ClusterHost, ClusterJob
from alphamed.cluster.failure import stop_requested
from alphamed.config.loading import build_config
from alphamed.config.schema import Config
from alphamed.errors import ConfigError, RunFailed
from alphamed.launch import nodes, remote
from alphamed.launch.meeting import Meeting
from alphamed.launch.nodes import commands_of

ROOT = Path(__file__).parents[2]
NAMES = ["localhost", "127.0.0.2", "127.0.0.3"]
"""Hosts that are all this one: the second's and third's names are addresses."""


def config(**sections) -> Config:
    tree = {"model": {"path": "m"}, "data": {"train": ["t.jsonl"]}} | sections
    return build_config(tree)


def port() -> int:
    return addresses.free_ports(addresses.LOOPBACK, 1)[0]


def together(*acts):
    """Run each act in a thread; their results, or what they raised, in order."""
    results = [None] * len(acts)

    def play(number, act):
        try:
            results[number] = act()
        except Exception as error:  # noqa: BLE001 - looked at by the test
            results[number] = error

    threads = [threading.Thread(target=play, args=pair, daemon=True) for pair in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_hosts_exchange_facts_and_get_the_first_ones_decision():
    meeting_port = port()

    def act(rank):
        with Meeting.join(NAMES, rank, meeting_port, "token", 20, 30) as meeting:
            facts = meeting.gather("facts", f"fact {rank}")
            return facts, meeting.share("decision", lambda: f"made by {rank}")

    assert together(*(lambda rank=rank: act(rank) for rank in range(3))) == [
        (["fact 0", "fact 1", "fact 2"], "made by 0"),
        (None, "made by 0"),
        (None, "made by 0"),
    ]


def test_a_host_that_does_not_come_is_named():
    meeting_port = port()
    first, second = together(
        lambda: Meeting.join(NAMES, 0, meeting_port, "token", 2, 30),
        lambda: Meeting.join(NAMES, 1, meeting_port, "token", 2, 30),
    )
    assert isinstance(second, RunFailed) and second.component == "host localhost"
    assert isinstance(first, RunFailed) and first.component == "host 127.0.0.3"
    assert "did not join the control links within 2 s (missing: host 127.0.0.3)" in first.message


def test_another_token_is_refused():
    meeting_port = port()
    first, second = together(
        lambda: Meeting.join(NAMES[:2], 0, meeting_port, "token", 3, 30),
        lambda: Meeting.join(NAMES[:2], 1, meeting_port, "another", 3, 30),
    )
    assert isinstance(first, RunFailed) and first.component == "host 127.0.0.2"
    assert isinstance(second, RunFailed) and "refuses 127.0.0.2: it has another token" in str(second)


def test_what_fails_on_one_host_fails_on_all_and_names_it():
    meeting_port = port()

    def act(rank):
        with Meeting.join(NAMES, rank, meeting_port, "token", 20, 30) as meeting:
            if rank == 2:
                raise ConfigError("cluster.x: is wrong here")
            meeting.gather("facts", rank)
            return meeting.share("decision", lambda: None)

    for failure in together(*(lambda rank=rank: act(rank) for rank in range(3))):
        assert str(failure) == "cluster.x: is wrong here"


def test_a_silent_host_is_lost_and_named():
    meeting_port = port()
    lost = []

    def first():
        with Meeting.join(NAMES[:2], 0, meeting_port, "token", 20, 1.0) as meeting:
            meeting.watch(lost.append)
            until = time.monotonic() + 20
            while not lost and time.monotonic() < until:
                time.sleep(0.05)
            return meeting.failure

    def second():
        with Meeting.join(NAMES[:2], 1, meeting_port, "token", 20, 1000.0):  # its next heartbeat is far away
            while not lost:
                time.sleep(0.05)

    failure, _ = together(first, second)
    assert failure.component == "host 127.0.0.2" and "sent no heartbeat" in failure.message and lost == [failure]


# ----------------------------------------------------------------------------------------------------------- what they run
@pytest.fixture
def started(monkeypatch):
    """What `nodes.run` begins: checks, and the whole training of a single host."""
    calls = []
    monkeypatch.setattr(nodes, "gpus_present", lambda: 8)
    monkeypatch.setattr(nodes.single_host, "train", lambda config, grace: calls.append("train") or 0)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    return calls


def test_a_run_on_one_host_is_checked_before_it_starts(started):
    assert nodes.run(lambda: config(cluster={"device": "cuda"}), ["a"], 0, 0, lambda config: started.append("validate")) == 0
    assert started == ["validate", "train"]
    assert "RAY_AUTH_TOKEN" not in os.environ, "would be reported as a variable that is ignored"


def test_hosts_beyond_the_one_that_is_shared_stay_out(started, capsys, tmp_path):
    shared = config(
        cluster={"device": "cuda", "share_gpus": True},
        parallel={"tensor": 8},
        rollout={"engines": 8},
        run={"root": str(tmp_path)},
    )
    meeting_port = port()
    assert together(
        *(
            lambda rank=rank: nodes.run(lambda: shared, NAMES, rank, meeting_port, lambda config: started.append("validate"))
            for rank in range(3)
        )
    ) == [0, 0, 0]
    assert started == ["validate", "train"]
    assert sorted(capsys.readouterr().err.splitlines()) == ["host 127.0.0.2 is not needed", "host 127.0.0.3 is not needed"]


def test_only_the_first_host_says_what_is_wrong(started, capsys):
    meeting_port = port()
    small = config(cluster={"device": "cuda"}, parallel={"tensor": 8, "pipeline": 4})
    assert together(
        *(
            lambda rank=rank: nodes.run(lambda: small, NAMES, rank, meeting_port, lambda config: started.append("validate"))
            for rank in range(3)
        )
    ) == [2, 0, 0]
    assert started == [] and capsys.readouterr().err.count("error: cluster: 32 trainer ranks") == 1


def test_hosts_without_gpus_are_named(started, monkeypatch, capsys):
    monkeypatch.setattr(nodes, "gpus_present", lambda: 0)
    assert nodes.run(lambda: config(cluster={"device": "cuda"}), ["a"], 0, 0, lambda config: started.append("validate")) == 2
    assert "cluster.gpus_per_node: 8, host a has 0" in capsys.readouterr().err


PLACES = (
    ClusterHost("a", "10.0.0.1", "eth0", 4, 4),
    ClusterHost("b", "10.0.0.2", "eth0", 4, 2),
    ClusterHost("c", "10.0.0.3", "ib0", 0, 8),
)


def test_every_host_gets_its_part():
    job, run = ClusterJob(PLACES, 21_000, 22_000), config(cluster={"device": "cuda", "ranks_per_host": 4})
    head, second, engines = (commands_of(job, place, run, Path("own"), Path("tmp")) for place in job.places)
    for rank, part in enumerate((head, second)):
        assert {
            "--nnodes=2",
            f"--node-rank={rank}",
            "--master-addr=10.0.0.1",
            "--master-port=21000",
            f"--local-addr=10.0.0.{rank + 1}",
            "--nproc-per-node=4",
        } <= set(part.command)
    assert not head.beside  # rank 0 itself brings Ray's head up
    for command, address, count in ((second.beside, "10.0.0.2", 2), (engines.command, "10.0.0.3", 8)):
        assert {
            "alphamed.cluster.join_ray",
            "--address=10.0.0.1:22000",
            f"--node-ip-address={address}",
            f"--num-gpus={count}",
            "--min-worker-port=0",
        } <= set(command)
    assert engines.serves and not engines.beside and not second.serves
    on_cpu = commands_of(job, job.places[2], config(cluster={"device": "cpu"}), Path("own"), Path("tmp")).command
    assert '--resources={"engine_slot": 8}' in on_cpu
    assert ClusterJob.from_json(job.to_json()) == job and job.first_rank("b") == 4


def test_a_dry_run_shows_what_every_host_would_run():
    run = config(cluster={"device": "cpu", "ranks_per_host": 1}, parallel={"data": 2})
    assert remote.fewest(run) == 3
    shown = remote.preview(run, ["a", "b", "c"], Path("run.yaml"), ["run.steps=2"], slurm=True)
    assert shown.startswith("# sbatch -N 3 examples/slurm/train.sbatch run.yaml run.steps=2\n#!/usr/bin/env bash")
    assert "# a: rank 0, torchrun's store on port 29500" in shown and "# c: room for 1 engine worker" in shown
    assert shown.count("alphamed.launch.agent") == 2 and shown.count("join_ray a 6379") == 1


def test_a_launcher_that_ssh_has_started_checks_the_run(tmp_path, monkeypatch, capfd):
    """ssh is a shell on this machine: it runs its last argument, with the same standard input."""
    (tmp_path / "ssh").write_text('exec bash -c "${@: -1}"\n')
    (tmp_path / "run.yaml").write_text(
        "model: {path: m}\ndata: {train: [absent.jsonl]}\ncluster: {device: cpu}\nrun: {root: runs}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv(remote.SSH_VARIABLE, f"bash {tmp_path}/ssh")
    assert remote.start(["localhost"], Path("run.yaml"), []) == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1 and not (tmp_path / "runs").exists(), said


def test_ssh_passes_on_what_such_a_run_honours():
    environment = {
        "VLLM_ATTENTION_BACKEND": "x",
        "HF_HOME": "/h",
        "ALPHAMED_PYTHON": "p",
        "TMPDIR": "/t",
        "RAY_ADDRESS": "a:1",
        "WANDB_MODE": "online",
        "HOME": "/home/me",
        "SSH_AUTH_SOCK": "/s",
    }
    assert sorted(remote.passed_on(environment)) == ["ALPHAMED_PYTHON", "HF_HOME", "TMPDIR", "VLLM_ATTENTION_BACKEND"]


# -------------------------------------------------------------------------------------------------------------- addresses
def test_the_address_is_that_of_the_route_unless_the_user_names_an_interface(monkeypatch):
    present = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"}
    monkeypatch.setattr(addresses, "_addresses", lambda: present)
    monkeypatch.setattr(addresses, "toward", lambda peer: {"b": "10.0.0.1"}[peer])
    assert addresses.own(["b"], {}) == addresses.Own("10.0.0.1", "eth0")
    chosen = addresses.own(["b"], {"NCCL_SOCKET_IFNAME": "=ib0"})
    assert chosen == addresses.Own("10.1.0.1", "ib0")
    assert addresses.own(["b"], {"NCCL_SOCKET_IFNAME": "ib,eth"}).interface == "ib0"
    assert addresses.own(["b"], {"NCCL_SOCKET_IFNAME": "^docker"}).interface == "eth0"
    assert addresses.interface_settings(chosen, {"NCCL_SOCKET_IFNAME": "=ib0"}) == {
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "=ib0",
    }
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME: 'eth7' is no interface .* eth0, ib0, lo"):
        addresses.own(["b"], {"GLOO_SOCKET_IFNAME": "eth7"})


def test_a_name_without_an_address_is_named():
    with pytest.raises(ConfigError, match="host no.such.host.invalid: its name has no address"):
        addresses.resolve("no.such.host.invalid")


def test_the_job_travels_in_the_environment():
    job = ClusterJob(PLACES, 1, 2)
    assert ClusterJob.of_environment({"ALPHAMED_JOB": job.to_json()}) == job and ClusterJob.of_environment({}) is None
    assert json.loads(job.to_json())["places"][2]["interface"] == "ib0" and os.sep not in job.head.name


def test_hosts_that_never_join_ray_are_named(monkeypatch):
    nodes_of_ray = [{"Alive": True, "NodeManagerAddress": "10.0.0.1"}, {"Alive": False, "NodeManagerAddress": "10.0.0.3"}]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes_of_ray))
    with pytest.raises(RunFailed) as late:
        placement.wait_for_hosts(ClusterJob(PLACES, 1, 2), 0.1)
    assert late.value.component == "host b" and "(missing: b, c); see logs/ray_b.log" in late.value.message
    placement.wait_for_hosts(ClusterJob(PLACES[:1], 1, 2), 0.1)


def test_a_stop_file_asks_the_run_for_a_checkpoint(tmp_path, monkeypatch):
    """What the batch script does upon Slurm's warning. Another signal gets no grace, nor does a run that is over."""
    received = []
    monkeypatch.setenv("ALPHAMED_STOP_FILE", str(tmp_path / "stop-here"))
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        run = config(run={"root": str(tmp_path), "name": "r"}, cluster={"stop_grace_s": 70})
        run.run_dir.mkdir()
        grace = nodes._Grace(run, SimpleNamespace(rank=0, failure=None))
        assert grace(signal.SIGTERM) == 0.0 and not stop_requested(run.run_dir)
        (tmp_path / "stop-here").touch()
        until = time.monotonic() + 20
        while not received and time.monotonic() < until:
            time.sleep(0.05)
        assert received == [signal.SIGUSR1] and grace(signal.SIGUSR1) == 70.0 and stop_requested(run.run_dir)
        grace.over = True
        assert grace(signal.SIGUSR1) == 0.0
    finally:
        signal.signal(signal.SIGUSR1, before)
