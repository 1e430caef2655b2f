"""Cores and memory that a process may use: control groups of both versions, CPU affinity, and who goes by them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alphamed.cluster import hardware
from alphamed.cluster.cgroup import Limits, limits
from alphamed.config.loading import build_config

ROOT = Path(__file__).parents[2]
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def fake_root(folder: Path, cgroup: str, mountinfo: str, **files: str) -> Path:
    """A root folder with a process `self`; `files`: contents by path, `_` for `/` there, `__` for `.`."""
    tree = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mountinfo}
    for name, text in (tree | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def v2(folder: Path, place: str, files: dict[str, str], mount: str = V2_MOUNT) -> Limits:
    return limits(
        fake_root(folder, f"0::{place}\n", mount, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    )


# ------------------------------------------------------------------------------------------------------- control groups
def test_without_limits_there_are_none(tmp_path):
    assert v2(tmp_path / "a", "/", {"cgroup.procs": ""}) == Limits()
    assert v2(tmp_path / "b", "/job", {"job/cpu.max": "max 100000\n", "job/memory.max": "max\n"}) == Limits()
    assert limits(tmp_path / "no" / "proc") == Limits()


def test_version_2_counts_page_cache_as_free(tmp_path):
    limits = v2(
        tmp_path,
        "/job",
        {
            "job/cpu.max": "150000 100000\n",
            "job/memory.max": "8000\n",
            "job/memory.current": "5000\n",
            "job/memory.stat": "anon 3000\ninactive_file 1500\nactive_file 500\n",
        },
    )
    assert limits == Limits(1.5, 8000, 8000 - (5000 - 1500))


def test_the_smallest_limit_up_the_tree_counts(tmp_path):
    """Cores are limited furthest inside, memory at the top, and the group in between has the least left."""
    limits = v2(
        tmp_path,
        "/slurm/job_7/step_0",
        {
            "slurm/memory.max": "9000",
            "slurm/memory.current": "1000",
            "slurm/cpu.max": "800000 100000",
            "slurm/job_7/memory.high": "9500",
            "slurm/job_7/memory.max": "10000",
            "slurm/job_7/memory.current": "7000",
            "slurm/job_7/step_0/cpu.max": "100000 50000",
            "slurm/job_7/step_0/memory.max": "max",
        },
    )
    assert limits == Limits(2.0, 9000, 9500 - 7000)


def test_version_1_has_a_tree_per_controller(tmp_path):
    mounts = (
        "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "32 23 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "33 23 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    )
    files = {
        "cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
        "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "memory/memory.usage_in_bytes": "77",
        "memory/box/memory.limit_in_bytes": "4096000",
        "memory/box/memory.usage_in_bytes": "96000",
        "memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 6000\n",
        "unified/cgroup.procs": "",
    }
    root = fake_root(
        tmp_path,
        "12:cpu,cpuacct:/box\n9:memory:/box\n1:name=systemd:/box\n0::/box\n",
        mounts,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    )
    assert limits(root) == Limits(2.5, 4096000, 4096000 - 90000)


def test_a_container_sees_only_its_own_part_of_the_tree(tmp_path):
    """Mounted is the group itself, while /proc/self/cgroup gives the place on the host, or leads out of the namespace."""
    mount = "30 23 0:26 /docker/4f /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    files = {"cpu.max": "300000 100000", "inner/cpu.max": "200000 100000"}
    assert v2(tmp_path / "a", "/docker/4f", files, mount).cores == 3
    assert v2(tmp_path / "b", "/docker/4f/inner", files, mount).cores == 2
    assert v2(tmp_path / "c", "/../4f", files).cores == 3


# ------------------------------------------------------------------------------------------------- what a process may use
@pytest.mark.parametrize(
    "allowed, quota, cores",
    [(8, None, 8), (8, 2.0, 2), (2, 6.0, 2), (8, 0.2, 1), (8, 1.4, 1), (8, 1.5, 2), (8, 2.5, 3), (8, 7.9, 8)],
)
def test_half_a_core_and_more_counts_as_one(monkeypatch, allowed, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    monkeypatch.setattr(hardware, "limits", lambda: Limits(quota))
    assert hardware.cores() == cores


def test_memory_is_that_of_the_tightest_group(monkeypatch):
    monkeypatch.setattr(hardware, "limits", lambda: Limits())
    total, free = hardware.memory_bytes()
    assert 0 < free <= total
    monkeypatch.setattr(hardware, "limits", lambda: Limits(None, 3 << 20, 1 << 20))
    assert hardware.memory_bytes() == (3 << 20, 1 << 20)
    monkeypatch.setattr(hardware, "limits", lambda: Limits(None, 1 << 60, 1 << 59))  # more than the machine has
    assert hardware.memory_bytes()[0] == total


def config(**cluster):
    return build_config({"model": {"path": "m"}, "data": {"train": ["d.jsonl"]}, "cluster": cluster})


def test_trainer_ranks_share_the_cores_that_are_there(monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 24)
    assert [hardware.trainer_threads(config(), ranks, on_cuda=False) for ranks in (1, 5, 48)] == [24, 4, 1]
    assert [hardware.trainer_threads(config(), ranks, on_cuda=True) for ranks in (1, 4, 8)] == [8, 6, 3]
    assert hardware.trainer_threads(config(trainer_threads=5), 8, on_cuda=True) == 5


WHO_GOES_BY_IT = """
import os, sys
from alphamed.cluster import hardware
from alphamed.launch.single_host import single_node_environment
from alphamed.config.loading import build_config
from alphamed.rundir.provenance import hardware as recorded
from alphamed.rollout.spec import engine_cores, _threads
from pathlib import Path
config = build_config({"model": {"path": "m"}, "data": {"train": ["d.jsonl"]}, "cluster": {"device": "cpu"}})
environment = single_node_environment(config, Path("t"))
print(hardware.cores(), recorded()["cores"], environment["OMP_NUM_THREADS"], _threads(config, engine_cores(config)),
      recorded()["memory_bytes"])
