"""What `fork_server` imports before it forks: vLLM's EngineCore with its worker for CPUs, and what is mixed into that."""

from importlib import import_module

import setproctitle

from alphamed.imports import quick_imports
from alphamed.rollout.spec import UNUSED_BY_VLLM

MODULES = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "alphamed.weights.receiver")

setproctitle.getproctitle()  # finds where titles are written, which it cannot once variables have been set
with quick_imports(*UNUSED_BY_VLLM):
    for name in MODULES:
        import_module(name)
