"""Time of a weight push for several model sizes: tensor by tensor, in buckets, direct, over gloo and through shared memory;
beside a plain broadcast over gloo.

    .venv/bin/python benchmarks/weight_sync.py [--sizes 5M 100M 400M] [--tensor 2] [--engine-tensor 2] [--engines 1]

Processes of this machine stand for trainer ranks (`--tensor`, one pipeline stage) and engine workers; each uses one thread.
They run the project's own sending and receiving, in bf16, digests included except for `per-tensor`; a worker writes what it
gets into parameters laid out as vLLM's, without vLLM, whose own loading and packing come on top. `plain` is one tensor of
the model's size that nobody packs, digests or loads. Seconds are those of the slowest process, GB/s count the model's bytes
once. Direct may beat plain: a worker receives its own share only. Medians of `--repeats` after one that does not count.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn import Module, Parameter

from alphamed.config.sections import ParallelConfig
from alphamed.model.families import entries, shard_shape
from alphamed.model.shape import ModelShape
from alphamed.records import Layout
from alphamed.weights import links
from alphamed.weights.buckets import Assembly, box_of, digest, unpack
from alphamed.weights.cuts import needed
from alphamed.weights.hf_io import gathered, parts_of
from alphamed.weights.receiver import Membership, arrivals
from alphamed.weights.routes import make_plan
from alphamed.weights.sender import Sender, take_part
from alphamed.weights.sync_plan import Slice, SyncPlan, Wire
from alphamed.weights.writer import ParameterWriter

ADDRESS = "127.0.0.1"
DEADLINE_S = 300.0
DEADLINE = timedelta(seconds=DEADLINE_S)
CPU = torch.device("cpu")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# layers, hidden, ffn, heads, KV heads, vocabulary; tied
SIZES = {
    "5M": (4, 256, 768, 4, 2, 8192),
    "100M": (12, 768, 2048, 12, 4, 32768),
    "400M": (24, 1024, 4096, 16, 4, 49152),
    "1B": (16, 2048, 8192, 32, 8, 128256),
}
METHODS = ("plain", "per-tensor", "bucketed", "direct", "bucketed ipc", "direct ipc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["5M", "100M", "400M"])
    parser.add_argument("--tensor", type=int, default=2, help="tensor ranks of the trainer")
    parser.add_argument("--engine-tensor", type=int, default=2, help="tensor ranks of an engine")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--bucket-bytes", type=int, default=256 << 20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    workers = options.engines * options.engine_tensor
    print(
        f"trainer TP {options.tensor}, {options.engines} engine(s) of TP {options.engine_tensor}, buckets of "
        f"{options.bucket_bytes / 2**20:g} MiB, medians of {options.repeats}"
    )
    print(f"{'model':<8}{'MB':>8}  {'method':<14}{'seconds':>9}{'GB/s':>8}{'of plain':>10}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _process, (options, options.tensor + workers, str(Path(folder) / "rendezvous")), nprocs=options.tensor + workers
        )


def _shape(size: str) -> ModelShape:
    layers, hidden, ffn, heads, kv_heads, vocab = SIZES[size]
    return ModelShape(
        family="llama",
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        vocab=vocab,
        tied=True,
        qkv_bias=False,
        qk_norm=False,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        max_positions=2048,
    )


def _process(rank: int, options: argparse.Namespace, world: int, rendezvous: str) -> None:
    """A trainer rank, or a worker of an engine."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=DEADLINE)
    trainer = dist.new_group(list(range(options.tensor)))
    store, port = links.host_store(ADDRESS, DEADLINE_S) if rank == 0 else (None, 0)
    ports = [port]
    dist.broadcast_object_list(ports, src=0)
    store = store or links.reach_store(ADDRESS, ports[0], DEADLINE_S)
    for size in options.sizes:
        shape, plain_s = _shape(size), None
        model_bytes = 2 * shape.parameters
        for method in METHODS:
            prefixed = dist.PrefixStore(f"{size}/{method}", store)
            if rank < options.tensor:
                push = _sending(method, shape, options, rank, trainer, prefixed)
            else:
                push = _receiving(method, shape, options, rank - options.tensor, prefixed)
            seconds = statistics.median([_timed(push) for _ in range(1 + options.repeats)][1:])
            plain_s = plain_s or seconds
            if rank == 0:
                print(
                    f"{size if method == 'plain' else '':<8}{model_bytes / 1e6:>8.0f}  {method:<14}{seconds:>9.3f}"
                    f"{model_bytes / seconds / 1e9:>8.2f}{plain_s / seconds:>10.0%}",
                    flush=True,
                )
    dist.barrier()
    dist.destroy_process_group()


def _timed(push: Callable[[], None]) -> float:
    """Seconds until the slowest process is done, on all of them."""
    dist.barrier()
    began = time.perf_counter()
    push()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _plan(method: str, shape: ModelShape, options: argparse.Namespace) -> SyncPlan:
    wire = Wire(
        "direct" if method.startswith("direct") else "gather",
        "ipc" if method.endswith("ipc") else "gloo",
        "bfloat16",
        options.bucket_bytes,
    )
    return make_plan(shape, ParallelConfig(tensor=options.tensor), (options.engine_tensor,) * options.engines, wire)


