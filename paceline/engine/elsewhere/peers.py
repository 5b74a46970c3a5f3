"""Links between the first workers of all hosts, each with each: what they fold goes there and not through home.

Each listens at a port of its own, and tells where in torch's store; of two the one of the higher rank connects. A link
that has ended is not made again: without all of them nothing is folded, and what workers bring goes home.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Protocol

from paceline.engine.elsewhere import mail
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.mirror import arithmetic
from paceline.errors import HostError
from paceline.protocol import owners
from paceline.protocol.link import Peer, Senseless
from paceline.transport.connect import connect
from paceline.transport.ends import Ended, Event, Joined, LinkEnded, Received
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.turns import Turns

_MEET_S = 20.0
_LOOK_S = 0.01
_LEAVE_S = 2.0
ROLE = "peer"
NOT_ONE = "- 0 -"  # told in place of an address: this worker will have no such links


class Hears(Protocol):
    """Of one exchange, who is told what has come."""

    def changed(self) -> None:
        """A link has ended."""

    def heard(self, sender: int, message: Any, size_bytes: int) -> None:
        """With a payload of so many bytes. Raises Senseless."""

    def place(self, sender: int, message: Any, size_bytes: int) -> memoryview | None: ...


class Post:
    """What goes to the other owners of exchange ``index`` from one thread, small things together."""

    def __init__(self, peers: Peers, index: int) -> None:
        self._peers, self._index = peers, index
        self._enclosed: dict[int, list[owners.Enclosed]] = {other: [] for other in peers.others}
        self._bytes = dict.fromkeys(peers.others, 0)

    def put(self, other: int, said: owners.One, payload: memoryview | None = None) -> None:
        """A payload that is not small must not be changed until the peer has it."""
        data = b"" if payload is None or len(payload) > mail.LETTER_BYTES else bytes(payload)
        if len(data) + self._bytes[other] > mail.LETTER_BYTES:
            self._send(other)
        if payload is not None and len(payload) > len(data):
            self._send(other)
            self._peers.send(other, said, payload)
            return
        self._enclosed[other].append(owners.Enclosed(said, data))
        self._bytes[other] += len(data)

    def put_to_all(self, said: owners.One) -> None:
        for other in self._peers.others:
            self.put(other, said)

    def send(self) -> None:
        """All of it."""
        for other in self._peers.others:
            self._send(other)

    def _send(self, other: int) -> None:
        match self._enclosed[other]:
            case []:
                return
            case [owners.Enclosed(said=said, data=b"")]:
                self._peers.send(other, said)
            case enclosed:
                self._peers.send(other, owners.Letter(self._index, enclosed[-1].said.number, enclosed))
        self._enclosed[other], self._bytes[other] = [], 0


class Peers:
    """Of worker ``rank``. ``home``: its link to its deputy, made as these are."""

    def __init__(self, rank: int, around: Around, home: Link) -> None:
        """From now on others can come; ``meet`` waits for them. Raises HostError, LinkEnded."""
        self.rank, self._around = rank, around
        leads = around.leads
        after = leads.index(rank) + 1
        self.others = leads[after:] + leads[: after - 1]  # from the next one on, so that not all begin with the same
        self._links: dict[int, Link] = {}
        self._heard: dict[int, Hears] = {}
        self.sent_bytes = 0
        self._end = dataclasses.replace(
            home.made_by,
            me=Peer(rank, ROLE),
            messages=owners.Any_,
            sink=self._sink,
            place=self._place,
            turns=Turns(),  # not those of the link to home: who is slow there is nobody's business here
        )
        self._host = home.own_address
        self._listener = Listener(self._end, self._host)

    def meet(self) -> bool:
        """Until there is a link to each other; False: not to all of them, or one computes otherwise."""
        self._around.tell(f"peer/{self.rank}", f"{self._host} {self._listener.port} {arithmetic()}")
        until_s = time.monotonic() + _MEET_S
        try:
            for other in self.others:
                told = self._around.ask(f"peer/{other}", until_s - time.monotonic())
                host, port, kind = told.split(" ", 2)
                if kind != arithmetic():
                    return False
                if other < self.rank:
                    self._links[other] = connect(self._end, (host, int(port)), until_s - time.monotonic())
            while not (self.are_all or self._has_ended) and time.monotonic() < until_s:
                time.sleep(_LOOK_S)
        except (HostError, TimeoutError, ValueError):
            return False
        return self.are_all

    @property
    def are_all(self) -> bool:
        """Is there a link to each?"""
        return len(self._links) == len(self.others) and not self._has_ended

    @property
    def _has_ended(self) -> bool:
        """Has a link, which is not made again?"""
        return any(link.ended is not None for link in list(self._links.values()))

    @property
    def has_lost_one(self) -> bool:
        """Of those who have not come to their end in order."""
        return any(link.ended is not None and not link.peer_left for link in self._links.values())

    def add(self, exchange: int, hears: Hears) -> None:
        self._heard[exchange] = hears

    def send(self, other: int, message: owners.Said, payload: memoryview | None = None) -> None:
        """The link may have ended: who waits for something is told of it."""
        try:
            self._links[other].send(message, payload)
            self.sent_bytes += message.size_bytes if isinstance(message, owners.Letter) else len(payload or b"")
        except LinkEnded:
            return

    def flush(self) -> None:
        """Until all have what was sent to them, or cannot be reached any more."""
        for link in self._links.values():
            try:
                link.flush()
            except LinkEnded:
                continue

    def stop(self) -> None:
        """Nothing is sent any more; what was sent arrives, if that is possible."""
        self._listener.close()
        until_s = time.monotonic() + _LEAVE_S
        for link in list(self._links.values()):  # where they have not all come, one may come meanwhile
            link.close(max(until_s - time.monotonic(), 0.1))

    # --- by the links' threads ---

    def _sink(self, event: Event) -> None:
        match event:
            case Joined(link=link) if link.peer.host not in self.others or link.peer.role != ROLE:
                raise Senseless(f"{link.peer} is none of the first workers of all hosts, {self.others}")
            case Joined(link=link) if link.peer.host > self.rank:
                self._links[link.peer.host] = link
            case Received(link=link, message=message, payload=payload) if message.exchange in self._heard:
                self._heard[message.exchange].heard(link.peer.host, message, len(payload or b""))
            case Ended():
                for hears in self._heard.values():
                    hears.changed()

    def _place(self, link: Link, message: Any, size_bytes: int) -> memoryview | None:
        hears = self._heard.get(message.exchange)
        return None if hears is None else hears.place(link.peer.host, message, size_bytes)
