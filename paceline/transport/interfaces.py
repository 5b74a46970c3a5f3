"""Which address of this machine other hosts are told: a decision with its reason, pure over what the system lists."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.errors import HostError

# Bridges and tunnels of container and virtual machine software: other hosts do not reach what is behind them.
_INNER = ("docker", "br-", "veth", "virbr", "cni", "flannel", "cali", "podman", "lxc", "vnet", "kube", "cilium")


@dataclass(frozen=True)
class Interface:
    """``addresses`` as text, IPv4 and IPv6, without scopes. ``speed_mbit`` is 0 where the system does not know it."""

    name: str
    addresses: Sequence[str]
    is_up: bool = True
    speed_mbit: int = 0


@dataclass(frozen=True)
class Advertised:
    """``reason`` says in words why this one; for logs and for `paceline doctor`."""

    address: str
    interface: str
    reason: str


def advertised(
    interfaces: Sequence[Interface], wanted: str | None = None, default_route: str | None = None
) -> Advertised:
    """The address that peers are told. Raises HostError where there is none that was ``wanted``.

    ``wanted`` is an interface's name, an address, or a network as ``10.0.0.0/8``. Without it the interface of the
    default route is taken, then the fastest one that is up; of its addresses the first IPv4.
    """
    found = [(one, address) for one in interfaces for address in sorted(one.addresses, key=_usefulness)]
    usable = [(one, address) for one, address in found if _usefulness(address) < _LINK_LOCAL]
    if wanted is not None:
        return _wanted(wanted, found, interfaces)
    outer = [
        (one, address)
        for one, address in usable
        if one.is_up and not one.name.startswith(_INNER) and not ipaddress.ip_address(address).is_loopback
    ]
    for one, address in outer:
        if one.name == default_route:
            return Advertised(address, one.name, f"{one.name} has the default route")
    if outer:
        one, address = max(outer, key=lambda pair: pair[0].speed_mbit)
        others = len({other.name for other, _ in outer}) - 1
        if not others:
            return Advertised(address, one.name, f"{one.name} is the only interface that other hosts may reach")
        speed = f"the fastest ({one.speed_mbit} Mbit/s)" if one.speed_mbit else "the first"
        return Advertised(address, one.name, f"{one.name} is {speed} of {others + 1} that other hosts may reach")
    return Advertised("127.0.0.1", "lo", "no other interface is up: only this machine can reach it")


def _wanted(wanted: str, found: list[tuple[Interface, str]], interfaces: Sequence[Interface]) -> Advertised:
    try:
        network = ipaddress.ip_network(wanted, strict=False)
    except ValueError:
        network = None
    for one, address in found:
        if one.name == wanted or (network is not None and ipaddress.ip_address(address) in network):
            if not one.is_up:
                raise HostError(f"interface {one.name} is down", fix=f"ip link set {one.name} up, or choose another")
            return Advertised(address, one.name, f"--interface {wanted} asks for it")
    there = ", ".join(f"{one.name} ({', '.join(one.addresses) or 'no address'})" for one in interfaces) or "none"
    raise HostError(f"--interface {wanted} fits no address of this machine; there are: {there}")


_LINK_LOCAL = 2


def _usefulness(address: str) -> int:
    """Smaller is better. A link-local address means nothing without saying on which link."""
    parsed = ipaddress.ip_address(address)
    return _LINK_LOCAL if parsed.is_link_local else (0 if parsed.version == 4 else 1)


def of_this_machine() -> list[Interface]:
    """What the system has now."""
    import socket

    import psutil

    stats: Mapping[str, psutil._common.snicstats] = psutil.net_if_stats()
    return [
        Interface(
            name,
            tuple(
                entry.address.partition("%")[0]
                for entry in entries
                if entry.family in (socket.AF_INET, socket.AF_INET6)
            ),
            name in stats and bool(stats[name].isup),
            int(stats[name].speed) if name in stats else 0,
        )
        for name, entries in psutil.net_if_addrs().items()
    ]


def default_route(routes: str) -> str | None:
    """The interface of the default route, from the text of /proc/net/route."""
    best: tuple[int, str] | None = None
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000":
            best = min(best or (int(fields[6]), fields[0]), (int(fields[6]), fields[0]))
    return best[1] if best else None
