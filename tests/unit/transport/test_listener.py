"""Claims about ports that are kept for processes that listen there by and by."""

from __future__ import annotations

import socket

import pytest

from paceline.errors import HostError
from paceline.transport.listener import hold, listening


def test_a_held_port_is_there_for_one_listener_after_the_other() -> None:
    with hold("127.0.0.1") as held:
        port = held.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1.0)  # nobody is let in before somebody listens
        for _ in range(2):
            listens = listening("127.0.0.1", port, shared=True)
            one, other = socket.create_connection(("127.0.0.1", port), 1.0), listens.accept()[0]
            assert one.getsockname() == other.getpeername()
            for sock in (one, other, listens):
                sock.close()


def test_a_held_port_is_nobody_elses() -> None:
    with hold("127.0.0.1") as held:
        port = held.getsockname()[1]
        with pytest.raises(HostError, match=f"127.0.0.1 port {port} is in use"):
            listening("127.0.0.1", port)
        with pytest.raises(HostError, match=f"127.0.0.1 port {port} is in use"):
            hold("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(HostError, match="this machine has no address"):
        hold("192.0.2.77")
