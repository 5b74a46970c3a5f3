"""Every decoder of bytes from elsewhere, fed with damaged ones: it takes them, or refuses in its own words.

    python -m tests.fuzz 1000000 --seed 3 --only wire

A case is its decoder, seed and number, so what is found can be had again: ``python -m tests.fuzz --only wire --seed 3
--first 4711 1``. Anything but the decoder's own error is a finding; a case that takes seconds is one, too.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from paceline.engine.checkpoint import checkpoints, safetensors
from paceline.protocol import messages
from paceline.protocol.link import Hello, Peer, Refused, Welcome
from paceline.transport import batches, frame, greeting, wire
from tests import fuzz_ranges, fuzz_said
from tests.unit.transport.test_frame import EXAMPLES

STUCK_S = 20.0
_CODES = ["<B", "<H", "<I", "<Q", ">H", ">I", ">Q"]
_EXTREMES = [0, 1, 2**7, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Target:
    """``feed`` may raise ``refuses``, nothing else. ``mend`` makes checksums right again: malice can."""

    samples: list[bytes]
    feed: Callable[[bytes], object]
    refuses: tuple[type[Exception], ...]
    mend: Callable[[bytearray], None] = lambda data: None
    twist: Callable[[bytes, random.Random, Callable[[bytes], bytearray]], bytes] | None = (
        None  # in place of ``damaged``
    )


def targets() -> dict[str, Target]:
    frames = [frame.encode(message) for message in EXAMPLES]
    return {
        "frame": Target([*frames, b"".join(frames)], _feed_frames, (frame.FrameError,)),
        "wire": Target(_wire_samples(), _feed_wire, (frame.FrameError, EOFError), _mend_wire),
        "greeting": Target(
            _greeting_samples(), _feed_greeting, (frame.FrameError, greeting.OtherVersion, EOFError), _mend_greeting
        ),
        "batch": Target(_batch_samples(), lambda data: batches.decode(bytearray(data)), (ValueError,)),
        "safetensors": Target(_safetensors_samples(), _feed_safetensors, (safetensors.Unusable,)),
        "owners": Target(fuzz_said.by_owners(), fuzz_said.HeardByOwners(), fuzz_said.REFUSES, twist=fuzz_said.twisted),
        "remote": Target(
            fuzz_said.by_deputies(), fuzz_said.HeardByDeputy(), fuzz_said.REFUSES, twist=fuzz_said.twisted
        ),
        "ranges": Target(
            fuzz_ranges.by_ranges(),
            fuzz_ranges.HeardByRanges(),
            fuzz_ranges.REFUSES,
            twist=fuzz_said.twisted,
        ),
        "spec": Target(
            list(fuzz_ranges.SPECS),
            fuzz_ranges.feed_spec,
            fuzz_ranges.REFUSES,
            twist=fuzz_ranges.twisted_spec,
        ),
        "manifest": Target(_manifest_samples(), checkpoints._unseal, (safetensors.Unusable,), _mend_manifest),
    }


def damaged(sample: bytes, others: Sequence[bytes], random_: random.Random) -> bytearray:
    """One to four things done to it that damage does, and some that only malice does."""
    data = bytearray(sample)
    for _ in range(random_.randrange(1, 5)):
        place = random_.randrange(len(data) + 1)
        match random_.randrange(7):
            case 0 if data:
                data[place % len(data)] ^= 1 << random_.randrange(8)
            case 1 if data:
                data[place % len(data)] = random_.choice((0, 0x7F, 0x80, 0xC1, 0xC6, 0xDD, 0xDF, 0xFF))
            case 2:
                del data[place:]
            case 3:
                del data[place : place + random_.randrange(16)]
            case 4:
                data[place:place] = random_.randbytes(random_.randrange(16))
            case 5:
                other = random_.choice(others)
                start = random_.randrange(max(len(other), 1))
                data[place:place] = other[start : start + random_.randrange(64)]
            case 6:
                number, code = random_.choice(_EXTREMES), random_.choice(_CODES)
                size = struct.calcsize(code)
                data[place : place + size] = struct.pack(code, number % 256**size)
    return data


def case(target: Target, seed: int, number: int) -> bytes:
    random_ = random.Random(seed << 40 | number)
    if target.twist is not None:
        return target.twist(random_.choice(target.samples), random_, lambda data: damaged(data, [data], random_))
    data = damaged(random_.choice(target.samples), target.samples, random_)
    if random_.random() < 0.7:
        target.mend(data)
    return bytes(data)


def run(name: str, target: Target, count: int, seed: int = 0, first: int = 0) -> list[str]:
    """What was found; empty is good."""
    found: list[str] = []
    faulthandler.dump_traceback_later(max(STUCK_S, count / 200), exit=True)  # a hang ends the process, and says where
    for number in range(first, first + count):
        data = case(target, seed, number)
        began_s = time.perf_counter()
        try:
            target.feed(data)
        except target.refuses:
            pass
        except Exception:  # noqa: BLE001 (whatever it is, it is a finding)
            found.append(f"{name} seed {seed} case {number}: {data[:80]!r}\n{traceback.format_exc(limit=-3)}")
        if time.perf_counter() - began_s > 5:
            found.append(f"{name} seed {seed} case {number} took {time.perf_counter() - began_s:.1f} s")
    faulthandler.cancel_dump_traceback_later()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=20_000, help="cases for each decoder (default 20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--only", choices=sorted(targets()), help="this decoder alone")
    arguments = parser.parse_args(argv)
    findings = 0
    for name, target in targets().items():
        if arguments.only in (None, name):
            began_s = time.monotonic()
            found = run(name, target, arguments.count, arguments.seed, arguments.first)
            took_s = time.monotonic() - began_s
            print(f"{name:12} {arguments.count:,} cases, {len(found)} findings, {took_s:.1f} s")
            print("\n".join(found[:5]), end="\n" if found else "")
            findings += len(found)
    return 1 if findings else 0


def _feed_frames(data: bytes) -> None:
    decoder = frame.Decoder()
    for start in range(0, len(data), 50):
        decoder.feed(data[start : start + 50])
    assert len(decoder._pending) <= len(data)


_PLACE = memoryview(bytearray(4096))
_DECODER: msgspec.msgpack.Decoder[messages.Any] = msgspec.msgpack.Decoder(messages.Any)


def _feed_wire(data: bytes) -> None:
    """As a link reads them, until the bytes are at an end."""
    rest = memoryview(data)

    def receive_into(view: memoryview) -> int:
        nonlocal rest
        count = min(len(view), len(rest), 700)
        view[:count] = rest[:count]
        rest = rest[count:]
        return count

    stream = wire.Stream(receive_into)
    while True:
        header = wire.decode_header(stream.take(wire.HEADER_BYTES))
        body = stream.take(header.body_bytes)
        wire.check_body(header, body)
        if header.kind == wire.MESSAGE:
            wire.decode_body(_DECODER, body)
        if header.payload_bytes > len(_PLACE):
            raise frame.FrameError("nobody expects so much")
        stream.take_into(_PLACE[: header.payload_bytes])
        wire.check_payload(header, wire.summed(_PLACE[: header.payload_bytes]))


def _wire_samples() -> list[bytes]:
    random_, encoder = random.Random(0), msgspec.msgpack.Encoder()
    frames = [wire.encode(wire.PULSE, wire.ANSWER, 0, 7), wire.encode(wire.BYE, 0, 0, 7)]
    for number, message in enumerate(EXAMPLES, 1):
        payload = random_.randbytes(random_.choice((0, 1, 9, 3000)))
        total = wire.summed(memoryview(payload))
        body = encoder.encode(message)
        frames.append(wire.encode(wire.MESSAGE, wire.SUMMED, number, 5, body, len(payload), total) + payload)
    return [*frames, b"".join(frames)]


def _mend_wire(data: bytearray) -> None:
    if len(data) >= wire.HEADER_BYTES:
        body_bytes = int.from_bytes(data[8:12], "little")
        body = data[wire.HEADER_BYTES : wire.HEADER_BYTES + body_bytes]
        data[12:16] = zlib.crc32(body).to_bytes(4, "little")
        end = wire.HEADER_BYTES - 4
        data[end : wire.HEADER_BYTES] = zlib.crc32(data[:end]).to_bytes(4, "little")


def _feed_greeting(data: bytes) -> None:
    reading = greeting.reading()
    wanted, start = next(reading), 0
    try:
        while start + wanted <= len(data):
            assert wanted <= greeting.MAX_BYTES
            start, wanted = start + wanted, reading.send(data[start : start + wanted])
    except StopIteration:
        pass


def _greeting_samples() -> list[bytes]:
    peer = Peer(3, "exchange", 1)
    said = [
        Hello("20261121-train", peer, b"s" * 16, 4, 1, 812, True),
        Welcome(peer, 77),
        Refused("it belongs to another job"),
    ]
    return [greeting.encode(greeting_) for greeting_ in said]


def _mend_greeting(data: bytearray) -> None:
    if len(data) >= greeting.PREAMBLE_BYTES:
        length = int.from_bytes(data[8:12], "little")
        body = data[greeting.PREAMBLE_BYTES : greeting.PREAMBLE_BYTES + length]
        data[12:16] = zlib.crc32(body, zlib.crc32(data[:12])).to_bytes(4, "little")


def _batch_samples() -> list[bytes]:
    return [
        batches.encode(batch)
        for batch in (
            (torch.arange(6.0).view(2, 3), torch.tensor([1, 2])),
            {"x": [np.ones((2, 2)), 1, "text", None], "y": (b"bytes", 2.5, True)},
            [torch.zeros(3, dtype=torch.bfloat16), torch.tensor(1.0), torch.zeros(0, 4, dtype=torch.complex64)],
        )
    ]


def _feed_safetensors(data: bytes) -> None:
    for tensor in safetensors.parse("state.safetensors", memoryview(data)).values():
        assert len(tensor.data) <= len(data)


def _safetensors_samples() -> list[bytes]:
    tensor = checkpoints.Tensor
    groups: list[dict[str, Any]] = [
        {
            "weight": tensor("float32", (2, 3), memoryview(bytes(24))),
            "bias": tensor("float32", (), memoryview(bytes(4))),
        },
        {"empty": tensor("int64", (0, 5), memoryview(b"")), "flag": tensor("bool", (3,), memoryview(bytes(3)))},
    ]
    return [b"".join(safetensors.to_pieces("state.safetensors", group)) for group in groups]


def _manifest_samples() -> list[bytes]:
    files = {"state.safetensors": checkpoints._File(12, "0" * 64), "run.json": checkpoints._File(3, "1" * 64)}
    return [bytes(checkpoints._seal(checkpoints._Manifest(checkpoints._FORMAT, 812, "2026-11-21T09:00:00", files)))]


def _mend_manifest(data: bytearray) -> None:
    body, _, _ = bytes(data).rpartition(b",")
    data[:] = body + checkpoints._last_field(body)


if __name__ == "__main__":
    sys.exit(main())
