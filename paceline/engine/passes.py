"""A worker's passes over loaders: which batches are its own, what a pass was, and that all meet at the end of one.

All workers run the same script, so they come to the ends of passes in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from paceline.config import Local, Quorum
from paceline.engine import position
from paceline.engine.buffers import Buffers
from paceline.engine.catching_up import CatchingUp
from paceline.engine.collectives import Collectives
from paceline.engine.context import Context
from paceline.engine.ending import Ending, Leave
from paceline.engine.exchange import Exchange
from paceline.engine.handover import Handover
from paceline.engine.keeping import load_random_states
from paceline.engine.leases import Leases
from paceline.engine.position import key_of
from paceline.engine.progress import Progress
from paceline.engine.saving import Saving
from paceline.engine.settling import Settling
from paceline.engine.snapshot import Resumed
from paceline.errors import ConfigError
from paceline.protocol import messages
from paceline.protocol.rounds import (
    EMPTY,
    LEFT,
    NOT_PARKED,
    PRESENT,
    TAIL,
    Waiting,
    held_at_end,
    more_at_tail,
)
from paceline.transport.board import COLLECTIVES


class Passes:
    """A ``data.loader.Passes``; loaders have numbers, in the order of their wraps.

    ``close_periods`` brings to a meeting what local steps have come to so far.
    """

    def __init__(
        self,
        context: Context,
        exchanges: Sequence[Exchange],
        leases: dict[int, Leases],
        progress: Progress,
        catching_up: CatchingUp,
        settling: Settling,
        ending: Ending,
        saving: Saving,
        collectives: Collectives,
        close_periods: Callable[[], None],
    ) -> None:
        self._context, self._board, self._lock, self._rank = context, context.board, context.lock, context.rank
        self._handover = Handover(context, exchanges, saving.keeper)
        self._heard = 0  # of the board's alarms
        self._is_asked = False  # by newcomers, perhaps
        self._exchanges, self._progress, self._catching_up = exchanges, progress, catching_up
        self._settling, self._ending, self._saving, self._collectives = settling, ending, saving, collectives
        self._close_periods, self._leases = close_periods, leases
        # Changes whenever a backward pass has added to a gradient. A deputy is told it by the worker it stands for.
        self.marks: Callable[[], object] = self._gradient_marks
        self.models: list[nn.Module] = []
        self.buffers: list[Buffers] = []
        self.count = 0
        self._leasing: set[int] = set()  # loaders whose pass in progress is drawn by lease
        self._verdicts: dict[int, bool] = {}  # loader -> did the last push of its batches count?
        # loader -> (its pass, batches of it that the script has had); which the script trains on; before that
        self._places: dict[int, tuple[int, int]] = {}
        self._reading: int | None = None
        self._read_before: dict[int, int | None] = {}
        self._starts: dict[int, int] = {}  # loader -> own steps when its pass began
        self._drawn_from: set[int] = set()  # loaders whose pass in progress has had a batch
        self._evaluating: dict[int, tuple[int, object]] = {}  # loader -> samples and gradients at that time
        self._training_loaders: set[int] = set()
        self._continued: set[int] = set()  # loaders whose pass this process has not begun
        self._deals: dict[int, tuple[int, int] | None] = {}  # loader -> see `deal`, in its pass in progress
        self._open: set[int] = set()  # loaders of which this worker has a part in a pass in progress
        # Loaders whose pass the script left early, and the gradients at that time; until that is told.
        self._leaving: list[tuple[int, object]] = []
        self._left: set[int] = set()  # loaders whose last pass it was, and its end is not waited for yet
        self._empty: set[int] = set()  # loaders whose last pass had nothing to read

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

    def deal(self, loader: int) -> tuple[int, int] | None:
        return self._deals[loader] if loader in self._deals else self._deal_to(self._sharers(leaving=True))

    def _sharers(self, *, leaving: bool) -> tuple[int, ...]:
        """Who shares a pass that begins now; with ``leaving`` also who is here, but has been asked to leave.

        Who is just gone because its script is over takes its part along: so who has which batches does not depend on
        how fast one is.
        """
        board = self._board
        return tuple(
            worker
            for worker in range(board.width)
            if (worker == self._rank and leaving)
            or (
                not (board.coming[worker] or board.given_up[worker])
                and (not board.leaving[worker] or (leaving and board.gone[worker] != LEFT))
            )
        )

    def _deal_to(self, sharers: Sequence[int]) -> tuple[int, int] | None:
        if self._context.job.data != "shared":  # each has all of its own, or worker 0 reads and nobody comes or leaves
            return None
        return (sharers.index(self._rank) if self._rank in sharers else -1, len(sharers))

    def _settle_deal(self, loader: int, number: int) -> bool:
        """Who shares this pass is settled by the first to begin it. An evaluation is each worker's own business. Has
        this worker a part?"""
        board, sharers = self._board, None
        trains = self._is_training() and (loader in self._training_loaders or not self._training_loaders)
        if trains and loader not in self._leases:
            with self._lock:
                sharers = board.sharers(loader, number)
                if sharers is None:
                    sharers = self._sharers(leaving=False) or self._sharers(leaving=True)
                    board.settle_sharers(loader, number, sharers)
        deal = self._deals[loader] = self._deal_to(self._sharers(leaving=True) if sharers is None else sharers)
        return deal is None or deal[0] >= 0

    def fetching(self) -> None:
        self._catching_up.fetching()
        self._answer()

    def fetched(self, loader: int) -> None:
        key, count = self._places[loader]
        self._places[loader] = (key, count + 1)
        self._reading = loader
        self._drawn_from.add(loader)

    def border(self) -> None:
        """Between two steps."""
        if self._leaving:
            self.tell_left()
        self._saving.at_border()
        if self._board.alarms != self._heard:
            self._heard = self._board.alarms
            self._is_asked = True
            self._answer()
        if self._board.leaving[self._rank] and not self._ending.over and (self._leases or not self.count):
            self.depart()

    def _answer(self) -> None:
        """Tell newcomers what they ask, as soon as this worker's script is what it is to be."""
        if self._is_asked and self._catching_up.is_itself:
            self._is_asked = False
            self._handover.answer()

    def drawn(self, samples: int) -> None:
        self._catching_up.drawn()
        self._progress.drawn(samples)

    def needs_ghost(self, loader: int) -> bool:
        is_new = loader == self._catching_up.joined_in or loader in self._continued
        needs = self._catching_up.needs_ghost(is_first=loader not in self._drawn_from, is_new=is_new)
        deal = self.deal(loader)
        if needs and deal is not None and deal[0] < 0:
            self._deals[loader] = (self._rank % deal[1], deal[1])  # any batch will do
        return needs

    def tell_returned(self, loader: int, count: int) -> None:
        """Under the run's lock: so many batches of the loader have come back by now."""
        board = self._board
        if board.returned[loader] != count:
            board.returned[loader] = count
            board.ring(board.common)

    def more(self, loader: int) -> bool:
        """Wait at the tail of a pass that is trained on; see ``protocol/rounds.py``."""
        board, rank = self._board, self._rank
        is_trained = self._progress.own_steps > self._starts[loader] or loader in self._training_loaders
        if not is_trained or self._ending.over:
            return False
        self._close_periods()
        self._progress.close_row()
        begun = time.monotonic()
        with self._lock:
            self._settling.drain(loader, arriving=rank)
            more = board.returned[loader] > 0
            if not more and board.drained[loader] <= board.passes(loader)[rank]:
                board.parked[rank] = loader + 1 + TAIL
        if board.parked[rank]:
            self._context.ring()
            while board.parked[rank]:
                board.wait(partial(more_at_tail, rank, board))
                with self._lock:  # others may have been faster
                    answer = more_at_tail(rank, board)
                    if not isinstance(answer, Waiting):
                        more = answer
                        board.parked[rank] = NOT_PARKED
            self._context.ring()
            for exchange in self._exchanges:
                exchange.catch_up()
                exchange.refresh()
        self._progress.waited_since(begun)
        return more

    # --- did what was read count? ---

    @property
    def may_drop(self) -> bool:
        return isinstance(self._context.job.pace, Quorum)

    def judge(self, *, counted: bool) -> None:
        """A push of what was read last has counted, or has not."""
        if self._reading is not None:
            self._verdicts[self._reading] = counted or self._verdicts.get(self._reading, False)
        if counted and self._progress.in_rounds:
            for leases in self._leases.values():
                leases.commit()

    def verdict(self, loader: int) -> bool | None:
        return self._verdicts.pop(loader, None)

    def where(self) -> tuple[int, int]:
        """How far this worker is into its data: what goes with a push, so that both count or neither."""
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
        first = False
        if not catching_up.joined:
            first = self._is_training()
            if (
                catching_up.look_again()
                or (not first and catching_up.is_fresh)
                or (first and not self.join(in_pass=True))
            ):
                catching_up.begin(loader, first)
                return False
            if first:
                catching_up.joined_in = loader
            elif catching_up.resumed is None:
                self.join()  # an evaluation, of which it may have nothing to read, and then waits with the others
        for left in sorted(self._left):
            self._left.discard(left)
            self._await_all(left)
        if progress.step_number == 0:
            progress.start_clock()  # what came before the first batch is not training
        progress.forget_losses()
        self._starts[loader] = progress.own_steps
        self._drawn_from.discard(loader)
        self._evaluating[loader] = (progress.samples, self.marks())
        ghost = self._ending.over and loader in self._training_loaders
        if not ghost:
            self._begin_for_real(loader, length, tell=not first)
        if self._is_training():  # an evaluation is part of what comes after a pass
            self._saving.at_border()
        if self._places.get(loader, (0, 0))[1] == 0:
            self.fetching()  # the checkpoint was made here, or in a pass before
        return not ghost

    def _begin_for_real(self, loader: int, length: int | None, *, tell: bool) -> None:
        number = self.epoch(loader)
        if loader in self._training_loaders or not self._training_loaders:
            self._progress.epoch = number + 1
            if self._rank == 0 and tell:
                self._context.channel.send(messages.Pass(loader, number, length))
        has_part = self._settle_deal(loader, number)
        if self._is_training():
            keeps = has_part and loader not in self._leases and self._context.job.data == "shared"
            if self._board.leaving[self._rank] and not (keeps or self._open):
                self.depart()
            (self._open.add if has_part else self._open.discard)(loader)
        done = self._done_before(loader, number)
        leases = self._leases.get(loader)
        if done or not has_part or (self._board.deaths[self._rank] and leases is not None and leases.committed):
            self._training_loaders.add(loader)
        (self._continued.add if done or not has_part else self._continued.discard)(loader)
        self._places[loader] = (key_of(loader, number), done)
        self._read_before[loader] = self._reading

    def _done_before(self, loader: int, number: int) -> int:
        """How many batches of its part of this pass had been trained on by the worker whose place this one takes."""
        key, done = self._board.places[2 * self._rank], self._board.places[2 * self._rank + 1]
        return done if key == key_of(loader, number) and loader not in self._leases else 0

    # --- a pass ends ---

    def end(self, loader: int) -> None:
        self.tell_left()
        self._progress.put_down()
        if self._ending.departed or self._caught_up(loader):
            return
        self._lay_ghost()
        self._ending.raise_if_interrupted()
        if self._finish(loader, self.marks()):
            self._progress.flush()
            self._await_all(loader)

    def _lay_ghost(self) -> None:
        self._catching_up.lay_ghost()
        self._answer()

    def leave(self, loader: int) -> None:
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
            self._training_loaders.add(loader)
        elif loader not in self._training_loaders:
            self._empty.add(loader)  # or it would not have counted
        return was

    def _finish(self, loader: int, marks: object) -> bool:
        """Was it a pass to train on? If so it is counted, and its end is one for all.

        A pass that was read without a step is an evaluation: it is nobody else's business, since scripts evaluate in
        the midst of training, and on worker 0 alone. A pass with nothing to read may be either: its worker parks empty
        (``protocol/rounds.py``).
        """
        board, progress = self._board, self._progress
        self._open.discard(loader)
        self._deals.pop(loader, None)
        steps = progress.own_steps - self._starts[loader]
        if steps:
            self._close_periods()
        progress.close_row()
        progress.forget_losses()
        drawn = loader in self._drawn_from  # not from another, an evaluation within this pass
        untouched = self._evaluating[loader][1] == marks
        # Fewer batches than there are to a step: they have left a gradient, for a step that comes after the pass.
        leased = loader in self._leasing
        trained = steps > 0 or (drawn and not untouched and (leased or loader in self._training_loaders))
        trained = trained or loader in self._continued
        if leased:
            self._leasing.discard(loader)
            self._leases[loader].end(trained=trained)
        if drawn and not trained:
            self._reading = self._read_before[loader]
            if untouched:
                progress.samples = self._evaluating[loader][0]  # no backward came of them: they weigh nothing
            board.evaluated[loader] = 1
            self._context.ring()
            return False
        if trained:
            self._training_loaders.add(loader)
        for one in self.buffers:
            one.write(progress.passes + 1, progress.samples - self._evaluating[loader][0] if trained else 0)
        passes = board.passes(loader)
        look = board.look(loader, passes[self._rank] + 1, self._rank)
        look[0], look[1], look[2] = *progress.look, max(steps, int(trained))
        if not progress.in_rounds:
            progress.look = (0.0, 0.0)
        with self._lock:
            passes[self._rank] += 1
            if leased:
                self._settling.drain(loader)
        (self._empty.discard if drawn else self._empty.add)(loader)
        self._context.ring()
        return True

    def _gradient_marks(self) -> object:
        return gradient_marks([p for exchange in self._exchanges for p in exchange.parameters])

    def _await_all(self, loader: int) -> None:
        """Stay parked until every worker has finished this pass; then all draw the same conclusions from it."""
        board, progress, ending = self._board, self._progress, self._ending
        number = self.epoch(loader)
        begun = time.monotonic()
        self._saving.at_border()
        board.parked[self._rank] = place = self._parked_at(loader)
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
        self._count_local_steps()
        progress.waited_since(begun)
        if ending.over:
            return
        others = ending.others
        ending.stop_if_interrupted(others)
        if trained:
            self._training_loaders.add(loader)
            progress.passes += 1
            for one in self.buffers:
                one.average(progress.passes, looked)
        if not progress.in_rounds:
            ending.follow()
            return
        if trained:
            ending.after_pass(number, sum(look[0] for look in looks), sum(look[1] for look in looks))
        ending.follow_parked(others)

    def _parked_at(self, loader: int) -> int:
        """The board's word for who waits at the end of a pass."""
        return loader + 1 + (EMPTY if loader in self._empty and loader not in self._training_loaders else 0)

    def _count_local_steps(self) -> None:
        if self._exchanges and isinstance(self._context.job.pace, Local):
            self._progress.steps = self._exchanges[0].most_steps

    # --- deaths and newcomers ---

    def hear(self, ask: Callable[[], object] = lambda: None) -> None:
        """There was an alarm. Draw the consequences of deaths that the launcher has told of, unless another worker has;
        tell newcomers what they ask; give one's part of a checkpoint, if one waits between two steps.

        ``ask``: what this worker waits for; Waiting until it has come.
        """
        board, joined = self._board, self._catching_up.joined
        if joined:
            self._is_asked = True
            self._answer()
            if board.parked[self._rank]:
                self._saving.at_border()
        with self._lock:
            if not joined:
                self._settling.bury()
                return
            changed = self._settling.settle()
        if changed:
            self._context.ring()
        while board.owes and board.parked[self._rank]:  # nobody may be left in that round to see to it
            for exchange in self._exchanges:
                board.wait(lambda exchange=exchange: _is_free(ask) or exchange.no_dead_in_round())  # type: ignore[misc]
            if _is_free(ask):
                return  # that round may wait for this worker
            with self._lock:
                self._settling.settle()
            self._context.ring()

    def join(self, *, in_pass: bool = False) -> bool:
        """This process has caught up: from here on the others count with it. ``in_pass``: it is about to begin a pass
        that it trains on. False if the others have got on meanwhile, and it is behind again."""
        board, rank, catching_up = self._board, self._rank, self._catching_up
        resumed, is_fresh = catching_up.resumed, catching_up.is_fresh
        # The worker before it may have died at the end of a pass that the others are still in.
        ended = catching_up.last if resumed is None and not is_fresh else None
        while True:
            with self._lock:
                self._settling.settle()
                if board.settled[rank] == board.deaths[rank]:
                    if is_fresh and not self._take_place():
                        return False
                    if ended is not None:
                        board.parked[rank] = self._parked_at(ended)
                    if resumed is None:
                        self._handover.begin()
                    board.presence[rank] = PRESENT
                    break
            for exchange in self._exchanges:  # a round that the worker before it was in is not over
                board.wait(exchange.no_dead_in_round)
        catching_up.joined = self._collectives.takes_part = True
        catching_up.is_to_ask = resumed is None
        for exchange in self._exchanges:
            exchange.catch_up()
        catching_up.forget_gradients()
        self._context.ring()
        if is_fresh:
            self._context.channel.send(messages.Joined(self._progress.passes + 1))
        if ended is not None:
            if ended in self._training_loaders:
                self._progress.passes -= 1
            self._await_all(ended)
        if resumed is not None:
            self._take_up(resumed)
            return True
        for exchange in self._exchanges:
            exchange.join()
        if board.owes:
            self.hear()
        self._count_local_steps()
        if self._progress.passes:
            present = [w for w in range(board.width) if board.gone[w] != LEFT]
            for one in self.buffers:
                one.average(self._progress.passes, present)
        if self._ending.others:
            self._handover.forgo()
        else:
            self._take_over(later=in_pass)
        catching_up.is_to_ask = False
        self._answer()
        for exchange in self._exchanges:
            exchange.await_slower()
        self._progress.start_clock()
        self._ending.follow()
        return True

    def _take_place(self) -> bool:
        """Under the run's lock: come to a place that was LEFT, in the pass that the hindmost of the others is in. False
        if that is a later one than this process has come to."""
        board, rank, catching_up = self._board, self._rank, self._catching_up
        if catching_up.look_again():
            return False
        if not catching_up.others:  # their scripts are over, and servers have gone with them
            self._ending.depart()
            self._collectives.departed = True
            return False
        for loader in range(self.count):
            number = catching_up.passes_of_others(loader)
            for look in (board.look(loader, number, rank), board.look(loader, number + 1, rank)):
                look[0] = look[1] = look[2] = 0.0  # of whoever had the place before
            board.passes(loader)[rank] = number
        for one in self.buffers:
            one.forget()
        board.coming[rank] = 0
        board.count_join()
        return True

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
            for leases in self._leases.values():
                leases.bury(self._rank)
            self.forgo()
        self._context.ring()
        raise Leave

    def _take_over(self, *, later: bool) -> None:
        """Keep what the others' scripts keep; ``later``: as soon as the script gets a batch."""
        take = self._handover.ask()
        if take is not None and later:
            self._catching_up.will_take(take)
        elif take is not None:
            take()

    def _take_up(self, resumed: Resumed) -> None:
        """This worker is where it was when the checkpoint was made, but for what its script draws next."""
        own = resumed.own(self._rank)
        if own is not None:
            document, tensors, is_its_own = own
            self._progress.look = (document["look"][0], document["look"][1])

            def take() -> None:
                self._saving.keeper.load(document, tensors, self._exchanges)
                for loader, samples in document["pass_samples"].items() if is_its_own else ():
                    if int(loader) in self._evaluating:
                        marks = self._evaluating[int(loader)][1]
                        self._evaluating[int(loader)] = (self._progress.samples - samples, marks)
                if is_its_own:  # two workers must not draw the same numbers
                    load_random_states(document, tensors)

            self._catching_up.will_take(take)
        self._catching_up.resumed = None
        for exchange in self._exchanges:
            exchange.refresh()
        self._count_local_steps()
        self._progress.start_clock()

    # --- checkpoints ---

    def position(self, number: int) -> dict[str, Any]:
        """Under the run's lock: how far all are into their data, of what counts up to round ``number``."""
        if self._progress.in_rounds:
            for worker in range(self._board.width):
                self._settling.settle_place(worker, self._exchanges[0].place_in(worker, number))
        return position.tell(self._context, self.count, self._leases, self._training_loaders)

    def own(self) -> dict[str, Any]:
        """What a checkpoint needs of this worker beside what the script keeps."""
        inside = {
            str(loader): self._progress.samples - before
            for loader, (before, _) in self._evaluating.items()
            if loader in self._places
        }
        return {"look": list(self._progress.look), "pass_samples": inside}

    # --- the end ---

    def forgo(self) -> None:
        """Under the run's lock: nobody waits for this worker any more, and what it had drawn is there for others."""
        self._settling.settle()
        for leases in self._leases.values():
            leases.forgo()
        self._board.presence[self._rank] = LEFT
        for loader in self._leases:
            self._settling.drain(loader)


def gradient_marks(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
    """Something else whenever a backward pass has added to one of their gradients."""
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


def _is_free(ask: Callable[[], object]) -> bool:
    """May who asks this go on?"""
    return not isinstance(ask(), Waiting)
