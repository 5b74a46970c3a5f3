"""The deputy of a server elsewhere: the server that it is to everybody at home, which has another step.

    board, rounds, log --serve--> which round, which entry --Step, Apply--> link --> server elsewhere (range_server.py)
    stepped, applied   <-- the link's thread <--Stepped, Applied-- link <--'

All words are home's, as with any server, and so is every decision. Only the values are not here: home's memory of the
range holds what was there when it was filled, loaded or fetched last (``Exchange.bring_home``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from paceline import errors
from paceline.engine.context import Context
from paceline.engine.elsewhere.deputy_line import next_event, say_stop, tell_starter
from paceline.engine.elsewhere.mail import PATIENCE, Mail
from paceline.engine.elsewhere.mirror import expect_values, sources_of
from paceline.engine.elsewhere.range_server import ROLE
from paceline.engine.elsewhere.ranges import send_parameters, send_state, whole
from paceline.engine.exchange.server import Served, serve, take
from paceline.engine.program import CAME, SERVERS, WAITS
from paceline.engine.setup import Door
from paceline.errors import HostError, PacelineError, WorkersLost
from paceline.protocol import messages, ranges
from paceline.protocol.link import Peer, Senseless
from paceline.protocol.log import STEP, Entry
from paceline.protocol.mirrors import Follow
from paceline.transport.board import AWAITS_ITS_WORKER, Aborted, Board
from paceline.transport.channel import Closed
from paceline.transport.ends import End, Ended, Event, Joined, LinkEnded, Received
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.tls import Credentials


def deputize(context: Context, door: Door, report: int, key: JobKey | None) -> None:
    """Stand for server ``context.rank``, which is elsewhere, until the run is over. Raises WorkersLost, HostError,
    Aborted."""
    rank = context.rank
    place = _place(context.directory, rank)
    if place.exists():
        raise _lost(rank, "its deputy at home has ended, and another cannot take it over")
    deputy = _Deputy(context)
    end = End(
        me=Peer(rank, "deputy"),
        job=door.job,
        messages=ranges.ToHome,
        sink=deputy.sink,
        place=deputy.place,
        credentials=None if key is None else Credentials.issue(key),
        insecure=door.insecure,
        patience=PATIENCE,
    )
    listener = Listener(end, door.host, door.server_ports[rank], shared=True)
    try:
        tell_starter(report, f"s{rank}", WAITS)
        link, here = deputy.await_server(door.starter)
        tell_starter(report, f"s{rank}", CAME)
        place.parent.mkdir(exist_ok=True)
        _write(place, f"{here.host} {here.port}")
        try:
            serve(context, deputy.take)
        except (Aborted, Closed) as stopped:
            say_stop(context, link, str(stopped))
            raise
        except BaseException as error:
            say_stop(context, link, f"its deputy at home failed: {error}")
            raise
        finally:
            deputy.is_over = True
            link.close()
    finally:
        listener.close()


def addresses(directory: Path, servers: Sequence[int]) -> dict[int, tuple[str, int]] | None:
    """Where workers come to these servers elsewhere, of the run in this directory; None if not all have come yet."""
    found = {}
    for server in servers:
        with suppress(FileNotFoundError):
            host, port = _place(directory, server).read_text().split()
            found[server] = host, int(port)
    return found if len(found) == len(servers) else None


def _place(directory: Path, server: int) -> Path:
    return directory / SERVERS / str(server)


def _write(path: Path, text: str) -> None:
    """Whoever reads it finds all of it or nothing."""
    before = path.with_suffix(".new")
    before.write_text(text)
    before.rename(path)


def _lost(server: int, reason: str) -> WorkersLost:
    return WorkersLost(
        f"server {server} is lost: {reason}",
        why="its process has ended, its host is down, or the network between is cut; what it had of the parameters is "
        "gone with it",
        fix="paceline resume: go on from the last checkpoint (--checkpoint-every), with servers on hosts that live",
    )


class _Deputy:
    """Of server ``context.rank``."""

    def __init__(self, context: Context) -> None:
        self._rank, self._board, self._channel = context.rank, context.board, context.channel
        self.mail, self.is_over = Mail(0), False  # nothing comes but what is expected
        self._link: Link | None = None
        self._has_said_where = False
        self._served: dict[int, _ServedElsewhere] = {}
        self._failure: PacelineError | None = None

    def await_server(self, starter: int) -> tuple[Link, ranges.Here]:
        """The link to the server, when it has come. Raises HostError, Aborted."""
        with self._board.waiting(AWAITS_ITS_WORKER):
            while True:
                match next_event(self.mail, self._board):
                    case Received(link=link, message=ranges.Here() as here):
                        return link, here
                    case None if not os.path.exists(f"/proc/{starter}"):
                        raise HostError(f"server {self._rank} has not come, and what was to start it has ended")
                self.check()

    def take(self, message: messages.Memory, descriptors: tuple[int, ...]) -> Served:
        """An exchange whose memory has come."""
        served = take(message, descriptors)
        if served.spec.hosts == 1:
            return served  # a store: home steps it
        assert self._link is not None
        index = len(self._served)  # as workers number their exchanges, which have no others
        made = _ServedElsewhere(served, index, message.spec, self._link, self._board, self._rank, self.check)
        made.expect(self.mail)
        self._served[index] = made
        return made

    def check(self) -> None:
        """Raise what has happened to the server, if anything has."""
        if self._failure is not None:
            raise self._failure

    def sink(self, event: Event) -> None:
        """The link's thread: what the server has done is told to all here at once."""
        match event:
            case Joined(link=link):
                if (link.peer.host, link.peer.role) != (self._rank, ROLE) or self._link is not None:
                    raise Senseless(f"this is the deputy of server {self._rank}, and has it")
                self._link = link
            case Received(link=link) if link is not self._link:
                raise Senseless(f"this is the deputy of server {self._rank}, which {link.peer} is not")
            case Received(message=ranges.Stepped() | ranges.Applied() | ranges.Fetched() as done):
                if done.exchange not in self._served:
                    raise Senseless(f"exchange {done.exchange} is not with this server")
                self._served[done.exchange].done(done)
            case Received(message=ranges.Failing(failure=said)):
                self._failure = errors.kind_of(said.kind, HostError)(said.what, why=said.why, fix=said.fix)
            case Received(message=ranges.Terminated()):
                with suppress(Closed):
                    self._channel.send(messages.Interrupt(1))
            case Ended(link=link, reason=reason) if link is self._link and not self.is_over:
                self._failure = self._failure or _lost(self._rank, reason)
            case Received(message=ranges.Here()):
                if self._has_said_where:
                    raise Senseless("the server has said where it is")
                self._has_said_where = True
                self.mail.events.put(event)

    def place(self, link: Link, message: Any, size_bytes: int) -> memoryview | None:
        """The link's thread: where a payload belongs."""
        return self.mail.place(link, message, size_bytes) if link is self._link else None


