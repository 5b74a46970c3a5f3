"""Hosts on one machine: network namespaces, each with an interface on a bridge. Needs root and ``ip``, for slow ones
``tc``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Writes every frame that passes an interface into a file, and says so once it listens.
CAPTURE = """
import socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)
wire.bind((sys.argv[1], 0))
print("listens", flush=True)
with open(sys.argv[2], "wb", buffering=0) as file:
    while True:
        file.write(wire.recv(1 << 17))
"""


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str
    interface: str

    @property
    def inside(self) -> tuple[str, ...]:
        """Before a command, to have it run on this host."""
        return ("ip", "netns", "exec", self.namespace)

    @property
    def outer(self) -> str:
        """The interface's other end, at the bridge."""
        return self.interface + "o"

    def slow(self, rate: str) -> None:
        """From now on so much comes and goes at most, say 1gbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "64kb", "latency", "100ms")
        for where, interface in ((self.inside, self.interface), ((), self.outer)):
            subprocess.run([*where, "tc", "qdisc", "replace", "dev", interface, *shape], check=True)

    def cut_from(self, other: Host) -> None:
        """Nothing goes from here to that one any more; nobody is told."""
        _ip("-n", self.namespace, "route", "add", "blackhole", f"{other.address}/32")

    def cut(self) -> None:
        """Nothing comes or goes any more; nobody is told."""
        _ip("-n", self.namespace, "link", "set", self.interface, "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    with some_hosts(2) as (first, second):
        yield first, second


@contextmanager
def some_hosts(count: int) -> Iterator[tuple[Host, ...]]:
    """So many that reach each other."""
    mark = os.getpid()
    bridge = f"pcb{mark}"
    hosts = tuple(Host(f"paceline-{mark}-{n}", f"10.77.0.{n}", f"pc{mark}n{n}") for n in range(1, count + 1))
    try:
        _ip(*_bridge(bridge))
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.outer, "type", "veth", "peer", "name", host.interface, "netns", host.namespace)
            _ip("link", "set", host.outer, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            _ip("link", "del", host.outer, must=False)  # a namespace lives on for a moment, and its interfaces with it
            _ip("netns", "del", host.namespace, must=False)
        _ip("link", "del", bridge, must=False)


def missing() -> str:
    """Why there can be no namespaces here, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command ip is not installed (iproute2)"
    mark = os.getpid()
    tries = {"a network namespace": ("netns", "add", f"paceline-{mark}"), "a bridge": _bridge(f"pcp{mark}")}
    for what, arguments in tries.items():
        made = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        if made.returncode:
            return f"{what} cannot be made here: {made.stderr.strip()}"
    _ip("netns", "del", f"paceline-{mark}")
    _ip("link", "del", f"pcp{mark}")
    return ""


def _bridge(name: str) -> tuple[str, ...]:
    return ("link", "add", name, "type", "bridge")


def _ip(*arguments: str, must: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=must, capture_output=True)
