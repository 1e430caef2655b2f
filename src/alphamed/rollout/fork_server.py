"""The process that vLLM's EngineCore is forked from on CPU: it imports vLLM while the engine's actor does the same.

vLLM itself starts a new interpreter for EngineCore once the actor is ready: the same imports again, one after the other. A
fork of the actor would be quicker still, but would share its connections to Ray.
"""

from __future__ import annotations

import importlib.util
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from alphamed.cluster import processes

PRELOADED = "alphamed.rollout.preloaded"
LIBRARIES = {"libgomp": ("torch", ("../torch.libs", "lib")), "libtcmalloc": ("vllm", ("libs",))}
"""What vLLM's CPU platform, once it is imported, puts into LD_PRELOAD of the processes that it starts: library -> package, and
folders relative to it."""


def start() -> None:
    """Start the server, which imports vLLM while this process goes on. It ends with this process."""
    _preload_libraries()
    forkserver.set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


class Process(ForkServerProcess):
    """A fork of the server that gets the environment of this process as it is when it is started, and ends with it: Ray kills
    the children of an actor that ends, but not their children."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.update(self._environment)
        # the server ends when nobody holds this any more: neither the process that started it nor, by default, a fork
        os.close(forkserver._forkserver._forkserver_alive_fd)  # pyright: ignore[reportAttributeAccessIssue]  # not in typeshed
        processes.die_with_parent()
        super().run()


class Context(ForkServerContext):
    """In place of the context of multiprocessing that vLLM would choose."""

    Process = Process  # pyright: ignore[reportAssignmentType]  # typeshed declares the class itself, not a type


def _preload_libraries() -> None:
    """vLLM leaves out what is there already."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name, (package, folders) in LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        if name in preloaded or spec is None or spec.origin is None:
            continue
        files = [path for folder in folders for path in sorted((Path(spec.origin).parent / folder).glob(f"{name}*.so*"))]
        preloaded = ":".join([*map(str, files[:1]), *filter(None, [preloaded])])
    if preloaded:
        os.environ["LD_PRELOAD"] = preloaded
