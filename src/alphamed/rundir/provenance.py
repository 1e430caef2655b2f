"""Where a run came from: commit and diff, packages, hardware, hashes of data and model, each start's command line.

provenance.json holds one entry per start (a resume adds one), and the hashes taken at the first start. Of environment
variables those are recorded that can redirect a run (cluster.variables), without secrets, paths and addresses. No host
names are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from alphamed.cluster import variables
from alphamed.cluster.hardware import cores, memory_bytes
from alphamed.errors import ConfigError
from alphamed.files import replace_file, replace_json

FULL_HASH_BYTES = 512 << 20
"""Larger files are hashed by size and samples: reading 140 GB of weights for a whole hash would take minutes."""
SAMPLE_BYTES = 1 << 20
SAMPLES = 64
GIT_DEADLINE_S = 20.0
IMAGE_COMMIT_FILE = "COMMIT"
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def record_start(
    run_dir: Path, command: Sequence[str], data: Sequence[Path], model: Path | None, note: Mapping[str, Any]
) -> dict[str, Any]:
    """Add this start to run_dir/provenance.json (made if absent) and return the whole record. `note` is merged into the
    entry (the step it continued from, changed settings). Files are hashed, and the questions in them counted, when they
    were not before."""
    path = run_dir / "provenance.json"
    record = read(run_dir) or {"starts": [], "data": [], "model": []}
    record["starts"].append(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": list(command),
            **note,
            "git": git_state(run_dir),
            "python": platform.python_version(),
            "packages": packages(),
            "hardware": hardware(),
            "environment": variables.noted(run_dir),
        }
    )
    record["data"] = record["data"] or [file_entry(file) for file in data]
    record["train"] = record.get("train") or training_set(data)
    if model is not None:
        record["model"] = record["model"] or model_entries(model)
    replace_json(path, record)
    return record


def read(run_dir: Path) -> dict[str, Any] | None:
    """The record of a run directory, None where there is none. ConfigError where it is damaged."""
    path = run_dir / "provenance.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); move it away and start again") from None
    if not isinstance(record, dict) or not {"starts", "data", "model"} <= record.keys():
        raise ConfigError(f"{path}: no record of starts, data and model; move it away and start again")
    return record


def changed_files(run_dir: Path, data: Sequence[Path]) -> list[str]:
    """Those of the training files `data` whose content is not what the run began with, wherever they are now. Absent files
    count as changed, and all where another number was recorded; none where nothing was."""
    recorded = (read(run_dir) or {}).get("data", [])
    if recorded and len(recorded) != len(data):
        return [str(file) for file in data]
    return [str(file) for file, entry in zip(data, recorded) if _hash_of(file) != entry["sha256"]]


def changed_model_files(run_dir: Path, folder: Path) -> list[str]:
    """Names of the files in which the model in `folder` is not what the run began with; [] where none were recorded."""
    record = read(run_dir)
    recorded = {Path(entry["path"]).name: entry["sha256"] for entry in (record or {}).get("model", [])}
    if not recorded:
        return []
    present = {file.name: _hash_of(file) for file in _model_files(folder)}
    return sorted(name for name in recorded | present if recorded.get(name) != present.get(name))


def has_hashes(run_dir: Path, of: str) -> bool:
    """Whether the run has recorded what its `data` or its `model` held."""
    return bool((read(run_dir) or {}).get(of))


def _hash_of(file: Path) -> str | None:
    """SHA-256 of a file as `file_entry` takes it, None where there is none. A start asks twice for the same file."""
    try:
        status = file.stat()
        return _hash_at(file, status.st_ino, status.st_size, status.st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return None


@cache
def _hash_at(file: Path, inode: int, size: int, changed_ns: int) -> str:
    return file_entry(file)["sha256"]


# ----------------------------------------------------------------------------------------------------------------- code
def git_state(run_dir: Path) -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and its uncommitted changes as a patch next to provenance.json.
    None where the package is installed rather than checked out, or git is absent."""
    package, commit, diff = _package(), commit_here(), diff_here()
    if not commit:
        return None
    state: dict[str, Any] = {
        "commit": commit,
        "diff_sha256": None,
        "diff_file": None,
        "untracked": (_git(package, "ls-files", "--others", "--exclude-standard", ":/") or b"")
        .decode(errors="replace")
        .splitlines()[:100],
    }
    if diff:
        state["diff_sha256"] = hashlib.sha256(diff).hexdigest()
        state["diff_file"] = f"uncommitted_{state['diff_sha256'][:12]}.patch"
        replace_file(run_dir / state["diff_file"], lambda partial: partial.write_bytes(diff))
    return state


