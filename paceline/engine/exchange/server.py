"""A server's process: it steps its shards of every exchange, round by round or as entries of the log come."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from typing import TypeAlias

import msgspec

from paceline.engine.context import Context
from paceline.engine.exchange.applier import Applier
from paceline.engine.exchange.arrivals import applied_by
from paceline.engine.exchange.shards import Shards
from paceline.engine.exchange.stepper import Stepper
from paceline.params.optimizers import find_class
from paceline.protocol import messages
from paceline.protocol.crew import crew_size
from paceline.protocol.log import Entry
from paceline.protocol.rounds import Closed, Waiting, close_round, next_to_act
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.slots import ExchangeMemory, Spec


class Served:
    """One exchange as the server of this rank sees it."""

    def __init__(
        self, spec: Spec, memory: ExchangeMemory, published_as: int, stepper: Stepper, applier: Applier
    ) -> None:
        self.spec, self.memory, self.published_as = spec, memory, published_as
        self.stepper, self.applier = stepper, applier
        self.without = 0  # the last round that was closed, if it is stepped without this server
        self.crew_without = 0  # by whom

    # A deputy of a server on another host does these otherwise: elsewhere/range_deputy.py.

    def stepped(self, member: int) -> int:
        """The last round that it has stepped, or has asked for."""
        return self.memory.stepped[member]

    def applied(self, part: int) -> int:
        """The last entry that was applied to a part, or that it has asked for."""
        return self.memory.applied[part]

    def owes_first(self) -> bool:
        """Is there something else to do before it steps and applies?"""
        return False

    def pay(self) -> None:
        """Do that."""

    def step(self, board: Board, number: int, contributors: tuple[int, ...], rank: int) -> None:
        """Step this server's share of a closed round."""
        step(board, self, number, contributors, rank)

    def apply(self, board: Board, part: int, entry: Entry, rank: int) -> None:
        """Apply an entry to one of its parts."""
        self.applier.apply(part, entry)
        board.ring(board.workers + rank)

    def is_known(self, crew: int, member: int) -> bool:
        """This server is not in the board's ``crew``. Do those who push know that, and has it nothing left to do? See
        docs/decisions/0019."""
        memory = self.memory
        if not self.spec.parts:
            return 0 < self.without == max(memory.pushed) and self.crew_without == crew
        seen = memory.log.seen
        return seen > 0 and memory.log.entry(seen).crew == crew and not self._owes(seen, member)

    def _owes(self, seen: int, member: int) -> bool:
        return any(
            applied_by(self.spec, self.memory.log.entry(number), part) == member
            for part in range(self.spec.parts)
            for number in range(self.memory.applied[part] + 1, seen + 1)
        )


def take(message: messages.Memory, descriptors: tuple[int, ...]) -> Served:
    """An exchange whose memory has come. Raises ConfigError for an unknown class."""
    spec = msgspec.msgpack.decode(message.spec, type=Spec)
    memory = ExchangeMemory(segment.attach(descriptors[0]), spec)
    shards = Shards(spec, memory, find_class(spec.optimizer), {})
    return Served(spec, memory, message.number, Stepper(shards, memory), Applier(spec, shards, memory))


def serve(context: Context, take: Callable[[messages.Memory, tuple[int, ...]], Served] = take) -> None:
    """Serve until the launcher ends the run, or this server is not wanted any more. Raises Aborted when it is stopped,
    ConfigError for an unknown class."""
    board, channel = context.board, context.channel
    served: list[Served] = []
    channel.send(messages.Joined(0))
    board.ring(board.workers + context.rank)  # the one before it may have died before it did
    while True:
        if not served or _arrived(channel.fileno()):
            with board.waiting():
                message, descriptors = channel.receive()
            if not isinstance(message, messages.Memory):
                return
            if all(message.number != one.published_as for one in served):  # a launcher that takes over may say it again
                served.append(take(message, descriptors))
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        answer = board.wait(lambda: next_turn(board, served, context.rank, channel.fileno()))
        match answer:
            case "leave":
                return
            case Served() as which:
                which.pay()
            case (Served() as which, int(number), tuple(contributors)):
                which.step(board, number, contributors, context.rank)
            case (Served() as which, int(part), Entry() as entry):
                which.apply(board, part, entry, context.rank)


