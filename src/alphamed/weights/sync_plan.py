"""A push as a whole, cut into links, slices and buckets (pure: no tensors, no communication). `routes.py` makes it.

A link is a communicator of its own: a source rank of the trainer, which is member 0, and workers of the engines. Slices of
Hugging Face tensors travel over it in flat buckets, in the order of the forward pass. All links are busy at the same time.
Rank 0 hands the plan to the workers as text; both ends cut the same buckets out of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
FLOOR_S, SLOWEST_BYTES_PER_S = 30.0, 50e6


@dataclass(frozen=True, slots=True)
class Wire:
    """How weights travel."""

    mode: str  # "gather" (whole tensors, gathered to one rank of each stage) | "direct" (shards)
    transport: str  # "nccl" | "gloo" | "ipc"
    dtype: str  # the engines': "float32" | "bfloat16"
    bucket_bytes: int  # limit of a bucket


class Slice(NamedTuple):
    """A rectangular part of a Hugging Face tensor."""

    name: str
    whole: tuple[int, ...]  # shape of the tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def all_of(cls, name: str, shape: tuple[int, ...]) -> Slice:
        return cls(name, shape, (0,) * len(shape), shape)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.whole


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive slices of a link that travel as one flat tensor."""

    link: str
    index: int  # within the link
    dtype: str
    slices: tuple[Slice, ...]

    @property
    def elements(self) -> int:
        """Length of the flat tensor: padded to whole 32-bit words, which digests are taken of."""
        words = 4 // ELEMENT_BYTES[self.dtype]
        return -(-sum(part.elements for part in self.slices) // words) * words

    @property
    def bytes(self) -> int:
        return self.elements * ELEMENT_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"bucket {self.index} of {self.link} ({self.slices[0].name} .. {self.slices[-1].name})"


@dataclass(frozen=True, slots=True)
class Link:
    """One communicator and what it carries."""

    name: str  # unique in a plan; names the link in messages and in the store
    stage: int
    source: int  # rank of the trainer, member 0
    receivers: tuple[int, ...]  # ranks in `SyncPlan.members`; the i-th is member 1 + i
    transport: str
    dtype: str
    bucket_bytes: int
    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        """Members of the communicator."""
        return 1 + len(self.receivers)

    @property
    def bytes(self) -> int:
        """What leaves the source, and what every receiver gets, without the padding of buckets."""
        return sum(part.elements for part in self.slices) * ELEMENT_BYTES[self.dtype]

    def buckets(self) -> tuple[Bucket, ...]:
        """Cut greedily: a bucket ends where the next slice would make it larger than `bucket_bytes`. A slice that is larger
        than a bucket is cut into blocks of rows, which begin in a bucket of their own."""
        cut: list[tuple[Slice, ...]] = []
        open_bucket: list[Slice] = []
        words = 4 // ELEMENT_BYTES[self.dtype]
        room = self.bucket_bytes // ELEMENT_BYTES[self.dtype] // words * words
        used = 0
        for whole in self.slices:
            for part in (whole,) if whole.elements <= room else _row_blocks(whole, room):
                if open_bucket and used + part.elements > room:
                    cut.append(tuple(open_bucket))
                    open_bucket, used = [], 0
                open_bucket.append(part)
                used += part.elements
        if open_bucket:
            cut.append(tuple(open_bucket))
        return tuple(Bucket(self.name, index, self.dtype, slices) for index, slices in enumerate(cut))


def _row_blocks(large: Slice, room: int) -> Iterable[Slice]:
    rows, row = large.shape[0], large.elements // large.shape[0]
    step = room // row
    assert step, f"{large.name}: a row of {row} elements does not fit into a bucket of {room}"
    return (
        large._replace(start=(large.start[0] + at, *large.start[1:]), shape=(min(step, rows - at), *large.shape[1:]))
        for at in range(0, rows, step)
    )


@dataclass(frozen=True, slots=True)
class Member:
    """A worker: its engine and its tensor rank there."""

    engine: int
    worker: int

    def __str__(self) -> str:
        return f"engine {self.engine} worker {self.worker}"


def members(tensor_parallel: Sequence[int]) -> tuple[Member, ...]:
    """The workers of all engines, given each engine's tensor-parallel size."""
    return tuple(Member(engine, worker) for engine, size in enumerate(tensor_parallel) for worker in range(size))


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """All links of a push. Everyone joins links, posts receives and sends in the order of this plan, each its own part of
    it: so nobody waits for a peer that waits for another."""

    mode: str  # as in Wire
    links: tuple[Link, ...]
    members: tuple[Member, ...]

    def links_to(self, member: int) -> tuple[Link, ...]:
        return tuple(link for link in self.links if member in link.receivers)

    def links_from(self, rank: int) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.source == rank)

    @property
    def sources(self) -> tuple[int, ...]:
        """Trainer ranks that send."""
        return tuple(sorted({link.source for link in self.links}))

    @property
    def bytes(self) -> int:
        return sum(link.bytes for link in self.links)

    @property
    def deadline_s(self) -> float:
        """Time a push may take, in seconds."""
        return FLOOR_S + self.bytes / SLOWEST_BYTES_PER_S

    def buffer_bytes(self, member: int) -> int:
        """What a worker holds in addition to its parameters while it receives: the posted bucket of every link, and the one that is
        being loaded."""
        largest = [max(bucket.bytes for bucket in link.buckets()) for link in self.links_to(member)]
        return sum(largest) + max(largest, default=0)

    def corrupted(
        self, sent: Mapping[str, Sequence[Sequence[int]]], received: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    ) -> list[str]:
        """What arrived otherwise than it was sent, by name. `sent`: the digests of each link's buckets; `received`: the same
        for each member, of the links that it belongs to."""
        return [
            f"{bucket} at {member}"
            for number, (member, digests) in enumerate(zip(self.members, received, strict=True))
            for link in self.links_to(number)
            for bucket, before, after in zip(link.buckets(), sent[link.name], digests[link.name], strict=True)
            if list(before) != list(after)
        ]

    def to_json(self) -> str:
        return json.dumps(
            {
                "mode": self.mode,
                "members": [[member.engine, member.worker] for member in self.members],
                "links": [
                    [
                        link.name,
                        link.stage,
                        link.source,
                        link.receivers,
                        link.transport,
                        link.dtype,
                        link.bucket_bytes,
                        link.slices,
                    ]
                    for link in self.links
                ],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> SyncPlan:
        tree = json.loads(text)
        return cls(
            tree["mode"],
            tuple(
                Link(
                    name,
                    stage,
                    source,
                    tuple(receivers),
                    transport,
                    dtype,
                    bucket_bytes,
                    tuple(Slice(n, tuple(whole), tuple(start), tuple(shape)) for n, whole, start, shape in slices),
                )
                for name, stage, source, receivers, transport, dtype, bucket_bytes, slices in tree["links"]
            ),
            tuple(Member(*member) for member in tree["members"]),
        )


def in_turns(links: Iterable[Link]) -> tuple[Bucket, ...]:
    """All buckets of some links in the order in which they are sent and taken: the links' in turn, so that all make
    progress."""
    per_link = [link.buckets() for link in links]
    depth = max(map(len, per_link), default=0)
    return tuple(buckets[i] for i in range(depth) for buckets in per_link if i < len(buckets))
