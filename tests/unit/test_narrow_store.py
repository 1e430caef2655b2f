"""What stores listen on: the address that others are given, and no other."""

import socket
import subprocess
import sys

import pytest

from alphamed.cluster.addresses import free_ports
from alphamed.weights.links import host_store, reach_store

RANK = """
import os, psutil
from torch.distributed import TCPStore

host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
TCPStore(host, port, 1, False).set("rank", os.environ["RANK"])
for one in psutil.Process(os.getppid()).net_connections("inet"):
    if one.status == psutil.CONN_LISTEN:
        print("listens at", one.laddr.ip)
"""


@pytest.mark.parametrize("hosts", ["one", "several"])
def test_the_store_listens_at_its_address_alone(hosts, tmp_path):
    rendezvous = ["--standalone", "--local-addr=127.0.0.1"]
    if hosts == "several":
        (port,) = free_ports("127.0.0.2", 1)
        rendezvous = [
            "--nnodes=1",
            "--node-rank=0",
            "--local-addr=127.0.0.2",
            "--master-addr=127.0.0.2",
            f"--master-port={port}",
        ]
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.launch.agent", str(tmp_path), *rendezvous, "--nproc-per-node=1", "rank.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    addresses = done.stdout.splitlines()
    assert addresses and set(addresses) == {f"listens at {'127.0.0.1' if hosts == 'one' else '127.0.0.2'}"}, addresses


def test_the_store_of_the_links_to_engines_listens_at_its_address_alone():
    store, port = host_store("127.0.0.2", 30)
    reach_store("127.0.0.2", port, 30).set("a", "b")
    assert store.get("a") == b"b"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
