"""Bundles: the same bytes each time, nothing that quotes a question where that is asked, and no trust in what is read."""

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from alphamed.cli import main
from alphamed.config.loading import build_config, dump_config, load_config, load_tree
from alphamed.errors import ConfigError
from alphamed.lab.bundle import archive, reproduce
from alphamed.lab.bundle.archive import MANIFEST, read_archive, write_archive
from alphamed.rundir import provenance

SECRET = "Which vitamin prevents scurvy?"
ITEM = {
    "set": "exam",
    "id": "e1",
    "question": SECRET,
    "options": {"A": "vitamin C", "B": "vitamin D"},
    "answer": "A",
    "level": 2,
    "letter": "A",
    "outcome": "correct",
    "finish_reason": "stop",
    "tokens": 9,
    "text": f"You ask: {SECRET} \\boxed{{A}}",
}


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A finished run, as its files tell; the current directory is where it was started."""
    monkeypatch.chdir(tmp_path)
    question = {key: ITEM[key] for key in ("question", "options", "answer")}
    Path("train.jsonl").write_text(json.dumps({"id": "q1"} | question) + "\n")
    Path("exam.jsonl").write_text(json.dumps({"id": "e1"} | question) + "\n")
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    config = build_config(
        {
            "run": {"name": "r", "steps": 2},
            "model": {"path": "model"},
            "logging": {"wandb": "online"},
            "data": {"train": ["train.jsonl"]},
            "evaluation": {"files": ["exam.jsonl"]},
        }
    )
    folder = Path("runs/r")
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    provenance.record_start(folder, ["alphamed", "train"], [Path("train.jsonl")], Path("model"), {})
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.75}\n')
    (folder / "evaluations" / "step_000002.json").write_text('{"step": 2, "sets": {}}\n')
    (folder / "evaluations" / "step_000002.items.jsonl").write_text(json.dumps(ITEM) + "\n")
    (folder / "report.html").write_text(f"<p>{SECRET}</p>")
    (folder / "finished.json").write_text('{"step": 2}')
    return folder


def bundle(out="b.tar.gz", *options) -> Path:
    assert main(["bundle", "runs/r", "--out", out, *options]) == 0
    return Path(out)


def refused(capfd, arguments, *words):
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [word for word in words if word not in error] == [], error


# --------------------------------------------------------------------------------------------------------------- writing
def test_a_bundle_holds_the_run(run_dir, capfd):
    (run_dir / "eval").mkdir()
    (run_dir / "eval" / "results.json").write_text("{}")
    archive = read_archive(bundle())
    assert sorted(archive.files) == sorted(
        [
            "config.yaml",
            "provenance.json",
            "metrics.jsonl",
            "report.html",
            "evaluations/step_000002.json",
            "evaluations/step_000002.items.jsonl",
            "eval/results.json",
            "data/data.train.0.train.jsonl",
            "data/evaluation.files.0.exam.jsonl",
            *(path.name for path in run_dir.glob("*.patch")),
        ]
    )
    assert archive.files["metrics.jsonl"] == (run_dir / "metrics.jsonl").read_bytes()
    manifest = archive.manifest
    assert (manifest["run"], manifest["step"], manifest["finished"], manifest["questions"]) == ("r", 2, True, True)
    assert manifest["data"]["data.train.0"]["sha256"] == provenance.file_entry(Path("train.jsonl"))["sha256"]
    assert [entry["path"] for entry in manifest["model"]["files"]] == ["config.json"]
    assert "torch" in manifest["packages"]


def test_the_same_run_gives_the_same_bytes(run_dir, tmp_path):
    first = bundle("a.tar.gz").read_bytes()
    for path in run_dir.rglob("*"):
        os.utime(path, (1, 1))
    second = bundle("elsewhere/b.tar.gz").read_bytes()
    assert first == second
    with tarfile.open("a.tar.gz") as tar:  # what another reader sees
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
    assert [m.name for m in members] == [MANIFEST, *sorted(m.name for m in members[1:])]


def test_question_texts_can_be_left_out(run_dir):
    path = bundle("b.tar.gz", "--without-questions")
    everything = gzip.decompress(path.read_bytes())
    assert SECRET.encode() not in everything and b"vitamin" not in everything
    archive = read_archive(path)
    item = json.loads(archive.files["evaluations/step_000002.items.jsonl"])
    assert list(item) == ["set", "id", "answer", "level", "letter", "outcome", "finish_reason", "tokens"]
    assert item.items() <= ITEM.items()
    assert not any(name.startswith("data/") or name == "report.html" for name in archive.files)
    assert archive.manifest["data"]["evaluation.files.0"]["bytes"] == Path("exam.jsonl").stat().st_size


def test_flipped_questions_of_a_comparison_are_left_out_but_for_their_ids(run_dir):
    flip = {
        "id": "e1",
        "way": "gained",
        "question": SECRET,
        "answer": "vitamin C",
        "before": [{"outcome": "wrong", "letter": "B", "option": "vitamin D"}],
        "after": [{"outcome": "correct", "letter": "A", "option": "vitamin C"}],
    }
    (run_dir / "eval" / "m").mkdir(parents=True)
    tree = {"benchmarks": {"exam": {"n": 1, "flipped": [flip]}}}
    (run_dir / "eval" / "m" / "comparison.json").write_text(json.dumps(tree))
    assert SECRET.encode() in read_archive(bundle()).files["eval/m/comparison.json"]
    path = bundle("b.tar.gz", "--without-questions")
    assert b"vitamin" not in gzip.decompress(path.read_bytes())
    assert json.loads(read_archive(path).files["eval/m/comparison.json"]) == {
        "benchmarks": {"exam": {"n": 1, "flipped": [{"id": "e1", "way": "gained"}]}}
    }


def test_a_development_set_is_bundled_and_found_again(run_dir, tmp_path, capfd, monkeypatch):
    (tmp_path / "dev.jsonl").write_text(Path("exam.jsonl").read_text())
    config = (run_dir / "config.yaml").read_text()
    assert "development: null" in config and "every: 0" in config
    (run_dir / "config.yaml").write_text(
        dump_config(
            build_config(
                load_tree(run_dir / "config.yaml")
                | {
                    "evaluation": {"files": ["exam.jsonl"], "development": "dev.jsonl", "every": 2},
                    "checkpoint": {"every": 2},
                }
            )
        )
    )
    path = bundle()
    (tmp_path / "dev.jsonl").unlink()
    monkeypatch.setattr(reproduce, "_start", lambda config: 0)
    assert main(["reproduce", str(path), "--out", "again"]) == 0
    development = load_config(Path("again") / reproduce.RUN_CONFIG).evaluation.development
    assert development.read_text() == Path("exam.jsonl").read_text() and development.is_relative_to("again")


def test_bad_input_is_one_line(run_dir, capfd):
    refused(capfd, ["bundle", "runs", "--out", "b.tar.gz"], "runs", "no config.yaml")
    refused(capfd, ["bundle", "runs/r", "--out", "b.zip"], "--out", ".tar.gz")
    Path("exam.jsonl").rename("gone.jsonl")
    refused(capfd, ["bundle", "runs/r", "--out", "b.tar.gz"], "evaluation.files", "exam.jsonl is not there")
    Path("train.jsonl").write_text("{}\n")
    refused(capfd, ["bundle", "runs/r", "--out", "b.tar.gz"], "data.train", "not the file that runs/r was trained on")
    assert not Path("b.tar.gz").exists()


def test_a_full_disk_leaves_the_old_bundle(run_dir):
    """A limit on file sizes stands for the full disk: writes beyond it fail as they do there, with OSError."""
    old = bundle().read_bytes()
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "x": {hash(i * 7919)}}}\n' for i in range(1, 60_000)))
    code = (
        "import resource, signal, sys; from alphamed.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "sys.exit(main(['bundle', 'runs/r', '--out', 'b.tar.gz']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert Path("b.tar.gz").read_bytes() == old and list(Path().glob(".*partial")) == []


# --------------------------------------------------------------------------------------------------------------- reading
def forged(path: Path, *members: tuple[str, bytes], listed=None, kind=tarfile.REGTYPE) -> Path:
    """An archive with members as given; the manifest lists the true hashes of `listed`, or of all members."""
    write_archive(path, {"run": "r"}, dict(listed if listed is not None else members))
    manifest = read_first(path)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in ((MANIFEST, manifest), *members):
            info = tarfile.TarInfo(name)
            info.size = len(content) if name == MANIFEST or kind == tarfile.REGTYPE else 0
            info.type, info.linkname = (tarfile.REGTYPE, "") if name == MANIFEST else (kind, "/etc/passwd")
            tar.addfile(info, io.BytesIO(content) if info.size else None)
    return path


def read_first(path: Path) -> bytes:
    with tarfile.open(path) as tar:
        return tar.extractfile(MANIFEST).read()


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/etc/cron.d/x", "a/./b", "a\\..\\b", "./x", ".."])
def test_a_member_that_would_leave_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="would be written outside"):
        read_archive(forged(tmp_path / "b.tar.gz", (name, b"x")))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with pytest.raises(ConfigError, match="'x' is not a regular file"):
        read_archive(forged(tmp_path / "b.tar.gz", ("x", b""), kind=kind))


@pytest.mark.parametrize(
    "members, listed, words",
    [
        ([("a", b"1"), ("a", b"1")], {"a": b"1"}, "'a' is there twice"),
        ([("a", b"1"), ("b", b"1")], {"a": b"1"}, "'b' is not in the manifest"),
        ([("a", b"1")], {"a": b"1", "b": b"2", "c": b"3"}, "b is missing, and 1 more"),
        ([("a", b"2")], {"a": b"1"}, "'a' is not what the manifest says"),
        ([("a", b"11")], {"a": b"1"}, "'a' has 2 bytes, the manifest says 1"),
    ],
)
def test_what_the_manifest_does_not_say_is_refused(tmp_path, members, listed, words):
    with pytest.raises(ConfigError) as error:
        read_archive(forged(tmp_path / "b.tar.gz", *members, listed=listed))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_small_archive_that_unpacks_to_much_is_refused(tmp_path, monkeypatch):
    """Neither tar's own headers, which are read whole, nor what follows the last member may fill memory or time."""
    monkeypatch.setattr(archive, "MAX_STREAM", 1 << 20)
    path = forged(tmp_path / "b.tar.gz", ("a", b"1"))
    whole = gzip.decompress(path.read_bytes())
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 1 << 30
    zeros = bytes(2 << 20)
    for content in (header.tobuf() + zeros, whole + zeros):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ConfigError, match="unpacks to more than"):
            read_archive(path)


