"""A worker among the others: what it hears of them, how it joins them, and how it leaves.

Deaths that the launcher tells of are settled by whoever hears of them first (``settling.py``). Newcomers join under the
run's lock, ask what the others' scripts keep (``handover.py``), and are told between two steps. Who is asked to leave
does so between two steps too (docs/decisions/0009, 0012).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.engine.checkpoint.saving import Saving
from paceline.engine.checkpoint.snapshot import Own, Resumed
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.catching_up import CatchingUp
from paceline.engine.worker.collectives import Collectives
from paceline.engine.worker.ending import Ending, Leave
from paceline.engine.worker.handover import Handover
from paceline.engine.worker.parking import Parking
from paceline.engine.worker.progress import Progress
from paceline.engine.worker.settling import Settling
from paceline.protocol import messages
from paceline.protocol.rounds import LEFT, PRESENT, Waiting


class Membership:
    """``close_periods`` brings to a meeting what local steps have come to so far."""

    def __init__(
        self,
        context: Context,
        exchanges: Sequence[Exchange],
        progress: Progress,
        catching_up: CatchingUp,
        settling: Settling,
        ending: Ending,
        saving: Saving,
        collectives: Collectives,
        parking: Parking,
        close_periods: Callable[[], None],
    ) -> None:
        self._context, self._board, self._lock, self._rank = context, context.board, context.lock, context.rank
        self._exchanges, self._progress, self._catching_up = exchanges, progress, catching_up
        self._settling, self._ending, self._saving, self._collectives = settling, ending, saving, collectives
        self._parking, self._close_periods = parking, close_periods
        self._handover = Handover(context, exchanges, saving.keeper)
        self._heard = 0  # of the board's alarms
        self._is_asked = False  # by newcomers, perhaps
        self._own: Own | None = None  # what the script takes up, from a checkpoint or as others have told it

    # --- what others have to tell ---

    def hear(self, ask: Callable[[], object] = lambda: None) -> None:
        """There was an alarm. Draw the consequences of deaths that the launcher has told of, unless another worker has;
        tell newcomers what they ask; give one's part of a checkpoint, if one waits between two steps.

        ``ask``: what this worker waits for; Waiting until it has come.
        """
        board, joined = self._board, self._catching_up.joined
        counts = joined or self._catching_up.resumed is not None  # a run that is resumed has all its workers
        if counts:
            self._is_asked = True
            self.answer()
        if joined and board.parked[self._rank]:
            self._saving.at_border()
        with self._lock:
            if not counts:
                self._settling.bury()
                return
            changed = self._settling.settle()
        if changed:
            self._context.ring()
        while board.owes and board.parked[self._rank]:  # nobody may be left in that round to see to it
            for exchange in self._exchanges:
                board.wait(lambda one=exchange: _is_free(ask) or one.is_between_rounds())  # type: ignore[misc]
            if _is_free(ask):
                return  # that round may wait for this worker
            with self._lock:
                self._settling.settle()
            self._context.ring()

    def at_border(self) -> None:
        """Between two steps."""
        if self._board.alarms != self._heard:
            self._heard = self._board.alarms
            self._is_asked = True
            self.answer()

    def answer(self) -> None:
        """Tell newcomers what they ask, as soon as this worker's script is what it is to be.

        Where it is to take that up from a checkpoint, or as it was told itself, it is told as it stands there: until it
        does, this worker may wait for the newcomer.
        """
        own = self._to_take_up()
        if self._is_asked and (own is not None or self._catching_up.is_itself):
            self._is_asked = False
            self._handover.answer(own)

    def _to_take_up(self) -> Own | None:
        resumed = self._catching_up.resumed
        if resumed is not None:
            return resumed.own(self._rank)
        return self._own if self._catching_up.is_to_take else None

    # --- joining ---

    def join(self, loaders: int, *, begins: int | None = None) -> bool:
        """This process has caught up: from here on the others count with it. ``loaders``: how many it has; ``begins``:
        it is about to begin a pass over this one that it trains on. False if the others have got on meanwhile, and it
        is behind again."""
        board, rank, catching_up = self._board, self._rank, self._catching_up
        resumed, is_fresh = catching_up.resumed, catching_up.is_fresh
        # The worker before it may have died at the end of a pass that the others are still in.
        ended = catching_up.last if resumed is None and not is_fresh else None
        while True:
            alarms = board.alarms
            with self._lock:
                self._settling.settle()
                if board.settled[rank] == board.deaths[rank]:
                    if is_fresh and not self._take_place(loaders, begins):
                        return False
                    if ended is not None:
                        board.parked[rank] = self._parking.word(ended)
                    if resumed is None:
                        self._handover.begin()
                    board.presence[rank] = PRESENT
                    break
            for exchange in self._exchanges:  # a round that the worker before it was in is not over
                # Of those who die meanwhile only this one may be left to draw the consequences.
                board.wait(lambda one=exchange, heard=alarms: board.alarms != heard or one.no_dead_in_round())  # type: ignore[misc]
        catching_up.joined = self._collectives.takes_part = True
        catching_up.is_to_ask = resumed is None
        for exchange in self._exchanges:
            exchange.catch_up()
        catching_up.forget_gradients()
        self._context.ring()
        if is_fresh:
            self._context.channel.send(messages.Joined(self._progress.passes + 1))
        if ended is not None:
            if ended in self._parking.trained_on:
                self._progress.passes -= 1
            self._parking.at_end(ended)
        if resumed is not None:
            self._take_up(resumed)
            return True
        for exchange in self._exchanges:
            exchange.join()
        if board.owes:
            self.hear()
        self._parking.count_local_steps()
        if self._progress.passes:
            self._parking.average_buffers([w for w in range(board.width) if board.gone[w] != LEFT])
        if self._ending.others:
            self._handover.forgo()
        else:
            self._take_over(later=begins is not None)
        catching_up.is_to_ask = False
        self.answer()
        for exchange in self._exchanges:
            exchange.await_slower()
        self._progress.start_clock()
        self._ending.follow()
        return True

    def _take_place(self, loaders: int, begins: int | None) -> bool:
        """Under the run's lock: come to a place that was LEFT, in the pass that the hindmost of the others is in. False
        if that is a later one than this process has come to."""
        board, rank, catching_up = self._board, self._rank, self._catching_up
        if catching_up.look_again(begins):
            return False
        if not catching_up.others:  # their scripts are over, and servers have gone with them
            self._ending.depart()
            self._collectives.departed = True
            return False
        for loader in range(loaders):
            number = catching_up.passes_of_others(loader)
            for look in (board.look(loader, number, rank), board.look(loader, number + 1, rank)):
                look[0] = look[1] = look[2] = 0.0  # of whoever had the place before
            board.passes(loader)[rank] = number
        for one in self._parking.buffers:
            one.forget()
        board.coming[rank] = 0
        board.count_join()
        return True

    def _take_over(self, *, later: bool) -> None:
        """Keep what the others' scripts keep; ``later``: as soon as the script gets a batch."""
        told = self._handover.ask()
        if told is not None and later:
            self._own = told
            self._catching_up.will_take(lambda: self._handover.take(told))
        elif told is not None:
            self._handover.take(told)

    def _take_up(self, resumed: Resumed) -> None:
        """This worker is where it was when the checkpoint was made, but for what its script draws next."""
        own, progress = resumed.own(self._rank), self._progress
        self._own = own
        if own is not None:
            document, tensors, is_its_own = own
            progress.look = (document["look"][0], document["look"][1])

            def take() -> None:
                # Two workers must not draw the same numbers.
                self._saving.keeper.load(document, tensors, self._exchanges, random=is_its_own)
                for loader, samples in document["pass_samples"].items() if is_its_own else ():
                    if int(loader) in progress.samples_before:
                        progress.samples_before[int(loader)] = progress.samples - samples

            self._catching_up.will_take(take)
        self._catching_up.resumed = None
        for exchange in self._exchanges:
            exchange.refresh()
        self._parking.count_local_steps()
        progress.start_clock()

    # --- leaving ---

    def depart(self) -> None:
        """This worker was asked to leave, and stands between two steps. Raises Leave, if anybody goes on."""
        board = self._board
        staying = (board.gone[w] != LEFT and not board.leaving[w] for w in range(board.width))
        if not self._catching_up.joined or not any(staying):
            return
        self._close_periods()
        self._progress.close_row()
        self._progress.flush()
        self._saving.at_border()
        self._collectives.departed = True
        self._ending.depart()
        with self._lock:
            self._settling.forgo(self._rank, begun=True)
        self._context.ring()
        raise Leave


def _is_free(ask: Callable[[], object]) -> bool:
    """May who asks this go on?"""
    return not isinstance(ask(), Waiting)
