"""A session between two processes over connections that break: numbers, acknowledgements, what is written again.

Pure: no sockets, no clocks. ``transport/link.py`` writes and reads what this decides. The laws, for each direction:

1. A message has a number, counted from 1, and keeps number and bytes however often it is written.
2. A receiver takes number n after n - 1 and once. A number that it has is a repeat: dropped, and acknowledged again.
3. A sender keeps a message until its number is acknowledged. On a new connection it goes on behind what the peer has.
4. A number that leaves a gap, and an acknowledgement of what was never written, end the connection. A peer that has
   forgotten what it acknowledged ends the session: nothing could make it whole.
5. What is kept is limited, in bytes and messages; who sends faster than the peer takes waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import msgspec

T = TypeVar("T")

VERSION = 1  # of everything that is said between hosts
_MAX_NUMBER = 2**62
# In a message: a count, a place, a number of something. Another is refused as it is decoded.
Number = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_NUMBER)]


class LinkBroken(Exception):
    """The peer said what no peer says who holds to the laws; this connection is of no use. A new one may be."""


class Senseless(Exception):
    """The peer's application sent what nobody here understands or expects; sent again it would be the same. Ends the
    session."""


class SessionLost(Exception):
    """The peer does not know this session any more; there is nothing to resume."""


@dataclass(frozen=True)
class Patience:
    """How long is waited for a peer, and how much is kept for it. The same at both ends, or nearly."""

    heartbeat_s: float = 0.5  # who has said nothing for so long says that it is there
    silence_s: float = 3.0  # who has heard nothing for so long gives the connection up
    give_up_s: float = 60.0  # without a connection for so long the session ends
    window_bytes: int = 64 * 2**20  # sent and not acknowledged: `send` waits above it
    window_messages: int = 4096

    def __post_init__(self) -> None:
        assert 0 < self.heartbeat_s < self.silence_s, "a heartbeat must come before silence is noticed"
        assert self.give_up_s > 0
        assert self.window_bytes > 0
        assert self.window_messages > 0


class Outgoing(Generic[T]):
    """What one side sends. ``T`` stands for a message with its bytes, whatever that is."""

    def __init__(self, limit_bytes: int, limit_messages: int) -> None:
        self._limit_bytes, self._limit_messages = limit_bytes, limit_messages
        self._kept: deque[tuple[T, int]] = deque()  # with its size; the first has number acknowledged + 1
        self._written = 0  # how many of those kept are written on the present connection
        self._ever = 0  # the highest number written on any
        self.acknowledged = 0
        self.kept_bytes = 0

    @property
    def last(self) -> int:
        """The number of the newest message."""
        return self.acknowledged + len(self._kept)

    def has_room(self, size_bytes: int) -> bool:
        """A message over the limit goes alone."""
        if not self._kept:
            return True
        return self.kept_bytes + size_bytes <= self._limit_bytes and len(self._kept) < self._limit_messages

    def add(self, message: T, size_bytes: int) -> int:
        """Its number. There must be room."""
        assert self.has_room(size_bytes), "the window is full"
        self._kept.append((message, size_bytes))
        self.kept_bytes += size_bytes
        return self.last

    def next(self) -> tuple[int, T] | None:
        """What to write now, with its number; it counts as written on this connection."""
        if self._written == len(self._kept):
            return None
        message, _ = self._kept[self._written]
        self._written += 1
        number = self.acknowledged + self._written
        self._ever = max(self._ever, number)
        return number, message

    @property
    def has_next(self) -> bool:
        return self._written < len(self._kept)

    @property
    def is_next_last(self) -> bool:
        """Is the one to write now the newest?"""
        return self._written == len(self._kept) - 1

    def acknowledge(self, number: int) -> list[T]:
        """The peer has everything up to ``number``: those that it had not before. Raises LinkBroken."""
        if number > self._ever:
            raise LinkBroken(f"the peer acknowledges message {number}; the last one written is {self._ever}")
        freed: list[T] = []
        while self.acknowledged < number:
            message, size_bytes = self._kept.popleft()
            self.kept_bytes -= size_bytes
            self.acknowledged += 1
            self._written = max(self._written - 1, 0)
            freed.append(message)
        return freed  # an older acknowledgement says nothing new

    def resume(self, received: int) -> list[T]:
        """A new connection, to a peer that has everything up to ``received``. As ``acknowledge``, or SessionLost."""
        if received < self.acknowledged:
            raise SessionLost(f"the peer has messages up to {received}, and had acknowledged {self.acknowledged}")
        if received > self._ever:
            raise SessionLost(f"the peer has messages up to {received}; the last one written is {self._ever}")
        self._written = 0
        return self.acknowledge(received)


class Incoming:
    """What one side has received, and what of it the peer has not been told yet."""

    def __init__(self) -> None:
        self.received = 0
        self._told = 0
        self._owed_bytes = 0

    def is_new(self, number: int) -> bool:
        """False for a repeat. Raises LinkBroken where one is missing before it."""
        if number > self.received + 1:
            raise LinkBroken(f"message {number} came after message {self.received}")
        return number == self.received + 1

    def take(self, number: int, size_bytes: int) -> None:
        """It is here, whole."""
        assert number == self.received + 1
        self.received = number
        self._owed_bytes += size_bytes

    def repeated(self) -> None:
        """A repeat came: the acknowledgement of it may have been lost."""
        self._told = min(self._told, self.received - 1)

    @property
    def owes(self) -> bool:
        return self._told != self.received

    def owes_much(self, limit_bytes: int, limit_messages: int) -> bool:
        """Is it time to acknowledge, even if nothing else is to be said?"""
        return self._owed_bytes >= limit_bytes or self.received - self._told >= limit_messages

    def tell(self) -> int:
        """The number to acknowledge with whatever is written now."""
        self._told = self.received
        self._owed_bytes = 0
        return self.received

    def resume(self) -> None:
        """A new connection: what the peer was told on the old one may be lost."""
        self._told, self._owed_bytes = -1, 0


class Pulse:
    """When to say that one is there, and when a peer has been silent too long. Times in seconds, of one clock."""

    def __init__(self, patience: Patience, now_s: float) -> None:
        self._patience = patience
        self._said_s = self._heard_s = now_s

    def said(self, now_s: float) -> None:
        self._said_s = now_s

    def heard(self, now_s: float) -> None:
        self._heard_s = now_s

    def due_in_s(self, now_s: float) -> float:
        """How long until a heartbeat must be written; 0 or less: now."""
        return self._said_s + self._patience.heartbeat_s - now_s

    def silent_s(self, now_s: float) -> float | None:
        """How long the peer has been silent, if that is too long."""
        silent_s = now_s - self._heard_s
        return silent_s if silent_s >= self._patience.silence_s else None


def retry_in_s(attempt: int, fraction: float) -> float:
    """How long to wait before attempt 1, 2, ...: 0, then up to 0.05, 0.1, ... 2 s. ``fraction`` is random in [0, 1)."""
    longest_s = min(0.05 * 2.0 ** min(attempt - 2, 10), 2.0)
    return 0.0 if attempt <= 1 else longest_s * (0.5 + fraction / 2)


# How two processes meet. What is said first, before any message; ``transport/greeting.py`` has the bytes around it.


class Peer(msgspec.Struct, frozen=True):
    """Who somebody is. A process that takes another's place has a higher incarnation."""

    host: int
    role: str
    incarnation: int = 0

    def __str__(self) -> str:
        again = f" (incarnation {self.incarnation})" if self.incarnation else ""
        return f"{self.role} of host {self.host}{again}"


