"""The command line: verbs, exit codes, the launcher form, and what a worker does around the loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_hf

from alphamed import doctor
from alphamed.cli import main
from alphamed.cluster import transformer_engine
from alphamed.cluster.failure import recorded
from alphamed.errors import ConfigError

ROOT = Path(__file__).parents[2]
VERBS = (
    "train",
    "launch",
    "worker",
    "eval",
    "data",
    "study",
    "export",
    "model",
    "report",
    "replay",
    "bundle",
    "reproduce",
    "compare",
    "plan",
    "doctor",
)


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert [verb for verb in VERBS if f"\n    {verb}" not in text] == []


@pytest.mark.parametrize(
    "arguments, word",
    [
        ([], "VERB"),
        (["trian"], "trian"),
        (["train"], "--config"),
        (["train", "--config"], "--config"),
        (["model"], "path"),
        (["replay", "r", "--step", "x", "--only", "update"], "'x'"),
        (["launch"], "--script"),
        (["worker"], "--script"),
        (["export", "no/such/run"], "no/such/run"),
        (["report", "no/such/run"], "no/such/run"),
        (["replay", "no/such/run", "--step", "1", "--only", "reward"], "no/such/run"),
        (["replay", "no/such/run", "--step", "1", "--only", "update", "parallel.tensor=2"], "no/such/run"),
        (["train", "--config", "no/such", "--chekc"], "--chekc"),
        (["report", "no/such/run", "a.b=1"], "a.b=1"),
        (["study", "no/such.yaml"], "no/such.yaml"),
        (["study", "x.yaml", "--slurm", "--dry-run"], "not allowed"),
        (["bundle", "no/such/run", "--out", "b.tar.gz"], "no/such/run"),
        (["reproduce", "no/such.tar.gz"], "no/such.tar.gz"),
        (["model", "no/such/folder"], "no/such"),
        (["model", ""], "model.path: '' names no model; give a Hugging Face folder"),
        (["study", "x.yaml", "x=1"], "unrecognized arguments: x=1; see `alphamed study --help`"),
        (["doctor", "x"], "unrecognized arguments: x; see `alphamed doctor --help`"),
        (
            ["data", "inspect", "x", "--out", "y.html", "z=1"],
            "unrecognized arguments: z=1; see `alphamed data inspect --help`",
        ),
        (["launch", "--config", "c.yaml", "--nodes", ""], "--nodes: '' leaves a node without a name; give all nodes"),
        (["launch", "--config", "c.yaml", "--nodes", "a,,b", "--node-rank", "0"], "--nodes: 'a,,b' leaves a node without"),
        (["launch", "--config", "c.yaml", "--nodes", "a,b,a", "--node-rank", "0"], "--nodes: 'a,b,a' names a twice"),
        (
            ["launch", "--config", "c.yaml", "--nodes", "a,b"],
            "--node-rank: is missing; give this node's position in --nodes, 0 to 1",
        ),
        (
            ["launch", "--config", "c.yaml", "--nodes", "a,b", "--node-rank", "2"],
            "--node-rank: 2 is no position in the 2 --no",
        ),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, word):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert word in captured.err


def test_model_prints_the_shape_and_copies(tmp_path, capsys):
    """213,184 parameters by hand: 2 x 509 x 64 embedding and output, 64 final norm, and per layer 64 x (64 + 2 x 32) +
    64 x 64 attention, 3 x 64 x 128 MLP, 2 x 64 norms."""
    folder = tiny_hf(tmp_path / "tiny")
    by_hand = 2 * 509 * 64 + 64 + 4 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert main(["model", str(folder), "--out", str(tmp_path / "copy")]) == 0
    out = capsys.readouterr().out
    assert f"{by_hand:,} parameters" in out and "4 heads on 2 KV heads of 16" in out
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert main(["model", str(folder), "--out", str(tmp_path / "copy")]) == 2


# --------------------------------------------------------------------------------------------------------------- doctor
def test_doctor_knows_what_is_here(capsys):
    import torch

    assert main(["doctor", "--json"]) == 0
    found = {finding["part"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert torch.__version__ in found["torch"]["detail"]
    assert found["CUDA"]["state"] == ("active" if torch.cuda.is_available() else "absent")
    assert "gloo" in found["collectives"]["detail"]
    assert 1 <= int(found["cores"]["detail"].split()[0]) <= len(os.sched_getaffinity(0))
    assert "CPU backend" in found["vLLM"]["detail"] or "CUDA backend" in found["vLLM"]["detail"]


def test_doctor_tells_pypis_apex_from_nvidias(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid')")
    assert "uninstall" in doctor._apex().detail
    (tmp_path / "apex" / "normalization").mkdir()
    assert "without its CUDA extensions" in doctor._apex().detail
    (tmp_path / "fused_weight_gradient_mlp_cuda.py").touch()
    assert doctor._apex().state == doctor.ComponentState.ACTIVE


def fake_transformer_engine(folder, monkeypatch, text):
    """A package of this name whose PyTorch part is `text`, as `pip` would install it."""
    package = folder / "transformer_engine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "pytorch.py").write_text(text)
    information = folder / "transformer_engine-2.20.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    transformer_engine.usable.cache_clear()


def test_a_transformer_engine_that_does_not_import_is_named_with_its_error(tmp_path, monkeypatch):
    fake_transformer_engine(tmp_path, monkeypatch, "raise OSError('libcublas.so.13: cannot open shared object file')")
    check = doctor._transformer_engine()
    assert check.state == doctor.ComponentState.WRONG
    assert "transformer-engine 2.20.2: it does not import (OSError: libcublas.so.13: cannot open" in check.detail
    with pytest.raises(ConfigError, match=r"^Transformer Engine: it does not import \(OSError: libcublas.so.13"):
        transformer_engine.usable()


def test_a_cudnn_that_torch_refuses_after_transformer_engine_is_named_with_its_fix(tmp_path, monkeypatch):
    import torch

    def version():
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against (9, 20, 0)")

    fake_transformer_engine(tmp_path, monkeypatch, "")
    assert transformer_engine.usable()
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    detail = doctor._transformer_engine().detail
    site = Path(torch.__file__).parents[1]
    assert "cuDNN version incompatibility" in detail and f"set LD_LIBRARY_PATH={site}/nvidia/cudnn/lib" in detail


def test_two_cudnns_of_a_process_are_told_from_one_that_is_mapped_several_times(tmp_path):
    def mapped(path, permissions="r-xp"):
        return f"7f00-7f01 {permissions} 00000000 08:01 42                 {path}"

    wheel, system = tmp_path / "with space" / "libcudnn.so.9", tmp_path / "libcudnn.so.9.13.0"
    (tmp_path / "with space").mkdir()
    wheel.touch()
    system.touch()
    link = tmp_path / "libcudnn.so.9"
    link.symlink_to(system)
    parts = [mapped(wheel), mapped(wheel, "rw-p"), mapped(tmp_path / "libcudnn_ops.so.9"), "7f02-7f03 rw-p 00000000 00:00 0"]
    assert transformer_engine.cudnn_libraries("\n".join(parts)) == [str(wheel)]
    parts += [mapped(system), mapped(link)]
    assert transformer_engine.cudnn_libraries("\n".join(parts)) == [str(system), str(wheel)]


def test_doctor_says_what_is_missing_for_what():
    lines = doctor.table(
        [
            doctor.ComponentCheck("ray", doctor.ComponentState.ABSENT, "not installed", "engines and rewards"),
            doctor.ComponentCheck("CUDA", doctor.ComponentState.ABSENT, "no GPU", "GPUs", optional=True),
        ]
    )
    assert lines == [
        "ray   absent  not installed  <- needed for engines and rewards",
        "CUDA  absent  no GPU  <- only needed for GPUs",
    ]


# --------------------------------------------------------------------------------------------------------------- worker
def test_a_worker_reports_its_failure_and_keeps_its_output(tmp_path):
    """A rank whose loop fails: traceback in its log, the failure recorded, one line on the console of a bare start."""
    script = tmp_path / "worker.py"
    script.write_text(f"""
