"""What all workers do together, in the same order: get memory that all of them map, and fill and read it.

The launcher hands out the memory when every worker has asked for it; worker 0 fills it and publishes that it has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from paceline.engine.checkpoint.snapshot import Resumed
from paceline.engine.context import Context
from paceline.engine.exchange.arrivals import Close
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.spec import compare
from paceline.engine.worker.ending import Leave
from paceline.errors import ConfigError
from paceline.params.table import Table, differences, tabulate
from paceline.protocol import messages
from paceline.protocol.rounds import LEFT, NOT_PARKED, Waiting
from paceline.transport import segment
from paceline.transport.board import COLLECTIVES, Aborted
from paceline.transport.channel import Closed
from paceline.transport.slots import ExchangeMemory, by_place, carve_vectors, size_bytes


class Collectives:
    """A worker's part in them."""

    def __init__(self, context: Context) -> None:
        self._board, self._channel, self._rank, self._ring = context.board, context.channel, context.rank, context.ring
        self._lock = context.lock
        self.number = 0
        self.before: Callable[[], None] = lambda: None  # called by who comes to one
        self.keeps = False  # is the descriptor of what was asked for last to be kept, as ``kept``?
        self.kept = -1
        self.before_filling: Callable[[], None] = lambda: None  # called by the worker whose values are to be shared
        self.departed = False  # has this worker left, so that it takes part in none any more?
        self.takes_part = not context.board.deaths[context.rank]  # a newcomer, from when it has caught up

    def ask(
        self, kind: str, spec: bytes, size: int, what: str, by_place: tuple[tuple[int, int, int], ...] = ()
    ) -> tuple[Any, bytes]:
        """Ask the launcher for memory that all workers get; (mapping, worker 0's spec). ``by_place``: which ranges
        of it belong to single workers."""
        if self.departed:
            raise Leave
        self.before()
        self.number += 1
        done = self._board.passes(COLLECTIVES)
        done[self._rank] = max(done[self._rank], self.number)
        self._channel.send(messages.Wrap(self.number, kind, spec, size, what, by_place))
        # To be here is to be at the end of a pass of all: nobody in a round must wait for this worker. A newcomer comes
        # to what the others have behind them, and they do not count with it yet.
        if self.takes_part:
            self._board.parked[self._rank] = COLLECTIVES + 1
            self._ring()
        try:
            with self._board.waiting():
                message, descriptors = self._channel.receive()
                while isinstance(message, messages.Kept) or (  # an answer to one that has died since
                    isinstance(message, messages.Memory) and message.number < self.number  # said again by a launcher
                ):
                    for descriptor in descriptors:
                        os.close(descriptor)
                    message, descriptors = self._channel.receive()
        except Closed:
            raise Aborted("the launcher is gone") from None
        if not isinstance(message, messages.Memory):
            raise Aborted("told to stop while sharing a model")
        if self.takes_part:
            self._board.parked[self._rank] = NOT_PARKED
        memory = segment.attach(descriptors[0])
        if self.keeps:
            self.kept = os.dup(descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        return memory, message.spec

    def barrier(self) -> None:
        """Blocks until all workers have come here."""
        self.ask("barrier", b"", 1, "a barrier")

    def copy_from_first(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Set these tensors to worker 0's values, in place. Blocks until worker 0 has given them."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        data = msgspec.msgpack.encode(table)
        size = max(table.offsets_bytes()[""], 1)
        memory, first = self.ask("copy", data, size, f"{len(tensors)} tensors")
        if first != data:
            other = msgspec.msgpack.decode(first, type=Table)
            told = differences(table, other, f"worker {self._rank}", "worker 0")
            raise ConfigError(f"workers do not train the same model: {told}")
        vectors = carve_vectors(memory, 0, table.sizes)
        views = [table.view(entry, vectors[entry.vector]) for entry in table.entries]
        with torch.no_grad():
            if not self._is_filled():
                self.before_filling()
                for view, (_, tensor) in zip(views, tensors, strict=True):
                    view.copy_(tensor)
                self._publish()
            for view, (_, tensor) in zip(views, tensors, strict=True):
                tensor.copy_(view)

    def open(
        self,
        exchange: Exchange,
        account: Close,
        attached: Callable[[], None],
        checkpoint: Callable[[], Resumed | None] = lambda: None,
        index: int = 0,
    ) -> None:
        """Put an exchange's parameters and state in shared memory. Raises ConfigError, HostError.

        ``checkpoint``: asks what they are taken from, there as exchange ``index``.
        """
        spec = exchange.spec
        what = f"{type(exchange.optimizer).__name__} over {spec.table.values} parameters"
        memory, first = self.ask("exchange", msgspec.msgpack.encode(spec), size_bytes(spec), what, by_place(spec))
        compare(spec, first, self._rank)
        exchange.attach(ExchangeMemory(memory, spec), self.number, account)
        attached()  # from here on the dead are to be buried in it, also while this worker waits below
        if not self._is_filled():
            segment.enlarge(memory, segment.in_use(size_bytes(spec), by_place(spec), self._board.width))
            self.before_filling()
            resumed = checkpoint()
            if resumed is not None:
                resumed.fill(index, exchange)
            exchange.publish()
            if resumed is not None:
                exchange.go_on_from(resumed.state["exchanges"][index])
            self._publish()
        exchange.adopt()

    def _is_filled(self) -> bool:
        """Wait until the memory of this collective is filled, or it is on this worker to do so: on worker 0, or, where
        it has been given up, on the first that is left."""
        board, number = self._board, self.number

        def ask() -> bool | Waiting:
            if board.published >= number:
                return True
            # Newcomers do not draw the consequences of deaths, so these need not be drawn yet.
            first = next(w for w, gone in enumerate(board.gone) if gone != LEFT and not board.given_up[w])
            return False if first == self._rank else Waiting(board.common, f"worker {first} has not shared its model")

        answer = ask()
        return board.wait(ask) if isinstance(answer, Waiting) else answer

    def _publish(self) -> None:
        with self._lock:
            self._board.publish(self.number)
