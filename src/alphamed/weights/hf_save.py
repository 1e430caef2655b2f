"""Writing the trained model as a Hugging Face folder: every pipeline stage writes its own safetensors files.

The folder is written under a temporary name beside its target and renamed when it is whole, so a folder of the target's
name is always complete. Everything that is not a weight (configuration, tokenizer, chat template, licence) is copied
from the folder that the model came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from alphamed.model.shape import ModelShape
from alphamed.model.weight_files import INDEX, SINGLE, WeightFiles
from alphamed.records import Layout
from alphamed.weights.hf_io import hf_manifest, hf_tensors

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
MAX_FILE_BYTES = 2 << 30  # a stage's source holds one file's tensors in host memory while it is written


def save_hf(
    folder: Path,
    source: Path,
    chunks: Sequence[Module],
    shape: ModelShape,
    layout: Layout,
    tensor_group: dist.ProcessGroup | None,
    pipeline_group: dist.ProcessGroup | None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the model into `folder` (replaced if it exists), with the companions of the folder `source`.

    `dtype` None gives every tensor the type it has in `source`. All ranks call this; the first of those that
    hold the same take part, the others return at once. The folder is complete when rank 0 returns. Raises OSError on
    the stages' sources (tensor rank 0) if any stage could not write; then nothing is left behind and an older folder is untouched.
    """
    if not layout.first_replica:
        return
    export = _Export(Path(folder), Path(source), layout, pipeline_group)
    if layout.tensor_rank:
        for _ in hf_tensors(chunks, shape, layout, tensor_group):
            pass
        return
    try:
        export.attempt(export.prepare, dtype)
        tensors = hf_tensors(chunks, shape, layout, tensor_group)
        plan = export.attempt(export.plan, hf_manifest(chunks, shape), dtype, max_file_bytes) or []
        export.write(plan, tensors)
        export.attempt(export.finish)
        export.raise_failure()
    except BaseException:  # Ctrl-C, too
        export.remove_partial()
        raise


class _Export:
    """One stage's part of an export. After a failure the stage keeps taking part in the exchanges, without writing, so
    that no other rank waits for it; `attempt` and `raise_failure` do that bookkeeping."""

    def __init__(self, target: Path, source: Path, layout: Layout, group: dist.ProcessGroup | None) -> None:
        self.target, self.source, self.layout, self.group = target, source, layout, group
        self.partial = target.parent / f".{target.name}.partial"
        self.first = layout.pipeline_rank == 0
        self.failure: str | None = None
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0

    def attempt(self, action, *arguments) -> Any:
        """Run `action` unless any stage has failed, then share failures between the stages."""
        result, own = None, None
        if self.failure is None:
            try:
                result = action(*arguments)
            except (OSError, SafetensorError, ValueError) as e:  # sent to all stages, raised by raise_failure
                own = f"pipeline stage {self.layout.pipeline_rank}: {' '.join(str(e).split())}"
        self.failure = next(filter(None, self.exchange(self.failure or own)), None)
        return result

    def raise_failure(self) -> None:
        if self.failure is None:
            return
        raise OSError(f"export to {self.target} failed on {self.failure}; make room or choose another folder")

    def remove_partial(self) -> None:
        if self.first:
            shutil.rmtree(self.partial, ignore_errors=True)

    def exchange(self, value: Any) -> list[Any]:
        """`value` of every stage, in stage order."""
        if self.layout.pipeline == 1:
            return [value]
        gathered = [None] * self.layout.pipeline
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def prepare(self, dtype: torch.dtype | None) -> None:
        """The first stage's source makes the temporary folder and copies what is not a weight."""
        if not self.first:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        for pattern in COMPANIONS:
            for path in sorted(self.source.glob(pattern)):
                if path.is_file():
                    shutil.copyfile(path, self.partial / path.name)
        if dtype is not None:
            path = self.partial / "config.json"
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree["torch_dtype" if "torch_dtype" in tree else "dtype"] = str(dtype).removeprefix("torch.")
            path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")

    def plan(
        self, manifest: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype | None, max_file_bytes: int
    ) -> list[list[tuple[str, torch.dtype]]]:
        """This stage's tensors, with the types they are written in, grouped into files of at most `max_file_bytes` (or
        of a single larger tensor)."""
        files, room = [], 0
        with WeightFiles(self.source, framework="numpy") as stored:
            for name, size in manifest:
                kind = dtype or getattr(torch, stored.dtype(name))
                length = torch.Size(size).numel() * kind.itemsize
                if length > room or not files:
                    files.append([])
                    room = max_file_bytes
                files[-1].append((name, kind))
                room -= length
        return files

    def write(self, plan: list[list[tuple[str, torch.dtype]]], tensors) -> None:
        """Write this stage's files; take every tensor, also after a failure, for the tensor ranks gather them
        together."""
        counts = self.exchange(len(plan))
        number, total = sum(counts[: self.layout.pipeline_rank]), sum(counts)
        for names in plan:
            number += 1
            file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            held = {}
            for name, kind in names:
                exported, tensor = next(tensors)
                assert exported == name, f"planned {name}, got {exported}"
                if self.failure is None:
                    held[name] = tensor.to("cpu", kind).contiguous()
            if self.failure is None:
                self._write_file(file, held)
        for _ in tensors:
            pass
        results = self.exchange((self.failure, self.weight_map, self.total_bytes))
        self.failure = next(filter(None, (failure for failure, _, _ in results)), None)
        self.weight_map = {name: file for _, part, _ in results for name, file in part.items()}
        self.total_bytes = sum(length for _, _, length in results)

    def _write_file(self, file: str, tensors: dict[str, Tensor]) -> None:
        try:
            save_file(tensors, self.partial / file, metadata={"format": "pt"})
            _flush(self.partial / file)
        except (OSError, SafetensorError) as e:  # kept until all stages have passed their collectives
            self.failure = f"pipeline stage {self.layout.pipeline_rank}: {file}: {' '.join(str(e).split())}"
            return
        self.weight_map |= dict.fromkeys(tensors, file)
        self.total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """The first stage's source writes the index and gives the folder its name."""
        if not self.first:
            return
        if SINGLE not in self.weight_map.values():
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(self.weight_map.items()))}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _flush(self.partial)
        older = self.target.parent / f".{self.target.name}.older"
        shutil.rmtree(older, ignore_errors=True)
        if self.target.exists():
            self.target.rename(older)
        self.partial.rename(self.target)
        shutil.rmtree(older, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the file (or the folder's entries) on the disk, not only in the cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
