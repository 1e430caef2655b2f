"""Pushes through real links, gloo and shared memory, without vLLM: ranks and engine workers are threads, a model is a
dictionary."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_hf_io import megatron_like
from test_sync_routes import SMALL, engine_like, fill, vllm_parameter

from alphamed.cluster.control import Control
from alphamed.cluster.control_links import accept, join, listen
from alphamed.config.loading import build_config
from alphamed.config.sections import ParallelConfig
from alphamed.errors import RunFailed
from alphamed.model.families import hf_shapes
from alphamed.records import Layout
from alphamed.rollout.failures import ActorProcess
from alphamed.weights import receiver
from alphamed.weights.hf_io import hf_parts
from alphamed.weights.links import GroupChannel
from alphamed.weights.probe import Probe
from alphamed.weights.receiver import WeightReceiver
from alphamed.weights.routes import make_plan
from alphamed.weights.sender import late_workers
from alphamed.weights.shared_memory import PeerTimeout, SharedMemoryReceiver
from alphamed.weights.sync import WeightSync, choose_transport
from alphamed.weights.sync_plan import Link, Slice, SyncPlan, Wire, members

DEADLINE_S = 900


transport = "auto"


@pytest.fixture(params=["gloo", "ipc"], autouse=True)
def over(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "transport", request.param)


def config(dtype="fp32", bucket_bytes=64, mode="gather"):
    return build_config(
        {
            "model": {"path": "m", "dtype": "fp32"},
            "data": {"train": ["d.jsonl"]},
            "cluster": {"device": "cpu"},
            "sync": {"bucket_bytes": bucket_bytes, "mode": mode, "transport": transport},
            "rollout": {"dtype": dtype},
        }
    )


class Source:
    """The weights of one stage's sender, or of a tensor rank that only takes part in the gathering. `everything`: the
    tensors of each stage, whose senders are ranks 0, 1, ..."""

    exports = True

    def __init__(self, *everything, rank=0, stage=0):
        self._stages, self._tensors, self.rank = everything, everything[stage], rank
        self.scores = rank == len(everything) - 1
        self.exported = 0

    def plan(self, engines, wire):
        workers = members(engines)
        return SyncPlan(
            wire.mode,
            tuple(
                Link(
                    f"stage {stage}",
                    stage,
                    stage,
                    tuple(range(len(workers))),
                    wire.transport,
                    wire.dtype,
                    wire.bucket_bytes,
                    tuple(Slice.all_of(name, tuple(tensor.shape)) for name, tensor in tensors.items()),
                )
                for stage, tensors in enumerate(self._stages)
            ),
            workers,
        )

    def tensors(self):
        for name, tensor in self._tensors.items():
            self.exported += 1
            yield name, tensor if self.rank < len(self._stages) else None


class Worker(WeightReceiver):
    def __init__(self, rank):
        self.rank, self.device = rank, torch.device("cpu")
        self.model: Any = self
        self.loaded, self.order, self.refuses, self.in_context = {}, [], None, False

    def get_model(self):  # vLLM's: what the runner holds may be a wrapper
        return self.model

    def load_weights(self, named):
        assert self.in_context
        for name, tensor in named:
            if name == self.refuses:
                raise KeyError(name)
            self.loaded[name] = tensor.clone()
            self.order.append(name)


class Pool:
    """Engines with the methods that WeightSync calls, each call in a thread."""

    def __init__(self, *tensor_parallel, scores=()):
        self.tensor_parallel, self.address, self.epoch, self.version = tensor_parallel, "127.0.0.1", 1, 0
        self.on_this_machine = True
        self.scores, self.committed = scores, []
        self.start_engines()
        self._threads = ThreadPoolExecutor(8)

    def start_engines(self):
        self.workers = [[Worker(rank) for rank in range(size)] for size in self.tensor_parallel]
        self.engines = [SimpleNamespace(peer=ActorProcess(f"engine {i}")) for i in range(len(self.tensor_parallel))]

    def begin(self, method, arguments):
        return [self._threads.submit(getattr(self, method), engine, **own) for engine, own in enumerate(arguments)]

    def end(self, calls, what, deadline_s):
        return [call.result(DEADLINE_S) for call in calls]

    def call(self, method, arguments, what, deadline_s):
        return self.end(self.begin(method, arguments), what, deadline_s)

    def join(self, engine, **arguments):
        return self._all(engine, "alphamed_join", arguments)

    def receive(self, engine, **arguments):
        return self._all(engine, "alphamed_receive", arguments)

    def commit(self, engine, version):
        self.committed.append((engine, version))

    def score(self, engine, tokens, version):
        return self.scores[engine]

    def _all(self, engine, method, arguments):
        with ThreadPoolExecutor(8) as threads:
            return [
                call.result(DEADLINE_S)
                for call in [threads.submit(getattr(worker, method), **arguments) for worker in self.workers[engine]]
            ]


@pytest.fixture
def ranks(tmp_path):
    """Real controls of so many ranks, which are threads of this process: joined over their links, left at the end."""
    opened = []

    def joined(world=1):
        peers = [[]]
        if world > 1:
            listener, key = listen("127.0.0.1")
            with listener, ThreadPoolExecutor(world) as threads:
                first = threads.submit(accept, listener, world, DEADLINE_S)
                others = [threads.submit(join, listener.address, key, rank, DEADLINE_S) for rank in range(1, world)]
                peers = [first.result(DEADLINE_S), *([call.result(DEADLINE_S)] for call in others)]
        for rank, own in enumerate(peers):
            folder = tmp_path / f"{len(opened)}"
            folder.mkdir()
            opened.append(Control(None, rank, world, own, folder, DEADLINE_S, DEADLINE_S))
        return opened[-world:]

    yield joined
    with ThreadPoolExecutor(len(opened)) as threads:  # a rank that leaves waits a little for the others
        list(threads.map(lambda control: control.__exit__(None, None, None), opened))


@pytest.fixture
def control(ranks):
    return ranks()[0]


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    @contextmanager
    def loading_context(worker):
        worker.in_context = True
        yield
        worker.in_context = False

    monkeypatch.setattr(receiver, "loading_context", loading_context)
    monkeypatch.setattr(receiver, "begin_reload", lambda worker: None)
    monkeypatch.setattr(receiver, "end_reload", lambda worker: None)
    monkeypatch.setattr(receiver, "finalize_load", lambda worker: None)


def weights(prefix, sizes=(3, 4, 20, 2, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"{prefix}{i}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}


def test_every_worker_of_every_engine_gets_the_weights_and_the_next_version(control):
    tensors, pool = weights("w"), Pool(1, 2)
    sync = WeightSync(config(), Source(tensors), pool, control, version=6)
    assert sync.push() == 7 == pool.version
    tensors["w2"].add_(1)
    assert sync.push() == 8
    for worker in (worker for engine in pool.workers for worker in engine):
        assert worker.order == list(tensors) * 2
        assert all(torch.equal(worker.loaded[name], tensor) for name, tensor in tensors.items())
    assert sorted(pool.committed) == [(0, 7), (0, 8), (1, 7), (1, 8)]


def test_bf16_engines_get_rounded_weights(control):
    tensors, pool = weights("w"), Pool(1)
    WeightSync(config("bf16"), Source(tensors), pool, control).push()
    assert all(torch.equal(pool.workers[0][0].loaded[name], tensor.bfloat16()) for name, tensor in tensors.items())


def run_ranks(*syncs):
    """Push on all ranks; the value or error of each."""

    def push(sync):
        try:
            return sync.push()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(syncs)) as threads:
        return list(threads.map(push, syncs, timeout=DEADLINE_S))


def three_ranks(pool, controls):
    """Two stages; the second has a tensor rank that does not send."""
    first, second = weights("a"), weights("b", sizes=(30, 1), seed=1)
    sources = [Source(first, second), Source(first, second, rank=1, stage=1), Source(first, second, rank=2, stage=1)]
    return (
        first | second,
        sources,
        [WeightSync(config(), source, pool if rank == 0 else None, controls[rank]) for rank, source in enumerate(sources)],
    )


def test_two_stages_send_over_links_of_their_own(ranks):
    pool = Pool(2)
    tensors, sources, syncs = three_ranks(pool, ranks(3))
    assert run_ranks(*syncs) == [1, 1, 1]
    for worker in pool.workers[0]:
        # buckets of 16 elements, in turns: a2 has 20, b0 30 of them and is there when its second part has come
        assert worker.order == ["a0", "a1", "b0", "b1", "a2", "a3", "a4"]
        assert all(torch.equal(worker.loaded[name], tensor) for name, tensor in tensors.items())
    assert sources[2].exported == 2  # the export is a collective


def test_damage_on_a_second_stages_link_is_named(ranks, monkeypatch):
    pool = Pool(1, 1)
    _, _, syncs = three_ranks(pool, ranks(3))

    def damage(bucket, flat):
        if threading.current_thread() is victim and str(bucket).startswith("bucket 1 of stage 1"):
            flat.view(torch.uint8)[2] ^= 1
        return flat

    victim = None
    original = pool.workers[1][0].alphamed_receive

    def receive(**arguments):
        nonlocal victim
        victim = threading.current_thread()
        return original(**arguments)

    pool.workers[1][0].alphamed_receive = receive
    monkeypatch.setattr(receiver, "arrived", damage)
    first, *others = run_ranks(*syncs)
    assert isinstance(first, RunFailed) and first.component == "engine 1 worker 0"
    assert first.message == "received other weights than were sent: bucket 1 of stage 1 (b0 .. b1) at engine 1 worker 0"
    assert [str(other) for other in others] == [str(first)] * 2
    assert pool.committed == [] and pool.version == 0


def test_a_tensor_that_cannot_be_loaded_fails_the_push_but_leaves_no_sender_waiting(control):
    tensors, pool = weights("w"), Pool(1)
    pool.workers[0][0].refuses = "w1"
    source = Source(tensors)
    with pytest.raises(RuntimeError, match=r"loading bucket 0 of stage 0 \(w0 .. w1\) of version 1: KeyError: 'w1'"):
        WeightSync(config(), source, pool, control).push()
    assert source.exported == len(tensors) and pool.workers[0][0].order == ["w0"]


class ShardSource:
    """A tensor rank that sends what it holds."""

    exports = scores = True

    def __init__(self, model, truth, size, rank):
        self.rank, self._model, self._size = rank, model, size
        self._layout = Layout(size, tensor_rank=rank)
        self._chunk = megatron_like(model, self._layout)
        fill(self._chunk, model, truth, size, rank)

    def plan(self, engines, wire):
        return make_plan(self._model, ParallelConfig(tensor=self._size), engines, wire)

    def parts(self):
        return hf_parts([self._chunk], self._model, self._layout)


@pytest.mark.parametrize("trainer, engines", [(2, (2, 2)), (1, (2, 1)), (4, (2,))])
def test_tensor_ranks_send_their_own_shards_to_the_parameters_that_they_belong_to(ranks, trainer, engines):
    model = SMALL[2]
    generator = torch.Generator().manual_seed(3)
    truth = {name: torch.randn(size, generator=generator) for name, size in hf_shapes(model).items()}
    pool, controls = Pool(*engines), ranks(trainer)
    for engine in pool.workers:
        for worker in engine:
            worker.model = engine_like(model, len(engine), worker.rank)
    syncs = [
        WeightSync(
            config(bucket_bytes=4096, mode="direct"),
            ShardSource(model, truth, trainer, rank),
            pool if rank == 0 else None,
            controls[rank],
        )
        for rank in range(trainer)
    ]
    assert run_ranks(*syncs) == [1] * trainer
    assert sorted(pool.committed) == [(engine, 1) for engine in range(len(engines))]
    for engine in pool.workers:
        for worker in engine:
            for name, parameter in worker.model.named_parameters():
                module, _, leaf = name.rpartition(".")
                assert torch.equal(parameter, vllm_parameter(model, truth, len(engine), worker.rank, module, leaf)), name


def test_a_lost_receiver_breaks_the_link_and_the_export_is_carried_to_its_end(control):
    tensors, pool = weights("w"), Pool(1)
    source = Source(tensors)
    sync = WeightSync(config(), source, pool, control)
    sync.push()

    def gone(**_):
        pool.workers[0][0].alphamed_membership.channels.clear()  # what the death of its process does
        return {}

    pool.workers[0][0].alphamed_receive = gone
    with pytest.raises(RuntimeError, match="a weight link of trainer rank 0 broke"):
        sync.push()
    assert source.exported == 2 * len(tensors) and pool.version == 1


def test_the_links_are_built_again_when_an_engine_comes(control):
    tensors, pool = weights("w"), Pool(1)
    sync = WeightSync(config(), Source(tensors), pool, control)
    sync.push()
    pool.tensor_parallel, pool.epoch = (1, 1), 2
    pool.start_engines()
    tensors["w3"].add_(1)
    assert sync.push() == 2 == pool.version
    assert [list(engine[0].loaded) for engine in pool.workers] == [list(tensors)] * 2
    assert all(torch.equal(engine[0].loaded["w3"], tensors["w3"]) for engine in pool.workers)


def test_links_of_unequal_length_come_to_their_ends(ranks):
    """Stage 1 has 1 bucket, stage 0 has 8, the last of which is the largest; a worker takes them in turn."""
    pool, controls = Pool(1, 1), ranks(2)
    first, second = weights("a", sizes=(9,) * 7 + (16,)), weights("b", sizes=(3,), seed=1)
    syncs = [
        WeightSync(config(), Source(first, second, rank=rank, stage=rank), pool if rank == 0 else None, controls[rank])
        for rank in range(2)
    ]
    for version in (1, 2):
        assert run_ranks(*syncs) == [version] * 2
    for engine in pool.workers:
        assert engine[0].order[:3] == ["a0", "b0", "a1"]
        assert all(torch.equal(engine[0].loaded[name], tensor) for name, tensor in (first | second).items())


def test_a_worker_that_takes_nothing_is_named_and_not_one_that_waits_for_it(monkeypatch, control):
    """Shared memory can tell; a broadcast of gloo fails as a whole."""
    monkeypatch.setattr(sys.modules[__name__], "transport", "ipc")
    tensors, pool = weights("w"), Pool(1, 1)
    sync = WeightSync(config(), Source(tensors), pool, control)
    sync.push()
    monkeypatch.setattr(SyncPlan, "deadline_s", 5.0)
    stuck, original = threading.Event(), pool.receive
    pool.receive = lambda engine, **arguments: stuck.wait(DEADLINE_S) if engine == 0 else original(engine, **arguments)
    with pytest.raises(RunFailed) as caught:
        sync.push()
    stuck.set()
    assert caught.value.component == "engine 0 worker 0"
    assert "version 2 was not done in time: link stage 0: member 1 did not take bucket" in caught.value.message


def test_weights_go_through_shared_memory_where_they_can(monkeypatch, ranks):
    """`auto` on one machine; between machines gloo, and `ipc` is refused."""
    monkeypatch.setattr(sys.modules[__name__], "transport", "auto")
    tensors, pool = weights("w"), Pool(1)
    sync = WeightSync(config(), Source(tensors), pool, ranks()[0])
    sync.push()
    assert type(pool.workers[0][0].alphamed_membership.channels["stage 0"]) is SharedMemoryReceiver
    pool.on_this_machine, pool.epoch = False, 2
    sync.push()
    assert type(pool.workers[0][0].alphamed_membership.channels["stage 0"]) is GroupChannel
    pool.on_this_machine, pool.epoch = True, 3
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # the trainer itself is on two
    sync.push()
    assert type(pool.workers[0][0].alphamed_membership.channels["stage 0"]) is GroupChannel
    assert torch.equal(pool.workers[0][0].loaded["w3"], tensors["w3"])
    monkeypatch.setattr(sys.modules[__name__], "transport", "ipc")
    with pytest.raises(
        RunFailed, match="^sync.transport: ipc needs trainer and engines on one machine .*set it to auto"
    ) as caught:
        WeightSync(config(), Source(tensors), pool, ranks()[0]).push()
    assert caught.value.user_error


@pytest.mark.parametrize(
    "share_gpus, one_machine, chosen",
    [(False, True, "nccl"), (False, False, "nccl"), (True, True, "ipc"), (True, False, "gloo")],
)
def test_on_gpus_nccl_carries_weights_unless_members_share_one(share_gpus, one_machine, chosen):
    wanted = build_config(
        {"model": {"path": "m"}, "data": {"train": ["d.jsonl"]}, "cluster": {"device": "cuda", "share_gpus": share_gpus}}
    )
    assert choose_transport(wanted, one_machine) == chosen


# ------------------------------------------------------------------------------------------------------------------- probe
def test_the_probe_runs_once_and_names_the_engine_that_differs(ranks):
    asked = []

    def logprobs(tokens):
        asked.append(tokens)
        return [-1.0, -2.0]

    probe = Probe((5, 6, 7), logprobs)
    good = Pool(1, 1, scores=([-1.0, -2.0001], [-1.0, -2.0]))
    sync = WeightSync(config(), Source(weights("w")), good, ranks()[0], probe)
    sync.push()
    sync.push()
    assert asked == [(5, 6, 7)]
    bad = Pool(1, 1, scores=([-1.0, -2.0], [-1.0, -2.5]))
    with pytest.raises(
        RunFailed, match="engine 1: its log-probs of a fixed text differ .* by 0.25 in the mean.* 0.5 at most"
    ):
        WeightSync(config(), Source(weights("w")), bad, ranks()[0], probe).push()


def test_the_probe_is_cut_to_what_an_engine_holds(control):
    asked = []
    sync = WeightSync(
        config(),
        Source(weights("w")),
        Pool(1, scores=([0.0] * 3070,)),
        control,
        Probe(tuple(range(5000)), lambda tokens: asked.append(tokens) or [0.0] * 3070),
    )
    sync.push()
    assert asked == [tuple(range(1024 + 2048 - 1))]


# ---------------------------------------------------------------------------------------------------------------- late workers
@pytest.mark.parametrize("stages, named", [(1, ["engine 1 worker 0"]), (2, [])])
def test_a_late_worker_is_named_where_it_cannot_be_waiting_for_another_rank(stages, named):
    source = Source(*(weights(f"{stage}w") for stage in range(stages)))
    plan = source.plan((1, 1), Wire("gather", "ipc", "float32", 64))
    late = late_workers(plan, source.rank, PeerTimeout("stage 0", [2], "take bucket 3"))
    assert [str(worker) for worker in late] == named
    assert late_workers(plan, source.rank, RuntimeError("link stage 0: member 2 is gone")) == []
    assert late_workers(plan, source.rank, None) == []
