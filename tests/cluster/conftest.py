"""Test hosts: one set for all tests of this folder."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "e2e")]

import hosts as machines  # noqa: E402


@pytest.fixture(scope="session")
def hosts():
    """Three hosts under Slurm. Skips where they cannot be made."""
    if why := machines.missing():
        pytest.skip(f"hosts of a cluster: {why}")
    with machines.hosts(3) as made:
        yield made


@pytest.fixture(autouse=True)
def all_hosts_work(request):
    """Whatever a test has done to a host is undone."""
    yield
    if "hosts" in request.fixturenames:
        request.getfixturevalue("hosts").restore()
