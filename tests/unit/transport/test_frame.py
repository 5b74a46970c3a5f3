"""Frames: what goes in comes out however it is cut, and nothing else that arrives does any harm."""

from __future__ import annotations

import itertools
import random
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.protocol import messages
from paceline.transport import frame
from paceline.transport.frame import MAGIC, MAX_LENGTH, VERSION, Decoder, FrameError, encode

# The numbers are the protocol: a message that is renumbered or whose fields move breaks older peers unseen.
WIRE: list[tuple[Any, list[Any]]] = [
    (messages.Wrap(1, "copy", b"s", 7, "w"), [1, 1, "copy", b"s", 7, "w", []]),
    (messages.Memory(1, 7, "copy", b"s"), [2, 1, 7, "copy", b"s", []]),
    (messages.Steps(b"r"), [3, b"r"]),
    (messages.Logged(4, {"a": 0.5}), [4, 4, {"a": 0.5}]),
    (messages.LoggedBehind(4, None, 3, {"a": 0.5}), [17, 4, None, 3, {"a": 0.5}]),
    (messages.Pass(0, 1, None), [5, 0, 1, None]),
    (messages.Ended("r"), [6, "r"]),
    (messages.Failed("K", "w", "y", "f", "t"), [7, "K", "w", "y", "f", "t"]),
    (messages.Finished(), [8]),
    (messages.Stop("r"), [9, "r"]),
    (messages.Fork("worker", 1, b"s"), [10, "worker", 1, b"s", 1]),
    (messages.Forked("worker", 1, 99), [11, "worker", 1, 99]),
    (messages.Exited("worker", 1, 99, -9), [12, "worker", 1, 99, -9]),
    (messages.Ready({"torch": "2"}), [13, {"torch": "2"}]),
    (messages.Hold("memory", "worker", 1, 7, b"a"), [30, "memory", "worker", 1, 7, b"a"]),
    (
        messages.Begin(b"s", "runs/a", ["b"], 99, True, 3, 4, {"events": 5}, ["d"]),
        [31, b"s", "runs/a", ["b"], 99, True, 3, 4, {"events": 5}, ["d"]],
    ),
    (messages.Show("metrics", 9, b"r"), [32, "metrics", 9, b"r"]),
    (messages.Interrupt(2), [33, 2]),
    (messages.Abandon("r"), [34, "r"]),
    (messages.Outcome(b"s", messages.Failed("K", "w")), [35, b"s", [7, "K", "w", "", "", ""]]),
    (messages.Letter(70_000), [36, 70_000]),
    (messages.Drop(7), [37, 7]),
    (messages.Joined(2), [40, 2]),
    (messages.Scale(4, 2), [41, 4, 2]),
    (messages.Scaled(("t",), "K", "w", "y", "f"), [42, ["t"], "K", "w", "y", "f"]),
]
EXAMPLES = [message for message, _ in WIRE]

HEADER = struct.Struct("<4sHHI")
TEXT = st.text(max_size=20)
NUMBER = st.integers(0, 2**40)
FLOAT = st.floats(allow_nan=False)
DATA = st.binary(max_size=200)
MESSAGES: st.SearchStrategy[Any] = st.one_of(
    st.builds(messages.Wrap, NUMBER, TEXT, DATA, NUMBER, TEXT),
    st.builds(messages.Memory, NUMBER, NUMBER, TEXT, DATA),
    st.builds(messages.Steps, DATA),
    st.builds(messages.Logged, NUMBER, st.dictionaries(TEXT, FLOAT, max_size=4)),
    st.builds(messages.LoggedBehind, NUMBER, st.none() | FLOAT, NUMBER, st.dictionaries(TEXT, FLOAT, max_size=4)),
    st.builds(messages.Pass, NUMBER, NUMBER, st.none() | NUMBER),
    st.builds(messages.Ended, TEXT),
    st.builds(messages.Failed, TEXT, TEXT, TEXT, TEXT, TEXT),
    st.builds(messages.Finished),
    st.builds(messages.Stop, TEXT),
    st.builds(messages.Fork, TEXT, NUMBER, DATA),
    st.builds(messages.Forked, TEXT, NUMBER, NUMBER),
    st.builds(messages.Exited, TEXT, NUMBER, NUMBER, st.integers(-64, 255)),
    st.builds(messages.Ready, st.dictionaries(TEXT, TEXT, max_size=3)),
)
STREAMS = st.lists(st.tuples(MESSAGES, st.integers(0, 16)), max_size=8)