class Hello(msgspec.Struct, frozen=True, tag_field="t", tag=1, array_like=True):
    """The one that connects says ... this is me, and this is one of the two connections of a session.

    ``session`` is 16 random bytes; ``attempt`` counts its connections; ``lane`` is 0 for what this side sends, 1 for
    what it receives; ``received`` is the last number it has; ``resumes`` is False for a session that nobody knows yet.
    Answer: Welcome or Refused.
    """

    job: str
    peer: Peer
    session: bytes
    attempt: int
    lane: int
    received: int
    resumes: bool


class Welcome(msgspec.Struct, frozen=True, tag_field="t", tag=2, array_like=True):
    """The one that listens says ... this is me, and the last number that I have. No answer."""

    peer: Peer
    received: int


class Refused(msgspec.Struct, frozen=True, tag_field="t", tag=3, array_like=True):
    """The one that listens says ... no, and asking again will not change it. No answer."""

    reason: str


Greeting = Hello | Welcome | Refused
SESSION_BYTES = 16
_MAX_NAME = 64


def mistaken(hello: Hello) -> str | None:
    """What is wrong with the form of it, for a peer that is not what it says."""
    if len(hello.session) != SESSION_BYTES:
        return f"a session has {len(hello.session)} bytes; it must have {SESSION_BYTES}"
    if hello.lane not in (0, 1):
        return f"lane {hello.lane}; it must be 0 or 1"
    numbers = (hello.attempt, hello.received, hello.peer.host, hello.peer.incarnation)
    if any(not 0 <= number < _MAX_NUMBER for number in numbers):
        return f"a number that is out of range, one of {numbers}"
    if not 0 < len(hello.peer.role) <= _MAX_NAME or not hello.peer.role.isidentifier():
        return "a role that is no word"
    return None


@dataclass(frozen=True)
class Known:
    """A session that the listening side has."""

    session: bytes
    peer: Peer


def admit(hello: Hello, job: str, known: Known | None) -> str | None:
    """Why this peer must stay outside, or None. ``known`` is the session that is held with its host and role.

    A higher incarnation, or a new session of the same one, takes the place of the session that is held.
    """
    if hello.job != job:
        return f"it belongs to job {hello.job[:_MAX_NAME]!r}; this is job {job!r}"
    if known is not None and hello.peer.incarnation < known.peer.incarnation:
        return f"{hello.peer} has been replaced by incarnation {known.peer.incarnation}"
    if hello.resumes and (known is None or known.session != hello.session):
        return "the session is not known here: this process was started anew, or has given the session up"
    return None