def test_a_name_that_no_folder_can_hold_is_refused(tmp_path):
    for name in ("a\nb", "a\x1b[2Jb"):
        with pytest.raises(ConfigError, match="has a name that cannot be written"):
            read_archive(forged(tmp_path / "b.tar.gz", (name, b"x"), listed={name: b"x"}))


def test_a_manifest_that_is_nested_too_deep_is_refused(tmp_path):
    nested = b"[" * 100_000
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo(MANIFEST)
        info.size = len(nested)
        tar.addfile(info, io.BytesIO(nested))
    with pytest.raises(ConfigError, match="manifest.json is damaged"):
        read_archive(tmp_path / "b.tar.gz")


def test_every_cut_and_every_flipped_bit_is_found(run_dir):
    """Cut anywhere, or with one bit changed anywhere that carries content: refused in one line, or read as it was."""
    path = bundle()
    whole = path.read_bytes()
    content = read_archive(path)
    for place in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:place])
        with pytest.raises(ConfigError):
            read_archive(path)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            assert read_archive(path) == content  # a bit of gzip's header that says nothing
        except ConfigError as error:
            assert "\n" not in str(error)


def test_other_files_are_refused(tmp_path, capfd):
    refused(capfd, ["reproduce", str(tmp_path / "none.tar.gz")], "no such file")
    (tmp_path / "x.tar.gz").write_bytes(b"not an archive at all")
    refused(capfd, ["reproduce", str(tmp_path / "x.tar.gz")], "damaged or not a .tar.gz")
    write_archive(tmp_path / "y.tar.gz", {"run": 3}, {})
    refused(capfd, ["reproduce", str(tmp_path / "y.tar.gz")], "its manifest cannot be used")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("config.yaml"))
    refused(capfd, ["reproduce", str(tmp_path / "z.tar.gz")], "does not begin with manifest.json")