"""


def who_goes_by_it(**options) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", WHO_GOES_BY_IT],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        **options,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_go_by_the_affinity_of_the_process():
    single = sorted(os.sched_getaffinity(0))[:1]
    assert who_goes_by_it(preexec_fn=lambda: os.sched_setaffinity(0, single))[:4] == [1, 1, 1, 1]


@pytest.fixture
def real_group():
    """Writes a limit into a control group of this machine and returns its cgroup.procs; the group goes with the test."""
    made = []

    def make(controller: str, v2_file: str, v2_text: str, v1: dict[str, str]) -> Path:
        top = Path("/sys/fs/cgroup")
        unified = (top / "cgroup.controllers").is_file()
        group = (top if unified else top / controller) / f"alphamed-test-{os.getpid()}"
        try:
            if unified and controller not in (top / "cgroup.subtree_control").read_text().split():
                pytest.skip(f"the {controller} controller is not handed down to groups here")
            group.mkdir()
            made.append(group)
            for name, text in ({v2_file: v2_text} if unified else v1).items():
                (group / name).write_text(text)
        except OSError as error:
            pytest.skip(f"control groups cannot be written here: {error}")
        return group / "cgroup.procs"

    yield make
    for group in made:
        group.rmdir()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_go_by_a_real_limit_on_cpu_time(real_group):
    procs = real_group("cpu", "cpu.max", "120000 100000", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "120000"})
    assert who_goes_by_it(preexec_fn=lambda: procs.write_text(str(os.getpid())))[:4] == [1, 1, 1, 1]


def test_a_real_limit_on_memory_is_seen(real_group):
    procs = real_group("memory", "memory.max", str(3 << 30), {"memory.limit_in_bytes": str(3 << 30)})
    assert who_goes_by_it(preexec_fn=lambda: procs.write_text(str(os.getpid())))[4] == 3 << 30
