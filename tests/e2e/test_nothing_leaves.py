"""Nothing leaves the machine: a run in a network namespace of its own sends nothing out, and does without any route.

Seen to fail: without `cluster.quiet_ray` Ray's dashboard process asks 169.254.169.254 and metadata.google.internal which cloud
this is. (A run this short is over before Ray would send its first usage report, and vLLM's CPU worker sends none.)
"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sealed
from tiny_run import DEADLINE_S, Workplace, clean_temporary, metrics

from alphamed.rundir.metrics import METRICS

ATTEMPTS = """
import socket
for attempt in (lambda: socket.create_connection(("198.51.100.7", 443), timeout=5),
                lambda: socket.create_connection(("2001:db8::7", 443), timeout=5),
                lambda: socket.getaddrinfo("usage.example.org", 443),
                lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"metrics", ("203.0.113.9", 8125)),
                lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"anybody?", ("127.0.0.53", 53))):
    try:
        attempt()
    except OSError:
        pass
own = socket.create_server(("{own}", 0))
socket.create_connection(own.getsockname()).send(b"to itself")
"""


def in_namespace(report: Path | str, command: list[str], **options) -> str:
    """Run a command to its good end in a namespace; returns what it printed."""
    with clean_temporary() as environment:
        done = subprocess.run(
            [sys.executable, sealed.__file__, str(report), *command],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env=environment,
            **options,
        )
    if done.returncode == sealed.NOT_PERMITTED:
        pytest.skip(f"no right to make a network namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_of_this_host(attempt: str) -> bool:
    """Whether a name server is asked for this host's own name, or for the name of one of its own addresses: torch's TCPStore
    does that for every peer (c10d/socket.cpp, formatSockAddr), and cannot be told not to."""
    own = [f"{'.'.join(reversed(address.split('.')))}.in-addr.arpa" for address in ("127.0.0.1", sealed.OWN)]
    return attempt.partition(" asking for ")[2] in [*own, socket.gethostname(), socket.getfqdn()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    return Workplace(
        tmp_path_factory.mktemp("sealed"),
        logging={"wandb": "offline", "report": True, "export_hf": True},
        run={"name": "tiny", "steps": 2},
    )


def test_the_tap_sees_every_kind_of_attempt(tmp_path):
    in_namespace(tmp_path / "report", [sys.executable, "-c", ATTEMPTS.format(own=sealed.OWN)])
    seen = (tmp_path / "report").read_text().splitlines()
    direct = {"TCP to 198.51.100.7 port 443", "UDP to 203.0.113.9 port 8125", "UDP to 127.0.0.53 port 53 asking for "}
    asked = {line for line in seen if "port 53 asking for usage.example.org" in line}  # of one server or of several
    assert asked and direct <= set(seen)
    assert set(seen) - direct - asked <= {"TCP to 2001:db8::7 port 443"}  # where there is IPv6


@pytest.mark.slow
def test_a_run_sends_nothing_out(place, tmp_path):
    """Megatron, Ray, vLLM, transformers and wandb (offline), two steps, export and report."""
    in_namespace(tmp_path / "report", place.command("train", "watched"), cwd=place.folder)
    assert [line for line in (tmp_path / "report").read_text().splitlines() if not is_of_this_host(line)] == []
    run_dir = place.run_dir("watched")
    assert sorted(metrics(run_dir)) == [1, 2] and (run_dir / "hf" / "model.safetensors").exists()
    assert list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    unseen = {name for name in METRICS if not name.startswith(("sampling/", "staleness/"))} - set(metrics(run_dir)[2])
    # of a GPU, of supervised training, of an overlong buffer; samplers and rollouts ahead are off
    assert unseen == {"memory/gpu_peak_bytes", "data/epochs", "reward/length_penalty"}


@pytest.mark.slow
@pytest.mark.matrix
def test_a_run_needs_no_route(place):
    in_namespace(sealed.CLOSED, place.command("train", "closed"), cwd=place.folder)
    assert sorted(metrics(place.run_dir("closed"))) == [1, 2]
