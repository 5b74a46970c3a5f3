"""Messages as bytes: a fixed header, then msgpack. Sans I/O: feed it what arrived, take what is whole.

    magic "PCLN" | version u16 | descriptors u16 | length u32 | msgpack of one message

A length is checked before anything is stored for it; a frame that is not ours ends the connection.
"""

from __future__ import annotations

import struct

import msgspec

from paceline.protocol import messages

MAGIC = b"PCLN"
VERSION = 1
MAX_LENGTH = 64 * 2**20
_HEADER = struct.Struct("<4sHHI")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(messages.Any)


class FrameError(Exception):
    """What arrived is not a frame of ours; the connection cannot be used any more."""


def encode(message: messages.Any, descriptors: int = 0) -> bytes:
    """One frame. ``descriptors`` is how many file descriptors travel with it."""
    body = _encoder.encode(message)
    if len(body) > MAX_LENGTH:
        raise FrameError(f"a {type(message).__name__} of {len(body)} bytes is over the limit of {MAX_LENGTH}")
    return _HEADER.pack(MAGIC, VERSION, descriptors, len(body)) + body


def split(data: bytes) -> list[bytes]:
    """The frames at the beginning of ``data`` that are whole, each with its header. Raises FrameError."""
    frames, start = [], 0
    while len(data) - start >= _HEADER.size:
        *_, length = _HEADER.unpack_from(data, start)
        stop = start + _HEADER.size + length
        if len(data) < stop:
            break
        frames.append(data[start:stop])
        start = stop
    return frames


def decode(frame: bytes) -> tuple[messages.Any, int]:
    """What one whole frame holds, with its count of descriptors. Raises FrameError."""
    found = Decoder().feed(frame)
    if len(found) != 1:
        raise FrameError(f"{len(found)} whole frames where one was promised")
    return found[0]


class Decoder:
    """Turns a stream of bytes into messages; holds at most one frame that is not whole yet."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[tuple[messages.Any, int]]:
        """The messages that are whole now, each with its count of descriptors. Raises FrameError."""
        self._pending += data
        whole: list[tuple[messages.Any, int]] = []
        start = 0
        while len(self._pending) - start >= _HEADER.size:
            magic, version, descriptors, length = _HEADER.unpack_from(self._pending, start)
            if magic != MAGIC:
                raise FrameError(f"a frame begins with {magic!r}, not {MAGIC!r}: the peer is not paceline")
            if version != VERSION:
                raise FrameError(f"the peer speaks version {version} of the protocol, this is {VERSION}")
            if length > MAX_LENGTH:
                raise FrameError(f"a frame claims {length} bytes; the limit is {MAX_LENGTH}")
            stop = start + _HEADER.size + length
            if len(self._pending) < stop:
                break
            try:
                message = _decoder.decode(memoryview(self._pending)[start + _HEADER.size : stop])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise FrameError(f"a frame holds no message: {error}") from None
            whole.append((message, descriptors))
            start = stop
        del self._pending[:start]
        return whole
