"""Links through shared memory, between threads and between processes."""

import gc
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alphamed.weights import shared_memory
from alphamed.weights.links import host_store
from alphamed.weights.shared_memory import SLOTS, PeerTimeout, SharedMemoryReceiver, SharedMemorySource

CPU = torch.device("cpu")
DEADLINE_S = 900.0
SOON, LATE = timedelta(seconds=0.3), timedelta(seconds=DEADLINE_S)


def open_link(receivers, slot_bytes=4096, deadline_s=DEADLINE_S):
    """Both ends of a link, in threads, as [source, receiver 1, receiver 2, ...]."""
    store = dist.HashStore()
    with ThreadPoolExecutor(1 + receivers) as threads:
        source = threads.submit(SharedMemorySource, store, "l", receivers, slot_bytes, CPU, deadline_s)
        ends = [threads.submit(SharedMemoryReceiver, store, "l", rank, CPU, deadline_s) for rank in range(1, receivers + 1)]
        return [end.result(DEADLINE_S) for end in (source, *ends)]


def test_every_receiver_gets_every_bucket_in_turn():
    generator = torch.Generator().manual_seed(0)
    sizes = (4096, 1, 77, 5000, 4096, 9, 10)  # more than there are slots, and larger than a page
    sent = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    sent += [torch.randn(33, generator=generator), torch.randn(64, generator=generator).bfloat16()]
    source, *receivers = open_link(3, slot_bytes=5000)

    def send():
        for bucket in sent:
            scratch = bucket.clone()
            source.broadcast(scratch, LATE)
            scratch.zero_()  # it may be reused at once
        return source.broadcast(sent[0], LATE).wait(LATE)

    def receive(receiver):
        received = [torch.empty_like(bucket) for bucket in (*sent, sent[0])]
        arrivals = [receiver.broadcast(flat, LATE) for flat in received]
        for arrival in arrivals:
            arrival.wait(LATE)
        return received

    with ThreadPoolExecutor(4) as threads:
        sending = threads.submit(send)
        for received in threads.map(receive, receivers, timeout=DEADLINE_S):
            assert all(map(torch.equal, received, (*sent, sent[0])))
        sending.result(DEADLINE_S)


def test_no_bucket_is_overwritten_before_all_have_taken_it():
    source, quick, slow = open_link(2)
    for number in range(SLOTS):
        source.broadcast(torch.full((8,), number), LATE)
        quick.broadcast(torch.empty(8, dtype=torch.int64), LATE).wait(SOON)
    with pytest.raises(RuntimeError, match="link l: member 2 did not take bucket 0 in time"):
        source.broadcast(torch.full((8,), 9), SOON)
    late = torch.empty(8, dtype=torch.int64)
    for number in range(SLOTS):
        slow.broadcast(late, LATE).wait(SOON)
        assert late.tolist() == [number] * 8


def test_a_bucket_that_does_not_come_is_named():
    source, receiver = open_link(1)
    with pytest.raises(RuntimeError, match="link l: bucket 0 did not come in time"):
        receiver.broadcast(torch.empty(8), LATE).wait(SOON)
    del source
    with pytest.raises(RuntimeError, match="link l: bucket 0 did not come: the other end has been closed"):
        receiver.broadcast(torch.empty(8), LATE).wait(LATE)


def test_a_member_that_does_not_join_is_named():
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as threads:
        source = threads.submit(SharedMemorySource, store, "l", 2, 4096, CPU, 0.5)
        SharedMemoryReceiver(store, "l", 2, CPU, DEADLINE_S)
        with pytest.raises(PeerTimeout, match="link l: member 1 did not join in time") as caught:
            source.result(DEADLINE_S)
    assert caught.value.members == (1,)


def test_a_process_that_says_nothing_keeps_nobody_out():
    """Nor one that says what is no member."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        source = threads.submit(SharedMemorySource, store, "l", 1, 4096, CPU, DEADLINE_S)
        store.wait(["address"], LATE)
        silent, wrong = (socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
        with silent, wrong:
            for peer in (silent, wrong):
                peer.connect("\0" + store.get("address").decode())
            wrong.send(shared_memory.NUMBER.pack(7))
            receiver = SharedMemoryReceiver(store, "l", 1, CPU, DEADLINE_S)
            source.result(DEADLINE_S).broadcast(torch.arange(5), LATE)
            flat = torch.empty(5, dtype=torch.int64)
            receiver.broadcast(flat, LATE).wait(LATE)
            assert flat.tolist() == [0, 1, 2, 3, 4]


def test_processes_of_other_users_are_not_let_in(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(shared_memory.os, "getuid", lambda: 54321)
    with ThreadPoolExecutor(1) as threads:
        source = threads.submit(SharedMemorySource, store, "l", 1, 4096, CPU, 0.5)
        with pytest.raises(RuntimeError, match="link l: member 1 could not join"):
            SharedMemoryReceiver(store, "l", 1, CPU, DEADLINE_S)
        with pytest.raises(RuntimeError, match="member 1 did not join in time"):
            source.result(DEADLINE_S)


def test_a_closed_link_leaves_nothing():
    def left():
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("/memfd:alphamed")

    gc.collect()  # tracebacks of other tests hold links in cycles
    before = left()
    ends = open_link(2)
    assert left()[1] == before[1] + 3
    del ends
    assert left() == before


RECEIVER = """
import sys, time, torch
from datetime import timedelta
from alphamed.weights.links import reach_store
from alphamed.weights.shared_memory import SharedMemoryReceiver
receiver = SharedMemoryReceiver(reach_store("127.0.0.1", int(sys.argv[1]), 900), "l", 1, torch.device("cpu"), 900)
flat = torch.empty(1000)
receiver.broadcast(flat, timedelta(seconds=900)).wait(timedelta(seconds=900))
print(float(flat.sum()), flush=True)
time.sleep(6000)
"""


def test_the_death_of_a_receiving_process_is_noticed_at_once():
    store, port = host_store("127.0.0.1", DEADLINE_S)
    child = subprocess.Popen([sys.executable, "-c", RECEIVER, str(port)], stdout=subprocess.PIPE, text=True)
    try:
        source = SharedMemorySource(store, "l", 1, 4096, CPU, 600.0)
        transfer = source.broadcast(torch.arange(1000.0), LATE)
        assert float(child.stdout.readline()) == 499500
        transfer.wait(LATE)
        pending = source.broadcast(torch.zeros(1000), LATE)
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="link l: member 1 did not take bucket 1: Connection reset by peer"):
            pending.wait(timedelta(days=1))  # not its deadline
        child.wait(DEADLINE_S)
        with pytest.raises(RuntimeError, match="link l: member 1 is gone"):
            source.broadcast(torch.zeros(1000), LATE)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
