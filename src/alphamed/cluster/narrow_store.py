"""Stores listen at the address that they are reached by, and at no other: a run's own, and those of torchrun.

Why: whoever reaches a store can read and change where the parts of a run find each other; torch's listen on all interfaces.
     The store on libuv, torch's default, takes no socket from outside, the older one does.
Where: torch/distributed/elastic/rendezvous: static_tcp_rendezvous.py, c10d_rendezvous_backend.py (TCPStore), dynamic_rendezvous.py
       (DynamicRendezvousHandler._create_tcp_store_server).
Versions: torch 2.13.0.
Remove when: TCPStore binds to the address of its host name.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any

# torch.distributed documents them, but has no list of exports that a type checker could read
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

__all__ = ["HashStore", "PrefixStore", "Store", "TCPStore", "apply", "store"]

BACKLOG = 4096


def apply() -> None:
    """From now on the stores of the agent in this process listen so."""
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous, static_tcp_rendezvous

    makers: list[Any] = [static_tcp_rendezvous, c10d_rendezvous_backend]
    for module in makers:
        assert hasattr(module, "TCPStore"), "another version of torch: find where it makes its stores"
        module.TCPStore = store
    handler = dynamic_rendezvous.DynamicRendezvousHandler
    assert hasattr(handler, "_create_tcp_store_server"), "another version of torch: find where it makes its stores"
    handler._create_tcp_store_server = _create_tcp_store_server


def _create_tcp_store_server(self: DynamicRendezvousHandler, master_addr: str, master_port: int) -> TCPStore:
    return store(master_addr, master_port, is_master=True, multi_tenant=True)


def store(
    host: str,
    port: int,
    world: int | None = None,
    is_master: bool = False,
    timeout: timedelta = timedelta(seconds=300),
    **options: Any,
) -> TCPStore:
    """torch's TCPStore. Raises OSError where the master's address is taken or not of this machine."""
    if not is_master:
        return TCPStore(host, port, world, False, timeout, **options)
    address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.listen(BACKLOG)
    bound = listener.getsockname()[1]
    return TCPStore(host, bound, world, True, timeout, **options, master_listen_fd=listener.detach(), use_libuv=False)