class _ServedElsewhere(Served):
    """An exchange whose range the server at the other end of ``link`` has."""

    def __init__(
        self,
        at_home: Served,
        index: int,
        spec: bytes,
        link: Link,
        board: Board,
        rank: int,
        check: Callable[[], None],
    ) -> None:
        super().__init__(at_home.spec, at_home.memory, at_home.published_as, at_home.stepper, at_home.applier)
        self._index, self._link, self._board, self._rank, self._check = index, link, board, rank, check
        self._range = whole(self.spec, [rank])
        self._parts = ranges.parts_of(rank, self.spec.servers, self.spec.parts)
        self._stepped, self._applied = 0, [0] * self.spec.parts  # as far as the server has been asked
        self._loads = -1
        self._wanted = 0
        self._settings = (-1, -1)  # whose settings the server has, in which version
        with self._kept():
            link.send(ranges.Attach(index, spec))

    def expect(self, mail: Mail) -> None:
        """What the server has comes to where it is when home has it."""
        expect_values(mail, self._index, self.memory, self.spec.table)

    # --- what is next, for ``serve`` ---

    def stepped(self, member: int) -> int:
        return max(self.memory.stepped[member], self._stepped)

    def applied(self, part: int) -> int:
        return max(self.memory.applied[part], self._applied[part])

    def owes_first(self) -> bool:
        """Raises WorkersLost when the server is."""
        self._check()
        if self._board.published < self.published_as:
            return False
        return self.memory.loads[0] > self._loads or self.memory.fetched[0] > self._wanted

    def pay(self) -> None:
        with self._kept():
            if self.memory.loads[0] > self._loads:
                self._loads = self.memory.loads[0]
                send_parameters(self._link, self._index, self.memory, self.spec.table, self._range)
                send_state(self._link, self._index, self.memory, self._range)
                self._link.flush()  # it is fetched to the same place
                self._link.send(ranges.Fill(self._index, self._loads))
            if self.memory.fetched[0] > self._wanted:
                self._wanted = self.memory.fetched[0]
                self._link.send(ranges.Fetch(self._index, self._wanted))

    def step(self, board: Board, number: int, contributors: tuple[int, ...], rank: int) -> None:
        sources = sources_of(self.memory.slots, number, contributors)
        self._stepped = number
        self._ask(ranges.Step, Follow(number, self.memory.loads[0], sources, self._changed(contributors[0])))

    def apply(self, board: Board, part: int, entry: Entry, rank: int) -> None:
        slots, pushed = self.memory.slots, self.memory.pushed
        members, settings = [], b""
        if entry.kind == STEP:
            weights = [slots[worker].weight(pushed[worker]) for worker in entry.members]
            masks = [bytes(slots[worker].mask) for worker in entry.members]
            numbers = [pushed[worker] for worker in entry.members]
            members = list(zip(entry.members, numbers, weights, masks, strict=True))
            settings = self._changed(entry.members[0])
        workers = list(dict.fromkeys((entry.by, *entry.members)))
        self._applied[part] = entry.number
        self._ask(ranges.Apply, part, entry.number, entry.staleness, members, workers, settings)

    def _ask(self, what: Any, *values: Any) -> None:
        if self.owes_first():
            self.pay()
        with self._kept():
            self._link.send(what(self._index, *values))

    def _changed(self, worker: int) -> bytes:
        """The settings of this worker's, which is the first, if the server has others."""
        version = self.memory.slots[worker].settings_version
        before, self._settings = self._settings, (worker, version)
        return b"" if before == self._settings else self.memory.slots[worker].settings

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Sending, within it, raises what has happened to the server if the link has ended."""
        try:
            yield
        except LinkEnded as ended:
            self._check()
            raise _lost(self._rank, str(ended)) from None

    # --- what has been done; by the link's thread ---

    def done(self, what: ranges.Stepped | ranges.Applied | ranges.Fetched) -> None:
        """Raises Senseless for what was not asked for."""
        memory, member = self.memory, self.spec.workers + self._rank
        match what:
            case ranges.Stepped(number=number) if memory.stepped[member] < number <= self._stepped:
                memory.stepped[member] = number
            case ranges.Applied(part=part, number=number) if (
                self.spec.parts and part in self._parts and memory.applied[part] < number <= self._applied[part]
            ):
                memory.applied[part] = number
            case ranges.Fetched(number=number) if memory.fetched[1 + self._rank] < number <= self._wanted:
                memory.tell_word(memory.fetched, 1 + self._rank, number)
            case _:
                raise Senseless(f"{what} was not asked for")
        self._board.ring(member)
