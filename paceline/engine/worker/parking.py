"""Where a worker parks: at the tail of what it may read of a pass, and at the end of every pass, where all meet.

The laws are in ``protocol/rounds.py`` and ``protocol/deals.py``. At an end all draw the same
conclusions from the pass: its looks at the loss, the mean of the buffers, the newest parameters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from paceline.config import Local
from paceline.engine.checkpoint.saving import Saving
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.buffers import Buffers
from paceline.engine.worker.ending import Ending
from paceline.engine.worker.progress import Progress
from paceline.engine.worker.settling import Settling
from paceline.protocol.deals import more_of_pass, place_at_tail
from paceline.protocol.rounds import EMPTY, NOT_PARKED, TAIL, Board, Waiting, held_at_end, more_at_tail


class Parking:
    """``trained_on``: the loaders that are known to be; ``empty``: those whose last pass had nothing to read."""

    def __init__(
        self,
        context: Context,
        exchanges: Sequence[Exchange],
        progress: Progress,
        settling: Settling,
        ending: Ending,
        saving: Saving,
    ) -> None:
        self._context, self._board, self._lock, self._rank = context, context.board, context.lock, context.rank
        self._exchanges, self._progress = exchanges, progress
        self._settling, self._ending, self._saving = settling, ending, saving
        self.trained_on: set[int] = set()
        self.empty: set[int] = set()
        self.buffers: list[Buffers] = []

    def at_tail(self, loader: int, *, is_trained: bool) -> bool:
        """Wait until batches have come back (True), or the pass is drained; where it is not known to be trained on, at
        most until it is seen not to be."""
        board, rank = self._board, self._rank
        with self._lock:
            self._settling.drain(loader, arriving=rank)
            more = board.returned[loader] > 0
            if not more and board.drained[loader] <= board.passes(loader)[rank]:
                board.parked[rank] = loader + 1 + TAIL + (0 if is_trained else EMPTY)
        return self._wait_at_tail(more_at_tail, lambda: None) if board.parked[rank] else more

    def at_tail_of(self, loader: int, deal: int, *, is_trained: bool) -> bool:
        """Wait until there is another deal behind this one (True), or the pass is drained; else as ``at_tail``."""
        board, rank = self._board, self._rank
        number = board.passes(loader)[rank] + 1
        with self._lock:
            more = self._settling.end_deal(loader, number, deal, arriving=rank)
            if isinstance(more, Waiting):
                board.parked[rank] = place_at_tail(loader, deal, is_empty=not is_trained)
        if not isinstance(more, Waiting):
            self._context.ring()
            return more
        return self._wait_at_tail(more_of_pass, lambda: self._settling.end_deal(loader, number, deal))

    def _wait_at_tail(self, ask: Callable[[int, Board], bool | Waiting], decide: Callable[[], object]) -> bool:
        """Stay parked there until the answer is not Waiting. ``decide`` is called under the lock, where it is due."""
        board, rank = self._board, self._rank
        more: bool | Waiting = False
        self._context.ring()
        while board.parked[rank]:
            board.wait(partial(ask, rank, board))
            with self._lock:  # others may have been faster
                decide()
                more = ask(rank, board)
                if not isinstance(more, Waiting):
                    board.parked[rank] = NOT_PARKED
        self._context.ring()
        for exchange in self._exchanges:
            exchange.catch_up()
            if not exchange.in_period:  # as at an end
                exchange.refresh()
        return more is True

    def finish(self, loader: int, steps: int, samples: int, *, leased: bool) -> None:
        """This worker has finished its pass: so many steps (not 0 if it was trained on), and samples trained on."""
        board, progress = self._board, self._progress
        if steps:
            self.trained_on.add(loader)
        for one in self.buffers:
            one.write(progress.passes + 1, samples)
        passes = board.passes(loader)
        look = board.look(loader, passes[self._rank] + 1, self._rank)
        look[0], look[1], look[2] = *progress.look, steps
        if not progress.in_rounds:
            progress.look = (0.0, 0.0)
        with self._lock:
            passes[self._rank] += 1
            if leased:
                self._settling.drain(loader)
            elif (dealt := board.shares.dealt(loader, passes[self._rank] - 1)) is not None:
                # At once: after a break it may step, in a round that those at the tail are excused from until then.
                self._settling.end_deal(loader, passes[self._rank], dealt.newest)
        self._context.ring()

    def word(self, loader: int) -> int:
        """The board's, for who waits at the end of a pass."""
        return loader + 1 + (EMPTY if loader in self.empty and not self.is_trained(loader) else 0)

    def is_trained(self, loader: int) -> bool:
        """Is it known that somebody trains on this loader? So who finds nothing to read waits for the others."""
        return loader in self.trained_on or self._board.trained[loader] != 0

    def at_end(self, loader: int) -> None:
        """Stay parked until every worker has finished this pass; then all draw the same conclusions from it."""
        board, progress, ending = self._board, self._progress, self._ending
        number = board.passes(loader)[self._rank]
        begun = time.monotonic()
        self._saving.at_border()
        board.parked[self._rank] = place = self.word(loader)
        self._context.ring()
        board.wait(lambda: held_at_end(self._rank, board) or number)
        if not progress.in_rounds:
            with self._lock:
                ending.decide(loader, number)
        board.parked[self._rank] = NOT_PARKED
        if place & EMPTY:
            self._context.ring()  # it may have gone on although the barrier is shut
        # Who is gone has not finished it; what it had logged before is of an older pass.
        looked = [w for w in range(board.width) if board.passes(loader)[w] >= number]
        looks = [board.look(loader, number, worker) for worker in looked]
        trained = any(look[2] for look in looks)
        for exchange in self._exchanges:
            if not trained:
                exchange.catch_up()
            if not exchange.in_period:  # an evaluation in the midst of local steps, with nothing to read
                exchange.refresh()
        self.count_local_steps()
        progress.waited_since(begun)
        if ending.over:
            return
        others = ending.others
        ending.stop_if_interrupted(others)
        if trained:
            self.trained_on.add(loader)
            progress.passes += 1
            self.average_buffers(looked)
        if not progress.in_rounds:
            ending.follow()
            return
        if trained:
            ending.after_pass(number, sum(look[0] for look in looks), sum(look[1] for look in looks))
        ending.follow_parked(others)

    def average_buffers(self, workers: Sequence[int]) -> None:
        """They become the mean of these workers', as of the last pass that was trained on."""
        for one in self.buffers:
            one.average(self._progress.passes, workers)

    def count_local_steps(self) -> None:
        """Other workers have trained on meanwhile (pace local)."""
        if self._exchanges and isinstance(self._context.job.pace, Local):
            self._progress.steps = self._exchanges[0].most_steps