import os, sys, types
from pathlib import Path
from alphamed.launch import worker
from alphamed.config.loading import build_config
loop = types.ModuleType("alphamed.train")
def main(config):
    print("step 1")
    os.write(2, b"a library's words\\n")
    raise OverflowError("too much")
loop.main = main
import alphamed
sys.modules["alphamed.train"] = alphamed.train = loop
config = build_config({{"model": {{"path": "m"}}, "data": {{"train": ["t"]}},
                        "run": {{"root": {str(tmp_path)!r}, "name": "r"}}}})
with worker._captured_output(config.run_dir, 0) as console:
    try:
        main(config)
    except Exception as error:
        status = worker._fail(config.run_dir, 0, error, console)
sys.exit(status)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stdout == "step 1\n"
    assert done.stderr.startswith("run failed: rank 0 (pid ") and done.stderr.endswith("OverflowError: too much\n")
    log = (tmp_path / "r" / "logs" / "rank_0.log").read_text()
    assert "step 1" in log and "a library's words" in log and 'raise OverflowError("too much")' in log
    assert recorded(tmp_path / "r").message == "OverflowError: too much"


def test_a_reader_that_goes_away_is_no_traceback():
    """What `alphamed data sources | head -1` does."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "alphamed.cli", "data", "sources"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# ------------------------------------------------------------------------------------- streams, names, Ctrl-C, full disks
def alphamed(*arguments, environment=None, **options):
    """The finished process of a command line; bytes, for names that are not UTF-8."""
    return subprocess.run(
        [sys.executable, "-m", "alphamed.cli", *arguments],
        stderr=subprocess.PIPE,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | (environment or {}),
        **options,
    )


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_closed_streams_lead_nowhere(tmp_path, closed):
    """`>&-`. What is opened later must not get their numbers: a library's warning would go into a file of results."""
    out = tmp_path / "out.html"
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "?", "options": {"A": "a", "B": "b"}, "answer": "A"}\n')
    command = f'exec "$0" -m alphamed.cli data inspect q.jsonl --out out.html {" ".join(f"{n}>&-" for n in closed.split())}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        cwd=tmp_path,
        capture_output=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr and out.stat().st_size > 1000
    done = subprocess.run(
        ["bash", "-c", command.replace("q.jsonl", "absent.jsonl"), sys.executable],
        cwd=tmp_path,
        capture_output=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 2 and b"Traceback" not in done.stdout + done.stderr
    assert done.stderr == b"" if "2" in closed else done.stderr.startswith(b"error: ")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = alphamed("data", "sources", stdout=full)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device; make room and start again\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("report", "absent"), ("train",)])
