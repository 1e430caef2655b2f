"""The limits that control groups (version 1 and 2) put on this process: cores and memory, read below any root folder.

A limit of any group between the root and the process's own holds, so the smallest counts. Container runtimes set them on a
parent, batch systems on the job's or the step's group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Limits:
    """`cores`: CPU seconds per second, a fraction; `memory_bytes`: at most; `memory_left_bytes`: until the tightest group is
    full. None where no group sets a limit."""

    cores: float | None = None
    memory_bytes: int | None = None
    memory_left_bytes: int | None = None


def limits(root: Path = Path("/"), process: str = "self") -> Limits:
    """The limits of a process, by root/proc/PROCESS/{cgroup,mountinfo} and the folders that these name. Limits that cannot
    be read are none."""
    cores, memory, left = [], [], []
    with contextlib.suppress(OSError, ValueError):
        for version, controllers, folder in _groups(root, process):
            if version == 2 or "cpu" in controllers:
                cores += _cpu_v2(folder) if version == 2 else _cpu_v1(folder)
            if version == 2 or "memory" in controllers:
                for limit, used in (_memory_v2 if version == 2 else _memory_v1)(folder):
                    memory.append(limit)
                    left.append(max(0, limit - used))
    return Limits(min(cores, default=None), min(memory, default=None), min(left, default=None))


def _groups(root: Path, process: str) -> Iterator[tuple[int, set[str], Path]]:
    """(version, controllers, folder) of every group that the process is in, its own first and the mounted root last."""
    proc = root / "proc" / process
    mounts = list(_mounts(root, (proc / "mountinfo").read_text(errors="replace")))
    for line in (proc / "cgroup").read_text(errors="replace").splitlines():
        number, names, place = line.split(":", 2)
        controllers = set(names.split(",")) if names else set()
        for version, mounted, top, folder in mounts:
            if (version == 2) != (number == "0" and not names) or (version == 1 and not controllers & mounted):
                continue
            # in a container the mount shows a part of the tree: `top` is where that begins
            inside = place if top == "/" else place.removeprefix(top)
            parts = [part for part in inside.split("/") if part]
            if ".." in parts:  # outside the namespace: what is mounted is all there is to see
                parts = []
            own = folder.joinpath(*parts)
            for group in (own, *list(own.parents)[: len(parts)]):
                if group.is_dir():
                    yield version, controllers, group
            break  # the same tree mounted twice has the same values


def _mounts(root: Path, mountinfo: str) -> Iterator[tuple[int, set[str], str, Path]]:
    """(version, mount options, the part of the tree, folder) of each control group mount. See proc(5) for the fields."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) >= 5 and kind and kind[0] in ("cgroup", "cgroup2"):
            options = set(kind[2].split(",")) if len(kind) > 2 else set()
            yield 2 if kind[0] == "cgroup2" else 1, options, fields[3], root / fields[4].replace("\\040", " ").lstrip("/")


def _cpu_v2(folder: Path) -> list[float]:
    quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
    return [] if quota == "max" else [int(quota) / int(period or 100_000)]


def _cpu_v1(folder: Path) -> list[float]:
    quota, period = (int(_read(folder / f"cpu.cfs_{name}_us") or -1) for name in ("quota", "period"))
    return [quota / period] if quota > 0 and period > 0 else []


def _memory_v2(folder: Path) -> list[tuple[int, int]]:
    """(limit, used); a group above memory.high is throttled, so that it is a limit too. Its page cache can go."""
    values = [_read(folder / f"memory.{name}") for name in ("max", "high")]
    set_limits = [int(value) for value in values if value and value != "max"]
    used = int(_read(folder / "memory.current") or 0) - _field(folder / "memory.stat", "inactive_file")
    return [(min(set_limits), used)] if set_limits else []


def _memory_v1(folder: Path) -> list[tuple[int, int]]:
    limit = _read(folder / "memory.limit_in_bytes")
    if not limit or int(limit) < 0 or int(limit) >= 1 << 62:  # "no limit" is 2^63 rounded down to pages
        return []
    used = int(_read(folder / "memory.usage_in_bytes") or 0) - _field(folder / "memory.stat", "total_inactive_file")
    return [(int(limit), used)]


def _read(file: Path) -> str | None:
    try:
        return file.read_text().strip()
    except OSError:  # the root group has no such file
        return None


def _field(file: Path, name: str) -> int:
    for line in (_read(file) or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
