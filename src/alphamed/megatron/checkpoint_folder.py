"""The checkpoints of a run on the disk: which one is the latest, how one becomes visible, which ones are kept.

    checkpoints/latest            name of the newest complete checkpoint, replaced atomically
    checkpoints/best.json         the step that did best on the development set, and how well; its checkpoint is kept
    checkpoints/step_000010/      complete: a folder has this name only after all in it was flushed to the disk
    checkpoints/.step_000020.*    being written or being deleted; ignored, cleared by the next save

A checkpoint's `manifest.json` holds the run's state, what the checkpoint was made from, size and digest of every file. Only
one process (rank 0) writes here. No torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alphamed.cluster.cluster_job import on_host
from alphamed.errors import ConfigError

LATEST, BEST, MANIFEST = "latest", "best.json", "manifest.json"
FORMAT = 1
_COMPLETE = re.compile(r"step_(\d{6,})")


class CheckpointError(ConfigError):
    """A checkpoint cannot be written or read: one line naming the folder, the problem and the fix. `damage` is what is wrong with
    its files, where that is the problem."""

    damage: str | None = None


def folder_of(directory: Path, step: int) -> Path:
    return directory / f"step_{step:06d}"


def partial_of(directory: Path, step: int) -> Path:
    """Where checkpoint `step` is written before it is complete."""
    return directory / f".step_{step:06d}.partial"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [path for path in _named_as_complete(directory) if (path / MANIFEST).is_file()]


def latest(directory: Path) -> Path | None:
    """The checkpoint to continue from: the one `latest` names, or else the newest complete one; None where there is
    none."""
    present, named = complete(directory), _latest_name(directory)
    return next((path for path in present if path.name == named), present[-1] if present else None)


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in the order in which a start tries them: the one `latest` names, then the newest first. Also those that
    have lost their manifest, which are damaged and no reason to start again in silence."""
    named, newest = _latest_name(directory), _named_as_complete(directory)
    newest.reverse()
    return sorted(newest, key=lambda folder: folder.name != named)


def _named_as_complete(directory: Path) -> list[Path]:
    """The folders with the name of a complete checkpoint, oldest first."""
    if not directory.is_dir():
        return []
    by_step = [(int(match[1]), path) for path in directory.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(by_step)]


def _latest_name(directory: Path) -> str | None:
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def best(directory: Path) -> Path | None:
    """The complete checkpoint that did best on the development set so far; None where none was marked."""
    marked = _marked(directory)
    folder = folder_of(directory, marked["step"]) if marked else None
    return folder if folder in complete(directory) else None


def offer_best(directory: Path, step: int, accuracy: float, questions: int, asked: str) -> bool:
    """Mark the checkpoint of `step` as the best where it is complete and more accurate than the one marked. A tie keeps the
    earlier one; accuracy on other questions (`asked` is their hash) is not comparable, and is replaced. Returns whether it was
    marked."""
    before = _marked(directory) if best(directory) else None
    better = before is None or before["asked"] != asked or accuracy > before["accuracy"]
    if not better or folder_of(directory, step) not in complete(directory):
        return False
    _write(
        directory / f".{BEST}",
        json.dumps({"step": step, "accuracy": accuracy, "questions": questions, "asked": asked}) + "\n",
    )
    (directory / f".{BEST}").replace(directory / BEST)
    return True


def _marked(directory: Path) -> dict[str, Any] | None:
    try:
        marked = json.loads((directory / BEST).read_text(encoding="utf-8"))
        return {"step": int(marked["step"]), "accuracy": float(marked["accuracy"]), "asked": marked.get("asked")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {directory / BEST}: cannot be read ({error}); remove it, the best one is then "
            f"chosen among those to come"
        ) from None


def begin(directory: Path, step: int, needed_bytes: int) -> Path:
    """An empty folder to write checkpoint `step` into; leftovers of killed saves are cleared. Raises CheckpointError
    where the disk has less room than `needed_bytes`."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".step_*"):
        shutil.rmtree(leftover)
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise CheckpointError(
            f"checkpoint {folder_of(directory, step)}: needs {_size(needed_bytes)}, {_size(free)} are free there{on_host()}; "
            f"make room or lower checkpoint.keep"
        )
    partial = partial_of(directory, step)
    partial.mkdir()
    return partial


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def discard(partial: Path) -> None:
    """Delete what was written of a checkpoint that cannot be completed."""
    shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, step: int, contents: Mapping[str, Any], keep: int, digests: Mapping[str, str]) -> Path:
    """Complete the folder with its manifest (`digests`: of each of its files), give it its name, point `latest` to it. Then
    delete all but the newest `keep` checkpoints up to this step and the best one, and those of later steps: the run went back to
    before them."""
    directory = partial.parent
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    missing = sorted(sizes.keys() - digests.keys())
    assert not missing, f"{missing} in {partial} have no digest: another version of Megatron-Core names files in another way"
    _write(
        partial / MANIFEST, json.dumps({"format": FORMAT, **contents, "files": sizes, "digests": digests}, indent=1) + "\n"
    )
    for name in sizes:
        _flush(partial / name)
    _flush(partial)
    folder, best_folder = folder_of(directory, step), best(directory)
    if best_folder and best_folder >= folder:  # of a past that is gone: this step is done again
        (directory / BEST).unlink()
    _delete(folder)  # of an earlier attempt at the same step
    partial.rename(folder)
    _write(directory / f".{LATEST}", folder.name + "\n")
    (directory / f".{LATEST}").replace(directory / LATEST)
    _flush(directory)
    everything = complete(directory)
    here = everything.index(folder)
    older = [other for other in everything[: max(0, here + 1 - keep)] if other != best_folder]
    for other in older + everything[here + 1 :]:
        _delete(other)
    return folder


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their size. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder}: has format {manifest['format']}, this version reads {FORMAT}; "
                f"continue it with the version that wrote it"
            )
        for name, size in manifest["files"].items():
            present = (folder / name).stat().st_size if (folder / name).is_file() else None
            if present != size:
                raise broken(folder, f"{name} {'is gone' if present is None else f'has {present} bytes, not {size}'}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise broken(folder, f"{MANIFEST}: {type(e).__name__}: {' '.join(str(e).split())}") from None
    return manifest


def broken(folder: Path, problem: str) -> CheckpointError:
    """The error of a checkpoint that cannot be read, with what to do."""
    others = [path.name for path in complete(folder.parent) if path != folder]
    then = f"the run then continues from {others[-1]}" if others else "the run then starts again"
    error = CheckpointError(f"checkpoint {folder}: is damaged ({problem}); delete that folder, {then}")
    error.damage = problem
    return error


def _delete(folder: Path) -> None:
    """Take the name away first, so that a folder that is half deleted is never taken for complete."""
    if folder.exists():
        going = folder.parent / f".{folder.name}.deleted"
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk and not only in the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