# ----------------------------------------------------------------------------------------------------------- reproducing
def test_a_check_on_the_same_machine_is_in_order(run_dir, capfd):
    path = bundle()
    capfd.readouterr()
    assert main(["reproduce", str(path), "--check"]) == 0
    output = capfd.readouterr().out
    assert "run r at step 2" in output and "differs" not in output and "problem" not in output
    assert "ok: data.train.0: in the bundle" in output and "ok: model: 1 files in model" in output
    assert not Path("r-reproduced").exists()


def test_missing_and_other_files_are_named(run_dir, capfd):
    path = bundle("b.tar.gz", "--without-questions")
    assert main(["reproduce", str(path), "--check"]) == 0  # the files lie where they lay
    Path("exam.jsonl").rename("moved.jsonl")
    Path("train.jsonl").write_text("{}\n")
    Path("model/config.json").write_text('{"other": 1}')
    capfd.readouterr()
    assert main(["reproduce", str(path), "--check"]) == 2
    output = capfd.readouterr()
    assert (
        "problem: evaluation.files.0: exam.jsonl" in output.out and "neither in the bundle nor at exam.jsonl" in output.out
    )
    assert "problem: data.train.0: train.jsonl is not the file that the run read" in output.out
    assert "problem: model: model/config.json differs" in output.out
    assert output.err.startswith("error: bundle b.tar.gz: 3 problems (the first: data.train.0")
    Path("kept").mkdir()
    shutil.move("moved.jsonl", "kept/exam.jsonl")
    Path("model").rename("elsewhere")
    Path("elsewhere/config.json").write_text("{}")
    assert main(["reproduce", str(path), "--check", "--data", "kept", "model.path=elsewhere"]) == 2
    assert (
        "ok: model: 1 files in elsewhere" in (output := capfd.readouterr().out)
        and "ok: evaluation.files.0: kept/exam.jsonl" in output
    )


