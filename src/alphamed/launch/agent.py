"""torchrun with a memory: the same launcher, which also writes down which worker failed first and how.

`python -m alphamed.launch.agent RUN_DIR <arguments of torchrun>`. The summary that torchrun prints is left out: the
supervisor says in one line what happened.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from alphamed.imports import quick_imports

with quick_imports():
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from alphamed.cluster import narrow_store
from alphamed.cluster.cluster_job import HOST_VARIABLE
from alphamed.cluster.failure import WORKERS_FILE, DeadWorker, write_workers


def main(arguments: list[str]) -> int:
    run_dir = Path(arguments[0])
    narrow_store.apply()
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(arguments[1:]))
    except ChildFailedError as error:
        dead = [
            DeadWorker(
                rank=rank,
                pid=failure.pid,
                status=failure.exitcode,
                time_s=failure.timestamp,
                host=os.environ.get(HOST_VARIABLE, ""),
            )
            for rank, failure in error.failures.items()
        ]
        write_workers(run_dir / WORKERS_FILE, dead)
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
