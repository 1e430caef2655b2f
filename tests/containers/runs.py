"""Containers for tests: what can build and start one on this machine, an image, a command in it as a user would start it."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/alphamed:test"
BASE = "localhost/debian:bookworm-slim"
BUILD_LIMIT_S, START_LIMIT_S = 1800, 60
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def build(kind: str) -> str | None:
    """Build an image as docs/containers.md says and return its name; None where this machine can build none (no builder, or
    neither a registry nor root with debootstrap for the base). A build that fails is an error."""
    if not shutil.which(_tool()):
        return None
    base = os.environ.get("ALPHAMED_BASE", "")  # say, a mirror's debian:bookworm-slim
    if not base and not _registry():
        if not _quiet([_tool(), "inspect", "--type", "image", BASE]):
            if os.getuid() != 0 or not shutil.which("debootstrap"):
                return None
            _run(["bash", ROOT / "docker" / "base.sh", "bookworm", BASE])
        base = BASE
    _run(["bash", ROOT / "docker" / "build.sh", kind, "--tag", IMAGE, *(["--base", base] if base else [])])
    return IMAGE


def command(image: str, work: Path, words: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """A container with a read-only root, an unprivileged user and one folder to write into. The host's certificates are
    those of the proxy, if there is one."""
    return [
        *starter(image),
        "--rm",
        "--network",
        "host",
        "--read-only",
        "--shm-size",
        "2g",
        "--volume",
        f"{work}:/workspace",
        *(["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"] if Path(CERTIFICATES).exists() else []),
        *options,
        image,
        *words,
    ]


@functools.cache
def starter(image: str) -> tuple[str, ...] | None:
    """The beginning of a command that starts containers here; None where none does."""
    files, processes = (resource.getrlimit(limit)[1] for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    bounded = ("--ulimit", f"nofile={files}:{files}", "--ulimit", f"nproc={min(processes, 30000)}:{min(processes, 30000)}")
    for words in (
        ("docker", "run", "--tmpfs", "/tmp:exec"),
        ("podman", "run"),
        # inside a container or a small virtual machine: no systemd, no right to raise limits
        ("podman", "--runtime", shutil.which("runc") or "runc", "--cgroup-manager=cgroupfs", "run", *bounded),
    ):
        if shutil.which(words[0]) and _quiet([*words, "--rm", "--network", "host", "--entrypoint", "true", image]):
            return words
    return None


def _registry() -> bool:
    """Whether the default base image can be pulled."""
    return _quiet([_tool(), "pull", "--quiet", "docker.io/library/debian:bookworm-slim"])


def _tool() -> str:
    return "docker" if _works("docker") else "buildah"


def _works(tool: str) -> bool:
    return bool(shutil.which(tool)) and _quiet([tool, "info"])


def _quiet(words: Sequence[str]) -> bool:
    try:
        return subprocess.run(words, capture_output=True, timeout=START_LIMIT_S).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _run(words: Sequence[str | Path]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
