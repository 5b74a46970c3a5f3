"""A worker's passes over loaders: which batches are its own, how a pass begins, and what it was when it ends.

All workers run the same script, so they come to the ends of passes in the same order. Who shares a pass is told by
``deals.py``, what happens where all meet at its end by ``parking.py``, who comes and leaves meanwhile by
``membership.py``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from paceline.config import Quorum
from paceline.data.passes import Pending
from paceline.engine.checkpoint.saving import Saving
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.catching_up import CatchingUp
from paceline.engine.worker.deals import Deals
from paceline.engine.worker.ending import Ending
from paceline.engine.worker.leases import Leases
from paceline.engine.worker.marks import gradient_marks
from paceline.engine.worker.membership import Membership
from paceline.engine.worker.parking import Parking
from paceline.engine.worker.position import done_in, key_of
from paceline.engine.worker.progress import Progress
from paceline.errors import ConfigError
from paceline.protocol import messages
from paceline.protocol.deals import Deal
from paceline.transport.board import COLLECTIVES


class Passes:
    """A ``data.passes.Passes``; loaders have numbers, in the order of their wraps.

    ``close_periods`` brings to a meeting what local steps have come to so far.
    """

    def __init__(
        self,
        context: Context,
        exchanges: Sequence[Exchange],
        leases: dict[int, Leases],
        progress: Progress,
        catching_up: CatchingUp,
        ending: Ending,
        saving: Saving,
        parking: Parking,
        membership: Membership,
        close_periods: Callable[[], None],
    ) -> None:
        self._context, self._board, self._rank = context, context.board, context.rank
        self._exchanges, self._leases, self._deals = exchanges, leases, Deals(context, leases)
        self._progress, self._catching_up, self._ending, self._saving = progress, catching_up, ending, saving
        self._parking, self._membership, self._close_periods = parking, membership, close_periods
        # Changes whenever a backward pass has added to a gradient. A deputy is told it by the worker it stands for.
        self.marks: Callable[[], object] = self._gradient_marks
        self.drawing: Callable[[], None] = lambda: None  # called before the script gets a batch
        self.models: list[nn.Module] = []
        self.count = 0
        self._leasing: set[int] = set()  # loaders whose pass in progress is drawn by lease
        self._verdicts: dict[int, bool] = {}  # loader -> did the last push of its batches count?
        self._pending: defaultdict[int, Pending] = defaultdict(Pending)
        # loader -> (its pass, batches of it that the script has had); which the script trains on; before that
        self._places: dict[int, tuple[int, int]] = {}
        self._reading: int | None = None
        self._stepped_from: int | None = None  # as ``_reading``, at the last step: an evaluation may have begun since
        self._read_before: dict[int, int | None] = {}
        self._starts: dict[int, int] = {}  # loader -> own steps when its pass began
        self._drawn_from: set[int] = set()  # loaders whose pass in progress has had a batch
        self._marks_before: dict[int, object] = {}  # loader -> the gradients' at that time
        self._continued: set[int] = set()  # loaders whose pass this process has not begun
        self._open: set[int] = set()  # loaders of which this worker has a part in a pass in progress
        # Loaders whose pass the script left early, and the gradients at that time; until that is told.
        self._leaving: list[tuple[int, object]] = []
        self._in_progress: set[int] = set()  # loaders in the midst of whose pass the script is
        self._left: set[int] = set()  # loaders whose last pass it was, and its end is not waited for yet

    def add_loader(self) -> int:
        """The number of one more. Raises ConfigError."""
        if self.count == COLLECTIVES:
            raise ConfigError(f"run.wrap got {COLLECTIVES + 1} loaders; a run has at most {COLLECTIVES}")
        self.count += 1
        return self.count - 1

    # --- whose batches ---

    def epoch(self, loader: int) -> int:
        return self._board.passes(loader)[self._rank]

    def leases(self, loader: int) -> Leases | None:
        """None for an evaluation: it is each worker's own business, and what it reads is not trained on."""
        leases = self._leases.get(loader)
        if leases is None or not self._is_training() or self._ending.over:
            return None
        leases.open(self.epoch(loader), self._board.gone)
        self._leasing.add(loader)
        return leases

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and (not self.models or any(model.training for model in self.models))

    def skip(self, loader: int) -> int:
        return self._places[loader][1]

    def deal(self, loader: int) -> Deal | None:
        return self._deals.of(loader)

    def fetching(self) -> None:
        self._catching_up.fetching()
        self._membership.answer()

    def fetched(self, loader: int) -> None:
        key, count = self._places[loader]
        self._places[loader] = (key, count + 1)
        self._reading = loader
        self._drawn_from.add(loader)

    def border(self, *, saves: bool = True) -> None:
        """Between two steps. ``saves``: is the script there now?"""
        if self._leaving:
            self.tell_left()
        if saves:
            self._saving.at_border()
        self._membership.at_border()
        if self._board.leaving[self._rank] and not self._ending.over and (self._leases or not self.count):
            self._membership.depart()

    def drawn(self, loader: int, samples: int) -> None:
        self._catching_up.drawn()
        self.drawing()
        self._progress.drawn(loader, samples)

    def needs_ghost(self, loader: int) -> bool:
        is_new = loader == self._catching_up.joined_in or loader in self._continued
        needs = self._catching_up.needs_ghost(is_first=loader not in self._drawn_from, is_new=is_new)
        if needs:
            self._deals.take_any(loader)
        return needs

    def tell_returned(self, loader: int, count: int) -> None:
        """Under the run's lock: so many batches of the loader have come back by now."""
        board = self._board
        if board.returned[loader] != count:
            board.returned[loader] = count
            board.ring(board.common)

    def more(self, loader: int) -> bool:
        """Wait at the tail of a pass that is trained on, or may be; see ``protocol/rounds.py``."""
        is_trained = self._progress.own_steps > self._starts[loader] or self._parking.is_trained(loader)
        deal = self._deals.number(loader)
        if self._ending.over or (not is_trained and loader in self._drawn_from):
            return False
        if deal is None and loader not in self._leasing:
            return False
        if is_trained:
            self._close_periods()
            self._progress.close_row()
        self._saving.at_border()  # rounds do not wait for who is parked
        begun = time.monotonic()
        if deal is None:
            more = self._parking.at_tail(loader, is_trained=is_trained)
        else:
            more = self._parking.at_tail_of(loader, deal, is_trained=is_trained) and self._go_on(loader)
        self._progress.waited_since(begun)
        return more

    def _go_on(self, loader: int) -> bool:
        """To the next deal of the pass, if there is training in it."""
        if self._ending.others or not self._deals.go_on(loader):
            return False
        self._places[loader] = (key_of(loader, self.epoch(loader), self._deals.number(loader) or 0), 0)
        return True

    # --- did what was read count? ---

    def pending(self, loader: int) -> Pending | None:
        return self._pending[loader] if isinstance(self._context.job.pace, Quorum) else None

    def judge(self, *, counted: bool) -> None:
        """A push of what the last steps were taken with has counted, or has not."""
        loader, own_steps = self._stepped_from, self._progress.own_steps
        if loader is not None:
            if counted and not self._board.trained[loader]:
                self._board.trained[loader] = 1
            self._verdicts[loader] = counted or self._verdicts.get(loader, False)
        if counted and self._progress.in_rounds:
            for leased, leases in self._leases.items():
                if own_steps > self._starts.get(leased, own_steps):
                    leases.commit()

    def verdict(self, loader: int) -> bool | None:
        return self._verdicts.pop(loader, None)

    def where(self) -> tuple[int, int]:
        """How far this worker is into its data: what goes with a push, so that both count or neither."""
        self._stepped_from = self._reading
        if self._reading is None:
            return (0, 0)
        key, fetched = self._places[self._reading]
        leases = self._leases.get(self._reading)
        return (key, fetched) if leases is None else (key, leases.place)

    # --- a pass begins ---

    @property
    def over(self) -> bool:
        return self._ending.over

    def begin(self, loader: int, length: int | None) -> bool:
        if self._ending.departed:
            return False
        self.tell_left()
        self._ending.raise_if_interrupted()
        catching_up, progress = self._catching_up, self._progress
        first, resumes = False, catching_up.resumed is not None
        if catching_up.has_ghost:
            catching_up.begin(loader, self._is_training())
            return False
        if not catching_up.joined:
            first = self._is_training()
            if (
                catching_up.look_again(loader if first else None)
                or (not first and catching_up.is_fresh)
                or (first and not self._membership.join(self.count, begins=loader))
            ):
                catching_up.begin(loader, first)
                return False
            if first:
                catching_up.joined_in = loader
            elif catching_up.resumed is None:
                self._membership.join(
                    self.count
                )  # an evaluation, of which it may have nothing to read, and then waits with the others
        for left in sorted(self._left):
            self._left.discard(left)
            self._parking.at_end(left)
        if progress.step_number == 0:
            progress.start_clock()  # what came before the first batch is not training
        progress.forget_losses()
        self._starts[loader] = progress.own_steps
        self._drawn_from.discard(loader)
        progress.samples_before[loader] = progress.samples
        self._marks_before[loader] = self.marks()
        ghost = self._ending.over and loader in self._parking.trained_on
        self._in_progress.add(loader)
        if ghost:
            progress.behind = None
        else:
            self._begin_for_real(loader, length, tell=resumes or not first)
        if self._is_training():  # an evaluation is part of what comes after a pass
            self._saving.at_border()
        if self._places.get(loader, (0, 0))[1] == 0:
            self.fetching()  # the checkpoint was made here, or in a pass before
        return not ghost

    def _begin_for_real(self, loader: int, length: int | None, *, tell: bool) -> None:
        number = self.epoch(loader)
        trained_on = self._parking.trained_on
        is_trained = loader in trained_on or not trained_on
        if is_trained:
            self._progress.epoch = number + 1
            if self._rank == 0 and tell:
                self._context.channel.send(messages.Pass(loader, number, length))
        has_part = self._deals.settle(loader, number, trains=self._is_training() and is_trained)
        if self._is_training():
            keeps = has_part and self._deals.keeps(loader)
            if self._board.leaving[self._rank] and not (keeps or self._open):
                self._membership.depart()
            (self._open.add if has_part else self._open.discard)(loader)
        key = key_of(loader, number, self._deals.number(loader) or 0)
        # How many batches of its part had been trained on by the worker whose place this one takes.
        done = done_in(self._board.places, self._rank, key) if loader not in self._leases else 0
        leases = self._leases.get(loader)
        if done or (self._board.deaths[self._rank] and leases is not None and self._board.trained[loader]):
            self._parking.trained_on.add(loader)
        (self._continued.add if done or not has_part else self._continued.discard)(loader)
        self._places[loader] = (key, done)
        self._read_before[loader] = self._reading

    # --- a pass ends ---

    @property
    def is_behind(self) -> bool:
        """Is the script behind an epoch, and in no pass?"""
        return self._progress.behind is not None and not self._in_progress

    def end(self, loader: int) -> None:
        self._in_progress.discard(loader)
        self.tell_left()
        self._progress.put_down()
        if self._ending.departed or self._caught_up(loader):
            return
        self._lay_ghost()
        self._ending.raise_if_interrupted()
        if self._finish(loader, self.marks()):
            self._progress.flush()
            self._parking.at_end(loader)

    def _lay_ghost(self) -> None:
        self._catching_up.lay_ghost()
        self._membership.answer()

    def leave(self, loader: int) -> None:
        self._in_progress.discard(loader)
        self._progress.put_down()
        if self._ending.departed or self._caught_up(loader) or self._ending.is_interrupted:
            return
        self._lay_ghost()
        self._leaving.append((loader, self.marks()))

    def tell_left(self) -> None:
        """The script goes on, so the passes that it left early are over. Called where it next comes to this package:
        an exception that ends it closes its loops in the same way, and then another is to go on in that pass."""
        while self._leaving and not self._ending.departed:
            loader, marks = self._leaving.pop(0)
            if self._finish(loader, marks):
                self._left.add(loader)

    def _caught_up(self, loader: int) -> bool:
        """Was it a pass of ghosts, of a newcomer?"""
        was, trained = self._catching_up.end(loader)
        if trained:
            self._progress.passes += 1
            self._parking.trained_on.add(loader)
        elif loader not in self._parking.trained_on:
            self._parking.empty.add(loader)  # or it would not have counted
        return was

    def _finish(self, loader: int, marks: object) -> bool:
        """Was it a pass to train on? If so it is counted, and its end is one for all.

        A pass that was read without a step is an evaluation: it is nobody else's business, since scripts evaluate in
        the midst of training, and on worker 0 alone. A pass with nothing to read may be either: its worker parks empty
        (``protocol/rounds.py``).
        """
        board, progress = self._board, self._progress
        self._open.discard(loader)
        self._deals.end(loader)
        progress.weights.put_down(loader)
        steps = progress.own_steps - self._starts[loader]
        if steps:
            self._close_periods()
        progress.close_row()
        progress.forget_losses()
        drawn = loader in self._drawn_from  # not from another, an evaluation within this pass
        untouched = self._marks_before[loader] == marks
        if untouched:
            self._pending[loader].forget()
        # Fewer batches than there are to a step: they have left a gradient, for a step that comes after the pass.
        leased = loader in self._leasing
        trained = steps > 0 or (drawn and not untouched and (leased or loader in self._parking.trained_on))
        # Who has no part of a pass is told by it only that others have begun it: it may be an evaluation.
        trained = trained or (loader in self._continued and loader in self._parking.trained_on)
        if leased:
            self._leasing.discard(loader)
            self._leases[loader].end(trained=trained)
        if drawn and not trained:
            self._reading = self._read_before[loader]
            if untouched:
                progress.weights.unread(progress.samples_before[loader])  # no backward came of them
            board.evaluated[loader] = 1
            self._context.ring()
            return False
        (self._parking.empty.discard if drawn else self._parking.empty.add)(loader)
        samples = progress.samples - progress.samples_before[loader] if trained else 0
        if trained:
            progress.behind = (progress.epoch, samples)
        self._parking.finish(loader, max(steps, int(trained)), samples, leased=leased)
        return True

    def _gradient_marks(self) -> object:
        return gradient_marks([p for exchange in self._exchanges for p in exchange.parameters])

    # --- checkpoints ---

    def own(self) -> dict[str, Any]:
        """What a checkpoint needs of this worker beside what the script keeps."""
        inside = {
            str(loader): self._progress.samples - before
            for loader, before in self._progress.samples_before.items()
            if loader in self._places
        }
        return {"look": list(self._progress.look), "pass_samples": inside}
