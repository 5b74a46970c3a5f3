"""A server's process: it folds and steps its shards of every exchange, round by round."""

from __future__ import annotations

import os
import select

import msgspec

from paceline.engine.context import Context
from paceline.engine.stepper import Stepper
from paceline.params.optimizers import find_class
from paceline.protocol import messages
from paceline.protocol.rounds import Closed, Waiting, close_round, next_to_act, reached
from paceline.transport import segment
from paceline.transport.board import Board
from paceline.transport.slots import ExchangeMemory, Spec


class _Served:
    """One exchange as a server sees it."""

    def __init__(self, spec: Spec, memory: ExchangeMemory, published_as: int) -> None:
        self.memory = memory
        self.stepper = Stepper(spec, memory, find_class(spec.optimizer), {})
        self.published_as = published_as


def serve(context: Context) -> None:
    """Serve until the launcher ends the run. Raises Aborted when it is stopped, ConfigError for an unknown class."""
    board, channel = context.board, context.channel
    member = board.workers + context.rank
    servers = tuple(range(board.workers, board.members))
    served: list[_Served] = []
    while True:
        if not served or _arrived(channel.fileno()):
            message, descriptors = channel.receive()
            if not isinstance(message, messages.Memory):
                return
            served.append(_take(message, descriptors))
            continue
        answer = board.wait(lambda: _next(board, served, member, channel.fileno()))
        if answer is None:
            channel.receive()  # the launcher says when the run is over
            return
        if isinstance(answer, tuple):
            which, number, contributors = answer
            if which.stepper.take_up(number, servers, member):
                which.memory.ready[member] = number
                board.ring(member)
                _await(board, which, number, servers)
            which.stepper.step(number, contributors)
            which.memory.stepped[member] = number
            board.ring(member)


def _await(board: Board, which: _Served, number: int, servers: tuple[int, ...]) -> None:
    board.wait(lambda: reached(number, which.memory.ready, servers))


def _next(
    board: Board, served: list[_Served], member: int, channel: int
) -> tuple[_Served, int, tuple[int, ...]] | str | Waiting | None:
    """A round that is closed, "message" if one has come, None when everyone is gone, or whom to wait for."""
    for one in served:
        number = one.memory.stepped[member] + 1
        if any(pushed >= number for pushed in one.memory.pushed):
            if board.published < one.published_as:
                return Waiting(0, "worker 0 has not shared its model")
            closed = close_round(number, one.memory.pushed, board)
            if isinstance(closed, Closed):
                return one, number, closed.contributors
            return closed
    if _arrived(channel):
        return "message"
    awaited = next_to_act(board)
    return None if awaited is None else Waiting(awaited, "no round has begun")


def _take(message: messages.Memory, descriptors: tuple[int, ...]) -> _Served:
    spec = msgspec.msgpack.decode(message.spec, type=Spec)
    memory = segment.attach(descriptors[0])
    for descriptor in descriptors:
        os.close(descriptor)
    return _Served(spec, ExchangeMemory(memory, spec), message.number)


def _arrived(channel: int) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(0))
