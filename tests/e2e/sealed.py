"""Run a command in a network namespace of its own and say what it tried to send out: a wire-tap for tests.

    python sealed.py REPORT COMMAND ...        REPORT: where the attempts are written, one a line; exit code: the command's
    python sealed.py --closed COMMAND ...      no route at all, so that nothing can be sent

All addresses of the world lead to the loopback device of the namespace, where nobody listens: connections are refused at
once, and every packet for another host, and every question for a name, passes the tap. Needs the right to make namespaces
(root, or unprivileged user namespaces); without it the exit code is NOT_PERMITTED.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

NOT_PERMITTED, CLOSED = 77, "--closed"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
OWN = "192.0.2.1"  # TEST-NET-1 (RFC 5737): the address of this host in its namespace
DNS = 53


# --------------------------------------------------------------------------------------------------------------- namespace
def enter_namespace() -> None:
    """Leave the host's network. Raises PermissionError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    flags = CLONE_NEWNET if uid == 0 else CLONE_NEWNET | CLONE_NEWUSER
    if libc.unshare(flags) != 0:
        raise PermissionError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if flags & CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def raise_loopback() -> None:
    SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh22x", b"lo", 0))
        flags = struct.unpack("16sh22x", request)[1] | IFF_UP
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags))


def lead_everything_home() -> None:
    """OWN becomes this host's address, and all other addresses are delivered to it: `ip addr add OWN/32 dev lo; ip route add
    local default dev lo src OWN`, and the same route for IPv6."""
    RTM_NEWADDR, RTM_NEWROUTE, IFA_LOCAL, IFA_ADDRESS, RTA_OIF, RTA_PREFSRC = 20, 24, 2, 1, 4, 7
    LOCAL_TABLE, BOOT, HOST_SCOPE, LOCAL_ROUTE = 255, 3, 254, 2
    own, lo = socket.inet_aton(OWN), socket.if_nametoindex("lo")
    _netlink(RTM_NEWADDR, struct.pack("BBBBi", socket.AF_INET, 32, 0, 0, lo), {IFA_LOCAL: own, IFA_ADDRESS: own})
    for family, source in ((socket.AF_INET, {RTA_PREFSRC: own}), (socket.AF_INET6, {})):
        if family == socket.AF_INET or has_ipv6():
            head = struct.pack("BBBBBBBBI", family, 0, 0, 0, LOCAL_TABLE, BOOT, HOST_SCOPE, LOCAL_ROUTE, 0)
            _netlink(RTM_NEWROUTE, head, {RTA_OIF: struct.pack("i", lo)} | source)


def has_ipv6() -> bool:
    switch = Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6")
    return switch.exists() and switch.read_text().strip() == "0"


def _netlink(kind: int, head: bytes, attributes: dict[int, bytes]) -> None:
    """One rtnetlink request, acknowledged. Raises OSError."""
    REQUEST_ACK_CREATE = 1 | 4 | 0x400
    body = head + b"".join(
        struct.pack("HH", 4 + len(value), name) + value + bytes(-len(value) % 4) for name, value in attributes.items()
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), kind, REQUEST_ACK_CREATE, 1, 0) + body)
        error = -struct.unpack_from("i", kernel.recv(4096), 16)[0]
    if error:
        raise OSError(error, os.strerror(error))


# --------------------------------------------------------------------------------------------------------------------- tap
# Classic BPF: keep packets to other hosts than 127.0.0.0/8, OWN and ::1, and UDP to port 53 wherever it goes (a name server
# may listen on the loopback address). A run sends much to itself; what is not kept never reaches Python.
LD_B, LD_H, LD_H_AT_X, LD_W, LDX_IP_LENGTH, AND, JEQ, RET = 0x30, 0x28, 0x48, 0x20, 0xB1, 0x54, 0x15, 0x06
KEEP, DROP = 20, 21
OWN_NUMBER = int.from_bytes(socket.inet_aton(OWN), "big")
PROGRAM = [  # (operation, value, line if equal, line if not)
    (LD_B, 0),
    (AND, 0xF0),
    (JEQ, 0x40, 3, 12),
    (LD_W, 16),
    (JEQ, OWN_NUMBER, 7, 5),
    (AND, 0xFF000000),
    (JEQ, 0x7F000000, 7, KEEP),  # IPv4 destination
    (LD_B, 9),
    (JEQ, socket.IPPROTO_UDP, 9, DROP),
    (LDX_IP_LENGTH, 0),
    (LD_H_AT_X, 2),
    (JEQ, DNS, KEEP, DROP),
    (LD_W, 24),
    (JEQ, 0, 14, KEEP),
    (LD_W, 28),
    (JEQ, 0, 16, KEEP),
    (LD_W, 32),
    (JEQ, 0, 18, KEEP),
    (LD_W, 36),
    (JEQ, 1, DROP, KEEP),  # IPv6 destination is ::1
    (RET, 0xFFFF),
    (RET, 0),
]


def open_tap() -> socket.socket:
    SO_ATTACH_FILTER, ALL_PROTOCOLS = 26, 3
    code = b"".join(
        struct.pack("HBBI", op, *((jumps[0] - i - 1, jumps[1] - i - 1) if jumps else (0, 0)), value)
        for i, (op, value, *jumps) in enumerate(PROGRAM)
    )
    buffer = ctypes.create_string_buffer(code)
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ALL_PROTOCOLS))
    tap.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(PROGRAM), ctypes.addressof(buffer)))
    tap.bind(("lo", 0))
    return tap


def listen(tap: socket.socket, found: set[str]) -> None:
    while True:
        found.add(describe(tap.recv(65535)))


def describe(packet: bytes) -> str:
    """Protocol, destination and, for a question to a name server, the name."""
    if packet[0] >> 4 == 6:
        protocol, where, payload = packet[6], socket.inet_ntop(socket.AF_INET6, packet[24:40]), packet[40:]
    else:
        protocol, where, payload = packet[9], socket.inet_ntoa(packet[16:20]), packet[4 * (packet[0] & 15) :]
    name = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP"}.get(protocol)
    if name is None or len(payload) < 8:
        return f"protocol {protocol} to {where}"
    port = int.from_bytes(payload[2:4], "big")
    asking = f" asking for {_question(payload[20:])}" if (name, port) == ("UDP", DNS) else ""
    return f"{name} to {where} port {port}{asking}"


def _question(labels: bytes) -> str:
    """The name in a DNS question (RFC 1035, 4.1.2)."""
    words = []
    while labels and labels[0]:
        words.append(labels[1 : 1 + labels[0]].decode(errors="replace"))
        labels = labels[1 + labels[0] :]
    return ".".join(words)


def main(report: str, command: list[str]) -> int:
    found: set[str] = set()
    try:
        enter_namespace()
        raise_loopback()
        if report != CLOSED:
            lead_everything_home()
            threading.Thread(target=listen, args=(open_tap(), found), daemon=True).start()
    except PermissionError as error:
        print(f"sealed: {error}", file=sys.stderr)
        return NOT_PERMITTED
    status = subprocess.run(command).returncode
    if report != CLOSED:
        Path(report).write_text("".join(f"{line}\n" for line in sorted(found)))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
