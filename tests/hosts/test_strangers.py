"""At the door: whatever strangers do there, links go on, memory does not grow, and it is told once in words."""

from __future__ import annotations

import random
import re
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from paceline.errors import HostError
from paceline.protocol.link import VERSION, Hello, Peer, Refused
from paceline.transport import greeting, tls, wire
from paceline.transport.connect import connect
from paceline.transport.ends import Joined, Lost
from paceline.transport.tls import Credentials
from tests.hosts.ends import JOB, KEY, OTHER_KEY, WAIT_S, Pair, Push, Side, payload

MOST_BYTES = 64 * 2**20
HELLO = Hello(JOB, Peer(7, "exchange"), b"s" * 16, 1, 0, 0, False)


def dialled(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), WAIT_S)


def secured(port: int, context: ssl.SSLContext) -> ssl.SSLSocket:
    return context.wrap_socket(dialled(port), server_hostname=tls.NAME)


def heard(sock: socket.socket) -> bytes:
    """All that it says until it hangs up."""
    said = b""
    with suppress(OSError), sock:
        while part := sock.recv(4096):
            said += part
    return said


def with_another_key(port: int) -> None:
    with pytest.raises(ssl.SSLError):
        secured(port, Credentials.issue(OTHER_KEY).client)


def that_trusts_anybody(port: int) -> None:
    context = Credentials.issue(OTHER_KEY).client
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    heard(secured(port, context))


