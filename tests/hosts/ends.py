"""Two ends of a link in one process, over loopback, and what each of them was told."""

from __future__ import annotations

import queue
import random
import threading
from typing import Any

import msgspec

from paceline.protocol.link import Patience, Peer
from paceline.transport.connect import connect
from paceline.transport.ends import End, Ended, Event, Joined, Received
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.tls import Credentials

KEY, OTHER_KEY = JobKey(bytes(range(32))), JobKey(bytes(range(1, 33)))
JOB = "20261121-train"
QUICK = Patience(heartbeat_s=0.1, silence_s=1.0, give_up_s=30.0)
WAIT_S = 30.0  # far more than anything takes; a test that runs into it has failed


class Push(msgspec.Struct, frozen=True, tag_field="t", tag=1, array_like=True):
    """A message of these tests: the ``number``-th, with a payload of random bytes that the number determines."""

    number: int
    size_bytes: int = 0


class Word(msgspec.Struct, frozen=True, tag_field="t", tag=2, array_like=True):
    """Another one."""

    text: str


class Side:
    """One end: its events in order, and its messages taken and checked."""

    def __init__(self, host: int, *, secure: bool = True, key: JobKey = KEY, **changes: Any) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        settings: dict[str, Any] = {
            "me": Peer(host, "exchange"),
            "job": JOB,
            "messages": Push | Word,
            "sink": self.events.put,
            "place": self._place,
            "credentials": Credentials.issue(key) if secure else None,
            "insecure": not secure,
            "patience": QUICK,
        }
        self.end = End(**(settings | changes))
        self._kept: list[Event] = []
        self.other: list[Event] = []  # what came beside messages

    def _place(self, link: Link, message: Push, size_bytes: int) -> memoryview | None:
        return memoryview(bytearray(size_bytes)) if size_bytes == message.size_bytes else None

    def event(self, kind: type[Any]) -> Any:
        """The next event that is no message, which must be of this kind."""
        while not isinstance(event := self.events.get(timeout=WAIT_S), kind):
            assert isinstance(event, Received), f"{event} where a {kind.__name__} is awaited"
        return event

    def later_end(self) -> str:
        """Why the link has ended, whatever comes before it."""
        while not isinstance(event := self.events.get(timeout=WAIT_S), Ended):
            pass
        return event.reason

    def later(self, kind: type[Any]) -> Any:
        """The next event of this kind; messages before it are kept for ``take``."""
        while not isinstance(event := self.events.get(timeout=WAIT_S), kind):
            assert not isinstance(event, Ended), event.reason
            if isinstance(event, Received):
                self._kept.append(event)
        return event

    def take(self, count: int) -> list[Any]:
        """The next messages, their payloads found right; other events go to ``other``."""
        taken: list[Any] = []
        while len(taken) < count:
            event = self._kept.pop(0) if self._kept else self.events.get(timeout=WAIT_S)
            assert not isinstance(event, Ended), event.reason
            if not isinstance(event, Received):
                self.other.append(event)
                continue
            taken.append(event.message)
            if isinstance(event.message, Push) and event.message.size_bytes:
                assert event.payload is not None
                assert bytes(event.payload) == payload(event.message), f"other bytes came with {event.message}"
        return taken


def payload(message: Push) -> bytes:
    return random.Random(message.number).randbytes(message.size_bytes)


def send_all(link: Link, pushes: list[Push]) -> threading.Thread:
    """In a thread of its own, as the other side may do the same."""

    def send() -> None:
        for push in pushes:
            link.send(push, payload(push) if push.size_bytes else None, WAIT_S)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


class Pair:
    """A listener and a link to it."""

    def __init__(self, *, secure: bool = True, **changes: Any) -> None:
        self._refusals: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server = Side(0, secure=secure, **changes)
        self.client = Side(1, secure=secure, **changes)
        self.listener = Listener(self.server.end, "127.0.0.1", on_refused=self.on_refused)
        self.far: Link | None = None

    def on_refused(self, line: str) -> None:
        self._refusals.put(line)

    def refusal(self) -> str:
        """The next line that the listener logs."""
        return self._refusals.get(timeout=WAIT_S)

    @property
    def untold(self) -> int:
        """Lines that nobody has looked at."""
        return self._refusals.qsize()

    def __enter__(self) -> Pair:
        return self

    def join(self, port: int | None = None) -> Link:
        """The client's link, both sides having been told."""
        self.near = connect(self.client.end, ("127.0.0.1", port or self.listener.port), WAIT_S)
        self.client.event(Joined)
        self.far = self.server.event(Joined).link
        return self.near

    def both(self) -> tuple[Link, Link]:
        near = self.join()
        assert self.far is not None
        return near, self.far

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        for link in (getattr(self, "near", None), self.far):
            if link is not None:
                link.end("the test is over")
        for link in (getattr(self, "near", None), self.far):
            if link is not None:
                link.close()
