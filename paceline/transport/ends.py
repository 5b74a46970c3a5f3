"""What a process says about all its links when it makes them, and the events that it is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paceline.errors import ConfigError
from paceline.protocol.link import Patience, Peer
from paceline.transport.tls import Credentials
from paceline.transport.turns import Turns

if TYPE_CHECKING:
    from paceline.transport.link import Link


class LinkEnded(Exception):
    """The session with this peer is over; nothing can be sent to it any more. The reason is in words."""


@dataclass(frozen=True)
class Joined:
    """The peer is there; the first event of a link."""

    link: Link


@dataclass(slots=True)
class Received:
    """The peer's next message, with its payload where ``place`` wanted it (None: it has none)."""

    link: Link
    message: Any
    payload: memoryview | None


@dataclass(frozen=True)
class Lost:
    """There is no connection now. It is being tried again; nothing is lost yet, and sending goes on into the window."""

    link: Link
    reason: str


@dataclass(frozen=True)
class Back:
    """There is a connection again, and the session goes on where it was."""

    link: Link


@dataclass(frozen=True)
class Ended:
    """The last event of a link: closed by either side, given up, or replaced by a new incarnation of the peer."""

    link: Link
    reason: str


Event = Joined | Received | Lost | Back | Ended


def _nowhere(link: Link, message: Any, size_bytes: int) -> memoryview | None:
    return None


@dataclass(frozen=True, kw_only=True)
class End:
    """This process's end of all its links: who it is, what it understands, where payloads go, who hears of events.

    ``messages`` is a union of tagged msgspec structs. ``sink(event)`` and ``place(link, message, size_bytes)`` are
    called by the links' reading threads, and must not wait for the network: a link is deaf as long. ``place`` returns
    ``size_bytes`` writable bytes for the payload of ``message``, or None if no payload is expected; it may be called
    again with the same message after a connection has broken. None ends the session, and so does Senseless, which both
    may raise. Raises ConfigError without credentials, unless ``insecure`` says that whoever reaches the port may speak.
    Its links write payloads in turn.
    """

    me: Peer
    job: str
    messages: Any
    sink: Callable[[Event], None]
    place: Callable[[Link, Any, int], memoryview | None] = _nowhere
    credentials: Credentials | None = None
    insecure: bool = False
    patience: Patience = field(default_factory=Patience)
    clock: Callable[[], float] = time.monotonic
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        if self.credentials is None and not self.insecure:
            raise ConfigError(
                "links between hosts need a job key",
                why="without one whoever reaches the port could read and change the training",
                fix="set PACELINE_JOB_KEY_FILE, or use --insecure on a network that you trust",
            )
        assert self.credentials is None or not self.insecure, "insecure, and yet with credentials"