def framed(body: bytes, *, magic: bytes = MAGIC, version: int = VERSION, length: int | None = None) -> bytes:
    return HEADER.pack(magic, version, 0, len(body) if length is None else length) + body


def chunks(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:stop] for start, stop in itertools.pairwise(places)]


def fed(decoder: Decoder, parts: list[bytes]) -> list[tuple[Any, int]]:
    return [message for part in parts for message in decoder.feed(part)]


def assert_harmless(decoder: Decoder, data: bytes) -> None:
    """It may be refused or be a message of ours; anything else is a defect."""
    try:
        for message, _ in decoder.feed(data):
            assert isinstance(message, messages.Message)
    except FrameError:
        return
    assert len(decoder._pending) < HEADER.size + MAX_LENGTH


@settings(max_examples=300)
@given(STREAMS, st.lists(st.integers(0, 10**6), max_size=20))
def test_messages_survive_any_chunking(stream: list[tuple[Any, int]], cuts: list[int]) -> None:
    data = b"".join(encode(message, descriptors) for message, descriptors in stream)
    assert fed(Decoder(), chunks(data, cuts)) == stream


def test_messages_survive_byte_by_byte() -> None:
    stream = [(messages.Stop("now"), 0), (messages.Memory(1, 2, "copy", b"\0" * 99), 1)]
    data = b"".join(encode(*pair) for pair in stream)
    assert fed(Decoder(), [data[place : place + 1] for place in range(len(data))]) == stream


@given(MESSAGES, st.integers(0, 10**6))
def test_only_the_part_of_a_frame_that_is_not_whole_is_kept(message: Any, cut: int) -> None:
    data = encode(message)
    decoder = Decoder()
    part = data[: cut % len(data)]
    assert decoder.feed(data + part) == [(message, 0)]
    assert bytes(decoder._pending) == part
    assert decoder.feed(data[len(part) :]) == [(message, 0)]
    assert not decoder._pending


def test_every_message_has_a_number_of_its_own() -> None:
    kinds = messages.Any.__args__
    tags = [kind.__struct_config__.tag for kind in kinds]
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(("message", "body"), WIRE, ids=lambda value: type(value).__name__)
def test_numbers_and_fields_on_the_wire_are_fixed(message: Any, body: list[Any]) -> None:
    assert encode(message, 3) == HEADER.pack(b"PCLN", 1, 3, len(msgspec.msgpack.encode(body))) + msgspec.msgpack.encode(
        body
    )


# --- what is not ours ---


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_any_one_flipped_bit_is_refused_or_harmless(message: Any) -> None:
    data = encode(message)
    for place, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        assert_harmless(Decoder(), bytes(flipped))


@settings(max_examples=200)
@given(STREAMS.filter(bool), st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 255)), min_size=1, max_size=5))
def test_flipped_bits_in_a_stream_are_refused_or_harmless(
    stream: list[tuple[Any, int]], flips: list[tuple[int, int]]
) -> None:
    data = bytearray(b"".join(encode(*pair) for pair in stream))
    for place, bits in flips:
        data[place % len(data)] ^= bits
    assert_harmless(Decoder(), bytes(data))