# ------------------------------------------------------------------------------------------------------------- trainer ranks
class ShardedWeights:
    """A tensor rank's shards of a random model, as the source of a push."""

    exports = scores = True

    def __init__(self, shape: ModelShape, options: argparse.Namespace, rank: int, group: dist.ProcessGroup):
        self.rank, self._group, self._layout = rank, group, Layout(options.tensor, tensor_rank=rank)
        self._own = [
            (entry, torch.randn(shard_shape(entry, options.tensor), dtype=torch.bfloat16))
            for entry in entries(shape)
            if not entry.copy
        ]

    def tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        return gathered(self._own, self._layout, self._group)

    def parts(self) -> Iterator[tuple[Slice, Tensor]]:
        return parts_of(self._own, self._layout)


def _sending(
    method: str, shape: ModelShape, options: argparse.Namespace, rank: int, group: dist.ProcessGroup, store: dist.Store
) -> Callable[[], None]:
    source, plan = ShardedWeights(shape, options, rank, group), _plan(method, shape, options)
    if rank not in plan.sources:
        return functools.partial(take_part, source, plan.mode) if method != "plain" else lambda: None
    sender = Sender(plan, source, store, ADDRESS, CPU, DEADLINE_S)
    if method not in ("plain", "per-tensor"):
        return functools.partial(_send, sender)
    channel = sender.channels[plan.links[0].name]
    if method == "plain":
        flat = torch.zeros(shape.parameters, dtype=torch.bfloat16)
        return lambda: channel.broadcast(flat, DEADLINE).wait(DEADLINE)

    def one_by_one() -> None:
        for _, tensor in source.tensors():
            channel.broadcast(tensor.contiguous(), DEADLINE).wait(DEADLINE)

    return one_by_one


def _send(sender: Sender) -> None:
    _, failure = sender.send()
    if failure:
        raise failure


# ---------------------------------------------------------------------------------------------------------- engine workers
class Engine:
    """A tensor rank's parameters under vLLM's names, and the boxes of the model that belong there."""

    def __init__(self, shape: ModelShape, size: int, rank: int):
        self.boxes = {
            entry.hf[i]: Slice(entry.hf[i], entry.shapes[i], *needed(entry, i, size, rank))
            for entry in entries(shape)
            if not entry.copy
            for i in range(len(entry.hf))
        }
        self.model = Module()
        self.model.packed_modules_mapping = PACKED
        fused = {part: whole for whole, parts in PACKED.items() for part in parts}
        for name in self.boxes:
            *path, layer, leaf = name.split(".")
            module = self.model
            for part in (*path, fused.get(layer, layer)):
                if part not in module._modules:
                    module.add_module(part, Module())
                module = module._modules[part]
            module.register_parameter(leaf, Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False))

    def writer(self, slices: Sequence[Slice]) -> ParameterWriter:
        return ParameterWriter(self.model, slices, lambda layer: None)


def _receiving(
    method: str, shape: ModelShape, options: argparse.Namespace, member: int, store: dist.Store
) -> Callable[[], None]:
    plan = _plan(method, shape, options)
    own = plan.links_to(member)
    channels = {
        link.name: links.open_channel(link, 1 + link.receivers.index(member), store, ADDRESS, CPU, DEADLINE_S)
        for link in own
    }
    engine = Engine(shape, options.engine_tensor, member % options.engine_tensor)
    channel = channels[own[0].name]
    if method == "plain":
        flat = torch.empty(shape.parameters, dtype=torch.bfloat16)
        return lambda: channel.broadcast(flat, DEADLINE).wait(DEADLINE)
    if method == "per-tensor":
        return functools.partial(_one_by_one, channel, own[0].slices, engine)
    return functools.partial(_load, Membership(store, plan.mode, own, channels), engine)


def _one_by_one(channel: links.Channel, tensors: Sequence[Slice], engine: Engine) -> None:
    writer = engine.writer(list(engine.boxes.values()))
    for piece in tensors:
        whole = torch.empty(piece.whole, dtype=torch.bfloat16)
        channel.broadcast(whole, DEADLINE).wait(DEADLINE)
        box = engine.boxes[piece.name]
        writer.write(box, whole[box_of(box)])
    writer.check_complete()


def _load(membership: Membership, engine: Engine) -> None:
    """As WeightReceiver does it: digest every bucket; take the own share of whole tensors, or write shards as they come."""
    whole_tensors, assembly = membership.mode == "gather", Assembly()
    slices = list(engine.boxes.values()) if whole_tensors else [piece for link in membership.links for piece in link.slices]
    writer, digests = engine.writer(slices), []
    for bucket, flat in arrivals(membership, CPU, DEADLINE_S):
        digests.append(digest(flat))
        for piece, part in unpack(bucket, flat):
            if not whole_tensors:
                writer.write(piece, part)
            elif (whole := assembly.add(piece, part)) is not None:
                box = engine.boxes[piece.name]
                writer.write(box, whole[box_of(box)])
    writer.check_complete()


if __name__ == "__main__":
    main()