ZEROS = "0" * 64


def rename(manifest, files):
    manifest["data"]["data.train.7"] = manifest["data"].pop("data.train.0")


def other_model(manifest, files):
    files["config.yaml"] = files["config.yaml"].replace(b"path: model", b"path: other")


TAMPERED = [
    (lambda manifest, files: manifest["data"].clear(), "data.train.0: train.jsonl of config.yaml is not in the manifest"),
    (
        lambda manifest, files: manifest["data"].pop("evaluation.files.0"),
        "evaluation.files.0: exam.jsonl of config.yaml is not in",
    ),
    (
        lambda manifest, files: manifest["data"]["data.train.0"].update(sha256=ZEROS),
        "data.train.0: data/data.train.0.train.jsonl in the bundle is not the file that the run read (another SHA-256)",
    ),
    (
        lambda manifest, files: files.update({"data/data.train.0.train.jsonl": b"{}"}),
        "data.train.0: data/data.train.0.train.jsonl in the bundle is not the file",
    ),
    (
        lambda manifest, files: manifest["data"]["data.train.0"].update(file="config.yaml"),
        "data.train.0: is called config.yaml in the bundle, not data/data.train.0.train.jsonl",
    ),
    (
        lambda manifest, files: manifest["data"]["data.train.0"].update(
            file="config.yaml", sha256=hashlib.sha256(files["config.yaml"]).hexdigest()
        ),
        "data.train.0: is called config.yaml",
    ),
    (rename, "data.train.0: train.jsonl of config.yaml is not in the manifest"),
    (
        lambda manifest, files: manifest["data"].update({"data.train.7": manifest["data"]["data.train.0"]}),
        "data.train.7: is not among the files that config.yaml names",
    ),
    (
        lambda manifest, files: manifest["data"]["data.train.0"].update(path="exam.jsonl"),
        "data.train.0: is exam.jsonl in the manifest and train.jsonl in config.yaml",
    ),
    (other_model, "model: is model in the manifest and other in config.yaml"),
    (
        lambda manifest, files: manifest["model"].update(path="other"),
        "model: is other in the manifest and model in config.yaml",
    ),
    (lambda manifest, files: manifest["model"].update(files=[]), "model: the manifest names none of its files"),
    (
        lambda manifest, files: manifest["model"]["files"][0].update(path="weights.json"),
        "model: its files in the manifest are not those of provenance.json",
    ),
    (
        lambda manifest, files: files.pop("provenance.json"),
        "model: its files in the manifest are not those of provenance.json",
    ),
]


