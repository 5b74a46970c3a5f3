"""A TCP proxy that does to a connection what networks do, by a seed: so a failure can be had again.

    with Proxy(("127.0.0.1", port), Faults(cut=0.05, flip=0.05), seed=7) as proxy: connect to proxy.port

Nothing is done until ``begin``; after ``budget`` faults there are no more, so that what runs through it must come to an
end. What is held back while a direction is silent comes through when it is not, as TCP would have it.
"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass

UP, DOWN = "up", "down"  # from the one that connected, to it
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class Faults:
    """How likely each is, for a chunk of up to 64 KiB."""

    delay: float = 0.0  # it waits, for up to ``delay_s``
    cut: float = 0.0  # it is lost, and the connection with it
    truncate: float = 0.0  # a part of it comes through, then the connection is cut
    duplicate: float = 0.0  # it comes twice
    flip: float = 0.0  # one bit of it is another
    delay_s: float = 0.02


class Proxy:
    def __init__(self, target: tuple[str, int], faults: Faults = Faults(), seed: int = 0, budget: int = 20) -> None:
        self._target, self._faults, self._random, self.budget = target, faults, random.Random(seed), budget
        self._lock = threading.Lock()
        self._begun = False
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._open = {UP: threading.Event(), DOWN: threading.Event()}
        for gate in self._open.values():
            gate.set()
        self._stop = threading.Event()
        self.done: list[str] = []  # the faults so far
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, name="proxy", daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.heal()
        self._sock.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._sock.close()

    def begin(self) -> None:
        """From now on there are faults."""
        self._begun = True

    def cut(self) -> None:
        """All connections at once, with what is under way."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            _hang_up(*pair)

    def silence(self, *directions: str) -> None:
        """Nothing comes through that way, and nobody is told."""
        for direction in directions:
            self._open[direction].clear()

    def heal(self) -> None:
        for gate in self._open.values():
            gate.set()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._sock.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            pair = (near, far)
            left = [2]
            with self._lock:
                self._pairs.add(pair)
            for source, sink, direction in ((near, far, UP), (far, near, DOWN)):
                thread = threading.Thread(
                    target=self._pump, args=(source, sink, direction, pair, left), name="proxy-pump", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        direction: str,
        pair: tuple[socket.socket, socket.socket],
        left: list[int],
    ) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._open[direction].wait()
                parts, go_on = self._mangled(data)
                for part in parts:
                    sink.sendall(part)
                if not go_on:
                    break
            self._open[direction].wait()
        except OSError:
            pass
        _hang_up(*pair)
        with self._lock:
            left[0] -= 1
            if not left[0]:
                self._pairs.discard(pair)
                for sock in pair:
                    sock.close()

    def _mangled(self, data: bytes) -> tuple[list[bytes], bool]:
        """What comes through of it, and does the connection go on?"""
        with self._lock:
            if not self._begun or self.budget <= 0:
                return [data], True
            kind = next(
                (
                    kind
                    for kind in ("delay", "cut", "truncate", "duplicate", "flip")
                    if self._random.random() < getattr(self._faults, kind)
                ),
                None,
            )
            if kind is None:
                return [data], True
            self.budget -= 1
            self.done.append(kind)
            place, bit = self._random.randrange(len(data)), 1 << self._random.randrange(8)
            delay_s = self._random.random() * self._faults.delay_s
        match kind:
            case "delay":
                self._stop.wait(delay_s)
                return [data], True
            case "cut":
                return [], False
            case "truncate":
                return [data[:place]], False
            case "duplicate":
                return [data, data], True
        flipped = bytearray(data)
        flipped[place] ^= bit
        return [bytes(flipped)], True


def _hang_up(*socks: socket.socket) -> None:
    for sock in socks:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
