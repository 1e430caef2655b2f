"""At which address and over which interface hosts reach one another: taken from the routes between them.

A host's own name says nothing: on Debian it resolves to 127.0.1.1. What others resolve it to, and the interface that packets
to them leave by, are the cluster's.
"""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alphamed.errors import ConfigError

LOOPBACK = "127.0.0.1"
CHOSEN_BY_USER = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Below the ports that the kernel gives to outgoing connections (32768 and above)."""


@dataclass(frozen=True, slots=True)
class Own:
    """This host's address in the cluster and the interface that has it."""

    address: str
    interface: str


def resolve(name: str) -> str:
    """The IPv4 address of a host. Raises ConfigError where its name is not known here."""
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(
            f"host {name}: its name has no address on {socket.gethostname()} ({error}); add it to the cluster's "
            f"DNS or to /etc/hosts, or give addresses"
        ) from None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def toward(peer: str) -> str:
    """The address of this machine that `peer`, a name or an address, sees."""
    address = LOOPBACK if peer == "localhost" else resolve(peer)
    if is_loopback(address):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing
        try:
            probe.connect((address, 9))
        except OSError as error:
            raise ConfigError(
                f"host {peer}: there is no route from {socket.gethostname()} to {address} ({error.strerror}); "
                f"see to the network"
            ) from None
        return probe.getsockname()[0]


def own(others: Sequence[str], environment: Mapping[str, str] = os.environ) -> Own:
    """This host's place in the network of the job: that of the interface which the user has named, else of the route to the
    first of the `others`. Raises ConfigError."""
    for variable in CHOSEN_BY_USER:
        if name := environment.get(variable, "").split(",")[0].lstrip("=^"):
            if environment[variable].startswith("^"):  # NCCL: "all but"
                continue
            return _of_interface(name, variable)
    address = toward(others[0]) if others else LOOPBACK
    return Own(address, interface_of(address))


def _of_interface(interface: str, variable: str) -> Own:
    """The first interface with this name, or (NCCL's way) one whose name begins so."""
    present = _addresses()
    for name, address in sorted(present.items(), key=lambda item: item[0] != interface):
        if name == interface or (variable.startswith("NCCL") and name.startswith(interface)):
            return Own(address, name)
    raise ConfigError(
        f"{variable}: {interface!r} is no interface with an IPv4 address on {socket.gethostname()}; choose from "
        f"{', '.join(sorted(present))}"
    )


def interface_of(address: str) -> str:
    """The name of the interface with this address. Raises ConfigError."""
    for name, present in _addresses().items():
        if present == address:
            return name
    raise ConfigError(
        f"host {socket.gethostname()}: none of its interfaces has the address {address}; set GLOO_SOCKET_IFNAME "
        f"and NCCL_SOCKET_IFNAME"
    )


def interface_settings(place: Own, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings that select gloo's and NCCL's interface, unless the user has set them."""
    return {name: environment.get(name) or place.interface for name in CHOSEN_BY_USER}


def _addresses() -> dict[str, str]:
    """Interface -> its first IPv4 address."""
    import psutil

    addresses = {}
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                addresses.setdefault(name, entry.address)
    return addresses


def free_ports(address: str, count: int) -> list[int]:
    """Ports of `address` that nobody listens on, drawn at random so that two jobs on one host hardly ask for the same."""
    ports: list[int] = []
    draw = random.SystemRandom()
    while len(ports) < count:
        port = draw.randrange(FIRST_PORT, LAST_PORT)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports
