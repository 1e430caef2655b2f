"""Signs of life of a run, for `alphamed status`: rank 0 writes every few seconds what it is doing and when it last heard from each
rank, engine and the reward process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from alphamed.cluster.cluster_job import HOST_VARIABLE

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PULSE_FILE = "pulse.json"
BEAT_S = 5.0


class Pulse:
    """A context manager. `ranks()` gives the seconds since the last message of each rank, by name; `activity()` what the run does."""

    def __init__(self, run_dir: Path, ranks: Callable[[], Mapping[str, float]], activity: Callable[[], str]):
        self._path = run_dir / PULSE_FILE
        self._ranks, self._activity = ranks, activity
        self._actors: list[tuple[str, ActorHandle]] = []
        self._answered: dict[str, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._over.set()
        self._thread.join(2 * BEAT_S)

    def watch(self, actors: Sequence[tuple[str, ActorHandle]]) -> None:
        """From now on these actors are checked for being alive, too."""
        self._answered = {name: time.time() for name, _ in actors}
        self._actors = list(actors)

    def _beat(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            with contextlib.suppress(Exception):  # Ray going down, a full disk: the run itself reports what is wrong
                self._ask_actors()
            with contextlib.suppress(OSError):
                self._write()
            self._over.wait(max(0.1, BEAT_S - (time.monotonic() - began)))

    def _ask_actors(self) -> None:
        import ray

        calls: dict[Any, str] = {actor.__ray_ready__.remote(): name for name, actor in self._actors}
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=BEAT_S - 1) if calls else ([], [])
        for call in ready:
            with contextlib.suppress(Exception):
                ray.get(call)
                self._answered[calls[call]] = time.time()

    def _write(self) -> None:
        now = time.time()
        heard = {name: now - age for name, age in self._ranks().items()} | self._answered
        text = json.dumps(
            {
                "time": now,
                "host": os.environ.get(HOST_VARIABLE) or socket.gethostname(),
                "pid": os.getpid(),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                "activity": self._activity(),
                "heard": heard,
            }
        )
        draft = self._path.with_suffix(".tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self._path)
