"""A server's process: it steps its shards of every exchange, round by round or as entries of the log come."""

from __future__ import annotations

import os
import select
from typing import TypeAlias

import msgspec

from paceline.engine.applier import Applier
from paceline.engine.arrivals import applied_by
from paceline.engine.context import Context
from paceline.engine.shards import Shards
from paceline.engine.stepper import Stepper
from paceline.params.optimizers import find_class
from paceline.protocol import messages
from paceline.protocol.log import Entry
from paceline.protocol.rounds import Closed, Waiting, close_round, next_to_act
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.slots import ExchangeMemory, Spec


class _Served:
    """One exchange as a server sees it."""

    def __init__(self, spec: Spec, memory: ExchangeMemory, published_as: int, rank: int) -> None:
        self.spec, self.memory, self.published_as = spec, memory, published_as
        shards = Shards(spec, memory, find_class(spec.optimizer), {})
        self.stepper = Stepper(shards, memory)
        self.applier = Applier(spec, shards, memory)
        self.parts = range(rank, spec.parts, spec.servers)


def serve(context: Context) -> None:
    """Serve until the launcher ends the run. Raises Aborted when it is stopped, ConfigError for an unknown class."""
    board, channel = context.board, context.channel
    member = board.workers + context.rank
    served: list[_Served] = []
    while True:
        if not served or _arrived(channel.fileno()):
            with board.waiting():
                message, descriptors = channel.receive()
            if not isinstance(message, messages.Memory):
                return
            if all(message.number != one.published_as for one in served):  # a launcher that takes over may say it again
                served.append(_take(message, descriptors, context.rank))
            for descriptor in descriptors:
                os.close(descriptor)
            continue
        answer = board.wait(lambda: _next(board, served, member, channel.fileno()))
        match answer:
            case (_Served() as which, int(number), tuple(contributors)):
                _step(board, which, number, contributors, member)
            case (_Served() as which, int(part), Entry() as entry):
                which.applier.apply(part, entry)
                board.ring(member)


def _step(board: Board, which: _Served, number: int, contributors: tuple[int, ...], member: int) -> None:
    """Step this server's share of a closed round."""
    which.stepper.step(number, contributors, member - board.workers, board.servers)
    which.memory.stepped[member] = number
    board.ring(member)


_Round: TypeAlias = tuple[_Served, int, tuple[int, ...]]
_Turn: TypeAlias = tuple[_Served, int, Entry]


def _next(board: Board, served: list[_Served], member: int, channel: int) -> _Round | _Turn | str | Waiting:
    """A round that is closed, a part and the entry whose turn it is there, "message" if one has come, or whom to wait
    for. When everyone is gone that is the launcher, who says that the run is over: somebody may still be added."""
    waiting: Waiting | None = None
    for one in served:
        answer = _next_entry(one, member) if one.spec.parts else _next_round(board, one, member)
        if isinstance(answer, Waiting):
            waiting = waiting or answer
        elif answer is not None:
            return answer
    awaited = next_to_act(board)
    if (waiting is None or awaited is None) and _arrived(channel):
        return "message"
    if awaited is None:
        return Waiting(board.common, "all workers are gone")
    if waiting is not None:
        return waiting
    through_log = any(one.spec.parts for one in served)
    return Waiting(board.common if through_log else awaited, "there is nothing to step")


def _next_round(board: Board, one: _Served, member: int) -> _Round | Waiting | None:
    number = one.memory.stepped[member] + 1
    if not any(pushed >= number for pushed in one.memory.pushed):
        return None
    if board.published < one.published_as:
        return Waiting(board.common, "nobody has shared the model")
    closed = close_round(number, one.memory.pushed, board, one.memory.since)
    if one.memory.stepped[member] >= number:  # it was empty, and who found that has pushed the next
        return _next_round(board, one, member)
    return (one, number, closed.contributors) if isinstance(closed, Closed) else closed


def _next_entry(one: _Served, member: int) -> _Turn | Waiting | None:
    memory, waiting = one.memory, None
    for part in one.parts:
        if memory.applied[part] < memory.log.seen:
            entry = memory.log.entry(memory.applied[part] + 1)
            on = applied_by(one.spec, entry, part)
            if on == member:
                return one, part, entry
            waiting = Waiting(on, f"worker {on} loads a checkpoint")
    return waiting


def _take(message: messages.Memory, descriptors: tuple[int, ...], rank: int) -> _Served:
    spec = msgspec.msgpack.decode(message.spec, type=Spec)
    memory = segment.attach(descriptors[0])
    return _Served(spec, ExchangeMemory(memory, spec), message.number, rank)


def _arrived(channel: int) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))
