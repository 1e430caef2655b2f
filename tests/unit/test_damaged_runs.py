"""Run directories that somebody has damaged, and places that cannot be written: one line and exit code 2, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import tiny_hf

from alphamed.cli import main
from alphamed.config.loading import build_config, dump_config
from alphamed.files import append_json


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_hf(tmp_path_factory.mktemp("model") / "tiny", head_dim=32)


@pytest.fixture
def run_dir(tmp_path, model, monkeypatch, capfd) -> Path:
    """A run of two steps as far as its report can tell, and run.yaml that continues it."""
    monkeypatch.chdir(tmp_path)
    question = {"question": "Which vitamin prevents scurvy?", "options": {"A": "A", "B": "C"}, "answer": "B"}
    Path("train.jsonl").write_text("".join(json.dumps({"id": f"q{i}"} | question) + "\n" for i in range(4)))
    config = build_config(
        {
            "model": {"path": str(model), "dtype": "fp32"},
            "data": {"train": ["train.jsonl"]},
            "run": {"name": "r", "steps": 4},
            "prompt": {"max_tokens": 512},
            "cluster": {"device": "cpu"},
            "rollout": {"questions_per_step": 2, "samples_per_question": 2, "max_response_tokens": 16},
        }
    )
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    for path in (folder / "config.yaml", Path("run.yaml")):
        path.write_text(dump_config(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": null}\n')
    (folder / "provenance.json").write_text('{"starts": [], "data": [], "model": []}')
    capfd.readouterr()  # what making the model has printed
    return folder


def put(name: str, text: str | bytes) -> Callable[[Path], object]:
    def write(run_dir: Path) -> None:
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def refused(capfd, arguments: list[str], *words: str) -> None:
    assert main(arguments) == 2
    captured = capfd.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert all(word in lines[0] for word in words), lines[0]


REPORT, COMPARE, RESUME = ["report", "runs/r"], ["compare", "runs/r"], ["train", "--check", "--config", "run.yaml"]
DAMAGE = [
    (put("metrics.jsonl", '{"step": 1}\nnot json\n'), REPORT, "metrics.jsonl: line 2 is not JSON"),
    (put("metrics.jsonl", "5\n"), REPORT, "metrics.jsonl: line 1 is no JSON object"),
    (put("metrics.jsonl", '{"reward/mean": 1.0}\n'), REPORT, "line 1 holds no whole number under 'step'"),
    (put("metrics.jsonl", '{"step": 1, "reward/mean": "x"}\n'), REPORT, "line 1 holds no number under 'reward/mean'"),
    (put("metrics.jsonl", b'\xff\xfe{"step": 1}\n'), REPORT, "metrics.jsonl: line 1"),
    (put("metrics.jsonl", '{"step": -5}\n'), REPORT, "metrics.jsonl: line 1 holds step -5, and the first is 1; remove it"),
    (put("metrics.jsonl", '{"step": true}\n'), REPORT, "metrics.jsonl: line 1 holds no number under 'step'"),
    (put("metrics.jsonl", '{"step": 1, "reward/mean": false}\n'), REPORT, "line 1 holds no number under 'reward/mean'"),
    (put("metrics.jsonl", '{"step": 1, "reward/mean": 1%s}\n' % ("0" * 400)), REPORT, "no number under 'reward/mean'"),
    (
        put("metrics.jsonl", '{"step": 1}\n{"step": 1%s}\n' % ("0" * 26)),
        REPORT,
        "metrics.jsonl: line 2 holds step 100000000000000000000000000, and steps go up to 1,000,000,000; remove it",
    ),
    (
        put("metrics.jsonl", '{"step": 1}\n{"step": 3}\n{"step": 3}\n'),
        REPORT,
        "metrics.jsonl: line 3 holds step 3, and it comes after step 3; remove it",
    ),
    (put("metrics.jsonl", '{"step": 2}\n{"step": 1}\n'), COMPARE, "line 2 holds step 1, and it comes after step 2"),
    (put("provenance.json", "{half"), REPORT, "provenance.json: not JSON"),
    (put("provenance.json", "{half"), RESUME, "provenance.json: not JSON"),
    (put("provenance.json", "[]"), RESUME, "provenance.json: no record"),
    (put("evaluations/step_000000.json", "{"), REPORT, "step_000000.json: not readable"),
    (put("rollouts/step_000001.parquet", "PAR1"), REPORT, "step_000001.parquet: not readable"),
    (put("config.yaml", "a: [\n"), REPORT, "config.yaml: not valid YAML"),
    (put("config.yaml", b"\xff\xff"), REPORT, "config.yaml: cannot be read"),
    (put("config.yaml", "data: {train: [a]}\n"), REPORT, "config runs/r/config.yaml: model: missing"),
    *(
        (
            put("config.yaml", "run: 3\n"),
            verb,
            "config runs/r/config.yaml: run: 3 is not valid; it is a section with settings",
        )
        for verb in (REPORT, COMPARE)
    ),
    (put("eval/m/items.jsonl", ""), ["compare", "runs/r/eval/m"], "compare runs/r/eval/m: its items.jsonl holds no answer"),
    (put("eval/m/other", ""), ["compare", "runs/r/eval/m"], "compare runs/r/eval/m: holds neither config.yaml"),
]


@pytest.mark.parametrize("damage, arguments, words", DAMAGE, ids=[f"{row[1][0]}: {row[2]}" for row in DAMAGE])
def test_a_damaged_file_is_named(run_dir, capfd, damage, arguments, words):
    damage(run_dir)
    refused(capfd, arguments, words)


def test_files_of_other_names_are_not_the_runs(run_dir, capfd):
    put("evaluations/step_mine.json", "{")(run_dir)
    put("rollouts/step_mine.parquet", "PAR1")(run_dir)
    assert main(REPORT) == 0 and main(RESUME) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["report", "runs/r"], "report.html"),
        (["model", "{model}", "--out", "/proc/no/such"], "/proc/no"),
        (["model", "{model}", "--out", "run.yaml"], "run.yaml"),
        (["model", "runs/r/config.yaml"], "is a file"),
    ],
)
def test_a_place_that_can_not_be_written_is_named(run_dir, capfd, model, arguments, words):
    (run_dir / "report.html").mkdir()  # in the way (permissions do not stop a root user)
    refused(capfd, [text.replace("{model}", str(model)) for text in arguments], words)


def test_a_full_disk_is_said_in_one_line(run_dir, capfd, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("alphamed.lab.reports.report.write_report", full)
        refused(capfd, REPORT, "No space left on device", "make room")
    monkeypatch.setattr("os.fsync", full)
    refused(capfd, REPORT, "runs/r/report.html: No space left on device; make room and start again")
    assert not (run_dir / "report.html").exists() and list(run_dir.glob(".*partial")) == []
    with pytest.raises(OSError, match="No space left on device: 'runs/r/metrics.jsonl'"):
        append_json(Path("runs/r/metrics.jsonl"), {"step": 3})


def test_the_path_of_a_model_is_taken_as_it_is(run_dir, capfd):
    """It is not YAML: all of this belongs to the name."""
    refused(
        capfd,
        ["eval", "--config", "run.yaml", "--model", "a: b #1", "evaluation.files=[train.jsonl]"],
        "'a: b #1': no such folder",
    )


def test_a_reward_module_that_dies_of_a_signal_is_said_in_one_line(run_dir, capfd, monkeypatch):
    Path("deadly_reward.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert main([*RESUME, "run.name=new", "reward.name=deadly_reward:f"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("run failed: grader") and "SIGKILL" in lines[0]


def test_an_export_does_not_replace_the_model_that_the_run_began_with(run_dir, capfd, model):
    checkpoint = run_dir / "checkpoints" / "step_000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"format": 1, "files": {}}')
    before = sorted(path.name for path in model.iterdir())
    refused(capfd, ["export", "runs/r", "--out", str(model)], "the run began with")
    assert sorted(path.name for path in model.iterdir()) == before
