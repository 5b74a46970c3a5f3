"""A framed, blocking channel over a Unix socket, able to carry file descriptors.

A message is sent in one piece of at most 32 KB, which the kernel takes whole or not at all: a sender that is killed
leaves no half of one. What is longer travels in memory of its own (*Letter*). So a reader may look at messages, write
down that it has them, and only then take them from the socket (``peek``, ``consume``): if it is killed in between,
whoever reads the socket after it finds them there.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections import deque
from typing import NamedTuple

from paceline.protocol import messages
from paceline.transport.frame import MAX_LENGTH, Decoder, FrameError, decode, encode, split

_CHUNK = 1 << 16
_MAX_DESCRIPTORS = 17  # sixteen, and a letter
_PIECE = 1 << 15


class Peeked(NamedTuple):
    """A message that is still in the socket, where it takes ``size_bytes``; its descriptors are copies, and the
    caller's. ``frame``: the message as a frame, however long."""

    message: messages.Any
    descriptors: tuple[int, ...]
    frame: bytes
    size_bytes: int


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
        if len(data) > _PIECE:
            letter = _write(data)
            try:
                self._send(encode(messages.Letter(len(data)), 1 + len(descriptors)), (letter, *descriptors))
            finally:
                os.close(letter)
        else:
            self._send(data, descriptors)

    def _send(self, data: bytes, descriptors: tuple[int, ...]) -> None:
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

    def peek(self) -> list[Peeked]:
        """The messages that are whole in the socket now; they stay there. Does not block. Raises Closed."""
        try:
            data, descriptors = self._receive(socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        found = []
        for frame in split(data):
            message, count = decode(frame)
            own, descriptors = descriptors[:count], descriptors[count:]
            content = frame
            if isinstance(message, messages.Letter):
                content = _read_letter(message, own)
                message, own = decode(content)[0], own[1:]
            found.append(Peeked(message, own, content, len(frame)))
        for fd in descriptors:  # of a message that is not whole
            os.close(fd)
        if not found and self._is_hung_up():
            raise Closed("the peer has closed the channel in the middle of a message")
        return found

    def consume(self, size_bytes: int) -> None:
        """Take what was peeked from the socket."""
        while size_bytes:
            size_bytes -= len(self._sock.recv(size_bytes))

    def _is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(0))

    def _next(self) -> tuple[messages.Any, tuple[int, ...]]:
        message, count = self._messages.popleft()
        if count > len(self._descriptors):
            raise FrameError(f"{type(message).__name__} claims {count} descriptors, {len(self._descriptors)} came")
        descriptors = tuple(self._descriptors.popleft() for _ in range(count))
        if isinstance(message, messages.Letter):
            return decode(_read_letter(message, descriptors))[0], descriptors[1:]
        return message, descriptors

    def _read(self) -> None:
        data, descriptors = self._receive(0)
        self._descriptors.extend(descriptors)
        self._messages.extend(self._decoder.feed(data))

    def _receive(self, flags: int) -> tuple[bytes, tuple[int, ...]]:
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
        try:
            data, extra, _, _ = self._sock.recvmsg(_CHUNK, space, socket.MSG_CMSG_CLOEXEC | flags)
        except ConnectionResetError:
            data, extra = b"", []
        found = array.array("i")
        for level, kind, payload in extra:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found.frombytes(payload[: len(payload) // 4 * 4])
        if not data:
            raise Closed("the peer has closed the channel")
        return data, tuple(found)


def _write(data: bytes) -> int:
    fd = os.memfd_create("paceline-letter", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def _read_letter(letter: messages.Letter, descriptors: tuple[int, ...]) -> bytes:
    """The frame that is in the first of the descriptors, which is closed. The others belong to its message."""
    if not descriptors or letter.size_bytes > 2 * MAX_LENGTH:
        raise FrameError(f"a letter of {letter.size_bytes} bytes, with {len(descriptors)} descriptors")
    try:
        frame = os.pread(descriptors[0], letter.size_bytes, 0)
    finally:
        os.close(descriptors[0])
    content, count = decode(frame)
    if count != len(descriptors) - 1:
        raise FrameError(f"{type(content).__name__} claims {count} descriptors, {len(descriptors) - 1} came")
    return frame
