"""A framed, blocking channel over a Unix socket, able to carry file descriptors."""

from __future__ import annotations

import array
import os
import socket
from collections import deque

from paceline.protocol import messages
from paceline.transport.frame import Decoder, FrameError, encode

_CHUNK = 1 << 16
_MAX_DESCRIPTORS = 16


class Closed(Exception):
    """The other side has closed its end, or is gone."""


class Channel:
    """Owns ``sock``. Not for several threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = Decoder()
        self._messages: deque[tuple[messages.Any, int]] = deque()
        self._descriptors: deque[int] = deque()

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return Channel(left), Channel(right)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def send(self, message: messages.Any, descriptors: tuple[int, ...] = ()) -> None:
        """Send all of it; blocks while the peer is behind. The descriptors stay open here. Raises Closed."""
        data = encode(message, len(descriptors))
        try:
            sent = 0
            if descriptors:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                sent = self._sock.sendmsg([data], [rights])
            if sent < len(data):
                self._sock.sendall(memoryview(data)[sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise Closed("the peer is gone") from None

    def receive(self) -> tuple[messages.Any, tuple[int, ...]]:
        """The next message and the descriptors that came with it (now the caller's). Blocks. Raises Closed."""
        while not self._messages:
            self._read()
        return self._next()

    def drain(self) -> list[tuple[messages.Any, tuple[int, ...]]]:
        """All messages that are whole after one read; blocks only if nothing has arrived. Raises Closed."""
        if not self._messages:
            self._read()
        return [self._next() for _ in range(len(self._messages))]

    def _next(self) -> tuple[messages.Any, tuple[int, ...]]:
        message, count = self._messages.popleft()
        if count > len(self._descriptors):
            raise FrameError(f"{type(message).__name__} claims {count} descriptors, {len(self._descriptors)} came")
        return message, tuple(self._descriptors.popleft() for _ in range(count))

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
        try:
            data, extra, _, _ = self._sock.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, extra = b"", []
        for level, kind, payload in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(payload[: len(payload) // 4 * 4])
                self._descriptors.extend(found)
        if not data:
            raise Closed("the peer has closed the channel")
        self._messages.extend(self._decoder.feed(data))
