"""Megatron's torch_dist checkpoint format, written by this process and its main thread.

Megatron forks its writers and starts a manager process that outlives the save. Rank 0 holds Ray's threads, which a fork
does not survive, and a run must leave no process behind.
"""

from __future__ import annotations

import queue
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from alphamed.files import transfer_deadline_s, within_deadline


class InProcessSave(TorchDistSaveShardedStrategy):
    """The strategy to hand to `dist_checkpointing.save`; one file per rank."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)

    def async_save(self, sharded_state_dict, checkpoint_dir):
        filesystem_async._results_queue = queue.Queue()  # what would be the manager process's queue
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:  # nothing to write on this rank
            return request
        assert isinstance(request.async_fn, partial), "another version of Megatron-Core: it writes in another way"
        transforms, _ = request.async_fn.args
        return request._replace(async_fn=partial(_write_files, transforms))


def _write_files(transforms: list, rank: int, buckets: list, results: queue.Queue) -> None:
    """Write this rank's files one after another and hand over what was written, or the first error."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        outcome, running = queue.Queue(), queue.Queue()
        running.put(number)
        path, _, (_, tensors) = bucket
        # its types name queues between processes, it calls what any queue has
        write = partial(
            filesystem_async.FileSystemWriterAsync.write_preloaded_data,
            transforms,
            number,
            bucket,
            outcome,  # pyright: ignore[reportArgumentType]
            running,  # pyright: ignore[reportArgumentType]
            use_fsync=True,
        )
        try:
            within_deadline(path, "writing a checkpoint", write, transfer_deadline_s(sum(t.nbytes for _, t in tensors)))
        except TimeoutError as error:
            results.put(error)
            return
        _, written[number] = outcome.get_nowait()
        if isinstance(written[number], Exception):
            results.put(written[number])
            return
    results.put(written)
