"""Provenance: hashes against sha256 by other means, git state of a real repository, one entry a start, no secrets."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from alphamed.rundir import provenance


def test_each_start_adds_an_entry_and_hashes_are_taken_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "hunter2-secret")
    data, model = tmp_path / "train.jsonl", tmp_path / "model"
    data.write_bytes(b"abc")
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"\0" * 10)
    (model / "notes.md").write_text("not part of the model")
    provenance.record_start(tmp_path, ["alphamed", "train", "a.yaml"], [data], model, {"continued_after_step": 0})
    data.write_bytes(b"other")
    record = provenance.record_start(tmp_path, ["alphamed", "train"], [data], model, {"continued_after_step": 7})

    assert record == json.loads((tmp_path / "provenance.json").read_text()) == provenance.read(tmp_path)
    first, second = record["starts"]
    assert first["command"] == ["alphamed", "train", "a.yaml"] and second["continued_after_step"] == 7
    assert first["time"] <= second["time"] and first["time"].endswith("+00:00")
    assert first["packages"]["pydantic"] and first["hardware"]["cores"] >= 1
    assert first["hardware"]["memory_bytes"] > 1 << 28
    assert record["data"] == [
        {
            "path": str(data),
            "bytes": 3,
            "hashed": "all",
            "sha256":  # FIPS 180 test vector
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
    ]
    assert [Path(entry["path"]).name for entry in record["model"]] == ["config.json", "model.safetensors"]
    assert "hunter2" not in (tmp_path / "provenance.json").read_text()
    assert provenance.changed_files(tmp_path, [data]) == [str(data)]
    data.write_bytes(b"abc")
    assert provenance.changed_files(tmp_path, [data]) == []


def test_big_files_are_hashed_by_size_and_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "FULL_HASH_BYTES", 100)
    monkeypatch.setattr(provenance, "SAMPLE_BYTES", 4)
    monkeypatch.setattr(provenance, "SAMPLES", 3)
    big = tmp_path / "big.bin"
    content = bytes(range(200))
    big.write_bytes(content)
    entry = provenance.file_entry(big)
    # three blocks of 4 bytes: at 0, at (200 - 4) / 2 = 98 and at 196
    assert entry["hashed"] == "samples"
    assert entry["sha256"] == hashlib.sha256(b"200" + content[0:4] + content[98:102] + content[196:200]).hexdigest()
    big.write_bytes(content[:-1] + b"!")  # the last byte counts
    assert provenance.file_entry(big)["sha256"] != entry["sha256"]
    big.write_bytes(content[:100])
    assert provenance.file_entry(big) == {
        "path": str(big),
        "bytes": 100,
        "hashed": "all",
        "sha256": hashlib.sha256(content[:100]).hexdigest(),
    }


def git(folder, *command):
    return subprocess.run(
        ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@t", *command],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A git repository that holds a package of the same shape as ours, and this module pretending to live in it."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    package = tmp_path / "repo" / "src" / "alphamed"
    (package / "observe").mkdir(parents=True)
    (package / "cli.py").write_text("A = 1\n")
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", "-A")
    git(tmp_path / "repo", "commit", "-qm", "first")
    monkeypatch.setattr(provenance, "__file__", str(package / "observe" / "provenance.py"))
    return package


def test_a_clean_checkout_has_a_commit_and_no_diff(checkout, tmp_path):
    state = provenance.git_state(tmp_path)
    assert state == {"commit": git(checkout, "rev-parse", "HEAD"), "diff_sha256": None, "diff_file": None, "untracked": []}


def test_uncommitted_changes_are_kept_as_a_patch_that_applies(checkout, tmp_path):
    (checkout / "cli.py").write_text("A = 2\n")
    (checkout / "new.py").write_text("B = 1\n")
    (checkout / "weights.bin").write_bytes(b"\0\1\2")
    git(checkout, "add", "weights.bin")
    run_dir = tmp_path / "run"
    state = provenance.git_state(run_dir)
    patch = (run_dir / state["diff_file"]).read_bytes()
    assert state["diff_sha256"] == hashlib.sha256(patch).hexdigest() and b"+A = 2" in patch
    assert [Path(name).name for name in state["untracked"]] == ["new.py"]
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(tmp_path / "repo"), str(clone))
    git(clone, "apply", str(run_dir / state["diff_file"]))
    assert (clone / "src" / "alphamed" / "cli.py").read_text() == "A = 2\n"
    assert (clone / "src" / "alphamed" / "weights.bin").read_bytes() == b"\0\1\2"


def test_an_installed_package_inside_a_foreign_repository_has_no_commit(checkout, tmp_path, monkeypatch):
    installed = tmp_path / "repo" / ".venv" / "alphamed" / "observe"
    installed.mkdir(parents=True)
    (installed.parent / "cli.py").write_text("A = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.git_state(tmp_path) is None


def test_an_image_has_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    package = tmp_path / "alphamed" / "src" / "alphamed"
    (package / "observe").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "observe" / "provenance.py"))
    assert provenance.git_state(tmp_path) is None
    (tmp_path / "alphamed" / "COMMIT").write_text("5b1e0d-modified\n")
    assert provenance.git_state(tmp_path) == {
        "commit": "5b1e0d-modified",
        "diff_sha256": None,
        "diff_file": None,
        "untracked": [],
    }


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "provenance.json").write_text("{")
    with pytest.raises(ValueError, match="provenance.json: not JSON .* move it away"):
        provenance.read(tmp_path)