@pytest.mark.parametrize("tamper, words", TAMPERED, ids=[words for _, words in TAMPERED])
def test_a_manifest_that_speaks_of_other_files_than_the_bundle_is_refused(run_dir, capfd, tamper, words):
    """Written again with true hashes of all members: by an attacker, or by mistake. Nothing is said to be in order that is
    not, and nothing is unpacked."""
    archive = read_archive(bundle())
    manifest, files = {key: value for key, value in archive.manifest.items() if key != "format"}, dict(archive.files)
    tamper(manifest, files)
    write_archive(Path("forged.tar.gz"), manifest, files)
    capfd.readouterr()
    assert main(["reproduce", "forged.tar.gz", "--check"]) == 2
    out, err = capfd.readouterr()
    assert f"problem: {words}" in out and f"(the first: {words}" in err and err.count("\n") == 1, (out, err)
    assert f"ok: {words.partition(':')[0]}" not in out
    refused(capfd, ["reproduce", "forged.tar.gz"], words)
    assert not Path("r-reproduced").exists()


def test_other_versions_are_told_and_not_refused(run_dir, capfd, monkeypatch):
    path = bundle()
    monkeypatch.setattr(provenance, "packages", lambda: {"torch": "9.9", "numpy": "2.3.5"})
    monkeypatch.setattr(provenance, "commit_here", lambda: "f" * 40)
    assert main(["reproduce", str(path), "--check"]) == 0
    output = capfd.readouterr().out
    assert "differs: torch: was" in output and "is 9.9" in output
    assert "differs: commit: was" in output and "is ffffffffffff" in output


def test_a_reproduction_is_the_run_in_a_folder_of_its_own(run_dir, capfd, monkeypatch):
    path = bundle()
    started = []
    monkeypatch.setattr(reproduce, "_start", lambda config: started.append(load_config(config)) or 0)
    for _ in range(2):  # the second call takes it up again
        assert main(["reproduce", str(path), "--out", "again", "optimizer.lr=2e-6"]) == 0
    first, second = started
    assert first == second and first.run_dir == Path("again/runs/r") and first.optimizer.lr == 2e-6
    assert first.data.train[0].read_bytes() == Path("train.jsonl").read_bytes()
    assert first.data.train == (Path("again/bundle/data/data.train.0.train.jsonl"),)
    assert str(first.logging.wandb) == "offline"  # nobody's account
    refused(capfd, ["reproduce", str(path), "--out", "again", "optimizer.lr=3e-6"], "other settings", "name a new folder")
    Path("taken").mkdir()
    refused(capfd, ["reproduce", str(path), "--out", "taken"], "taken exists and is no reproduction")


def test_a_reproduction_starts_as_training_does(run_dir, capfd):
    """One question is too few for a step of 256: what `alphamed train` says is said here, before anything is started."""
    path = str(bundle())
    refused(
        capfd,
        ["reproduce", path, "--out", "again", "cluster.device=cpu", "evaluation.allow_overlap=true"],
        "rollout.questions_per_step: 256 is more than the 1 questions of data.train",
    )
    assert not Path("again/runs").exists()


def test_a_full_disk_unpacks_nothing(run_dir, capfd, monkeypatch):
    path = bundle()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    refused(capfd, ["reproduce", str(path), "--out", "again"], "No space left on device", "Nothing was left half-written")
    assert not Path("again").exists() and list(Path().glob(".again*")) == []


def test_a_configuration_without_all_sections_is_unpacked_too(run_dir, monkeypatch):
    """A hand-made one: what it leaves out has its default."""
    archive = read_archive(bundle())
    manifest = {key: value for key, value in archive.manifest.items() if key not in ("files", "format")}
    short = b"data: {train: [train.jsonl]}\nmodel: {path: model}\nevaluation: {files: [exam.jsonl]}\n"
    write_archive(Path("short.tar.gz"), manifest, dict(archive.files) | {"config.yaml": short})
    monkeypatch.setattr(reproduce, "_start", lambda config: 0)
    assert main(["reproduce", "short.tar.gz", "--out", "again"]) == 0
