"""A job of several hosts as its processes see it: who is where, and which ports it uses. Travels in the environment."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

VARIABLE = "ALPHAMED_JOB"
HOST_VARIABLE = "ALPHAMED_HOST"
ADDRESS_VARIABLE = "ALPHAMED_ADDRESS"
"""This host's name and its address as the others see it, where ranks are on several."""


@dataclass(frozen=True, slots=True)
class Place:
    """A host: its name and address, its trainer ranks, and how many workers of engines it has room for."""

    name: str
    address: str
    interface: str
    ranks: int
    engine_slots: int


@dataclass(frozen=True, slots=True)
class Job:
    """`places` in the order of ranks; the first has rank 0, torchrun's store and Ray's head."""

    places: tuple[Place, ...]
    master_port: int
    ray_port: int

    @property
    def head(self) -> Place:
        return self.places[0]

    @property
    def trainers(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place.ranks)

    @property
    def engine_hosts(self) -> tuple[Place, ...]:
        return tuple(place for place in self.places if place.engine_slots)

    def place(self, name: str) -> Place | None:
        return next((place for place in self.places if place.name == name), None)

    def first_rank(self, name: str) -> int:
        ranks = 0
        for place in self.places:
            if place.name == name:
                break
            ranks += place.ranks
        return ranks

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        tree = json.loads(text)
        return cls(tuple(Place(**place) for place in tree["places"]), tree["master_port"], tree["ray_port"])

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """The job that this process is part of; None on a single host, or where torchrun was started by hand."""
        text = environment.get(VARIABLE)
        return cls.from_json(text) if text else None


def on_host() -> str:
    """' on NAME' for messages of a run over several hosts, nothing on a single one."""
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != os.environ.get("WORLD_SIZE", "1")
    name = os.environ.get(HOST_VARIABLE) or (socket.gethostname() if several else "")
    return f" on {name}" if name else ""