@settings(max_examples=400)
@given(STREAMS.filter(bool), st.integers(0, 10**9))
def test_a_truncated_stream_gives_the_whole_frames_and_waits(stream: list[tuple[Any, int]], cut: int) -> None:
    data = b"".join(encode(*pair) for pair in stream)
    part = data[: cut % len(data)]
    whole = fed(Decoder(), [part])
    assert whole == stream[: len(whole)]
    assert len(b"".join(encode(*pair) for pair in stream[: len(whole) + 1])) > len(part)


@settings(max_examples=1000)
@given(st.binary(max_size=100))
def test_noise_is_refused_or_waits_for_more(data: bytes) -> None:
    assert_harmless(Decoder(), data)


@settings(max_examples=2000)
@given(st.binary(max_size=60))
def test_noise_in_a_proper_frame_is_refused_or_a_message(body: bytes) -> None:
    assert_harmless(Decoder(), framed(body))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=3)
    | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=500)
@given(st.integers(-1, 15), st.lists(VALUES, max_size=6))
def test_other_msgpack_in_a_proper_frame_is_refused_or_a_message(tag: int, fields: list[Any]) -> None:
    assert_harmless(Decoder(), framed(msgspec.msgpack.encode([tag, *fields])))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc0", id="nil"),
        pytest.param(b"\x90", id="no tag"),
        pytest.param(b"\x91\x63", id="a tag nobody has"),
        pytest.param(b"\x92\x09\xa2\xff\xfe", id="text that is no UTF-8"),
        pytest.param(b"\x93\x04\x01\x81\xa1\xff\xcb" + bytes(8), id="a key that is no UTF-8"),
        pytest.param(b"\x93\x09\xa1a" + b"\x91" * 100_000 + b"\xc0", id="nested deeper than any stack"),
        pytest.param(b"\x93\x04\x01\xdf\xff\xff\xff\xff", id="a map that claims four billion entries"),
        pytest.param(b"\xdd\xff\xff\xff\xff\x09\xa1a", id="an array that claims four billion items"),
        pytest.param(b"\x92\x03\xc6\xff\xff\xff\xff", id="data that claims four billion bytes"),
        pytest.param(b"\x91\x08" + b"\x91\x08", id="something behind the message"),
    ],
)
def test_a_body_that_is_no_message_is_a_frame_error(body: bytes) -> None:
    with pytest.raises(FrameError):
        Decoder().feed(framed(body))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (framed(b"", magic=b"HTTP"), "b'HTTP', not b'PCLN'"),
        (framed(b"", version=2), "version 2 of the protocol, this is 1"),
        (framed(b"", length=MAX_LENGTH + 1), f"claims {MAX_LENGTH + 1} bytes; the limit is {MAX_LENGTH}"),
        (framed(b"", length=2**32 - 1), f"claims {2**32 - 1} bytes"),
    ],
)
def test_a_bad_header_is_refused_before_any_body(data: bytes, says: str) -> None:
    decoder = Decoder()
    assert decoder.feed(data[:-1]) == []
    with pytest.raises(FrameError) as caught:
        decoder.feed(data[-1:])
    assert says in str(caught.value)
    assert len(decoder._pending) <= HEADER.size


def test_a_length_at_the_limit_is_waited_for() -> None:
    decoder = Decoder()
    assert decoder.feed(framed(b"", length=MAX_LENGTH)) == []


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "MAX_LENGTH", 100)
    assert encode(messages.Steps(bytes(90)))
    with pytest.raises(FrameError, match="a Steps of 104 bytes is over the limit of 100"):
        encode(messages.Steps(bytes(100)))


def test_a_long_stream_does_not_grow_the_decoder() -> None:
    decoder, random_ = Decoder(), random.Random(1)
    data = encode(messages.Steps(random_.randbytes(300))) * 500
    taken = 0
    for part in chunks(data, [random_.randrange(len(data)) for _ in range(1500)]):
        taken += len(decoder.feed(part))
        assert len(decoder._pending) < 400
    assert taken == 500
