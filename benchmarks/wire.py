"""A link against the bare socket under it, on loopback: push and pull of one vector, plain and with TLS.

    python -m benchmarks.wire --rounds 15 --json

Two processes. One sends so many bytes and the other, when it has them all, as many back; what is reported is the time
of both. Link and bare socket take turns within a round, so that what disturbs the machine falls on both alike, and the
ratio is of the same round: median (lowest to highest). The bare socket is blocking, `sendall` and `recv_into`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import msgspec

from paceline.protocol.link import Peer
from paceline.transport import tls
from paceline.transport.connect import connect
from paceline.transport.ends import End, Joined, Received
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener

KEY = JobKey(bytes(range(32)))  # of nothing but this benchmark
SIZES_MB = (1.0, 4.0, 25.0, 100.0)
PIECE_BYTES = 2**20
_NETWORK = 0x40000000  # CLONE_NEWNET
Turn = Callable[[memoryview], None]  # push and pull so many bytes, once


class Piece(msgspec.Struct, frozen=True, tag_field="t", tag=1, array_like=True):
    """Bytes [start, start + those that come with it) of ``size_bytes``."""

    start: int
    size_bytes: int


@dataclass(frozen=True)
class Row:
    """One size, one way; rates in MB/s, there and back counted."""

    size_mb: float
    secure: bool
    link_mb_s: float
    bare_mb_s: float
    ratio: float
    ratio_low: float
    ratio_high: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="times each is measured (default 15)")
    parser.add_argument("--sizes", default=",".join(f"{size:g}" for size in SIZES_MB), help="MB, with commas")
    parser.add_argument("--piece-mb", type=float, default=PIECE_BYTES / 1e6, help="the link sends in pieces of so much")
    parser.add_argument("--plain", action="store_true", help="without TLS only")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args(argv)
    sizes = [float(size) for size in arguments.sizes.split(",")]
    rows: list[Row] = []
    for secure in (False,) if arguments.plain else (False, True):
        with rivals(secure, int(max(sizes) * 1e6), int(arguments.piece_mb * 1e6)) as (link, bare):
            rows += [measured(size_mb, secure, link, bare, arguments.rounds) for size_mb in sizes]
    if arguments.json:
        print(json.dumps([msgspec.to_builtins(row) for row in rows], indent=2))
        return 0
    print(f"{'':14}{'link MB/s':>12}{'bare MB/s':>12}{'link / bare':>14}")
    for row in rows:
        named = f"{'TLS' if row.secure else 'plain'} {row.size_mb:g} MB"
        spread = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
        print(f"{named:14}{row.link_mb_s:12,.0f}{row.bare_mb_s:12,.0f}   {spread}")
    return 0


def measured(size_mb: float, secure: bool, link: Turn, bare: Turn, rounds: int) -> Row:
    vector = memoryview(bytearray(int(size_mb * 1e6)))
    turns = max(1, round(40 / size_mb)) if size_mb < 20 else 1  # of small ones several are one measurement
    took: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        pair = [0.0, 0.0]
        for place in (0, 1) if number % 2 else (1, 0):
            began_s = time.perf_counter()
            for _ in range(turns):
                (link, bare)[place](vector)
            pair[place] = (time.perf_counter() - began_s) / turns
        took.append((pair[0], pair[1]))
    took = took[1:]  # the first one touches memory for the first time
    ratios = [bare_s / link_s for link_s, bare_s in took]
    return Row(
        size_mb,
        secure,
        2 * size_mb / median(link_s for link_s, _ in took),
        2 * size_mb / median(bare_s for _, bare_s in took),
        median(ratios),
        min(ratios),
        max(ratios),
    )


@contextmanager
def rivals(
    secure: bool, most_bytes: int, piece_bytes: int, *, host: str = "127.0.0.1", namespace: str = ""
) -> Iterator[tuple[Turn, Turn]]:
    """What pushes and pulls over a link, and what does it over a bare socket; the other process answers both, at
    ``host``, which is the address of a network namespace if that is given."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, secure, most_bytes, piece_bytes, host, namespace)
    answering = context.Process(target=_answer, args=arguments, daemon=True)
    answering.start()
    link_port, bare_port = here.recv()
    end, events = _end(1, secure, memoryview(bytearray(most_bytes)))
    link = connect(end, (host, link_port))
    assert isinstance(events.get(), Joined)
    bare = socket.create_connection((host, bare_port))
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if secure:
        bare = tls.Credentials.issue(KEY).client.wrap_socket(bare, server_hostname=tls.NAME)

    def by_link(vector: memoryview) -> None:
        _send(link, vector, piece_bytes)
        _collect(events, len(vector))

    def by_socket(vector: memoryview) -> None:
        bare.sendall(len(vector).to_bytes(8, "little"))
        bare.sendall(vector)
        _fill(bare, vector)

    yield by_link, by_socket
    bare.close()
    link.close()
    answering.join(10)


def enter(namespace: str) -> None:
    """From now on this process, of one thread, is in the network namespace of that name."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NETWORK):
            raise OSError(ctypes.get_errno(), f"network namespace {namespace} cannot be entered")


def _answer(there: Connection, secure: bool, most_bytes: int, piece_bytes: int, host: str, namespace: str) -> None:
    """The other process: two threads would share a core with the main one, so it answers one rival at a time."""
    import threading

    if namespace:
        enter(namespace)
    vector = memoryview(bytearray(most_bytes))
    end, events = _end(0, secure, vector)
    listener = Listener(end, host)
    door = socket.create_server((host, 0))
    there.send((listener.port, door.getsockname()[1]))

    def by_socket() -> None:
        bare, _ = door.accept()
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if secure:
            bare = tls.Credentials.issue(KEY).server.wrap_socket(bare, server_side=True)
        head = memoryview(bytearray(8))
        with bare:
            while _fill(bare, head):
                part = vector[: int.from_bytes(head, "little")]
                _fill(bare, part)
                bare.sendall(part)

    threading.Thread(target=by_socket, daemon=True).start()
    joined = events.get()
    while (size_bytes := _collect(events, None)) is not None:
        _send(joined.link, vector[:size_bytes], piece_bytes)
    listener.close()


def _end(host: int, secure: bool, vector: memoryview) -> tuple[End, queue.SimpleQueue[Any]]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def place(link: Link, piece: Any, size_bytes: int) -> memoryview:
        return vector[piece.start : piece.start + size_bytes]

    credentials = tls.Credentials.issue(KEY) if secure else None
    end = End(
        me=Peer(host, "bench"),
        job="bench",
        messages=Piece,
        sink=events.put,
        place=place,
        credentials=credentials,
        insecure=not secure,
    )
    return end, events


def _send(link: Link, vector: memoryview, piece_bytes: int) -> None:
    for start in range(0, len(vector), piece_bytes):
        link.send(Piece(start, len(vector)), vector[start : start + piece_bytes])


def _collect(events: queue.SimpleQueue[Any], size_bytes: int | None) -> int | None:
    """Waits for a whole vector and returns its size; None if the link ends."""
    taken = 0
    while size_bytes is None or taken < size_bytes:
        event = events.get()
        if not isinstance(event, Received):
            return None
        size_bytes = event.message.size_bytes
        taken += len(event.payload or b"")
    return size_bytes


def _fill(sock: socket.socket, view: memoryview) -> bool:
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            return False
        done += count
    return True


if __name__ == "__main__":
    sys.exit(main())
