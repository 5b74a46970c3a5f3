"""Frames between hosts, as bytes: a fixed header, one message as msgpack, then the payload as it lies in memory.

    magic "PCLK" | kind u8 | flags u8 | 0 u16 | body bytes u32 | CRC-32 of the body u32 | payload bytes u64
    | number u64 | acknowledged u64 | sum of the payload u64 | CRC-32 of all before it u32 | body | payload

A length is believed after its checksum only, and then it is compared with a limit: nothing is allocated for it here.
The sum is there where TLS is not: TCP's own checksum has 16 bits, and not every path keeps to it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from paceline.transport.frame import FrameError

MAGIC = b"PCLK"
MAX_BODY = 2**20
MAX_PAYLOAD = 16 * 2**20
_HEADER = struct.Struct("<4sBBHIIQQQQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
_COLUMNS = 509  # a prime: what is damaged at every page, or at every power of two, is damaged in many columns
_FEW_ROWS = 4  # of fewer the CRC of all bytes is as fast
_BUFFER_BYTES = 4096  # more would copy more of a payload that comes behind a header

MESSAGE, PULSE, BYE = 1, 2, 3  # kinds; a pulse says that one is there, and acknowledges
ANSWER, SUMMED = 1, 2  # flags: acknowledge soon; the payload has a sum


class Header(NamedTuple):
    kind: int
    flags: int
    body_bytes: int
    body_crc: int
    payload_bytes: int
    number: int
    acknowledged: int
    sum: int


def check_sizes(body_bytes: int, payload_bytes: int) -> None:
    """Raises FrameError where a limit is passed."""
    if body_bytes > MAX_BODY:
        raise FrameError(f"a message of {body_bytes} bytes is over the limit of {MAX_BODY}")
    if payload_bytes > MAX_PAYLOAD:
        raise FrameError(f"a payload of {payload_bytes} bytes is over the limit of {MAX_PAYLOAD}; send it in pieces")


def encode(
    kind: int,
    flags: int,
    number: int,
    acknowledged: int,
    body: bytes = b"",
    payload_bytes: int = 0,
    payload_sum: int = 0,
) -> bytes:
    """Header and body. Raises FrameError where a limit is passed."""
    check_sizes(len(body), payload_bytes)
    head = _HEADER.pack(
        MAGIC,
        kind,
        flags,
        0,
        len(body),
        zlib.crc32(body),
        payload_bytes,
        number,
        acknowledged,
        payload_sum,
        0,
    )[: -_CRC.size]
    return head + _CRC.pack(zlib.crc32(head)) + body


def decode_header(data: bytes | memoryview) -> Header:
    """What ``HEADER_BYTES`` bytes say. Raises FrameError: of another program, damaged, or past a limit."""
    magic, kind, flags, zero, body, body_crc, payload, number, acknowledged, total, crc = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, not {MAGIC!r}: the peer is not paceline, or bytes were lost")
    if crc != zlib.crc32(data[: -_CRC.size]):
        raise FrameError("a frame's header is damaged: its checksum is not that of its bytes")
    if body > MAX_BODY:
        raise FrameError(f"a frame claims a message of {body} bytes; the limit is {MAX_BODY}")
    if payload > MAX_PAYLOAD:
        raise FrameError(f"a frame claims a payload of {payload} bytes; the limit is {MAX_PAYLOAD}")
    if kind not in (MESSAGE, PULSE, BYE) or flags & ~(ANSWER | SUMMED) or zero:
        raise FrameError(f"a frame of kind {kind} with flags {flags} and {zero}: there is none")
    if kind != MESSAGE and (body or payload or number):
        raise FrameError(f"a frame of kind {kind} claims a message")
    if kind == MESSAGE and not number:
        raise FrameError("a message has number 0; they are counted from 1")
    return Header(kind, flags, body, body_crc, payload, number, acknowledged, total)


def check_body(header: Header, body: bytes | bytearray | memoryview) -> None:
    """Raises FrameError if it is not what was sent."""
    if zlib.crc32(body) != header.body_crc:
        raise FrameError("a message is damaged: its checksum is not that of its bytes")


def check_payload(header: Header, found: int) -> None:
    """Raises FrameError if the sum ``found`` is not that of the bytes that were sent."""
    if header.flags & SUMMED and found != header.sum:
        raise FrameError(f"a payload of {header.payload_bytes} bytes is damaged: its sum is not that of its bytes")


def decode_body(decoder: msgspec.msgpack.Decoder[Any], body: bytes | bytearray | memoryview) -> Any:
    """The message. Raises FrameError."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"a frame holds no message: {error}") from None


def summed(payload: memoryview) -> int:
    """The CRC-32 of the sums of the payload's columns: its 8-byte words, modulo 2^64, laid out in rows of ``_COLUMNS``.

    Any one flipped bit changes it; two of different columns leave it as it was once in 2^32. Where there are many rows
    it is ten times as fast as the CRC of all bytes.
    """
    import numpy

    rows, rest = divmod(len(payload), 8 * _COLUMNS)
    if rows < _FEW_ROWS:
        return zlib.crc32(payload)
    words = numpy.frombuffer(payload, numpy.uint64, rows * _COLUMNS).reshape(rows, _COLUMNS)
    return zlib.crc32(payload[len(payload) - rest :], zlib.crc32(numpy.add.reduce(words, axis=0)))


class Stream:
    """Bytes as they arrive: small things through a buffer, payloads straight to where they belong.

    ``receive_into`` returns how many bytes it stored, 0 at the end of the stream. It may raise, and then the stream
    stands where it stood. ``fill``, if given, does the same for what is to be filled whole, and may wait for more.
    """

    def __init__(
        self, receive_into: Callable[[memoryview], int], fill: Callable[[memoryview], int] | None = None
    ) -> None:
        self._receive_into, self._fill = receive_into, fill or receive_into
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._stop = 0

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes; valid until the next call. Raises EOFError."""
        if count > _BUFFER_BYTES:
            body = memoryview(bytearray(count))
            self.take_into(body)
            return body
        if self._stop - self._start < count:
            left = bytes(self._buffer[self._start : self._stop])
            self._buffer[: len(left)] = left
            self._start, self._stop = 0, len(left)
            while self._stop < count:
                self._stop += self._received(self._buffer[self._stop :], self._receive_into)
        self._start += count
        return self._buffer[self._start - count : self._start]

    def take_into(self, view: memoryview) -> None:
        """Fill ``view``, bytes. Raises EOFError."""
        done = min(self._stop - self._start, len(view))
        view[:done] = self._buffer[self._start : self._start + done]
        self._start += done
        while done < len(view):
            done += self._received(view[done:], self._fill)

    def _received(self, view: memoryview, receive_into: Callable[[memoryview], int]) -> int:
        count = receive_into(view)
        if not count:
            raise EOFError("the peer has hung up")
        return count
