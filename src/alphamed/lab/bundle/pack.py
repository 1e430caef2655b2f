"""`alphamed bundle RUN`: configuration, provenance, hashes, metrics and evaluation of a run in one archive."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from alphamed import jsonl
from alphamed.config.loading import dump_config
from alphamed.config.schema import Config
from alphamed.data.attributes import ATTRIBUTES
from alphamed.data.output import write_all
from alphamed.errors import ConfigError
from alphamed.evaluation.regrade import COMPARISON
from alphamed.files import read_json_lines
from alphamed.lab.bundle.archive import write_archive
from alphamed.rundir import provenance
from alphamed.rundir.directory import config_of_run, finished_step
from alphamed.rundir.metrics import last_step, read_rows

CONFIG, DATA = "config.yaml", "data"
EVALUATIONS = ("evaluations", "eval")
"""Evaluations of the training itself, and those that `alphamed eval` wrote into the run."""
PLAIN = ("provenance.json", "metrics.jsonl", "questions.jsonl", "evaluations.jsonl", "study.json")
ANSWER_FIELDS = (
    "set",
    "benchmark",
    "variant",
    "id",
    "sample",
    "answer",
    "source",
    *(attribute.field for attribute in ATTRIBUTES),
    "letter",
    "outcome",
    "finish_reason",
    "tokens",
)
"""The fields of a graded answer without texts. The response is left out too: models repeat the question."""


def main(run_dir: Path, out: Path, with_questions: bool) -> int:
    """Write the bundle; returns the exit code. ConfigError for a folder that is not a run, DataError for a full disk."""
    if not out.name.endswith(".tar.gz"):
        raise ConfigError(f"--out: {str(out)!r} does not end in .tar.gz; give such a name")
    config = config_of_run(run_dir)
    for path in provenance.changed_files(run_dir, config.data.train):
        raise ConfigError(
            f"data.train: {path} is not the file that {run_dir} was trained on; put that file back (relative paths "
            f"count from where the run was started)"
        )
    entries = data_entries(config)
    manifest = manifest_of(run_dir, config, entries, with_questions)
    files = contents(run_dir, config, entries, with_questions)
    write_all({out: lambda path: write_archive(path, manifest, files)})
    texts = "with" if with_questions else "without"
    print(f"{out}: {len(files)} files of {run_dir}, {texts} question texts, {out.stat().st_size:,} bytes")
    if not manifest["finished"]:
        print(f"the run is at step {manifest['step']} of {config.run.last_step}: it is not finished")
    return 0


def manifest_of(
    run_dir: Path, config: Config, entries: Mapping[str, dict[str, Any]], with_questions: bool
) -> dict[str, Any]:
    """The manifest of a bundle without its list of files; nothing in it depends on when it is made."""
    record = provenance.read(run_dir)
    if record is None or not record["starts"]:
        raise ConfigError(f"{run_dir}: holds no provenance.json; give the directory of a run that has been started")
    last = record["starts"][-1]
    rows = read_rows(run_dir / "metrics.jsonl")
    return {
        "run": config.run.name,
        "step": last_step(rows),
        "finished": finished_step(run_dir) is not None,
        "questions": with_questions,
        "data": dict(entries),
        "model": {
            "path": config.model.path,
            "files": [entry | {"path": Path(entry["path"]).name} for entry in record["model"]],
        },
        "python": last["python"],
        "packages": last["packages"],
        "git": last["git"] and last["git"]["commit"],
        "diff_sha256": last["git"] and last["git"]["diff_sha256"],
    }


def data_entries(config: Config) -> dict[str, dict[str, Any]]:
    """Setting -> path as configured, size and SHA-256 of every file of questions or decisions that the run reads. Raises
    ConfigError where one is gone."""
    entries = {}
    for name, path in data_files(config).items():
        if not path.is_file():
            raise ConfigError(
                f"{name.rpartition('.')[0]}: {path} is not there; put it back, or give the command where the run was started"
            )
        entries[name] = provenance.file_entry(path) | {"file": data_name(name, path)}
    return entries


def data_files(config: Config) -> dict[str, Path]:
    """Setting and place (data.train.0) -> the file of questions or decisions that a configuration names there."""
    settings = {
        "data.train": config.data.train,
        "evaluation.files": config.evaluation.files,
        "evaluation.decisions": config.evaluation.decisions,
        "evaluation.development": (config.evaluation.development,) if config.evaluation.development else (),
    }
    return {f"{setting}.{number}": path for setting, paths in settings.items() for number, path in enumerate(paths)}


def data_name(entry: str, path: Path) -> str:
    """The name of such a file in the bundle."""
    return f"{DATA}/{entry}.{path.name}"


def contents(run_dir: Path, config: Config, entries: Mapping[str, dict[str, Any]], with_questions: bool) -> dict[str, bytes]:
    """Name in the bundle -> bytes, each file read once."""
    files = {CONFIG: dump_config(config).encode()}
    files |= {name: (run_dir / name).read_bytes() for name in PLAIN if (run_dir / name).is_file()}
    files |= {path.name: path.read_bytes() for path in run_dir.glob("uncommitted_*.patch")}
    for path in (path for folder in EVALUATIONS for path in (run_dir / folder).rglob("*.json*")):
        if path.suffix in (".json", ".jsonl"):  # else a partial file that a kill has left
            files[path.relative_to(run_dir).as_posix()] = path.read_bytes() if with_questions else _without_questions(path)
    if with_questions:
        report = run_dir / "report.html"
        files |= {report.name: report.read_bytes()} if report.is_file() else {}
        files |= {entry["file"]: Path(entry["path"]).read_bytes() for entry in entries.values()}
    return files


def _without_questions(path: Path) -> bytes:
    if path.suffix == ".jsonl":
        return without_texts(read_json_lines(path))
    return without_flips(path) if path.name == COMPARISON else path.read_bytes()


def without_flips(path: Path) -> bytes:
    """A comparison of `alphamed eval --against` with the ids of flipped questions, but nothing that quotes one."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for benchmark in tree["benchmarks"].values():
            benchmark["flipped"] = [{"id": flip["id"], "way": flip["way"]} for flip in benchmark["flipped"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: no comparison of `alphamed eval` ({type(error).__name__}: {error}); remove it, or make it again"
        ) from None
    return jsonl.encode(tree, indent=2) + b"\n"


def without_texts(items: Iterable[Mapping[str, Any]]) -> bytes:
    """Graded answers as JSONL with ids, letters and outcomes, but nothing that quotes a question."""
    rows = ({key: item[key] for key in ANSWER_FIELDS if key in item} for item in items)
    return b"".join(map(jsonl.line, rows))
