"""One connection, used in one direction: with TCP alone, and with TLS over it.

A link has two, one for what it sends and one for what it receives. So one thread at a time uses a connection, as TLS
needs it, and both directions are as fast as each alone.
"""

from __future__ import annotations

import socket
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from paceline.transport.turns import TURN_BYTES, UNSENT_BYTES, Turns
from paceline.transport.wire import Stream

AT_ONCE_BYTES = UNSENT_BYTES - 1024  # with headers and TLS's own it is less than what a call waits at
_WAKE_BYTES = 128 * 1024
_RECORD_BYTES = 16 * 1024  # TLS gives out no less at once


def prepare(sock: socket.socket, timeout_s: float, silence_s: float) -> None:
    """``timeout_s``: how long a call waits; ``silence_s``: how long the kernel keeps what the peer does not confirm."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    sock.settimeout(timeout_s)


def hang_up(sock: socket.socket) -> None:
    """Wakes whoever reads or writes; from any thread. The descriptor stays until ``close``."""
    with suppress(OSError):  # it is down already
        # Not SSLSocket's own: it first forgets that there is TLS, and a thread in the midst of writing goes on without.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class OutLane:
    """What this process sends. ``write`` may be called by one thread at a time. Payloads are written in turn with
    those of other lanes that share ``turns``."""

    def __init__(self, sock: socket.socket, turns: Turns) -> None:
        self._sock, self._turns = sock, turns
        self._busy = threading.Lock()
        self._closed = False
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)

    @property
    def own_address(self) -> str:
        return str(self._sock.getsockname()[0])

    def takes_at_once(self, size_bytes: int) -> bool:
        """Would ``write`` of so many bytes not wait?"""
        import fcntl  # not everywhere that a script runs alone
        import termios

        queued = bytearray(4)
        try:
            fcntl.ioctl(self._sock.fileno(), termios.TIOCOUTQ, queued)
        except (OSError, ValueError):  # it was closed
            return False
        return int.from_bytes(queued, sys.byteorder) + size_bytes <= AT_ONCE_BYTES

    def write(self, head: bytes, payload: memoryview | None) -> None:
        """All of it. Raises OSError where the connection is broken, TimeoutError where it makes no progress."""
        with self._busy:
            if self._closed:
                raise BrokenPipeError("the connection is closed")
            if payload is None or len(payload) <= AT_ONCE_BYTES:
                self._sock.sendall(head if payload is None else head + payload)
                return
            for start in range(0, len(payload), TURN_BYTES):
                with self._turns.taken():
                    self._send(b"" if start else head, payload[start : start + TURN_BYTES])

    def _send(self, head: bytes, part: memoryview) -> None:
        if self.is_tls:
            if head:
                self._sock.sendall(head)
            self._sock.sendall(part)
            return
        sent = self._sock.sendmsg([head, part])
        while sent < len(head):  # hardly ever
            sent += self._sock.sendmsg([head[sent:], part])
        sent -= len(head)
        while sent < len(part):
            sent += self._sock.send(part[sent:])

    def hang_up(self) -> None:
        hang_up(self._sock)

    def close(self) -> None:
        """After ``hang_up``: waits for who is writing, which is then not long."""
        with self._busy:
            self._closed = True
            self._sock.close()


class InLane:
    """What this process receives, by one thread. ``on_wait`` is called when nothing has come for the timeout."""

    def __init__(self, sock: socket.socket, on_bytes: Callable[[], None], on_wait: Callable[[], None]) -> None:
        self._sock = sock
        self._on_bytes, self._on_wait = on_bytes, on_wait
        self._least = 1
        self.stream = Stream(self._receive_into, self._fill)

    def _receive_into(self, view: memoryview) -> int:
        self._wake_at(1)
        return self._received(view)

    def _fill(self, view: memoryview) -> int:
        """As a payload comes over a slow wire, this process is not to be woken for every packet of it: that took more
        of a core than all else that a link does. What TLS has read and not given out yet does not wake anybody."""
        self._wake_at(max(1, min(len(view) - _RECORD_BYTES, _WAKE_BYTES)))
        return self._received(view)

    def _wake_at(self, size_bytes: int) -> None:
        if size_bytes != self._least:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size_bytes)
            self._least = size_bytes

    def _received(self, view: memoryview) -> int:
        while True:
            try:
                count = self._sock.recv_into(view)
            except TimeoutError:
                if self._least > 1:
                    self._wake_at(1)  # so slow is the wire: take what is there
                else:
                    self._on_wait()
            else:
                self._on_bytes()
                return count

    def hang_up(self) -> None:
        hang_up(self._sock)

    def close(self) -> None:
        self._sock.close()
