"""Who listens where: from the kernel's tables, never by guessing.

Invariants:
- A port is free when it can be bound. Its owner is found by the listening socket's inode in /proc/*/fd.
- Everything here but `check_free` may walk /proc: call it in a thread.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path

import psutil

from fleetd.errors import HostError
from fleetd.host.process.table import LINUX, command_of
from fleetd.host.types import PortOwner

_LISTEN = "0A"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def is_free(host: str, port: int) -> bool:
    """Return whether a listener could bind now; a foreign address counts as free."""
    try:
        _bind(host, port)
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def _bind(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = "127.0.0.1" if host in ("", "localhost") else host
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))


def check_free(host: str, port: int) -> None:
    """Raise HostError naming the owner when the port is taken."""
    if is_free(host, port):
        return
    found = owner(port)
    who = f"by {found}" if found is not None else "and its owner cannot be seen"
    raise HostError(
        f"port {port} on {host} is taken {who}",
        hint=f"stop that program or give this process another port (`ss -ltnp sport = :{port}` shows the listener)",
        recoverable=True,
    )


def listening_inodes(port: int) -> frozenset[int]:
    """Return the inodes of the sockets that listen on this port, any address."""
    wanted = f":{port:04X}"
    inodes = set()
    for table in _TABLES:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[3] == _LISTEN and fields[1].endswith(wanted):
                inodes.add(int(fields[9]))
    return frozenset(inodes)


def holds(pid: int, inodes: frozenset[int]) -> bool:
    """Return whether a process has one of the sockets; False if not readable."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)  # noqa: PTH208 (names alone; this is the hot path)
    except OSError:
        return False
    for name in names:
        try:
            if os.readlink(f"{folder}/{name}") in wanted:  # noqa: PTH115
                return True
        except OSError:
            continue
    return False


def listener_among(port: int, pids: Iterable[int]) -> bool:
    """Say whether one of these processes listens on the port."""
    if LINUX:
        inodes = listening_inodes(port)
        return bool(inodes) and any(holds(pid, inodes) for pid in pids)
    return any(_listens(pid, port) for pid in pids)


def _listens(pid: int, port: int) -> bool:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except (psutil.Error, OSError):
        return False
    return any(c.status == psutil.CONN_LISTEN and getattr(c.laddr, "port", None) == port for c in connections)


def owner(port: int) -> PortOwner | None:
    """Return the owner of a port, with pid None if not visible; None if none."""
    if not LINUX:
        return next((PortOwner(port, pid, command_of(pid)) for pid in psutil.pids() if _listens(pid, port)), None)
    inodes = listening_inodes(port)
    if not inodes:
        return None
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and holds(int(name), inodes):
            return PortOwner(port, int(name), command_of(int(name)))
    return PortOwner(port, None)