def test_a_mistake_that_cannot_be_written_has_its_exit_code(arguments):
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -m alphamed.cli "$@" 2> /dev/full', sys.executable, *arguments],
        capture_output=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_not_utf8_are_printed_as_they_are(tmp_path, encoding):
    page, questions = (os.fsencode(tmp_path) + b"/q\xff" + ending for ending in (b".html", b".jsonl"))
    with open(questions, "w") as file:
        file.write('{"id": "q", "question": "?", "options": {"A": "a", "B": "b"}, "answer": "A"}\n')
    done = alphamed("data", "inspect", questions, stdout=subprocess.PIPE, environment={"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stderr, done.stdout.splitlines()[0]) == (0, b"", page)


def test_a_model_folder_whose_name_is_not_utf8_is_refused_by_that_name(tmp_path):
    folder = os.fsencode(tiny_hf(tmp_path / "tiny").rename(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")))
    done = alphamed("model", folder)
    assert (
        done.returncode == 2
        and b"/m\\udcff' is not UTF-8, and libraries of a run take no other names; rename" in done.stderr
    )


def test_names_that_are_not_utf8_are_written_as_json_and_pages_read_them(tmp_path):
    from alphamed.data.output import json_writer
    from alphamed.files import append_json, read_json_lines, replace_json

    name = os.fsdecode(b"q\xff.jsonl")
    replace_json(tmp_path / "a.json", {"path": name})
    append_json(tmp_path / "b.jsonl", {"path": name})
    json_writer({"path": name})(tmp_path / "c.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "c.json").read_bytes() == b'{\n  "path": "q\\udcff.jsonl"\n}\n'
    assert json.loads((tmp_path / "a.json").read_text())["path"] == read_json_lines(tmp_path / "b.jsonl")[0]["path"] == name
    questions = os.fsencode(tmp_path) + b"/" + os.fsencode(name)
    with open(questions, "w") as file:
        file.write('{"id": "q", "question": "?", "options": {"A": "a", "B": "b"}, "answer": "A"}\n')
    done = alphamed("data", "inspect", questions, "--out", tmp_path / "page.html", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments",
    [["plan", "--config", "c.yaml", "model.path=m\udcff"], ["train", "--check", "--config", "c.yaml", "run.root=\udcff"]],
)
def test_settings_that_are_not_utf8_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {train: [t.jsonl]}\n")
    assert main(arguments) == 2
    assert "is not UTF-8; rename the file or folder" in capsys.readouterr().err


INTERRUPTED = """
import runpy, signal, sys
moment, swallowed = sys.argv.pop(1).split()
class Finder:
    def find_spec(self, name, path, target=None):
        if name == moment:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                if swallowed == "True":
                    raise SystemError("a library's own") from None
                raise
sys.meta_path.insert(0, Finder())
sys.modules.pop("argparse", None)
runpy.run_module("alphamed.cli", run_name="__main__", alter_sys=False)
"""


@pytest.mark.parametrize(
    "moment, swallowed",
    [
        ("argparse", False),
        ("alphamed.config.schema", False),
        ("pydantic", False),
        ("pydantic", True),
        ("alphamed.doctor", True),
        ("torch", False),
        ("torch", True),
    ],
)
def test_ctrl_c_while_things_are_imported_is_no_traceback(moment, swallowed):
    """Pydantic makes a KeyboardInterrupt during its import an error of its own: `swallowed`."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, f"{moment} {swallowed}", "doctor"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stdout) == (130, "") and done.stderr in ("", "interrupted\n")


def test_a_model_is_copied_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    import shutil

    folder = tiny_hf(tmp_path / "tiny")
    copied = []

    def copy2(source, destination):
        if copied:
            raise KeyboardInterrupt
        copied.append(shutil.copyfile(source, destination))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", copy2)
        assert main(["model", str(folder), "--out", str(tmp_path / "copy")]) == 130
    assert copied and [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert capsys.readouterr().err.endswith("interrupted\n")
    (tmp_path / "copy").mkdir()  # an empty folder may be there
    assert main(["model", str(folder), "--out", str(tmp_path / "copy")]) == 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {path.name for path in folder.iterdir()}
    assert main(["model", str(folder), "--out", str(folder / "inside")]) == 2
    assert "is in the model's own folder" in capsys.readouterr().err and not (folder / "inside").exists()


def test_a_full_disk_leaves_no_half_model(tmp_path):
    folder, disk = tiny_hf(tmp_path / "tiny"), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = alphamed("model", folder, "--out", disk / "copy", stdout=subprocess.PIPE)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert b"No space left on device); make room or choose another place. Nothing was left half-written" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_file_that_may_not_grow_leaves_no_half_model(tmp_path):
    import resource

    folder = tiny_hf(tmp_path / "tiny")
    done = alphamed(
        "model",
        folder,
        "--out",
        tmp_path / "copy",
        stdout=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2 and b"(File too large); make room" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_lines_reach_a_pipe_when_they_are_printed():
    code = (
        "import sys; from alphamed.cli import main; main(['data', 'sources']); "
        "print(sys.stdout.line_buffering, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stderr.strip()) == (0, "True")
