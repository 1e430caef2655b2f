"""The weight files of a Hugging Face folder: which tensor is in which safetensors file, and whether all is there.

`check_weights` reads headers only, `require_finite` every value; neither imports torch, so a broken folder is refused before
any process is started.

The trainer reads the files that `weight_files` names. vLLM (load format "safetensors") reads whatever safetensors files lie
in the folder itself, those that an index does not name left out. A folder of which the two would read different files, or
different tensors of them, is refused.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphamed.errors import ConfigError
from alphamed.model.families import hf_shapes
from alphamed.model.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names of what can be trained
EXPONENTS = {"F32": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
"""How a value's bits are read, and the bits of its exponent: all of them are set in what is not finite, and only there."""
SMALL_BYTES = 1 << 30
"""Folders with more weights than this are not read through before a start, it would take from seconds to minutes."""
CHUNK = 1 << 24


class WeightFiles:
    """The open weight files of a folder; a context manager. Files are memory-mapped: only slices that are used are
    read.

    `framework` is safetensors' ("pt" gives torch tensors; "numpy" imports no torch and serves for headers).
    Raises ConfigError for missing or corrupt files.
    """

    def __init__(self, folder: Path, framework: str = "pt") -> None:
        self.folder, self.framework = Path(folder), framework
        self._stack, self._owner, self._file = ExitStack(), {}, {}

    def __enter__(self) -> WeightFiles:
        with ExitStack() as stack:
            for name, keys in weight_files(self.folder).items():
                handle = self._open(stack, name)
                present = set(handle.keys())
                for key in sorted(set(keys) - present):
                    raise _broken(self.folder / name, f"does not hold tensor {key!r}, which {INDEX} promises")
                for key in sorted(present & self._owner.keys()):
                    raise _broken(
                        self.folder,
                        f"tensor {key!r} is in {name} and in {self._file[key]}",
                        "remove one of them, or fetch the model again",
                    )
                self._owner |= dict.fromkeys(present, handle)
                self._file |= dict.fromkeys(present, name)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._owner.clear()
        self._file.clear()
        self._stack.close()

    def names(self) -> set[str]:
        return set(self._owner)

    def slice(self, name: str) -> Any:
        """A lazy view of one tensor: indexing it reads those rows or columns."""
        if name not in self._owner:
            raise _broken(self.folder, f"tensor {name!r} is missing")
        return self._owner[name].get_slice(name)

    def dtype(self, name: str) -> str:
        """Stored type in torch's spelling ("bfloat16"). Raises ConfigError where it cannot be trained."""
        stored = self.slice(name).get_dtype()
        if stored not in DTYPES:
            raise _broken(
                self.folder,
                f"tensor {name!r} has type {stored}; only {', '.join(DTYPES)} can be trained",
                "choose the unquantised model",
            )
        return DTYPES[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def _open(self, stack: ExitStack, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        try:
            return stack.enter_context(safe_open(path, framework=self.framework))
        except (SafetensorError, OSError) as e:
            raise _broken(path, f"is not a complete safetensors file ({' '.join(str(e).split())})") from None


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Name of every weight file and the tensors that the index promises of it. Raises ConfigError where there is none, one
    is missing, or it is open which are the model's."""
    if not folder.is_dir():
        raise ConfigError(f"model.path: {str(folder)!r}: no such folder; give a Hugging Face model folder")
    single, index = (folder / SINGLE).is_file(), folder / INDEX
    if not index.is_file():
        if not single:
            raise _broken(folder, f"holds neither {SINGLE} nor {INDEX}", "give a folder with safetensors weights")
        for other in sorted(file.name for file in folder.glob("*.safetensors") if file.name != SINGLE):
            raise _broken(
                folder,
                f"holds {SINGLE} and {other}, and no {INDEX} that names those of the model (engines would read both)",
                "move away the one that is not the model",
            )
        return {SINGLE: []}
    files = _indexed(index)
    if single and SINGLE not in files:
        raise _broken(
            folder, f"holds two sets of weights, {SINGLE} and those of {INDEX}", "remove the one that is not meant"
        )
    for name in files:
        if not (folder / name).is_file():
            raise _broken(folder, f"weight file {name!r}, which {INDEX} names, is missing")
    return files


def _indexed(index: Path) -> dict[str, list[str]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
        for key, name in weight_map.items():
            files[name].append(key)
        outside = [name for name in files if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise _broken(index, f"is no weight index ({type(e).__name__})") from None
    if not files:
        raise _broken(index, "names no weights")
    if outside:
        raise _broken(index, f"names the file {outside[0]!r}, which is not one of its own folder")
    return files


def has_weights(folder: Path) -> bool:
    """Whether a folder claims to hold weights (a plan does with its config.json alone)."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Refuse a folder whose tensors are not exactly those of `shape`: missing, left over, of another size or of a type
    that cannot be trained. Reads headers only. Raises ConfigError naming folder and tensor."""
    expected = hf_shapes(shape)
    with WeightFiles(folder, framework="numpy") as files:
        for name, size in expected.items():
            check_tensor(files, name, size)
        for name in sorted(files.names() - expected.keys()):
            if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                continue  # a tied model's copy (compared when loaded); a constant of old checkpoints
            raise _broken(
                folder,
                f"tensor {name!r} has no place in the {shape.family} model of config.json",
                "fix config.json or choose another model",
            )


def check_tensor(files: WeightFiles, name: str, size: tuple[int, ...]) -> None:
    """Refuse a tensor that is missing or not as config.json has it. Raises ConfigError."""
    stored = files.shape(name)
    if stored != size:
        raise _broken(
            files.folder,
            f"tensor {name!r} has the shape {list(stored)}, config.json means {list(size)}",
            "fix config.json or fetch the model again",
        )
    files.dtype(name)


def require_finite(folder: Path) -> None:
    """Read every value. Raises ConfigError naming the first tensor that holds one that is not finite."""
    import numpy as np

    for name in weight_files(folder):
        with (folder / name).open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start - 8))
        for tensor, about in header.items():
            if tensor == "__metadata__" or about["dtype"] not in EXPONENTS:
                continue
            kind, exponent = EXPONENTS[about["dtype"]]
            begin, end = about["data_offsets"]
            size = (end - begin) // np.dtype(kind).itemsize
            if size and _any_set(np.memmap(folder / name, kind, "r", start + begin, (size,)), exponent):
                raise not_finite(folder, tensor)


def _any_set(bits: np.ndarray, exponent: int) -> bool:
    return any(bool(((bits[at : at + CHUNK] & exponent) == exponent).any()) for at in range(0, len(bits), CHUNK))


def not_finite(folder: Path, tensor: str) -> ConfigError:
    return _broken(folder, f"{tensor} holds values that are not finite", "repair the model or fetch it again")


def _broken(path: Path, problem: str, fix: str = "fetch the model again") -> ConfigError:
    return ConfigError(f"model.path: {path}: {problem}; {fix}")
