"""What a worker's process knows while its script runs: exchanges, passes over loaders, and what to report.

It answers three moments of a plain training loop: a batch is drawn, ``optimizer.step()`` is called, a pass over a
loader ends. All workers run the same script, so they come to wraps and to ends of passes in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from paceline.config import Async, Local, Quorum, Sync
from paceline.data.loader import Count, Part, share
from paceline.data.trained import ALL, Trained
from paceline.engine import buffers, clipping
from paceline.engine.collectives import Collectives
from paceline.engine.context import Context
from paceline.engine.exchange import Exchange
from paceline.engine.keeping import load_random_states
from paceline.engine.leases import Leases
from paceline.engine.leases import size_bytes as leases_bytes
from paceline.engine.meeting import Push, Round
from paceline.engine.metrics import Row
from paceline.engine.saving import Saving
from paceline.engine.served import Reader, ServedBatches
from paceline.engine.shards import VOID
from paceline.engine.snapshot import Resumed
from paceline.errors import ConfigError, Diverged
from paceline.params.table import tabulate
from paceline.protocol import messages
from paceline.protocol.log import Entry
from paceline.protocol.rounds import (
    AWAY,
    EMPTY,
    LEFT,
    NOT_PARKED,
    PRESENT,
    TAIL,
    Waiting,
    held_at_end,
    is_drained,
    more_at_tail,
)
from paceline.protocol.stopping import CHECK_ROUNDS, Stopping
from paceline.transport.board import COLLECTIVES, Aborted
from paceline.transport.channel import Closed

STRIKES = 3
_FLUSH_S = 0.2
_IDLE_STEPS, _IDLE_S = 1000, 10.0  # a script that goes on this long after the end of training is ended
_EVALUATED, _TRAINED = 1, 2  # what a pass counts as that a newcomer catches up with
_TRAINING, _DONE, _INTERRUPTED = 0, 1, 2  # cells of the board's column "ended"


class Worker:
    """The worker side of a run; a ``data.loader.Passes``. Not for several threads at once."""

    def __init__(self, context: Context) -> None:
        job = context.job
        self.context, self.rank, self.pace = context, context.rank, job.pace
        assert job.assign is not None
        self._leased = job.assign == "lease"
        assign = "round_robin" if self._leased else job.assign
        # Who has data of its own trains on all of it.
        place = (0, 1) if job.data == "own" else (context.rank, job.workers)
        self.part = Part(*place, assign, job.seed)
        self._leases: dict[int, Leases] = {}
        self._leasing: set[int] = set()  # loaders whose pass in progress is drawn by lease
        self._verdicts: dict[int, bool] = {}  # loader -> did the last push of its batches count?
        self._models: list[nn.Module] = []
        self._board, self._channel, self._lock = context.board, context.channel, context.lock
        self._in_rounds = isinstance(job.pace, Sync | Local)
        self._stopping = Stopping(job.steps, job.epochs, job.until_loss, job.patience)
        self.collectives = Collectives(context, self._ring)
        self._exchanges: list[Exchange] = []
        self._stores: list[Exchange] = []
        board = self._board
        board.on_alarm = self._settle
        # A newcomer takes the place of a worker that has died: it runs the script from the top, and for each pass that
        # its place has behind it yields one ghost batch (docs/decisions/0009).
        # So does a worker of a run that is resumed, and with it all others.
        self._joined = self.collectives.takes_part
        self._behind: dict[int, int] = {}  # loader -> passes that are left to catch up with
        self._resumed: Resumed | None = None
        # Sets what the script has of its own to what it was; until the first batch that is not a ghost.
        self._to_take: Callable[[], None] | None = None
        self._is_taken = True
        if self._joined and context.resume is not None:
            self._resumed, self._joined = Resumed(context.resume), False
            self.part = replace(self.part, trained=self._trained_then(self._resumed.state))
        self.saving = Saving(context, self._exchanges, self._position)
        self.saving.more = self._own
        if not self._joined:
            passes = {loader: board.passes(loader)[context.rank] for loader in range(COLLECTIVES)}
            self._behind = {loader: count for loader, count in passes.items() if count}
        self._ghosts: dict[int, int] = {}  # loaders whose pass in progress is one to catch up with -> what it counts as
        self._joined_in: int | None = None  # the loader in whose pass it has joined, while that lasts
        self._last_ghost: int | None = None  # the loader of the last of them that stood for training
        self._with_ghost = False  # is the batch in hand one that only keeps the script from finding a pass empty?
        # loader -> (loader and pass, batches of it that the script has had); which the script trains on; before that
        self._places: dict[int, tuple[int, int]] = {}
        self._reading: int | None = None
        self._read_before: dict[int, int | None] = {}
        self._samples_at_step: list[int] = []
        self._samples = 0  # drawn so far
        self._batch_samples = 1
        self._own_steps = self._drawn = 0
        self._pass_starts: dict[int, tuple[int, int]] = {}  # loader -> own steps and batches drawn when its pass began
        self._evaluating: dict[int, tuple[int, object]] = {}  # loader -> samples and gradients at that time
        self._training_loaders: set[int] = set()
        self._continued: set[int] = set()  # loaders whose pass this process has not begun
        self._left: set[int] = set()  # loaders whose last pass the script left early
        self._empty: set[int] = set()  # loaders whose last pass had nothing to read
        self._loaders = 0
        self._buffers: list[buffers.Buffers] = []
        self._readers: list[Reader] = []
        self._served: list[ServedBatches] = []
        self._trained_passes = 0
        self._epoch = 0
        self._look = (0.0, 0.0)  # sums of loss x samples, samples: of steps, not told yet
        self._unstepped = (0.0, 0.0)  # the same of what was logged since the last step
        self._batch_stepped = self._batch_dropped = False
        self._steps = 0  # pace local: steps in the rounds behind this worker
        self._ended = _TRAINING
        self._interrupted = False  # the script has still to be told
        self._ended_s, self._idle_steps = 0.0, 0
        self._strikes = 0  # gradients in a row that were not finite
        self._row = Row()
        self._rows = bytearray()
        self._flushed_s = self._step_done_s = time.monotonic()

    @property
    def step_number(self) -> int:
        """Rounds, or pushes of all divided by the number of workers, or local steps."""
        if not self._exchanges:
            return 0
        first = self._exchanges[0]
        if isinstance(self.pace, Local) and first.inner is not None:
            return self._steps + first.inner.steps
        return first.number // self._pushes_a_step

    @property
    def _pushes_a_step(self) -> int:
        return 1 if self._in_rounds or isinstance(self.pace, Quorum) else self._board.workers

    @property
    def exchanges(self) -> Sequence[Exchange]:
        return self._exchanges

    @property
    def over(self) -> bool:
        return self._ended != _TRAINING

    @property
    def holds(self) -> bool:
        """Do schedulers stand still? Not in the rest of a step that Ctrl-C has ended training with."""
        return self.over and not self._interrupted

    # --- sharing: each is a collective, called by all workers in the same order ---

    def add_exchange(
        self, optimizer: optim.Optimizer, names: dict[int, str], with_rows: set[int], *, share: bool
    ) -> Exchange:
        """Put an optimizer's parameters and state in shared memory. Raises ConfigError, HostError.

        ``names``: id of a parameter -> its name; ``with_rows``: ids of those whose gradients are sparse rows.
        """
        exchange = Exchange(optimizer, names, with_rows, self.context, share=share, pace=self.pace)
        account = None if self._exchanges else self._account
        resumed, index = self._resumed, len(self._exchanges)
        if resumed is not None and self.rank == 0:
            resumed.fill(index, exchange)
        self.collectives.open(
            exchange,
            lambda entry: self._close(exchange, entry, account),
            lambda: self._exchanges.append(exchange),
            None if resumed is None else resumed.state["exchanges"][index],
        )
        self._samples_at_step.append(self._samples)
        if isinstance(self.pace, Sync):
            clipping.register(self)  # at other paces there is no gradient of all: what is clipped is the push
        return exchange

    def add_store(self, optimizer: optim.Optimizer, names: dict[int, str]) -> Exchange:
        """Share tensors that are pushed to and pulled outside of any training loop. A collective."""
        exchange = Exchange(optimizer, names, set(), self.context, share=True, pace=Async())
        self.collectives.open(exchange, _nothing, lambda: self._stores.append(exchange))
        return exchange

    def average_buffers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """From now on these tensors are made equal at the end of every pass that was trained on. A collective."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        workers = self._board.workers
        size = buffers.size_bytes(table, workers)
        memory, _ = self.collectives.ask("buffers", b"", size, f"{len(tensors)} buffers")
        self._buffers.append(buffers.Buffers(memory, table, [t for _, t in tensors], self.rank, workers))

    def share_loader(self, loader: Any, count: Count | None) -> Any:
        """This worker's version of a loader. A collective where batches are leased or sent."""
        index = self._next_loader()
        if self.context.job.data != "served" or self._board.workers == 1:
            return share(loader, index, self.part, self, count)
        if self.rank:
            _, path = self.collectives.ask("served", b"", 1, f"the batches of loader {index}")
            served = ServedBatches(loader, index, self, path.decode(), self.rank)
            self._served.append(served)
            return served
        reader = Reader(loader, index, count, lambda rank: replace(self.part, rank=rank))
        self._readers.append(reader)
        self.collectives.ask("served", reader.path.encode(), 1, f"the batches of loader {index}")
        leases = self._leases.get(index)
        reader.accept({w: leases.of(w) if leases else None for w in range(1, self._board.workers)})
        return reader.in_turn(share(loader, index, self.part, self, count, reader.orders))

    def _next_loader(self) -> int:
        number, self._loaders = self._loaders, self._loaders + 1
        if number >= COLLECTIVES:
            raise ConfigError(f"run.wrap got {number + 1} loaders; a run has at most {COLLECTIVES}")
        if self._leased:
            workers = self._board.workers
            memory, _ = self.collectives.ask("ledger", b"", leases_bytes(workers), f"the ledger of loader {number}")
            tell = partial(self._tell_returned, number)
            self._leases[number] = Leases(memory, self.collectives.number, self._lock, self.rank, workers, tell)
            if self._resumed is not None and number < len(self._resumed.state["loaders"]):
                ledger = self._resumed.state["loaders"][number]["ledger"]
                if ledger is not None and self.part.left_of(number, ledger[0]) is None:
                    self._leases[number].refill(*ledger)
        return number

    def knows(self, models: Sequence[nn.Module]) -> None:
        """The wrapped models: whether they are in training mode tells an evaluation from training."""
        self._models = self.saving.models = list(models)

    # --- passes: whose batches ---

    def leases(self, loader: int) -> Leases | None:
        """None for an evaluation: it is each worker's own business, and what it reads is not trained on."""
        leases = self._leases.get(loader)
        if leases is None or not self._is_training() or self._ended != _TRAINING:
            return None
        leases.open(self.epoch(loader), self._board.gone)
        self._leasing.add(loader)
        return leases

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and (not self._models or any(model.training for model in self._models))

    def more(self, loader: int) -> bool:
        """Wait at the tail of a pass that is trained on; see ``protocol/rounds.py``."""
        board, rank = self._board, self.rank
        if self._own_steps == self._pass_starts[loader][0] or self._ended != _TRAINING:
            return False
        self._close_periods()
        if self._row.stepped:
            self._close_row()
        begun = time.monotonic()
        with self._lock:
            self._drain(loader, arriving=rank)
            more = board.returned[loader] > 0
            if not more and board.drained[loader] <= board.passes(loader)[rank]:
                board.parked[rank] = loader + 1 + TAIL
        if board.parked[rank]:
            self._ring()
            while board.parked[rank]:
                board.wait(lambda: more_at_tail(rank, board))
                with self._lock:  # others may have been faster
                    answer = more_at_tail(rank, board)
                    if not isinstance(answer, Waiting):
                        more = answer
                        board.parked[rank] = NOT_PARKED
            self._ring()
            for exchange in self._exchanges:
                exchange.catch_up()
                exchange.refresh()
        self._row.waiting_s += time.monotonic() - begun
        self._step_done_s = time.monotonic()
        return more

    def _tell_returned(self, loader: int, count: int) -> None:
        board = self._board
        if board.returned[loader] != count:
            board.returned[loader] = count
            board.ring(board.common)

    def _drain(self, loader: int, arriving: int | None = None) -> None:
        """Under the run's lock, after any change that may drain a pass over ``loader``."""
        board = self._board
        before = board.drained[loader]
        while is_drained(loader, board.drained[loader] + 1, arriving, board):
            board.drained[loader] += 1
        if board.drained[loader] > before:
            board.ring(board.common)

    def verdict(self, loader: int) -> bool | None:
        return self._verdicts.pop(loader, None)

    @property
    def may_drop(self) -> bool:
        return isinstance(self.pace, Quorum)

    # --- the training loop ---

    def exchange(self, index: int, *, void: bool = False) -> None:
        """One optimizer step of exchange ``index``, as the pace says. ``void``: there is no gradient worth applying."""
        if self._ended != _TRAINING:
            self._raise_if_interrupted()
            self._idle()
            return
        if self._is_muted or self.is_behind:
            return
        if not self._joined:
            self._join()
        if not self._loaders:
            self.saving.at_border()  # there is no better one
        if not self._in_rounds and self._board.interrupt:
            self._follow_end(_INTERRUPTED)
        exchange = self._exchanges[index]
        begun = time.monotonic()
        row = self._row
        if index == 0:
            if row.stepped:
                self._close_row()
                row = self._row
            self._take_in_losses()
            self._own_steps += 1
        samples = self._samples - self._samples_at_step[index]
        self._samples_at_step[index] = self._samples
        if index == 0:
            row.samples += samples if self._loaders else 1.0
            row.steps += 1
        weight = float(samples) if self._loaders else 1.0
        row.computing_s += begun - self._step_done_s
        self._step_done_s = begun
        place = self._where()
        if self.context.job.clip is not None and not void:
            nn.utils.clip_grad_norm_(exchange.parameters, self.context.job.clip)
        round_ = exchange.step(Push(VOID if void else weight, self._look, self._board.interrupt, 1, place))
        if not void:
            self._judge(exchange)
        self._account_time(round_)
        if round_ is not None:
            self._after_meeting(index, round_)
        elif index == 0 and isinstance(self.pace, Local):
            reason = self._stopping.after_round(self.step_number)
            if reason is not None:
                self._close_periods()
                if self._ended == _TRAINING:
                    self._end(_DONE, reason)
        if row.time_s - self._flushed_s > _FLUSH_S:
            self.flush()

    def _judge(self, exchange: Exchange) -> None:
        """A gradient with NaN or infinity was dropped: tell; after STRIKES in a row there is no use in going on.

        Raises Diverged.
        """
        if exchange.was_finite:
            self._strikes = 0
            return
        self._strikes += 1
        told = f"worker {self.rank}: the gradient of step {self.step_number} was not finite and was dropped"
        if self._strikes < STRIKES:
            self._channel.send(messages.Alarm(f"{told} ({self._strikes} of {STRIKES} in a row)"))
            return
        raise Diverged(
            f"{told}, the {STRIKES}rd in a row",
            why="the loss is no longer a number on its batches; the parameters are those of the last good step",
            fix="a lower learning rate, --clip 1, or a look at the data; paceline resume goes on from a checkpoint",
        )

    def _close_periods(self) -> None:
        """Bring to a meeting what local steps have come to so far."""
        for index, exchange in enumerate(self._exchanges):
            self._step_done_s = time.monotonic()
            round_ = exchange.flush() if self._ended == _TRAINING else None
            self._account_time(round_)
            if round_ is not None:
                self._after_meeting(index, round_)

    def _account_time(self, round_: Round | None) -> None:
        row, now = self._row, time.monotonic()
        waited = round_.waiting_s if round_ is not None else 0.0
        row.waiting_s += waited
        row.exchanging_s += now - self._step_done_s - waited
        self._step_done_s = row.time_s = now

    def _after_meeting(self, index: int, round_: Round) -> None:
        row = self._row
        if round_.counted:
            self._judged(counted=True)
            for leases in self._leases.values() if self._in_rounds else ():
                leases.commit()
        if round_.over:
            self._row = Row()
        elif not round_.counted:
            self._judged(counted=False)
            self._drop(row)
        elif index == 0:
            row.stepped, row.epoch, row.staleness = True, self._epoch, round_.staleness
            row.key = -(-round_.number // self._pushes_a_step)
            row.contributors = len(round_.contributors) if self._pushes_a_step == 1 else self._pushes_a_step
        if self._in_rounds:
            if index == 0:
                self._after_round(self._exchanges[0], round_.number, round_.contributors)
            return
        if index == 0:
            self._look = (0.0, 0.0)
        self._follow_end(max(self._board.ended) or (_INTERRUPTED if self._board.interrupt else _TRAINING))

    def _judged(self, *, counted: bool) -> None:
        if self._reading is not None:
            self._verdicts[self._reading] = counted or self._verdicts.get(self._reading, False)

    def _drop(self, row: Row) -> None:
        """The push came too late for its round: it counts for nothing, and its samples come again."""
        self._row = Row(
            dropped=row.dropped + 1,
            computing_s=row.computing_s,
            waiting_s=row.waiting_s,
            exchanging_s=row.exchanging_s,
            time_s=row.time_s,
        )
        self._batch_dropped = True

    def _after_round(self, exchange: Exchange, number: int, contributors: tuple[int, ...]) -> None:
        rounds = exchange.in_rounds
        assert rounds is not None
        if self._board.owes:
            self._settle()
        every, before = 1, self.step_number - 1
        if isinstance(self.pace, Local):
            every, before = self.pace.every, self._steps
            self._steps = rounds.count_steps(number, contributors, self._steps)
        lowest = contributors[0] == self.rank
        if rounds.asked_to_stop(number, contributors):
            self.saving.want(number, self.step_number, shares=lowest)
            self._end(_INTERRUPTED, "interrupted")
            self._interrupted = True
            if not self._loaders:  # there is no border to come to
                self._raise_if_interrupted()
            return
        self.saving.after(number, before, self.step_number, shares=lowest)
        reason = self._stopping.after_round(self._steps if isinstance(self.pace, Local) else number)
        look = reason is None and self._stopping.needs_loss and number % max(1, CHECK_ROUNDS // every) == 0
        # Whoever is out of data has not seen this round: then nobody looks, so that all count the same looks.
        if look and all(w in contributors or self._board.gone[w] for w in range(self._board.workers)):
            total, samples = rounds.losses(number, contributors)
            self._look = (0.0, 0.0)
            reason = self._look_once(number, total, samples)
        if reason is not None:
            self._end(_DONE, reason)

    def _look_once(self, number: int, loss: float, samples: float) -> str | None:
        """At rounds, after round ``number`` or at the end of a pass: the first to come to a look takes it for all, so
        that newcomers know of those before them."""
        accounts, stopping = self._board.accounts, self._stopping
        at = self._trained_passes << 32 | number
        with self._lock:
            if accounts.looked < at:
                accounts.looked = at
                stopping.best, stopping.looks_without_gain = accounts.best, int(accounts.looks_without_gain)
                reason = stopping.look(loss / samples) if samples else None
                accounts.best, accounts.looks_without_gain = stopping.best, stopping.looks_without_gain
                accounts.found = float(reason is not None)
                return reason
            return "" if accounts.found else None

    def _close(self, exchange: Exchange, entry: Entry, account: Callable[[Entry], None] | None) -> None:
        """Under the run's lock, with a STEP as it is appended: it counts from here on, and so do its samples."""
        for member in entry.members:
            self._settle_place(member, exchange.place(member))
        if account is not None:
            account(entry)

    def _account(self, entry: Entry) -> None:
        """A push through the log counts: add up what came with it, and end training where that is due.

        Called under the run's lock by whoever appends the entry, so that one decides for all.
        """
        accounts = self._board.accounts
        for loss, samples, steps in self._exchanges[0].told(entry.members):
            accounts.loss_sum += loss
            accounts.samples += samples
            accounts.steps += steps
        alone = isinstance(self.pace, Quorum)
        steps_done = entry.version if alone else int(accounts.steps) // self._board.workers
        reason = self._stopping.after_round(steps_done)
        if alone or entry.version % self._pushes_a_step == 0:
            step = entry.version // self._pushes_a_step
            self.saving.after(entry.version, step - 1, step, shares=True)
        if reason is None and entry.version % (CHECK_ROUNDS * self._pushes_a_step) == 0:
            reason = self._take_look()
        if reason is not None:
            self._end_for_all(reason)

    def _take_look(self) -> str | None:
        """Under the run's lock: look at the mean loss since the last look."""
        accounts, stopping = self._board.accounts, self._stopping
        if not stopping.needs_loss or not accounts.samples:
            return None
        stopping.best, stopping.looks_without_gain = accounts.best, accounts.looks_without_gain
        reason = stopping.look(accounts.loss_sum / accounts.samples)
        accounts.best, accounts.looks_without_gain = stopping.best, stopping.looks_without_gain
        accounts.loss_sum = accounts.samples = 0.0
        return reason

    def _end_for_all(self, reason: str) -> None:
        self._board.ended[self.rank] = _DONE
        self._channel.send(messages.Ended(reason))
        self._board.wake_all()

    def _follow_end(self, ended: int) -> None:
        if ended and self._ended == _TRAINING:
            if ended == _INTERRUPTED:
                self._stop_here()
            self._end(ended, "")
            for exchange in self._exchanges:
                exchange.refresh()  # what others have pushed until then

    def loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """The script has loaded a checkpoint into these parameters: it counts for all workers."""
        given = {id(parameter) for parameter in parameters}
        for exchange in self._exchanges:
            if any(id(parameter) in given for parameter in exchange.parameters):
                exchange.load(parameters=True, state=False)

    def loaded_state(self, index: int) -> None:
        """The script has loaded a checkpoint into an optimizer."""
        self._exchanges[index].load(parameters=False, state=True)

    def norm(self, exchange: Exchange, chosen: bytes, order: float) -> float:
        """The norm of a gradient of this exchange over all workers; see engine/clipping.py."""
        if self._is_muted or self.is_behind:
            return 1.0
        if not self._joined:
            self._join()
        index = self._exchanges.index(exchange)
        samples = self._samples - self._samples_at_step[index]
        return exchange.norm(chosen, order, float(samples) if self._loaders else 1.0)

    def log(self, loss: float | None, values: dict[str, float]) -> None:
        """Record a loss of the batch in hand, and other values of the step."""
        if self._is_muted or not self._joined:
            return
        if (self._ended != _TRAINING and not self._row.stepped) or (self._batch_stepped and self._batch_dropped):
            return
        if loss is not None:
            self._unstepped = _added(self._unstepped, (loss * self._batch_samples, self._batch_samples))
            if self._batch_stepped:
                self._take_in_losses()
        if values and self.rank == 0:
            self._channel.send(messages.Logged(self._row.key if self._row.stepped else self.step_number, values))

    def _take_in_losses(self) -> None:
        """What was logged belongs to a step that is taken, or just being taken."""
        self._row.loss_sum += self._unstepped[0]
        self._row.loss_samples += self._unstepped[1]
        self._look = _added(self._look, self._unstepped)
        self._unstepped = (0.0, 0.0)
        self._batch_stepped = True

    # --- passes over loaders (data.loader.Passes) ---

    def begin(self, loader: int, length: int | None) -> bool:
        self._raise_if_interrupted()
        first = False
        if not self._joined:
            if self.is_behind:
                trained = self._was_trained(loader)
                counts = loader in self._behind and (not trained or self._is_training())
                self._ghosts[loader] = (_TRAINED if trained else _EVALUATED) if counts else 0
                return False
            first = self._is_training()
            if first:
                self._join(loader)
                self._joined_in = loader
            elif self._resumed is None:
                self._join()  # an evaluation, of which it may have nothing to read, and then waits with the others
        for left in sorted(self._left):
            self._left.discard(left)
            self._await_all(left)
        if self.step_number == 0:
            self._step_done_s = time.monotonic()  # what came before the first batch is not training
        self._unstepped = (0.0, 0.0)  # of an evaluation: not training's
        self._pass_starts[loader] = (self._own_steps, self._drawn)
        self._evaluating[loader] = (self._samples, self._gradient_marks())
        ghost = self._ended != _TRAINING and loader in self._training_loaders
        if not ghost:
            number = self._board.passes(loader)[self.rank]
            if loader in self._training_loaders or not self._training_loaders:
                self._epoch = number + 1
                if self.rank == 0 and not first:
                    self._channel.send(messages.Pass(loader, number, length))
            done = self._done_before(loader, number)
            leases = self._leases.get(loader)
            if done or (self._board.deaths[self.rank] and leases is not None and leases.committed):
                self._training_loaders.add(loader)
            (self._continued.add if done else self._continued.discard)(loader)
            self._places[loader] = (_key(loader, number), done)
            self._read_before[loader] = self._reading
        if self._is_training():  # an evaluation is part of what comes after a pass
            self.saving.at_border()
        if self._places.get(loader, (0, 0))[1] == 0:
            self.fetching()  # the checkpoint was made here, or in a pass before
        return not ghost

    def border(self) -> None:
        self.saving.at_border()

    def fetching(self) -> None:
        if self._to_take is not None and not self._is_taken:
            self._to_take()
            self._is_taken = True

    @property
    def is_behind(self) -> bool:
        """Has this process still to catch up with what the worker before it in its place had done?"""
        return bool(self._behind)

    def skip(self, loader: int) -> int:
        return self._places[loader][1]

    def fetched(self, loader: int) -> None:
        key, count = self._places[loader]
        self._places[loader] = (key, count + 1)
        self._reading = loader

    def needs_ghost(self, loader: int) -> bool:
        is_new = loader == self._joined_in or loader in self._continued or self._to_take is not None
        self._with_ghost = is_new and self._drawn == self._pass_starts[loader][1]
        return self._with_ghost

    @property
    def _is_muted(self) -> bool:
        """Is what the script does now not training, but catching up?"""
        return self._with_ghost or bool(self._ghosts)

    def _lay_ghost(self) -> None:
        """Of a batch that only kept the script from finding a pass empty, nothing stays."""
        if self._with_ghost and self._to_take is not None:
            self._to_take()
        if self._with_ghost:
            self._forget_gradients()
        self._with_ghost, self._joined_in = False, None

    def _forget_gradients(self) -> None:
        """Those of ghost batches, which are not to be in the next step."""
        for exchange in self._exchanges:
            for parameter in exchange.parameters:
                parameter.grad = None

    def _was_trained(self, loader: int) -> bool:
        """Were the passes over this loader that lie behind this worker's place trained on?"""
        if self._resumed is not None:
            return bool(self._resumed.state["loaders"][loader]["trained"])
        board = self._board
        number = board.passes(loader)[self.rank]
        return any(board.look(loader, number, worker)[2] for worker in range(board.workers))

    def drawn(self, samples: int) -> None:
        if self._row.stepped:
            self._close_row()
        self._to_take = None
        self._drawn += 1
        self._batch_stepped = self._batch_dropped = False
        self._samples += samples
        self._batch_samples = samples

    def epoch(self, loader: int) -> int:
        return self._board.passes(loader)[self.rank]

    def end(self, loader: int) -> None:
        if self._caught_up(loader):
            return
        self._lay_ghost()
        self._raise_if_interrupted()
        if self._finish_pass(loader):
            self.flush()
            self._await_all(loader)

    def _caught_up(self, loader: int) -> bool:
        """Was it a pass of ghosts, of a newcomer?"""
        counts = self._ghosts.pop(loader, None)
        if counts is None:
            return False
        if counts == _TRAINED:
            self._trained_passes += 1
            self._training_loaders.add(loader)
            self._last_ghost = loader
        if counts:
            self._behind[loader] -= 1
            if not self._behind[loader]:
                del self._behind[loader]
        return True

    def leave(self, loader: int) -> None:
        if self._caught_up(loader) or self._ended == _INTERRUPTED:
            return
        self._lay_ghost()
        if self._finish_pass(loader):
            self._left.add(loader)

    def _finish_pass(self, loader: int) -> bool:
        """Was it a pass to train on? If so it is counted, and its end is one for all.

        A pass that was read without a step is an evaluation: it is nobody else's business, since scripts evaluate in
        the midst of training, and on worker 0 alone. A pass with nothing to read may be either: its worker parks empty
        (``protocol/rounds.py``).
        """
        steps_before, drawn_before = self._pass_starts[loader]
        steps = self._own_steps - steps_before
        if steps:
            self._close_periods()
        if self._row.stepped:
            self._close_row()
        self._unstepped = (0.0, 0.0)
        drawn = self._drawn > drawn_before
        untouched = self._evaluating[loader][1] == self._gradient_marks()
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
                self._samples = self._evaluating[loader][0]  # no backward came of them: they weigh nothing
            self._board.evaluated[loader] = 1
            self._ring()
            return False
        if trained:
            self._training_loaders.add(loader)
        for one in self._buffers:
            one.write(self._trained_passes + 1, self._samples - self._evaluating[loader][0] if trained else 0)
        passes = self._board.passes(loader)
        look = self._board.look(loader, passes[self.rank] + 1, self.rank)
        look[0], look[1], look[2] = *self._look, max(steps, int(trained))
        if not self._in_rounds:
            self._look = (0.0, 0.0)
        with self._lock:
            passes[self.rank] += 1
            if leased:
                self._drain(loader)
        (self._empty.discard if drawn else self._empty.add)(loader)
        self._ring()
        return True

    def _gradient_marks(self) -> list[tuple[int, int]]:
        """Changes whenever a backward pass has added to a gradient."""
        gradients = [p.grad for exchange in self._exchanges for p in exchange.parameters]
        return [(id(g), g._version) for g in gradients if g is not None]

    def _await_all(self, loader: int) -> None:
        """Stay parked until every worker has finished this pass; then all draw the same conclusions from it."""
        board = self._board
        number = board.passes(loader)[self.rank]
        begun = time.monotonic()
        empty = loader in self._empty and loader not in self._training_loaders
        self.saving.at_border()
        board.parked[self.rank] = loader + 1 + (EMPTY if empty else 0)
        self._ring()
        board.wait(lambda: held_at_end(self.rank, board) or number)
        if not self._in_rounds:
            with self._lock:
                self._decide(loader, number)
        board.parked[self.rank] = NOT_PARKED
        if empty:
            self._ring()  # it may have gone on although the barrier is shut
        # Who is gone has not finished it; what it had logged before is of an older pass.
        looked = [w for w in range(board.workers) if board.passes(loader)[w] >= number]
        looks = [board.look(loader, number, worker) for worker in looked]
        trained = any(look[2] for look in looks)
        for exchange in self._exchanges:
            if not trained:
                exchange.catch_up()
            if not exchange.in_period:  # an evaluation in the midst of local steps, with nothing to read
                exchange.refresh()
        if self._exchanges and isinstance(self.pace, Local):
            self._steps = self._exchanges[0].most_steps
        self._row.waiting_s += time.monotonic() - begun
        self._step_done_s = time.monotonic()
        if self._ended != _TRAINING:
            return
        ended = max(board.ended)
        if ended == _INTERRUPTED:
            self._stop_here()
        if trained:
            self._training_loaders.add(loader)
            self._trained_passes += 1
            for one in self._buffers:
                one.average(self._trained_passes, looked)
        if not self._in_rounds:
            self._follow_end(ended)
            return
        if trained:
            self._after_pass(number, sum(look[0] for look in looks), sum(look[1] for look in looks))
        if ended and not self.over:  # in a round of the others that this worker was parked in
            self._end(ended, self._stopping.after_round(self.step_number) or "")

    def _ring(self) -> None:
        """Tell of a change that rounds depend on, also those who wait for no one in particular."""
        self._board.ring(self.rank)
        with self._lock:
            self._board.ring(self._board.common)

    def _decide(self, loader: int, number: int) -> None:
        """Under the run's lock: the first to leave the end of a pass draws the conclusions from it for all."""
        board = self._board
        if board.decided[loader] >= number:
            return
        board.decided[loader] = number
        looks = [board.look(loader, number, w) for w in range(board.workers) if board.passes(loader)[w] >= number]
        if not sum(look[2] for look in looks) or max(board.ended):
            return
        for exchange in self._exchanges:
            exchange.level()
        board.accounts.loss_sum += sum(look[0] for look in looks)
        board.accounts.samples += sum(look[1] for look in looks)
        reason = self._stopping.after_pass(number)
        reason = self._take_look() or reason
        if reason is not None:
            self._end_for_all(reason)

    def _after_pass(self, number: int, loss: float, samples: float) -> None:
        reason = self._stopping.after_pass(number)
        if self._stopping.needs_loss and samples:
            self._look = (0.0, 0.0)
            found = self._look_once(self._exchanges[0].number, loss, samples)
            reason = found if found is not None else reason
        if reason is not None:
            self._end(_DONE, reason)

    # --- deaths and newcomers ---

    def _where(self) -> tuple[int, int]:
        """How far this worker is into its data: what goes with a push, so that both count or neither."""
        if self._reading is None:
            return (0, 0)
        key, fetched = self._places[self._reading]
        leases = self._leases.get(self._reading)
        return (key, fetched) if leases is None else (key, leases.place)

    def _done_before(self, loader: int, number: int) -> int:
        """How many batches of its part of this pass had been trained on by the worker whose place this one takes."""
        key, done = self._board.places[2 * self.rank], self._board.places[2 * self.rank + 1]
        return done if key == _key(loader, number) and loader not in self._leases else 0

    def _settle(self) -> None:
        """Draw the consequences of deaths that the launcher has told of, unless another worker has; give one's part of
        a checkpoint, if one waits between two steps."""
        if self._joined and self._board.parked[self.rank] and self.collectives.takes_part:
            self.saving.at_border()
        if not self._joined:
            with self._lock:
                self._bury()
            return
        with self._lock:
            changed = self._settle_all()
        if changed:
            self._ring()
        while self._board.owes and self._board.parked[self.rank]:  # nobody may be left in that round to see to it
            for exchange in self._exchanges:
                self._board.wait(exchange.no_dead_in_round)
            with self._lock:
                self._settle_all()
            self._ring()

    def _bury(self) -> list[int]:
        board = self._board
        dead = [w for w in range(board.workers) if board.settled[w] < board.deaths[w]]
        for worker in dead:
            for exchange in (*self._exchanges, *self._stores):
                exchange.bury(worker, board.deaths[worker])
        return dead

    def _settle_all(self) -> bool:
        """Under the run's lock; has anything changed?"""
        board = self._board
        dead = self._bury()
        for exchange in (*self._exchanges, *self._stores) if dead else ():
            exchange.finish_abandoned()
        # To give back the batches of one whose round is not over would free others to push it, who are not in it.
        owed = [w for w in dead if self._leases and any(exchange.is_in_round(w) for exchange in self._exchanges)]
        board.owes = bool(owed)
        dead = [worker for worker in dead if worker not in owed]
        for worker in dead:
            board.ring(worker)  # the dead do not
            for exchange in self._exchanges if self._in_rounds else ():
                self._settle_place(worker, exchange.place(worker))
            for leases in self._leases.values():
                leases.bury(worker)
            board.parked[worker] = NOT_PARKED
            board.settled[worker] = board.deaths[worker]
            if board.gone[worker] != LEFT:
                board.presence[worker] = AWAY
        lost = [w for w in range(board.workers) if board.given_up[w] and board.gone[w] == AWAY]
        for worker in lost:
            board.presence[worker] = LEFT
        for loader in self._leases if dead or lost else ():
            self._drain(loader)
        return bool(dead or lost)

    def _settle_place(self, worker: int, place: tuple[int, int]) -> None:
        """Under the run's lock: a push of the worker's counts, and with it the samples that it had come to by then."""
        key, position = place
        if not key:
            return
        leases = self._leases.get((key >> 32) - 1)
        if leases is not None:
            leases.settle(worker, position)
            return
        places = self._board.places
        if places[2 * worker] != key:
            places[2 * worker], places[2 * worker + 1] = key, 0
        places[2 * worker + 1] = max(places[2 * worker + 1], position)

    def _join(self, loader: int | None = None) -> None:
        """A newcomer has caught up, and is about to begin a pass over ``loader``: from here on the others count with
        it."""
        board, rank = self._board, self.rank
        loader = self._last_ghost if loader is None else loader  # a step outside of any loop
        # The worker before it may have died at the end of a pass that the others are still in.
        at_end = self._resumed is None and loader is not None and board.passes(loader)[rank] > 0
        while True:
            with self._lock:
                self._settle_all()
                if board.settled[rank] == board.deaths[rank]:
                    if loader is not None and at_end:
                        board.parked[rank] = loader + 1
                    board.presence[rank] = PRESENT
                    break
            for exchange in self._exchanges:  # a round that the worker before it was in is not over
                board.wait(exchange.no_dead_in_round)
        self._joined = self.collectives.takes_part = True
        for exchange in self._exchanges:
            exchange.catch_up()
        self._forget_gradients()
        self._ring()
        if loader is not None and at_end:
            self._trained_passes -= 1
            self._await_all(loader)
        if self._resumed is not None:
            self._take_up(self._resumed)
            return
        for exchange in self._exchanges:
            exchange.join()
        if board.owes:
            self._settle()
        if isinstance(self.pace, Local) and self._exchanges:
            self._steps = self._exchanges[0].most_steps
        if self._trained_passes:
            present = [w for w in range(board.workers) if board.gone[w] != LEFT]
            for one in self._buffers:
                one.average(self._trained_passes, present)
        self._step_done_s = time.monotonic()
        if max(board.ended):
            self._follow_end(max(board.ended))

    # --- checkpoints ---

    def _position(self, number: int) -> dict[str, Any]:
        """Under the run's lock: how far all are into their data, of what counts up to round ``number``."""
        board, workers = self._board, range(self._board.workers)
        for worker in workers if self._in_rounds else ():
            self._settle_place(worker, self._exchanges[0].place_in(worker, number))
        loaders = []
        for loader in range(self._loaders):
            passes, leases = list(board.passes(loader)), self._leases.get(loader)
            # Who waits for the others at the end of a pass is still in it, with nothing left to do.
            now = min((passes[w] for w in workers if board.gone[w] != LEFT), default=0)
            done = [0] * board.workers
            for w in workers if leases is None else ():
                if passes[w] > now:
                    done[w] = ALL
                elif board.places[2 * w] == _key(loader, now):
                    done[w] = board.places[2 * w + 1]
            passes = [min(now, count) for count in passes]
            ledger = None if leases is None else leases.left()
            decided, evaluated = board.decided[loader], board.evaluated[loader]
            trained = loader in self._training_loaders
            known = {"passes": passes, "done": done, "ledger": ledger, "decided": decided}
            loaders.append(known | {"evaluated": evaluated, "trained": trained})
        job = self.context.job
        dealt = {"workers": board.workers, "assign": job.assign, "seed": job.seed}
        return dealt | {"loaders": loaders, "accounts": board.accounts.words()}

    def _own(self) -> dict[str, Any]:
        """What a checkpoint needs of this worker beside what the script keeps."""
        inside = {
            str(loader): self._samples - before
            for loader, (before, _) in self._evaluating.items()
            if loader in self._places
        }
        return {"look": list(self._look), "pass_samples": inside}

    def _trained_then(self, state: dict[str, Any]) -> tuple[Trained | None, ...]:
        """Where data are dealt otherwise than in the run that is resumed: what it had trained on, by loader."""
        job, found = self.context.job, []
        for known in state["loaders"]:
            epoch, ledger = min(known["passes"]), known["ledger"]
            trained = None
            if job.data != "own" and (ledger is not None) != self._leased and ledger is not None:
                if ledger[0] == epoch:
                    trained = Trained(epoch, state["workers"], "lease", state["seed"], (), ledger[1], tuple(ledger[2]))
            elif job.data != "own" and ledger is None and self._is_dealt_otherwise(state):
                trained = Trained(epoch, state["workers"], state["assign"], state["seed"], tuple(known["done"]))
            found.append(trained)
        return tuple(found)

    def _is_dealt_otherwise(self, state: dict[str, Any]) -> bool:
        return (state["workers"], state["assign"]) != (self.context.job.workers, self.context.job.assign)

    def _take_up(self, resumed: Resumed) -> None:
        """This worker is where it was when the checkpoint was made, but for what its script draws next."""
        own = resumed.own(self.rank)
        if own is not None:
            document, tensors, is_its_own = own
            self._look = (document["look"][0], document["look"][1])

            def take() -> None:
                self.saving.keeper.load(document, tensors, self._exchanges)
                for loader, samples in document["pass_samples"].items() if is_its_own else ():
                    if int(loader) in self._evaluating:
                        self._evaluating[int(loader)] = (self._samples - samples, self._evaluating[int(loader)][1])
                if is_its_own:  # two workers must not draw the same numbers
                    load_random_states(document, tensors)

            self._to_take, self._is_taken = take, False
        self._resumed = None
        for exchange in self._exchanges:
            exchange.refresh()
        if isinstance(self.pace, Local) and self._exchanges:
            self._steps = self._exchanges[0].most_steps
        self._step_done_s = time.monotonic()

    def _stop_here(self) -> None:
        """Ctrl-C has reached this worker: save and raise. Raises KeyboardInterrupt."""
        if self._in_rounds and self._exchanges:
            self.saving.want(self._exchanges[0].number, self.step_number, shares=False)
        elif self._exchanges:
            with self._lock:
                first = not any(ended == _INTERRUPTED for ended in self._board.ended)
                self._board.ended[self.rank] = _INTERRUPTED
            if first:
                self.saving.want(self._exchanges[0].number, self.step_number, shares=True)
        self._end(_INTERRUPTED, "interrupted")
        self._interrupted = True
        self._raise_if_interrupted()

    def _raise_if_interrupted(self) -> None:
        if self._interrupted:
            self.saving.at_border()
            self._interrupted = False
            raise KeyboardInterrupt

    # --- the end ---

    def _end(self, how: int, reason: str) -> None:
        self._ended, self._ended_s = how, time.monotonic()
        self._board.ended[self.rank] = how
        if reason:  # not only worker 0: who is out of data may learn of the end without the reason
            self._channel.send(messages.Ended(reason))

    def _idle(self) -> None:
        """A step after the end of training does nothing; a script that never stops stepping is ended."""
        self._idle_steps += 1
        if self._idle_steps > _IDLE_STEPS and time.monotonic() - self._ended_s > _IDLE_S:
            raise SystemExit(0)

    def close(self) -> None:
        """Tell the launcher of every round not told yet."""
        if self._row.stepped:
            self._close_row()
        self.flush()

    def finish(self) -> None:
        """The script has come to its end: say so to everybody."""
        self.saving.at_border()
        if not self._in_rounds:
            self._close_periods()  # local steps behind the end of the last pass; others may go on with them
        self.close()
        self.go()
        for served in self._served:
            served.close()
        for reader in self._readers:
            reader.join()
        self._channel.send(messages.Finished())

    def go(self) -> None:
        """Leave: nobody waits for this worker any more."""
        with self._lock:
            self._settle_all()
            for leases in self._leases.values():
                leases.forgo()
            self._board.presence[self.rank] = LEFT
            for loader in self._leases:
                self._drain(loader)
        self._ring()

    def flush(self) -> None:
        """Send the launcher what it has not seen of the rounds behind this worker."""
        if self._rows:
            try:
                self._channel.send(messages.Steps(bytes(self._rows)))
            except Closed:
                raise Aborted("the launcher is gone") from None
            self._rows.clear()
        self._flushed_s = time.monotonic()

    def _close_row(self) -> None:
        self._rows += self._row.pack()
        self._row = Row()


def _key(loader: int, number: int) -> int:
    return loader + 1 << 32 | number


def _nothing(entry: Entry) -> None:
    """What is counted is the first optimizer's steps."""


def _added(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]
