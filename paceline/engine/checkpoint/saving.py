"""A worker's side of checkpoints: when its part of one is due, and giving it at the border between two steps.

Where the loader gives a batch, or the worker parks, the script has done all that belongs to the step before (schedulers
are stepped) and nothing of the next (no random number is drawn). There every worker gives what it has of its own, and
one of them also what all share: at rounds the lowest contributor, whom the next round waits for; with a log the worker
whose push made it due, in the turn of an entry of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from paceline.engine.checkpoint import snapshot
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.keeping import Keeper
from paceline.errors import ConfigError, PacelineError
from paceline.params.packing import Tensors
from paceline.protocol import messages


class Saving:
    """``position`` tells, under the run's lock, how far all are into their data at a round of the first exchange;
    ``more`` what a worker has of its own beside what the script keeps."""

    def __init__(self, context: Context, exchanges: Sequence[Exchange], keeper: Keeper) -> None:
        self._context, self._board, self._exchanges = context, context.board, exchanges
        self._every = context.job.checkpoint_every
        self._due = self._step = self._saved = 0
        self._shares = False
        self.models: list[nn.Module] = []
        self.keeper = keeper
        self.more: Callable[[], dict[str, Any]]
        self.position: Callable[[int], dict[str, Any]]

    def keep_if_possible(self, item: Any) -> None:
        """What is wrapped is kept; if that cannot be, training is none the worse for it."""
        try:
            self.keeper.add(item)
        except ConfigError as error:
            if self._context.rank == 0:
                text = f"checkpoints will be without the {type(item).__name__}: {error.what}"
                self._context.channel.send(messages.Alarm(text))

    def after(self, number: int, before: int, step: int, *, shares: bool) -> None:
        """Round, or version, ``number`` has brought training from step ``before`` to ``step``. Is it one to save?"""
        if self._every is not None and step // self._every > before // self._every:
            self.want(number, step, shares=shares)

    def want(self, number: int, step: int, *, shares: bool) -> None:
        """Save ``number`` at the next border. ``shares``: this worker gives what all share."""
        if number > self._board.checkpoint:
            self._due, self._step, self._shares = number, step, shares

    @property
    def is_due(self) -> bool:
        """Has this worker something to give at the next border?"""
        return self._due > self._saved or self._board.checkpoint > self._saved

    def at_border(self) -> None:
        """Between two steps."""
        if self.is_due:
            self._save()

    def _save(self) -> None:
        try:
            if self._due > self._board.checkpoint and self._shares:
                self._send_shared()
            self._saved = max(self._due, self._board.checkpoint)
            tensors: Tensors = {}
            name = f"worker-{self._context.rank}"
            own = self.keeper.state(self._exchanges, tensors, random=True) | self.more()
            snapshot.send(self._context.channel, self._saved, 0, {name: tensors}, {name: own})
        except PacelineError as error:
            self._saved = max(self._due, self._saved)
            text = f"the checkpoint of step {self._step} is not made: {error.what}"
            self._context.channel.send(messages.Alarm(". ".join(part for part in (text, error.why) if part)))
        self._due, self._shares = 0, False

    def _send_shared(self) -> None:
        board, number = self._board, self._due
        with self._context.lock:
            if number <= board.checkpoint:
                return
            entries = [exchange.append_save() for exchange in self._exchanges]
            state = self.position(number) | {
                "step": self._step,
                "exchanges": [exchange.numbers() for exchange in self._exchanges],
                "pace": str(self._context.job.pace),
            }
            board.want_checkpoint(number)
        groups = snapshot.shared_groups(self._exchanges, self.models)
        send = partial(snapshot.send, self._context.channel, number, self._step, groups, {"state": state})
        self._in_turn(list(zip(self._exchanges, entries, strict=True)), send)

    def _in_turn(self, waiting: list[tuple[Exchange, Any]], copy: Callable[[], None]) -> None:
        """Call ``copy`` in the turns of all entries at once."""
        if not waiting:
            copy()
            return
        (exchange, entry), *others = waiting
        exchange.save(entry, lambda: self._in_turn(others, copy))
