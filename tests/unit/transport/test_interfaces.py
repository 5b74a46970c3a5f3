"""Which address is advertised: what was asked for, or the one that others most likely reach, and why in words."""

from __future__ import annotations

import pytest

from paceline.errors import HostError
from paceline.transport.interfaces import Interface, advertised, default_route, of_this_machine

LO = Interface("lo", ("127.0.0.1", "::1"))
ETH = Interface("eth0", ("fe80::1", "2001:db8::5", "10.0.0.5"), speed_mbit=1000)
IB = Interface("ib0", ("192.168.7.5",), speed_mbit=100_000)
DOCKER = Interface("docker0", ("172.17.0.1",), speed_mbit=10_000)
DOWN = Interface("eth9", ("10.9.0.1",), is_up=False, speed_mbit=400_000)


@pytest.mark.parametrize(
    ("interfaces", "wanted", "route", "address", "reason"),
    [
        ([LO], None, None, "127.0.0.1", "no other interface is up: only this machine can reach it"),
        ([LO, DOCKER, DOWN], None, None, "127.0.0.1", "only this machine"),
        ([LO, DOCKER, ETH], None, None, "10.0.0.5", "eth0 is the only interface that other hosts may reach"),
        ([LO, ETH, IB], None, None, "192.168.7.5", "ib0 is the fastest (100000 Mbit/s) of 2"),
        ([LO, ETH, IB], None, "eth0", "10.0.0.5", "eth0 has the default route"),
        ([LO, ETH, IB], None, "docker0", "192.168.7.5", "fastest"),
        ([LO, ETH, IB], "ib0", "eth0", "192.168.7.5", "--interface ib0 asks for it"),
        ([LO, ETH, IB], "10.0.0.0/8", None, "10.0.0.5", "--interface 10.0.0.0/8 asks for it"),
        ([LO, ETH, IB], "2001:db8::5", None, "2001:db8::5", "asks for it"),
        ([LO, ETH], "127.0.0.1", None, "127.0.0.1", "asks for it"),
        ([LO, DOCKER], "docker0", None, "172.17.0.1", "asks for it"),
        ([LO, Interface("a", ("10.1.1.1",)), Interface("b", ("10.1.1.2",))], None, None, "10.1.1.1", "the first of 2"),
        ([LO, Interface("a", ("fe80::7",))], None, None, "127.0.0.1", "only this machine"),
    ],
)
def test_the_address_and_its_reason(
    interfaces: list[Interface], wanted: str | None, route: str | None, address: str, reason: str
) -> None:
    found = advertised(interfaces, wanted, route)
    assert found.address == address
    assert reason in found.reason


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("eth7", "--interface eth7 fits no address of this machine; there are: lo (127.0.0.1, ::1), eth0 (fe80::1, "),
        ("10.1.0.0/16", "fits no address"),
        ("eth9", "interface eth9 is down"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(wanted: str, says: str) -> None:
    with pytest.raises(HostError) as caught:
        advertised([LO, ETH, DOWN], wanted)
    assert says in str(caught.value)


def test_the_default_route_is_the_one_with_the_lowest_metric() -> None:
    routes = (
        "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        "wlan0\t00000000\t0100A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
        "eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        "ib0\t0000A8C0\t00000000\t0001\t0\t0\t50\t00FFFFFF\t0\t0\t0\n"
    )
    assert default_route(routes) == "eth0"
    assert default_route(routes.splitlines()[0]) is None


def test_this_machine_has_an_address() -> None:
    assert advertised(of_this_machine()).address
