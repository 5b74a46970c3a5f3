"""How two processes meet on a fresh connection: the bytes around ``protocol/link.py``'s Hello and Welcome.

    magic "PCLH" | version u16 | 0 u16 | length u32 | CRC-32 of all before it and of what follows u32 | msgpack

These 16 bytes stay as they are in every version, so that two versions can at least tell each other their numbers.
Sans I/O: ``reading`` asks for so many bytes, is given them, and returns what was said.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Generator

import msgspec

from paceline.protocol.link import VERSION, Greeting
from paceline.transport.frame import FrameError

MAGIC = b"PCLH"
MAX_BYTES = 4096
_PREAMBLE = struct.Struct("<4sHHII")
PREAMBLE_BYTES = _PREAMBLE.size
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)


class OtherVersion(Exception):
    """The peer is of another version of paceline; both are named."""


def encode(greeting: Greeting) -> bytes:
    body = _encoder.encode(greeting)
    assert len(body) <= MAX_BYTES, "a greeting is short"
    head = _PREAMBLE.pack(MAGIC, VERSION, 0, len(body), 0)[:-4]
    return head + zlib.crc32(body, zlib.crc32(head)).to_bytes(4, "little") + body


def reading() -> Generator[int, bytes, Greeting]:
    """Yields how many bytes it wants next. Raises FrameError, and OtherVersion."""
    head = yield PREAMBLE_BYTES
    magic, version, _, length, crc = _PREAMBLE.unpack(head)
    if magic != MAGIC:
        raise FrameError(f"it began with {magic!r}, not {MAGIC!r}: it is not paceline")
    if length > MAX_BYTES:
        raise FrameError(f"it claims a greeting of {length} bytes; the limit is {MAX_BYTES}")
    body = (yield length) if length else b""
    if crc != zlib.crc32(body, zlib.crc32(head[:-4])):
        raise FrameError("its greeting is damaged: the checksum is not that of its bytes")
    if version != VERSION:
        raise OtherVersion(f"it speaks version {version} of paceline's protocol, this is {VERSION}")
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(f"its greeting is none: {error}") from None
