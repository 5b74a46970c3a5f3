"""One connection, used in one direction: with TCP alone, and with TLS over it.

A link has two, one for what it sends and one for what it receives. So one thread at a time uses a connection, as TLS
needs it, and both directions are as fast as each alone.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

from paceline.transport.wire import BUFFER_BYTES, Stream

# A write that makes no progress is noticed by the piece: on a slow line a whole payload may take longer than patience.
_WRITE_BYTES = 256 * 1024


def prepare(sock: socket.socket, timeout_s: float, silence_s: float) -> None:
    """``timeout_s``: how long a call waits; ``silence_s``: how long the kernel keeps what the peer does not confirm."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    sock.settimeout(timeout_s)


def _let_the_kernel_wait(sock: socket.socket, timeout_s: float) -> None:
    """From now on one system call moves a whole piece; with Python's own timeouts it takes a poll for every part."""
    timeval = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.settimeout(None)


def hang_up(sock: socket.socket) -> None:
    """Wakes whoever reads or writes; from any thread. The descriptor stays until ``close``."""
    with suppress(OSError):  # it is down already
        # Not SSLSocket's own: it first forgets that there is TLS, and a thread in the midst of writing goes on without.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class OutLane:
    """What this process sends. ``write`` may be called by one thread at a time."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        self._sock = sock
        self._busy = threading.Lock()
        self._closed = False
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        if not self._is_tls:
            _let_the_kernel_wait(sock, timeout_s)

    def write(self, head: bytes, payload: memoryview | None) -> None:
        """All of it. Raises OSError where the connection is broken, TimeoutError where it makes no progress."""
        with self._busy:
            if self._closed:
                raise BrokenPipeError("the connection is closed")
            if self._is_tls:
                self._sock.sendall(head)
                for start in range(0, len(payload or b""), _WRITE_BYTES):
                    assert payload is not None
                    self._sock.sendall(payload[start : start + _WRITE_BYTES])
            else:
                self._send([head] if payload is None else [head, payload])

    def _send(self, parts: list[bytes | memoryview]) -> None:
        while parts:
            try:
                sent = self._sock.sendmsg(parts)
            except BlockingIOError:
                raise TimeoutError("nothing of it was taken") from None
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def hang_up(self) -> None:
        hang_up(self._sock)

    def close(self) -> None:
        """After ``hang_up``: waits for who is writing, which is then not long."""
        with self._busy:
            self._closed = True
            self._sock.close()


class InLane:
    """What this process receives, by one thread. ``on_wait`` is called when nothing has come for the timeout."""

    def __init__(
        self, sock: socket.socket, timeout_s: float, on_bytes: Callable[[], None], on_wait: Callable[[], None]
    ) -> None:
        self._sock = sock
        self._on_bytes, self._on_wait = on_bytes, on_wait
        self._whole = 0  # flags for a payload
        if not isinstance(sock, ssl.SSLSocket):
            _let_the_kernel_wait(sock, timeout_s)
            self._whole = socket.MSG_WAITALL
        self.stream = Stream(self._receive_into)

    def _receive_into(self, view: memoryview) -> int:
        while True:
            try:
                count = self._sock.recv_into(view, 0, self._whole if len(view) > BUFFER_BYTES else 0)
            except (TimeoutError, BlockingIOError):
                self._on_wait()
            else:
                self._on_bytes()
                return count

    def hang_up(self) -> None:
        hang_up(self._sock)

    def close(self) -> None:
        self._sock.close()
