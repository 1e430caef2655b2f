"""The vLLM side of a push: mixed into vLLM's workers (`worker_extension_cls`), called through `collective_rpc`.

vLLM keeps weights in the layout its kernels want (fused, cut over tensor ranks, packed). Whole tensors go through the
model's own `load_weights`, inside vLLM's layer-wise reload, which repacks each layer when it is complete; shards are written
where they belong (`writer.py`), and a layer is repacked when its last one has come.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from alphamed.weights import links
from alphamed.weights.buckets import Assembly, digest, empty_flat, unpack
from alphamed.weights.sync_plan import Bucket, Link, SyncPlan, in_turns
from alphamed.weights.tensors import all_finite
from alphamed.weights.writer import ParameterWriter


@dataclass
class Membership:
    """This worker's place in the links of one epoch."""

    store: links.TCPStore
    mode: str
    links: tuple[Link, ...]
    channels: dict[str, links.Channel]  # by link


class WeightReceiver:
    """Methods that every worker gets. `self` is vLLM's worker; names are prefixed so that they meet none of its own."""

    rank: int  # these three and get_model are vLLM's
    device: torch.device
    vllm_config: Any
    get_model: Callable[[], Any]  # the model itself, where the runner holds a wrapper of CUDA graphs
    alphamed_membership: Membership | None  # set by `alphamed_join`

    def alphamed_join(self, address: str, port: int, first_member: int, deadline_s: float) -> None:
        """Read the plan from the store and join the links of member `first_member` + tensor rank."""
        self.alphamed_membership = None  # an older epoch's links close here
        store = links.reach_store(address, port, deadline_s)
        plan = SyncPlan.from_json(store.get("plan").decode())
        member = first_member + self.rank
        own = plan.links_to(member)
        channels = {
            link.name: links.open_channel(link, 1 + link.receivers.index(member), store, address, self.device, deadline_s)
            for link in own
        }
        self.alphamed_membership = Membership(store, plan.mode, own, channels)

    def alphamed_receive(self, version: int, deadline_s: float) -> dict[str, list[list[int]]]:
        """Take and load one push. Returns the digest of each bucket, by link.

        When loading fails the rest is still received, so that the senders are not left waiting; then it is raised.
        """
        membership, failure = self.alphamed_membership, None
        assert membership is not None, "weights are to be received before any link was joined"
        digests: dict[str, list[Tensor]] = {link.name: [] for link in membership.links}
        with loading_context(self):
            loader = WholeLoader(self) if membership.mode == "gather" else ShardLoader(self, membership.links)
            for bucket, flat in arrivals(membership, self.device, deadline_s):
                flat = arrived(bucket, flat)
                digests[bucket.link].append(digest(flat))
                if failure:
                    continue
                try:
                    loader.load(bucket, flat)
                except Exception as error:  # noqa: BLE001 - re-raised below, when the link is empty
                    failure = RuntimeError(f"loading {bucket} of version {version}: {type(error).__name__}: {error}")
            if failure:
                raise failure
            loader.finish()
        return {name: [pair.tolist() for pair in pairs] for name, pairs in digests.items()}

    def alphamed_not_finite(self) -> list[str]:
        """vLLM's names of this worker's parameters that hold values that are not finite. On CPU most have been packed and
        hold none any more."""
        return [
            name
            for name, parameter in self.get_model().named_parameters()
            if parameter.is_floating_point() and not all_finite(parameter)
        ]


class WholeLoader:
    """Whole tensors, through the model's own loading."""

    def __init__(self, worker: Any):
        self._worker, self._assembly = worker, Assembly()
        begin_reload(worker)

    def load(self, bucket: Bucket, flat: Tensor) -> None:
        self._worker.get_model().load_weights(self._complete(bucket, flat))

    def _complete(self, bucket: Bucket, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        for piece, part in unpack(bucket, flat):
            whole = self._assembly.add(piece, part)
            if whole is not None:
                yield piece.name, whole

    def finish(self) -> None:
        end_reload(self._worker)


class ShardLoader:
    """This worker's shards, straight into its parameters."""

    def __init__(self, worker: Any, own: tuple[Link, ...]):
        self._worker = worker
        self._writer = ParameterWriter(worker.get_model(), [piece for link in own for piece in link.slices], repack)

    @torch.no_grad()
    def load(self, bucket: Bucket, flat: Tensor) -> None:
        for piece, part in unpack(bucket, flat):
            self._writer.write(piece, part)

    def finish(self) -> None:
        self._writer.check_complete()
        finalize_load(self._worker)


def arrivals(membership: Membership, device: torch.device, deadline_s: float) -> Iterator[tuple[Bucket, Tensor]]:
    """Yield (bucket, flat tensor) in the plan's order, with the next receive of every link already posted."""
    end = time.monotonic() + deadline_s
    waiting = {link.name: deque(link.buckets()) for link in membership.links}
    transports = {link.name: link.transport for link in membership.links}
    posted: dict[str, tuple[Bucket, Tensor, links.Transfer]] = {}

    def left() -> timedelta:
        return timedelta(seconds=max(1.0, end - time.monotonic()))

    def post(link: str) -> None:
        if waiting[link]:
            bucket = waiting[link].popleft()
            flat = empty_flat(bucket, "cpu" if transports[link] == "gloo" else device)
            posted[link] = bucket, flat, membership.channels[link].broadcast(flat, left())

    for link in waiting:
        post(link)
    for bucket in in_turns(membership.links):
        expected, flat, transfer = posted.pop(bucket.link)
        assert expected == bucket, f"{bucket} is due, {expected} was posted"
        transfer.wait(left())
        post(bucket.link)
        yield bucket, flat


def arrived(bucket: Bucket, flat: Tensor) -> Tensor:
    """A received bucket, as it came. Tests put damage here."""
    return flat


# ------------------------------------------------------------------------------------------ vLLM 0.32 (CPU and CUDA builds)
def loading_context(worker: Any) -> AbstractContextManager[None]:
    """What vLLM loads a model in: layers ask for its configuration when their weights are repacked."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(worker.vllm_config)


def begin_reload(worker: Any) -> None:
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(worker.get_model())


def end_reload(worker: Any) -> None:
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    finalize_layerwise_reload(worker.get_model(), worker.model_config)
    finalize_load(worker)


def repack(module: torch.nn.Module) -> None:
    """Bring a layer's new weights into the form that its kernel takes. On CPU that packs them and drops the originals; on
    CUDA unquantised weights stay as they are."""
    if quant_method := getattr(module, "quant_method", None):
        quant_method.process_weights_after_loading(module)


def finalize_load(worker: Any) -> None:
    """What is left to do when all layers are loaded."""
    refresh_tied_head(worker.get_model())
    if worker.device.type != "cpu":
        torch.accelerator.synchronize()


def refresh_tied_head(model: torch.nn.Module) -> None:
    """Pack a tied output layer again. On CPU vLLM multiplies by a packed copy of the weight; the layer-wise reload repacks a
    layer when its own tensors arrive, and for a tied output layer none do: it would stay at the old weights."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(weight := module.weight, Tensor):
            if weight.numel():  # an untied head keeps no unpacked weight
                repack(module)
