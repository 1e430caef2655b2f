"""The deadline of collectives while ranks wait for storage: for all groups, and only while it lasts."""

import multiprocessing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from alphamed.megatron.runtime import collective_deadline

LONG_S = 600.0


def rank_of_two(rank: int, file: str, answers, failed) -> None:
    """Rank 0 is not there before rank 1 has given up."""
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2)
    groups = [None, dist.new_group([0, 1], backend="gloo")]
    dist.barrier()
    if rank == 0:
        failed.wait(LONG_S)
        return
    for group in groups:
        with collective_deadline(1.0, LONG_S):
            try:
                dist.barrier(group)
                answers.put("passed")
            except RuntimeError as error:
                answers.put(str(error))
    failed.set()


def test_a_collective_in_any_group_ends_at_the_deadline_that_is_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers, failed = context.Queue(), context.Event()
    ranks = [context.Process(target=rank_of_two, args=(rank, str(tmp_path / "s"), answers, failed)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [answers.get(timeout=LONG_S) for _ in range(2)]
    for process in ranks:
        process.join(LONG_S)
    assert all("imed out" in answer for answer in results), results


def test_afterwards_collectives_have_their_own_deadline_again():
    def timeouts():
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    try:
        groups = [dist.group.WORLD, dist.new_group([0], backend="gloo", timeout=timedelta(seconds=7))]
        with pytest.raises(OSError), collective_deadline(300, 7):
            assert timeouts() == [300, 300]
            raise OSError("the disk is full")
        assert timeouts() == [7, 7]
    finally:
        dist.destroy_process_group()
