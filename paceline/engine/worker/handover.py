"""What a script keeps of its own (schedulers, hyper-parameters, ``run.keep``) goes from a worker to a newcomer.

A newcomer's script has come to its place by ghost batches: what is stepped once a pass is right by then, what is
stepped with every batch is not. So as soon as the others count with it, it asks; the first of them that is between two
steps, or waits for others, answers by way of the launcher. In rounds nobody gets beyond the one that the newcomer
joined in, so what it is told is as of that round.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from paceline.engine.checkpoint import snapshot
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.keeping import Keeper
from paceline.errors import ConfigError, PacelineError
from paceline.params.packing import Tensors
from paceline.protocol import messages
from paceline.protocol.newcomers import answer_to, asking
from paceline.transport.board import COLLECTIVES, Aborted
from paceline.transport.channel import Closed


class Handover:
    """Both ends of it."""

    def __init__(self, context: Context, exchanges: Sequence[Exchange], keeper: Keeper) -> None:
        self._context, self._board, self._rank = context, context.board, context.rank
        self._exchanges, self._keeper = exchanges, keeper

    def begin(self) -> None:
        """This newcomer is to ask; until then it has nothing to tell others."""
        self._board.asks[self._rank] = self._board.answers[self._rank] + 1

    def forgo(self) -> None:
        """It need not."""
        self._board.asks[self._rank] = self._board.answers[self._rank]

    def ask(self) -> snapshot.Own | None:
        """What another's script keeps now; None if there is nobody to ask. Blocks until one has answered."""
        board, rank = self._board, self._rank
        board.asks[rank] = board.answers[rank] + 2
        self._alarm_all()
        answered = board.wait(lambda: answer_to(rank, board, COLLECTIVES))
        if not answered:
            self.forgo()
        if asking(board):
            self._alarm_all()  # others that ask: this worker has not listened to them, and may be the one to answer
        return self._receive() if answered else None

    def _receive(self) -> snapshot.Own | None:
        board, rank = self._board, self._rank
        try:
            with board.waiting():
                message, descriptors = self._context.channel.receive()
                while isinstance(message, messages.Memory) or (  # said again by a launcher that has taken over
                    isinstance(message, messages.Kept) and message.number != board.asks[rank]  # one before had asked
                ):
                    message, descriptors = self._context.channel.receive()
        except Closed:
            raise Aborted("the launcher is gone") from None
        if not isinstance(message, messages.Kept):
            raise Aborted("told to stop while taking over")
        if not message.layout:
            return None
        groups, documents = snapshot.unpack(message.layout, descriptors[0])
        os.close(descriptors[0])
        return documents["kept"], groups["kept"], False

    def take(self, told: snapshot.Own) -> None:
        """Set what this script keeps to that."""
        document, tensors, _ = told
        try:
            self._keeper.load(document, tensors, self._exchanges)
        except ConfigError as error:
            self._tell_user(f"worker {self._rank} goes on with schedulers and settings of its own: {error.what}")

    def answer(self, own: snapshot.Own | None = None) -> None:
        """Between two steps, or while waiting: tell the newcomers that ask, unless this worker asks itself.

        ``own``: what its script is to keep, if it does not yet.
        """
        board, lock = self._board, self._context.lock
        if not asking(board) or self._rank in asking(board):
            return
        with lock:
            for worker in asking(board):
                self._tell(worker, board.asks[worker], own)
                board.answers[worker] = board.asks[worker]
            board.ring(board.common)

    def _tell(self, worker: int, number: int, own: snapshot.Own | None) -> None:
        channel = self._context.channel
        try:
            document, tensors, _ = own or self._state()
            layout, fd = snapshot.pack({"kept": tensors}, {"kept": document})
        except PacelineError as error:
            self._tell_user(f"worker {worker} cannot be told what worker {self._rank} keeps: {error.what}")
            channel.send(messages.Kept(worker, number, b""))
            return
        try:
            channel.send(messages.Kept(worker, number, layout), (fd,))
        finally:
            os.close(fd)

    def _state(self) -> snapshot.Own:
        tensors: Tensors = {}
        return self._keeper.state(self._exchanges, tensors), tensors, True

    def _alarm_all(self) -> None:
        with self._context.lock:
            self._board.alarm()

    def _tell_user(self, text: str) -> None:
        self._context.channel.send(messages.Alarm(text))
