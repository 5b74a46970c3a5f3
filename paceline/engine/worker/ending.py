"""When training ends: decided by all alike, or by one for all; and what a worker does from then on.

In rounds all workers ask the stop rules (``protocol/stopping.py``) after the same round, with the same numbers. With a
log whoever appends an entry asks them, under the run's lock.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from paceline.config import Local, Quorum
from paceline.engine.checkpoint.saving import Saving
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.meeting import Round
from paceline.engine.worker.progress import Progress
from paceline.protocol import messages
from paceline.protocol.log import Entry
from paceline.protocol.stopping import CHECK_ROUNDS, Stopping

_IDLE_STEPS, _IDLE_S = 1000, 10.0  # a script that goes on this long after the end of training is ended
_TRAINING, _DONE, _INTERRUPTED = 0, 1, 2  # cells of the board's column "ended"


class Leave(SystemExit):
    """Ends the script of a worker that was asked to leave, between two steps. ``finally`` and exit functions run."""


class Ending:
    """What a worker knows of the end of training."""

    def __init__(self, context: Context, exchanges: Sequence[Exchange], progress: Progress, saving: Saving) -> None:
        job = context.job
        self._board, self._channel, self._lock, self._rank = context.board, context.channel, context.lock, context.rank
        self._exchanges, self._progress, self._saving, self._pace = exchanges, progress, saving, job.pace
        self._stopping = Stopping(job.steps, job.epochs, job.until_loss, job.patience)
        self._ended = _TRAINING
        self.departed = False  # has this worker left before the others?
        self._owes_interrupt = False  # the script has still to be told
        self._ended_s, self._idle_steps = 0.0, 0

    @property
    def over(self) -> bool:
        return self._ended != _TRAINING

    @property
    def is_interrupted(self) -> bool:
        return self._ended == _INTERRUPTED

    @property
    def holds(self) -> bool:
        """Do schedulers stand still? Not in the rest of a step that Ctrl-C has ended training with."""
        return self.over and not self._owes_interrupt

    # --- at rounds ---

    def after_round(self, round_: Round) -> None:
        """A round of the first exchange is behind this worker: is it the last, or one to save?"""
        progress, number, contributors = self._progress, round_.number, round_.contributors
        rounds = self._exchanges[0].in_rounds
        assert rounds is not None
        every, before = 1, progress.step_number - 1
        if isinstance(self._pace, Local):
            every, before = self._pace.every, progress.steps
            progress.steps = rounds.count_steps(number, contributors, progress.steps)
        lowest = contributors[0] == self._rank
        if rounds.asked_to_stop(number, contributors):
            self._saving.want(number, progress.step_number, shares=lowest)
            self._end(_INTERRUPTED, messages.INTERRUPTED)
            self._owes_interrupt = True
            return
        self._saving.after(number, before, progress.step_number, shares=lowest)
        reason = self._stopping.after_round(progress.steps if isinstance(self._pace, Local) else number)
        look = reason is None and self._stopping.needs_loss and number % max(1, CHECK_ROUNDS // every) == 0
        # Whoever is out of data has not seen this round: then nobody looks, so that all count the same looks.
        # Nor has a newcomer, whether it has joined by now or not.
        if look and all(
            w in contributors or self._board.gone[w] or not rounds.counts(w, number) for w in range(self._board.width)
        ):
            total, samples = rounds.losses(number, contributors)
            progress.look = (0.0, 0.0)
            reason = self._look_once(number, total, samples)
        if reason is not None:
            self._end(_DONE, reason)

    def after_local_step(self) -> str | None:
        """The reason to end in the midst of a period, or None."""
        return self._stopping.after_round(self._progress.step_number)

    def after_pass(self, number: int, loss: float, samples: float) -> None:
        """Pass ``number`` was trained on; ``loss`` and ``samples`` as ``Progress.look``, of all."""
        reason = self._stopping.after_pass(number)
        if self._stopping.needs_loss and samples:
            self._progress.look = (0.0, 0.0)
            found = self._look_once(self._exchanges[0].number, loss, samples)
            reason = found if found is not None else reason
        if reason is not None:
            self._end(_DONE, reason)

    def _look_once(self, number: int, loss: float, samples: float) -> str | None:
        """The first to come to a look takes it for all, so that newcomers know of those before them."""
        accounts = self._board.accounts
        at = self._progress.passes << 32 | number
        with self._lock:
            if accounts.looked < at:
                accounts.looked = at
                reason = self._look(loss / samples) if samples else None
                accounts.found = float(reason is not None)
                return reason
            return "" if accounts.found else None

    # --- with a log: under the run's lock, by whoever is first ---

    def account(self, entry: Entry) -> None:
        """A push is appended, and counts: add up what came with it, and end training where that is due."""
        accounts, progress, a_step = self._board.accounts, self._progress, self._progress.pushes_a_step
        for loss, samples, steps in self._exchanges[0].told(entry.members):
            accounts.loss_sum += loss
            accounts.samples += samples
            accounts.steps += steps
        alone = isinstance(self._pace, Quorum)
        reason = self._stopping.after_round(entry.version if alone else int(accounts.steps) // progress.workers)
        if entry.version % a_step == 0:
            step = entry.version // a_step
            self._saving.after(entry.version, step - 1, step, shares=True)
        if reason is None and entry.version % (CHECK_ROUNDS * a_step) == 0:
            reason = self._take_look()
        self._end_for_all(reason)

    def decide(self, loader: int, number: int) -> None:
        """All have finished pass ``number``: the first to leave its end draws the conclusions from it."""
        board = self._board
        if board.decided[loader] >= number:
            return
        board.decided[loader] = number
        looks = [board.look(loader, number, w) for w in range(board.width) if board.passes(loader)[w] >= number]
        if not sum(look[2] for look in looks) or max(board.ended):
            return
        for exchange in self._exchanges:
            exchange.level()
        board.accounts.loss_sum += sum(look[0] for look in looks)
        board.accounts.samples += sum(look[1] for look in looks)
        reason = self._stopping.after_pass(number)
        self._end_for_all(self._take_look() or reason)

    def _take_look(self) -> str | None:
        """Look at the mean loss since the last look."""
        accounts = self._board.accounts
        if not self._stopping.needs_loss or not accounts.samples:
            return None
        reason = self._look(accounts.loss_sum / accounts.samples)
        accounts.loss_sum = accounts.samples = 0.0
        return reason

    def _look(self, loss: float) -> str | None:
        """What is known of the looks before lies on the board."""
        accounts, stopping = self._board.accounts, self._stopping
        stopping.best, stopping.looks_without_gain = accounts.best, int(accounts.looks_without_gain)
        reason = stopping.look(loss)
        accounts.best, accounts.looks_without_gain = stopping.best, stopping.looks_without_gain
        return reason

    def _end_for_all(self, reason: str | None) -> None:
        if reason is not None:
            self._board.ended[self._rank] = _DONE
            self._channel.send(messages.Ended(reason))
            self._board.wake_all()

    # --- this worker's own end ---

    def depart(self) -> None:
        """Training is over for this worker, and for no other."""
        self.departed, self._ended, self._ended_s = True, _DONE, time.monotonic()

    def end(self, reason: str) -> None:
        """Training is over for this worker."""
        self._end(_DONE, reason)

    @property
    def others(self) -> int:
        """Have others ended training? Not 0 then."""
        return max(self._board.ended)

    def follow(self, *, interrupt: bool = False) -> None:
        """With a log: end if another has ended training, or (if asked for) at Ctrl-C. Raises KeyboardInterrupt."""
        ended = self.others or (_INTERRUPTED if interrupt and self._board.interrupt else _TRAINING)
        if ended and not self.over:
            self.stop_if_interrupted(ended)
            self._end(ended, "")
            for exchange in self._exchanges:
                exchange.refresh()  # what others have pushed until then

    def follow_parked(self, ended: int) -> None:
        """At rounds: end as others have in one that this worker was parked in."""
        if ended and not self.over:
            self._end(ended, self._stopping.after_round(self._progress.step_number) or "")

    def stop_if_interrupted(self, ended: int) -> None:
        if ended == _INTERRUPTED:
            self.stop_here()

    def stop_here(self) -> None:
        """Ctrl-C has reached this worker: save and raise. Raises KeyboardInterrupt."""
        if self._exchanges:
            exchange, shares = self._exchanges[0], False
            if not self._progress.in_rounds:
                with self._lock:
                    shares = not any(ended == _INTERRUPTED for ended in self._board.ended)
                    self._board.ended[self._rank] = _INTERRUPTED
            if shares or self._progress.in_rounds:
                self._saving.want(exchange.number, self._progress.step_number, shares=shares)
        self._end(_INTERRUPTED, messages.INTERRUPTED)
        self._owes_interrupt = True
        self.raise_if_interrupted()

    def raise_if_interrupted(self) -> None:
        """Between two steps. Raises KeyboardInterrupt, once."""
        if self._owes_interrupt:
            self._saving.at_border()
            self._owes_interrupt = False
            raise KeyboardInterrupt

    def idle(self) -> None:
        """A step after the end of training does nothing; a script that never stops stepping is ended."""
        self._idle_steps += 1
        if self._idle_steps > _IDLE_STEPS and time.monotonic() - self._ended_s > _IDLE_S:
            raise SystemExit(0)

    def _end(self, how: int, reason: str) -> None:
        self._ended, self._ended_s = how, time.monotonic()
        self._board.ended[self._rank] = how
        if reason:  # not only worker 0: who is out of data may learn of the end without the reason
            self._channel.send(messages.Ended(reason))
