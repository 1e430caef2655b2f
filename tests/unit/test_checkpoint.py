"""Checkpoint folders: what counts as complete, which one is the latest, what is kept, how damage is reported."""

import hashlib
import json
import shutil
import sys
from collections import namedtuple

import pytest
import xxhash

from alphamed.megatron import checkpoint_digests
from alphamed.megatron.checkpoint_digests import digest, first_difference, of_folder
from alphamed.megatron.checkpoint_folder import (
    CheckpointError,
    begin,
    complete,
    folder_of,
    latest,
    newest_first,
    publish,
    read_manifest,
)


def write(directory, step, keep=2):
    partial = begin(directory, step, needed_bytes=10)
    (partial / "weights.distcp").write_bytes(b"0123456789")
    return publish(partial, step, {"state": {"step": step}}, keep, of_folder(partial, 0, 1))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_becomes_the_latest(tmp_path):
    assert latest(tmp_path / "none") is None and complete(tmp_path / "none") == []
    folder = write(tmp_path / "checkpoints", 10)
    assert folder == folder_of(tmp_path / "checkpoints", 10) == latest(tmp_path / "checkpoints")
    assert names(tmp_path / "checkpoints") == ["latest", "step_000010"]
    manifest = read_manifest(folder)
    assert manifest["state"] == {"step": 10} and manifest["files"] == {"weights.distcp": 10}


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        write(tmp_path, step, keep=3)
    assert names(tmp_path) == ["latest", "step_000010", "step_000015", "step_000020"]
    write(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["latest", "step_000025"] and latest(tmp_path).name == "step_000025"


def test_steps_order_by_number(tmp_path):
    for step in (999_999, 1_000_000):
        write(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert latest(tmp_path).name == "step_1000000"


def test_a_repeated_step_replaces_its_checkpoint(tmp_path):
    write(tmp_path, 10)
    (folder_of(tmp_path, 10) / "stale").write_text("x")
    write(tmp_path, 10)
    assert names(folder_of(tmp_path, 10)) == ["manifest.json", "weights.distcp"]


def test_going_back_drops_what_was_ahead(tmp_path):
    for step in (10, 20, 30):
        write(tmp_path, step, keep=3)
    write(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["latest", "step_000010", "step_000015"]


def test_what_a_kill_leaves_is_ignored_and_cleared(tmp_path):
    """Killed while writing, between the rename and `latest`, and while deleting."""
    write(tmp_path, 10)
    (begin(tmp_path, 20, 1) / "weights.distcp").write_bytes(b"half")
    assert latest(tmp_path).name == "step_000010"
    (tmp_path / ".step_000005.deleted").mkdir()
    write(tmp_path, 20)
    assert names(tmp_path) == ["latest", "step_000010", "step_000020"]
    (tmp_path / "latest").write_text("step_000010\n")  # as if killed before `latest` was replaced
    assert latest(tmp_path).name == "step_000010"
    shutil.rmtree(tmp_path / "step_000010")  # and then deleted by hand, as an error advises
    assert latest(tmp_path).name == "step_000020"


@pytest.mark.parametrize("content", ("", "step_999999", "../elsewhere", "\xff"))
def test_a_spoilt_latest_falls_back_to_the_newest(tmp_path, content):
    write(tmp_path, 10)
    (tmp_path / "latest").write_bytes(content.encode("latin-1"))
    assert latest(tmp_path).name == "step_000010"


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    (tmp_path / "step_000010").mkdir()
    assert latest(tmp_path) is None


def cut_short(folder):
    (folder / "weights.distcp").write_bytes(b"01234")


def lose(folder):
    (folder / "weights.distcp").unlink()


def change_manifest(folder, **changes):
    tree = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "damage, message",
    (
        (cut_short, "weights.distcp has 5 bytes, not 10"),
        (lose, "weights.distcp is gone"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: JSONDecodeError"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: TypeError"),
        (lambda f: change_manifest(f, files=None), "manifest.json: AttributeError"),
        (lambda f: change_manifest(f, format=99), "has format 99, this version reads 1"),
    ),
    ids=("cut", "lost", "not JSON", "a list", "no files", "format"),
)
def test_damage_is_one_line(tmp_path, damage, message):
    write(tmp_path, 10)
    folder = write(tmp_path, 20)
    damage(folder)
    with pytest.raises(CheckpointError) as refused:
        read_manifest(folder)
    text = str(refused.value)
    assert str(folder) in text and message in text and "\n" not in text
    assert "the run then continues from step_000010" in text or "format" in message


def test_damage_of_the_only_checkpoint(tmp_path):
    folder = write(tmp_path, 10)
    lose(folder)
    with pytest.raises(CheckpointError, match="delete that folder, the run then starts again"):
        read_manifest(folder)


def test_a_start_tries_what_latest_names_then_the_newest(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step, keep=9)
    tried = [folder.name for folder in newest_first(tmp_path)]
    assert tried == ["step_000015", "step_000010", "step_000005"]
    (tmp_path / "latest").write_text("step_000010\n")
    assert [folder.name for folder in newest_first(tmp_path)] == ["step_000010", "step_000015", "step_000005"]
    (tmp_path / "step_000010" / "manifest.json").unlink()  # damaged, and still the first to be named
    assert newest_first(tmp_path)[0].name == "step_000010" and latest(tmp_path).name == "step_000015"
    assert newest_first(tmp_path / "none") == []


# ---------------------------------------------------------------------------------------------------------------- digests
@pytest.mark.parametrize("installed", [True, False])
def test_a_flipped_byte_anywhere_is_found(tmp_path, monkeypatch, installed):
    monkeypatch.setattr(checkpoint_digests, "CHUNK_BYTES", 1000)  # files of several chunks
    if not installed:
        monkeypatch.setitem(sys.modules, "xxhash", None)
    content = bytes(range(256)) * 10
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "empty").touch()
    recorded = of_folder(tmp_path, 0, 1)
    expected = xxhash.xxh3_128_hexdigest(content) if installed else hashlib.sha256(content).hexdigest()
    assert recorded["a"] == f"{'xxh3_128' if installed else 'sha256'}:{expected}" and recorded.keys() == {"a", "empty"}
    assert first_difference(tmp_path, recorded, 0, 1) is None
    for place in (0, 999, 1000, 1280, len(content) - 1):
        (tmp_path / "a").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert first_difference(tmp_path, recorded, 0, 1) == "a", place


def test_each_rank_takes_its_own_files_and_its_share(tmp_path):
    for name in ("__0_0.distcp", "__1_0.distcp", "__10_0.distcp", ".metadata", "common.pt", "__none"):
        (tmp_path / name).write_bytes(name.encode())
    taken = [sorted(of_folder(tmp_path, rank, 11)) for rank in range(11)]
    assert taken[0] == [".metadata", "__0_0.distcp", "__none", "common.pt"]
    assert taken[1] == ["__1_0.distcp"] and taken[10] == ["__10_0.distcp"] and not any(taken[2:10])
    recorded = {name: value for rank in range(11) for name, value in of_folder(tmp_path, rank, 11).items()}
    (tmp_path / "common.pt").write_bytes(b"Common.pt")
    noticed = [first_difference(tmp_path, recorded, rank, 4) for rank in range(4)]
    assert sorted(map(str, noticed)) == ["None", "None", "None", "common.pt"]


def test_a_digest_whose_package_is_not_here_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"a")
    recorded = of_folder(tmp_path, 0, 1)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    assert digest(tmp_path / "a", "xxh3_128") is None and digest(tmp_path / "a").startswith("sha256:")
    (tmp_path / "a").write_bytes(b"b")
    assert first_difference(tmp_path, recorded, 0, 1) is None
    assert first_difference(tmp_path, {"a": "sha256:00"}, 0, 1) == "a"


def test_a_full_disk_is_found_before_writing(tmp_path, monkeypatch):
    write(tmp_path, 10)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(8 << 30, 7 << 30, 1 << 30))
    with pytest.raises(CheckpointError, match=r"needs 3.0 GiB, 1.0 GiB are free there; make room or lower checkpoint.keep"):
        begin(tmp_path, 20, needed_bytes=3 << 30)
    assert names(tmp_path) == ["latest", "step_000010"] and latest(tmp_path).name == "step_000010"
