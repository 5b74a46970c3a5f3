"""Links: whatever is lost, repeated or cut, each message is taken once and in order, and nothing else is believed."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.protocol.link import (
    Hello,
    Incoming,
    Known,
    LinkBroken,
    Outgoing,
    Patience,
    Peer,
    Pulse,
    SessionLost,
    admit,
    mistaken,
    retry_in_s,
)

# What may happen to a session: a message is sent, written, arrives, arrives twice; an acknowledgement is written,
# arrives; the connection is cut, and what was under way is lost.
HAPPENINGS = st.lists(
    st.sampled_from(["send", "send", "write", "write", "write", "arrive", "arrive", "repeat", "tell", "hear", "cut"]),
    max_size=300,
)


class Wire:
    """One direction of a session, and what is under way in both."""

    def __init__(self) -> None:
        self.out: Outgoing[int] = Outgoing(limit_bytes=100, limit_messages=8)
        self.incoming = Incoming()
        self.under_way: list[tuple[int, int]] = []
        self.told: list[int] = []
        self.sent, self.taken, self.freed = [0], [0], [0]

    def happen(self, what: str) -> None:
        match what:
            case "send" if self.out.has_room(20):
                number = self.out.add(self.sent[-1] + 1, 20)
                assert number == self.sent[-1] + 1
                self.sent.append(number)
            case "write" if (written := self.out.next()) is not None:
                self.under_way.append(written)
            case "arrive" | "repeat" if self.under_way:
                number, message = self.under_way[0] if what == "repeat" else self.under_way.pop(0)
                if self.incoming.is_new(number):
                    self.incoming.take(number, 20)
                    self.taken.append(message)
                else:
                    self.incoming.repeated()
            case "tell":
                self.told.append(self.incoming.tell())
            case "hear" if self.told:
                self.freed += self.out.acknowledge(self.told.pop(0))
            case "cut":
                self.under_way, self.told = [], []
                self.freed += self.out.resume(self.incoming.received)
                self.incoming.resume()
        assert len(self.sent) - 1 - self.out.acknowledged <= 5  # of 20 bytes each, in a window of 100
        assert self.out.kept_bytes == 20 * (self.out.last - self.out.acknowledged)


@settings(max_examples=500)
@given(HAPPENINGS)
def test_each_message_is_taken_once_and_in_order_whatever_happens(happenings: list[str]) -> None:
    wire = Wire()
    for what in happenings:
        wire.happen(what)
        assert wire.taken == wire.sent[: len(wire.taken)]
        assert wire.freed == wire.taken[: len(wire.freed)], "a message was let go that the peer does not have"
    for what in ["cut", *["write", "arrive"] * 8, "tell", "hear"]:
        wire.happen(what)
    assert wire.taken == wire.freed == wire.sent, "what was sent has not come through in the quiet phase"


@given(HAPPENINGS, st.integers(1, 5))
def test_an_acknowledgement_of_what_was_never_written_is_not_believed(happenings: list[str], beyond: int) -> None:
    wire = Wire()
    written = 0
    for what in happenings:
        wire.happen(what)
        written = max([written, *[number for number, _ in wire.under_way]])
    with pytest.raises(LinkBroken):
        wire.out.acknowledge(max(written, wire.incoming.received) + beyond)


def test_a_gap_breaks_the_connection() -> None:
    incoming = Incoming()
    incoming.take(1, 0)
    with pytest.raises(LinkBroken, match="message 3 came after message 1"):
        incoming.is_new(3)


def test_a_peer_that_has_forgotten_ends_the_session() -> None:
    out: Outgoing[str] = Outgoing(100, 8)
    for text in "abc":
        out.add(text, 1)
        out.next()
    assert out.acknowledge(2) == ["a", "b"]
    with pytest.raises(SessionLost, match="has messages up to 1, and had acknowledged 2"):
        out.resume(1)
    with pytest.raises(SessionLost, match="has messages up to 9; the last one written is 3"):
        out.resume(9)


def test_a_message_over_the_window_goes_alone() -> None:
    out: Outgoing[str] = Outgoing(100, 8)
    assert out.has_room(1000)
    out.add("large", 1000)
    assert not out.has_room(0)
    out.next()
    out.acknowledge(1)
    assert out.has_room(1000)


def test_a_repeat_is_acknowledged_again() -> None:
    incoming = Incoming()
    incoming.take(1, 10)
    assert incoming.owes
    assert incoming.tell() == 1
    assert not incoming.owes
    assert not incoming.is_new(1)
    incoming.repeated()
    assert incoming.owes


def test_after_a_new_connection_the_peer_is_told_again() -> None:
    incoming = Incoming()
    incoming.take(1, 10)
    incoming.tell()
    incoming.resume()
    assert incoming.owes


def test_acknowledgements_of_much_are_not_put_off() -> None:
    incoming = Incoming()
    for number in range(1, 4):
        incoming.take(number, 10)
    assert incoming.owes_much(30, 100)
    assert incoming.owes_much(100, 3)
    assert not incoming.owes_much(31, 4)


def test_silence_counts_from_what_was_heard_and_heartbeats_from_what_was_said() -> None:
    pulse = Pulse(Patience(heartbeat_s=1, silence_s=3), 10.0)
    assert pulse.due_in_s(10.5) == 0.5
    pulse.said(10.5)
    assert pulse.due_in_s(11.5) == 0
    assert pulse.silent_s(12.9) is None
    assert pulse.silent_s(13.0) == 3
    pulse.heard(13.0)
    assert pulse.silent_s(15.9) is None


def test_attempts_come_at_once_then_less_and_less_often() -> None:
    longest = [retry_in_s(attempt, 1.0) for attempt in range(1, 2000)]
    assert longest[:4] == [0.0, 0.05, 0.1, 0.2]
    assert longest == sorted(longest)
    assert max(longest) == 2.0
    assert retry_in_s(3, 0.0) == 0.05


def hello(**changes: Any) -> Hello:
    first = Hello(job="a", peer=Peer(1, "exchange", 2), session=b"s" * 16, attempt=1, lane=0, received=0, resumes=False)
    return msgspec.structs.replace(first, **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"session": b"short"}, "a session has 5 bytes; it must have 16"),
        ({"lane": 2}, "lane 2; it must be 0 or 1"),
        ({"received": -1}, "out of range"),
        ({"attempt": 2**63}, "out of range"),
        ({"peer": Peer(-1, "exchange")}, "out of range"),
        ({"peer": Peer(1, "")}, "a role that is no word"),
        ({"peer": Peer(1, "x" * 65)}, "a role that is no word"),
        ({"peer": Peer(1, "a\nb")}, "a role that is no word"),
    ],
)
def test_a_hello_that_makes_no_sense_is_told_why(changes: dict[str, Any], says: str) -> None:
    assert says in (mistaken(hello(**changes)) or "")


def test_a_proper_hello_is_admitted() -> None:
    assert mistaken(hello()) is None
    assert admit(hello(), "a", None) is None


KNOWN = Known(b"s" * 16, Peer(1, "exchange", 2))


@pytest.mark.parametrize(
    ("changes", "known", "says"),
    [
        ({}, KNOWN, None),
        ({"resumes": True}, KNOWN, None),
        ({"session": b"n" * 16}, KNOWN, None),
        ({"peer": Peer(1, "exchange", 3), "session": b"n" * 16}, KNOWN, None),
        ({"job": "b"}, KNOWN, "it belongs to job 'b'; this is job 'a'"),
        ({"resumes": True}, None, "the session is not known here"),
        ({"resumes": True, "session": b"n" * 16}, KNOWN, "the session is not known here"),
        (
            {"peer": Peer(1, "exchange", 1)},
            KNOWN,
            "exchange of host 1 (incarnation 1) has been replaced by incarnation 2",
        ),
        ({"peer": Peer(1, "exchange", 1)}, dataclasses.replace(KNOWN, session=b"o" * 16), "replaced by incarnation 2"),
    ],
)
def test_who_is_admitted(changes: dict[str, Any], known: Known | None, says: str | None) -> None:
    answer = admit(hello(**changes), "a", known)
    assert answer is None if says is None else says in (answer or "")