def without_a_certificate(port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    heard(secured(port, context))


def of_another_job(port: int) -> None:
    sock = secured(port, Credentials.issue(KEY).client)
    sock.sendall(greeting.encode(msgspec.structs.replace(HELLO, job="else")))
    assert b"it belongs to job 'else'; this is job" in heard(sock)


def of_another_version(port: int) -> None:
    sock = secured(port, Credentials.issue(KEY).client)
    sock.sendall(preamble(version=VERSION + 1))
    magic, version = struct.unpack_from("<4sH", heard(sock))
    assert (magic, version) == (greeting.MAGIC, VERSION)


def with_noise(port: int) -> None:
    sock = dialled(port)
    with suppress(OSError):
        sock.sendall(random.Random(7).randbytes(3000))
    heard(sock)


def with_http(port: int) -> None:
    sock = dialled(port)
    sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    heard(sock)


def that_hangs_up(port: int) -> None:
    dialled(port).close()


def with_a_hello_without_end(port: int) -> None:
    """A ClientHello that claims 128 KiB, in records as TLS has them, and most of it."""
    claimed = b"\x01" + (2**17 - 1).to_bytes(3, "big") + b"\x03\x03" + bytes(32) + b"\x00"
    rest = bytes(2**17)
    stream = claimed + rest[: 110_000 - len(claimed)]
    with dialled(port) as sock, suppress(OSError):
        for start in range(0, len(stream), 16_000):
            part = stream[start : start + 16_000]
            sock.sendall(b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part)
        heard(sock)


def with_a_greeting_of_4_gb(port: int) -> None:
    sock = secured(port, Credentials.issue(KEY).client)
    sock.sendall(preamble(length=2**32 - 1))
    heard(sock)


def that_is_no_hello(port: int) -> None:
    sock = secured(port, Credentials.issue(KEY).client)
    sock.sendall(greeting.encode(Refused("you")))
    heard(sock)


def preamble(version: int = VERSION, length: int = 0) -> bytes:
    head = struct.pack("<4sHHI", greeting.MAGIC, version, 0, length)
    return head + zlib.crc32(head).to_bytes(4, "little")


def memory(field: str) -> int:
    """VmRSS, or VmHWM: the most since ``watch``."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def watch() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def still_goes(pair: Pair) -> None:
    """The link that was there before has heard nothing of it."""
    push = Push(1, 100_000)
    pair.near.send(push, payload(push), WAIT_S).wait(WAIT_S)
    assert pair.server.take(1) == [push]
    assert pair.server.other == []


@pytest.mark.parametrize(
    ("stranger", "says"),
    [
        (with_another_key, "it has another job key"),
        (that_trusts_anybody, "its certificate is not of this job's key"),
        (without_a_certificate, "it showed no certificate: it has no job key"),
        (of_another_job, "it belongs to job 'else'; this is job '20261121-train'"),
        (of_another_version, f"it speaks version {VERSION + 1} of paceline's protocol, this is {VERSION}"),
        (with_noise, "TLS"),
        (with_http, "it speaks HTTP"),
        (that_hangs_up, "it hung up"),
        (with_a_hello_without_end, "it has sent more than 64 KiB without saying who it is"),
        (with_a_greeting_of_4_gb, "it claims a greeting of 4294967295 bytes; the limit is 4096"),
        (that_is_no_hello, "it began with a Refused, not with a Hello"),
    ],
)
def test_a_stranger_is_refused_and_told_of_once(stranger: Callable[[int], None], says: str) -> None:
    with Pair() as pair:
        pair.join()
        before = watch()
        for _ in range(3):
            stranger(pair.listener.port)
        line = pair.refusal()
        assert re.fullmatch(r"refused 127\.0\.0\.1:\d+: .*", line)
        assert says in line
        still_goes(pair)
        connect(Side(2).end, ("127.0.0.1", pair.listener.port), WAIT_S).close()
        assert memory("VmHWM") - before < MOST_BYTES
        assert pair.listener.refused == 3
        assert pair.untold == 0


def test_two_thousand_slow_connections_keep_nobody_out() -> None:
    with Pair() as pair:
        pair.join()
        before = watch()
        slow = [dialled(pair.listener.port) for _ in range(2000)]
        for sock in slow[::2]:
            with suppress(OSError):
                sock.send(b"\x16")
        still_goes(pair)
        connect(Side(2).end, ("127.0.0.1", pair.listener.port), WAIT_S).close()
        assert "more than 64 connections at once have not said who they are" in pair.refusal()
        assert memory("VmHWM") - before < MOST_BYTES
        assert pair.listener.refused >= 2000 - 64
        assert pair.untold <= 2  # those that hung up are another kind
        for sock in slow:
            sock.close()


def test_who_says_nothing_is_let_go_after_5_seconds() -> None:
    class Clock:
        now_s = 100.0

    with Pair(clock=lambda: Clock.now_s) as pair, dialled(pair.listener.port) as silent:
        with_http(pair.listener.port)  # when this one has been refused the other one has been accepted
        assert "HTTP" in pair.refusal()
        Clock.now_s += 4.9
        with_http(pair.listener.port)
        assert pair.listener.refused == 2
        Clock.now_s += 0.2
        with_http(pair.listener.port)
        assert "it has not said who it is within 5 s" in pair.refusal()
        assert heard(silent) == b""


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({"payload": 2**63}, "a frame claims a payload of 9223372036854775808 bytes; the limit is 16777216"),
        ({"body": 2**32 - 1}, "a frame claims a message of 4294967295 bytes; the limit is 1048576"),
        ({"number": 2**63}, "message 9223372036854775808 came after message 0"),
        (
            {"kind": wire.PULSE, "number": 0, "acknowledged": 2**63},
            "the peer acknowledges message 9223372036854775808; the last one written is 0",
        ),
        ({"magic": b"HTTP"}, "a frame begins with b'HTTP', not b'PCLK'"),
        ({"kind": 9}, "a frame of kind 9"),
    ],
)
def test_a_claim_of_a_peer_is_refused_before_anything_is_allocated(head: dict[str, object], says: str) -> None:
    with Pair() as pair:
        pair.join()
        before = watch()
        context = Credentials.issue(KEY).client
        lanes = [secured(pair.listener.port, context) for _ in range(2)]
        for number, lane in enumerate(lanes):
            lane.sendall(greeting.encode(msgspec.structs.replace(HELLO, lane=number)))
            assert lane.recv(4)
        link = pair.server.event(Joined).link
        lanes[0].sendall(header(**head))  # type: ignore[arg-type]
        assert says in pair.server.event(Lost).reason
        assert memory("VmHWM") - before < MOST_BYTES
        still_goes(pair)
        link.close()
        for lane in lanes:
            lane.close()


def header(
    magic: bytes = wire.MAGIC,
    kind: int = wire.MESSAGE,
    body: int = 0,
    payload: int = 0,
    number: int = 1,
    acknowledged: int = 0,
) -> bytes:
    head = struct.pack("<4sBBHIIQQQQ", magic, kind, 0, 0, body, 0, payload, number, acknowledged, 0)
    return head + zlib.crc32(head).to_bytes(4, "little")


def test_a_server_of_another_version_is_told_by_both_numbers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            sock, _ = door.accept()
            with Credentials.issue(KEY).server.wrap_socket(sock, server_side=True) as wrapped:
                wrapped.recv(4096)
                wrapped.sendall(preamble(version=VERSION + 1))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(
            HostError, match=f"it speaks version {VERSION + 1} of paceline's protocol, this is {VERSION}"
        ):
            connect(Side(1).end, ("127.0.0.1", door.getsockname()[1]), WAIT_S)
        thread.join(WAIT_S)