def step(board: Board, which: Served, number: int, contributors: tuple[int, ...], rank: int) -> None:
    """Step this server's share of a closed round."""
    memory = which.memory
    crew = crew_size(memory.slots[contributors[0]].crew(number))
    which.stepper.step(number, contributors, rank, crew)
    if rank == 0:
        memory.crew[0] = crew
    memory.stepped[board.workers + rank] = number
    board.ring(board.workers + rank)


_Round: TypeAlias = tuple[Served, int, tuple[int, ...]]
_Turn: TypeAlias = tuple[Served, int, Entry]


def next_turn(board: Board, served: list[Served], rank: int, channel: int) -> Served | _Round | _Turn | str | Waiting:
    """An exchange that owes something first, a round that is closed, a part and the entry whose turn it is there,
    "message" if one has come, "leave" if this server may, or whom to wait for. When everyone is gone that is the
    launcher, who says that the run is over: somebody may still be added. It says so too when the last have died for
    good, and nobody is left to draw the consequences: what cannot be stepped then never will be."""
    member, arrived = board.workers + rank, _arrived(channel)  # before the rest is looked at
    waiting: Waiting | None = None
    for one in served:
        if one.owes_first():
            return one
        answer = _next_entry(one, member) if one.spec.parts else _next_round(board, one, rank)
        if isinstance(answer, Waiting):
            waiting = waiting or answer
        elif answer is not None:
            return answer
    awaited = next_to_act(board)
    if arrived or ((waiting is None or awaited is None) and _arrived(channel)):
        return "message"
    if board.kept_servers <= rank and not _arrived(channel) and _is_known(board.crew, served, member):
        return "leave"
    if awaited is None:
        return Waiting(board.common, "all workers are gone")
    if waiting is not None:
        return waiting
    through_log = any(one.spec.parts for one in served)
    return Waiting(board.common if through_log else awaited, "there is nothing to step")


def _is_known(crew: int, served: list[Served], member: int) -> bool:
    return all(one.is_known(crew, member) for one in served)


def _next_round(board: Board, one: Served, rank: int) -> _Round | Waiting | None:
    memory = one.memory
    number = max(memory.pushed)
    if number <= max(one.stepped(board.workers + rank), one.without):
        return None
    if board.published < one.published_as:
        return Waiting(board.common, "nobody has shared the model")
    closed = close_round(number, memory.pushed, board, memory.since, memory.asked)
    if not isinstance(closed, Closed):
        return closed
    crew = memory.slots[closed.contributors[0]].crew(number)
    if max(memory.pushed) > number:  # it was not: the next would wait for it
        return _next_round(board, one, rank)
    if rank < crew_size(crew):
        return one, number, closed.contributors
    one.without, one.crew_without = number, crew
    return None


def _next_entry(one: Served, member: int) -> _Turn | Waiting | None:
    log, waiting = one.memory.log, None
    seen = log.seen
    since, crew = log.crew  # not read before
    for part in range(one.spec.parts):
        first = one.applied(part) + 1
        if first > seen or (first >= since and one.spec.workers + part % crew != member):
            continue
        entry = log.entry(first)
        on = applied_by(one.spec, entry, part)
        if on == member:
            return one, part, entry
        # Others do what comes first; is there anything behind it for this server?
        if any(applied_by(one.spec, log.entry(number), part) == member for number in range(first + 1, seen + 1)):
            waiting = Waiting(on, f"member {on} has not applied entry {first}")
    return waiting


def _arrived(channel: int) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))
