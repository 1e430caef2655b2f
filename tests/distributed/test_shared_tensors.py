"""`Control.open` and `share_tensors` over a real gloo group of two processes."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TORCH_RANK = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from alphamed.cluster.control import Control
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
given = [torch.arange(5), torch.tensor([[True, False, True]]), torch.empty(0), torch.tensor([1.5, -2.25]),
         torch.arange(12, dtype=torch.int64).reshape(3, 4).T]
with Control.open(dist.group.WORLD, folder) as control:
    got = control.share_tensors(given if rank == 0 else None)
    assert control.share_tensors([] if rank == 0 else None) == []
    control.everywhere("comparing", lambda: None)
for a, b in zip(given, got, strict=True):
    assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
"""


def test_tensors_of_rank_0_on_every_rank(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TORCH_RANK, str(rank), str(tmp_path)], env=environment) for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=600) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