def commit_here() -> str | None:
    """Commit of the checkout this package runs from, or that a container image was built from; None where it is installed
    otherwise."""
    if not _git(_package(), "ls-files", "cli.py"):  # a foreign repository that merely contains the installation
        return _commit_of_image()
    return (_git(_package(), "rev-parse", "HEAD") or b"").decode().strip() or None


def _commit_of_image() -> str | None:
    """What docker/Dockerfile wrote next to the sources; it ends in -modified where the checkout had changes."""
    file = _package().parents[1] / IMAGE_COMMIT_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def diff_here() -> bytes | None:
    """Uncommitted changes of that checkout as a patch; None or empty where there are none."""
    return _git(_package(), "diff", "HEAD", "--binary", "--", ":/") if commit_here() else None


def _package() -> Path:
    return Path(__file__).resolve().parents[1]


def _git(folder: Path, *command: str) -> bytes | None:
    """What git prints of the repository at `folder`; variables such as GIT_DIR, which hooks set, would name another."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command],
            capture_output=True,
            timeout=GIT_DEADLINE_S,
            env={name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@cache
def packages() -> dict[str, str]:
    """Every installed distribution and its version."""
    versions = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


# ------------------------------------------------------------------------------------------------------------- hardware
def hardware() -> dict[str, Any]:
    """Processor, cores and memory that this process may use, GPUs. Asks torch for GPUs only where it is loaded already."""
    gpus: list[str] = []
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_bytes": memory_bytes()[0],
        "gpus": gpus,
        "system": platform.platform(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---------------------------------------------------------------------------------------------------------------- files
def training_set(data: Sequence[Path]) -> dict[str, Any] | None:
    """Number, sources, attributes and a hash of the questions in training files, how many bad rows are left out and how each
    file was read; None where they hold none (no run starts with such files)."""
    from alphamed.config.choices import BadRows
    from alphamed.data.attributes import ATTRIBUTES
    from alphamed.data.describe import describe
    from alphamed.data.sources import load_questions
    from alphamed.errors import DataError

    try:
        loaded = load_questions(data, BadRows.SKIP) if data else None
    except DataError:
        return None
    if loaded is None:
        return None
    about, recorded = (
        describe(loaded.questions),
        ("questions", "content_sha256", "sources", *(attribute.axis for attribute in ATTRIBUTES)),
    )
    return {key: about[key] for key in recorded} | {
        "bad_rows": len(loaded.skipped),
        "reading": {str(file): reading.plain() for file, reading in zip(data, loaded.readings)},
    }


def model_entries(folder: Path) -> list[dict[str, Any]]:
    """Entries of a Hugging Face folder: configuration, tokenizer and weights."""
    return [file_entry(file) for file in _model_files(folder)]


def _model_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})


def file_entry(file: Path) -> dict[str, Any]:
    """Path, size and SHA-256 of a file. `hashed` names what was hashed: `all` bytes, or above FULL_HASH_BYTES the `samples`: the
    size as decimal text, then SAMPLES blocks of SAMPLE_BYTES spread evenly from the first byte to the last."""
    with file.open("rb") as stream:
        return {"path": str(file)} | content_entry(stream)


def content_entry(stream: io.BufferedIOBase) -> dict[str, Any]:
    """`file_entry` without its path, of a file that is open or in memory."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    digest, whole = hashlib.sha256(), size <= FULL_HASH_BYTES
    if whole:
        digest = hashlib.file_digest(stream, "sha256")
    else:
        digest.update(str(size).encode())
        for i in range(SAMPLES):
            stream.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest(), "hashed": "all" if whole else "samples"}
