"""What a worker's process knows while its script runs: the parts it is made of, sharing, and the step.

All workers run the same script, so they come to wraps and to ends of passes in the same order. ``passes.py`` has what
happens at a batch and at the ends of passes, ``ending.py`` the end of training, ``catching_up.py`` the newcomer's way,
``membership.py`` how it joins and leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from paceline.config import Async, Local, Sync
from paceline.data.fingerprint import fingerprint
from paceline.data.loader import Count, share
from paceline.data.part import Part
from paceline.data.trained import Trained
from paceline.engine.checkpoint.saving import Saving
from paceline.engine.checkpoint.snapshot import Resumed
from paceline.engine.context import Context
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.exchange.meeting import Push, Round
from paceline.engine.exchange.shards import VOID
from paceline.engine.worker import buffers, clipping, position
from paceline.engine.worker.buffers import Buffers
from paceline.engine.worker.catching_up import CatchingUp
from paceline.engine.worker.collectives import Collectives
from paceline.engine.worker.ending import Ending
from paceline.engine.worker.keeping import Keeper
from paceline.engine.worker.leases import Leases
from paceline.engine.worker.leases import size_bytes as leases_bytes
from paceline.engine.worker.left_out import LeftOut
from paceline.engine.worker.membership import Membership
from paceline.engine.worker.parking import Parking
from paceline.engine.worker.passes import Passes
from paceline.engine.worker.progress import Progress
from paceline.engine.worker.served import Reader, ServedBatches
from paceline.engine.worker.settling import Settling
from paceline.engine.worker.strikes import Strikes
from paceline.engine.worker.weights import Zeroing
from paceline.params.table import tabulate
from paceline.protocol import messages
from paceline.protocol.log import Entry


class Worker:
    """The worker side of a run. Not for several threads at once."""

    def __init__(self, context: Context, keeper: Keeper | None = None) -> None:
        """``keeper``: who knows what the script keeps, if not this process."""
        job = context.job
        self.context, self.rank, self._pace = context, context.rank, job.pace
        self._board, self._channel, self._lock = context.board, context.channel, context.lock
        self._exchanges: list[Exchange] = []
        self._stores: list[Exchange] = []
        self._leases: dict[int, Leases] = {}
        self.collectives = Collectives(context)
        self._catching_up = CatchingUp(context, self._exchanges, is_newcomer=not self.collectives.takes_part)
        self.progress = Progress(context, self._exchanges)
        self.saving = Saving(context, self._exchanges, keeper or Keeper())
        self._ending = Ending(context, self._exchanges, self.progress, self.saving)
        in_rounds = self.progress.in_rounds
        self._settling = Settling(context, self._exchanges, self._stores, self._leases, in_rounds=in_rounds)
        self._parking = Parking(context, self._exchanges, self.progress, self._settling, self._ending, self.saving)
        self._membership = Membership(
            context,
            self._exchanges,
            self.progress,
            self._catching_up,
            self._settling,
            self._ending,
            self.saving,
            self.collectives,
            self._parking,
            self._close_periods,
        )
        self.passes = Passes(
            context,
            self._exchanges,
            self._leases,
            self.progress,
            self._catching_up,
            self._ending,
            self.saving,
            self._parking,
            self._membership,
            self._close_periods,
        )
        self.saving.position, self.saving.more = self._position, self.passes.own
        self.collectives.before = self.passes.tell_left
        self._board.on_alarm = self._membership.hear
        # Who has data of its own trains on all of it.
        place = (0, 1) if job.data == "own" else (context.rank, job.workers)
        assert job.assign is not None
        self._part = Part(*place, "round_robin" if job.assign == "lease" else job.assign, job.seed, context.trained)
        self.left_out: LeftOut | None = None  # of the script that runs in this process
        self.zeroing = Zeroing(self._exchanges, self.dropped)
        self.passes.drawing = self.zeroing.drawing
        self._samples_at_step = 0  # of the first exchange
        self._strikes = Strikes(context)
        self._readers: list[Reader] = []
        self._served: list[ServedBatches] = []

    @property
    def exchanges(self) -> Sequence[Exchange]:
        return self._exchanges

    @property
    def step_number(self) -> int:
        """Rounds, or pushes of all divided by the number of workers, or local steps."""
        return self.progress.step_number

    @property
    def num_workers(self) -> int:
        """How many the run is to have."""
        return self._board.wanted

    @property
    def is_behind(self) -> bool:
        """Does this process still do again what the worker before it in its place had done?"""
        return self._catching_up.is_repeating

    @property
    def has_joined(self) -> bool:
        """Do the others count with this worker?"""
        return self._catching_up.joined

    @property
    def is_to_take(self) -> bool:
        """Is there something of the others' to keep before the next batch is fetched?"""
        return self._catching_up.is_to_take

    @property
    def resumes(self) -> bool:
        """Is it still to take up what it was when a checkpoint was made?"""
        return self._catching_up.resumed is not None

    @property
    def trained_before(self) -> Sequence[tuple[Trained, ...]]:
        """By loader, what of its epoch had been trained on before the run was resumed."""
        return self._part.trained

    @property
    def holds(self) -> bool:
        """Do schedulers stand still?"""
        return self._ending.holds

    # --- sharing: each is a collective, called by all workers in the same order ---

    def add_exchange(
        self, optimizer: optim.Optimizer, names: dict[int, str], with_rows: set[int], *, share: bool
    ) -> Exchange:
        """Put an optimizer's parameters and state in shared memory. Raises ConfigError, HostError.

        ``names``: id of a parameter -> its name; ``with_rows``: ids of those whose gradients are sparse rows.
        """
        exchange = Exchange(optimizer, names, with_rows, self.context, share=share, pace=self._pace)
        account = None if self._exchanges else self._ending.account
        self.collectives.open(
            exchange,
            lambda entry: self._close(exchange, entry, account),
            lambda: self._exchanges.append(exchange),
            self._checkpoint,
            len(self._exchanges),
        )
        self.progress.weights.add_exchange()
        if isinstance(self._pace, Sync):
            exchange.know(self._exchanges)
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
        places = buffers.by_place(table, workers)
        memory, _ = self.collectives.ask("buffers", b"", size, f"{len(tensors)} buffers", places)
        self._parking.buffers.append(Buffers(memory, table, [t for _, t in tensors], self.rank, workers))

    def share_loader(self, loader: Any, count: Count | None) -> Any:
        """This worker's version of a loader. A collective where batches are leased or sent."""
        index = self.add_loader(fingerprint(loader))
        if self.context.job.data != "served" or self.context.job.workers == 1:
            return share(loader, index, self._part, self.passes, count)
        if self.rank:
            _, path = self.collectives.ask("served", b"", 1, f"the batches of loader {index}")
            served = ServedBatches(loader, index, self.passes, path.decode(), self.rank)
            self._served.append(served)
            return served
        reader = Reader(loader, index, count, lambda rank: replace(self._part, rank=rank))
        self._readers.append(reader)
        self.collectives.ask("served", reader.path.encode(), 1, f"the batches of loader {index}")
        leases = self._leases.get(index)
        reader.accept({w: leases.of(w) if leases else None for w in range(1, self.context.job.workers)})
        return reader.in_turn(share(loader, index, self._part, self.passes, count, reader.orders))

    def add_loader(self, mark: int) -> int:
        """The number of one more, with its fingerprint; a collective where its batches are leased."""
        index = self.passes.add_loader()
        if self.context.job.data == "shared":
            self._channel.send(messages.Reads(index, mark))
        if self.context.job.assign == "lease":
            self._share_leases(index)
        return index

    def _share_leases(self, loader: int) -> None:
        workers = self._board.workers
        memory, _ = self.collectives.ask("ledger", b"", leases_bytes(workers), f"the ledger of loader {loader}")
        tell = partial(self.passes.tell_returned, loader)
        leases = Leases(memory, self.collectives.number, self._lock, self.rank, workers, tell)
        self._leases[loader] = leases
        resumed = self._checkpoint() if leases.is_new else None
        if resumed is not None and loader < len(resumed.state["loaders"]):
            ledger = resumed.state["loaders"][loader]["ledger"]
            if ledger is not None:
                leases.refill(*ledger)

    def _checkpoint(self) -> Resumed | None:
        """What the run goes on from, for whoever is the first to need it: also a newcomer, where those have died that
        had read it. Once there is another checkpoint, somebody has trained."""
        resumed, path = self._catching_up.resumed, self.context.resume
        if resumed is None and path is not None and not self._catching_up.joined and not self._board.checkpoint:
            return Resumed(path)
        return resumed

    def knows(self, models: Sequence[nn.Module]) -> None:
        """The wrapped models: whether they are in training mode tells an evaluation from training."""
        self.passes.models = self.saving.models = list(models)

    # --- the training loop ---

    def exchange(self, index: int, *, void: bool = False) -> None:
        """One optimizer step of exchange ``index``, as the pace says. ``void``: there is no gradient worth applying."""
        ending, progress = self._ending, self.progress
        self.passes.tell_left()
        progress.put_down()
        if ending.over:
            ending.raise_if_interrupted()
            ending.idle()
            return
        if not self.counts():
            return
        if not self.passes.count:
            self.passes.border()  # there is no better one
        if not progress.in_rounds and self._board.interrupt:
            ending.follow(interrupt=True)
        exchange = self._exchanges[index]
        if index == 0:
            progress.close_row()
            progress.take_in_losses()
            progress.own_steps += 1
        if self.context.job.clip is not None and not void:
            nn.utils.clip_grad_norm_(exchange.parameters, self.context.job.clip)  # by the same weight as the step
        weight = self._weight(index)
        progress.weights.stepped(index)
        self.zeroing.stepped(index)
        if index == 0:
            # Read is read, also where the gradients were dropped; without loaders nobody knows how many there are.
            progress.row.samples += progress.samples - self._samples_at_step if self.passes.count else 0
            self._samples_at_step = progress.samples
            progress.row.steps += 1
        progress.begin_step()
        place = self.passes.where()
        round_ = exchange.step(Push(VOID if void else weight, progress.look, self._board.interrupt, 1, place))
        if not void:
            self._strikes.take(index, exchange, self.step_number)
        progress.end_step(round_)
        if round_ is not None:
            self._after_meeting(index, round_)
        elif index == 0 and isinstance(self._pace, Local):
            reason = ending.after_local_step()
            if reason is not None:
                self._close_periods()
                if not ending.over:
                    ending.end(reason)
        progress.flush_now_and_then()

    def counts(self) -> bool:
        """Is what the script does training? A newcomer joins where it first is."""
        if self._catching_up.is_muted or self._catching_up.is_behind:
            return False
        return self._catching_up.joined or self._membership.join(self.passes.count)

    def _weight(self, index: int) -> float:
        """Samples behind the gradient that this optimizer's step brings."""
        return float(self.progress.weights.of(index)) if self.passes.count else 1.0

    def dropped(self, index: int, in_hand: bool) -> None:
        """The script has dropped the gradients of exchange ``index``; see ``Weights.dropped``."""
        self.passes.tell_left()
        self.progress.weights.dropped(index, in_hand=in_hand)

    def _close_periods(self) -> None:
        """Bring to a meeting what local steps have come to so far."""
        for index, exchange in enumerate(self._exchanges):
            self.progress.start_clock()
            round_ = exchange.flush() if not self._ending.over else None
            self.progress.end_step(round_)
            if round_ is not None:
                self._after_meeting(index, round_)

    def _after_meeting(self, index: int, round_: Round) -> None:
        progress = self.progress
        if round_.counted:
            self.passes.judge(counted=True)
        if round_.over:
            progress.forget_step()
        elif not round_.counted:
            self.passes.judge(counted=False)
            progress.drop_step()
        elif index == 0:
            progress.count_step(round_)
        if not progress.in_rounds:
            if index == 0:
                progress.look = (0.0, 0.0)
            self._ending.follow(interrupt=True)
        elif index == 0:
            if self._board.owes:
                self._membership.hear()
            self._ending.after_round(round_)
            if not self.passes.count:  # there is no border to come to
                self._ending.raise_if_interrupted()

    def _close(self, exchange: Exchange, entry: Entry, account: Callable[[Entry], None] | None) -> None:
        """Under the run's lock, with a STEP as it is appended: it counts from here on, and so do its samples."""
        for member in entry.members:
            self._settling.settle_place(member, exchange.place(member))
        if account is not None:
            account(entry)

    def _position(self, number: int) -> dict[str, Any]:
        """Under the run's lock: how far all are into their data, of what counts up to round ``number``."""
        self._settling.settle_places(number)
        return position.tell(self.context, self.passes.count, self._leases, self._parking.trained_on, self._part)

    def loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """The script has loaded a checkpoint into these parameters: it counts for all workers."""
        given = {id(parameter) for parameter in parameters}
        for exchange in self._exchanges:
            if any(id(parameter) in given for parameter in exchange.parameters):
                self._load(exchange, parameters=True, state=False)

    def loaded_state(self, index: int) -> None:
        """The script has loaded a checkpoint into an optimizer."""
        self._load(self._exchanges[index], parameters=False, state=True)

    def _load(self, exchange: Exchange, *, parameters: bool, state: bool) -> None:
        if self._catching_up.last is not None and exchange.may_load_first(state=state):
            self.counts()  # a newcomer: the others may be in the pass before this
        exchange.load(parameters=parameters, state=state)

    def norm(self, exchange: Exchange, chosen: bytes, order: float) -> float:
        """The norm of a gradient of this exchange over all workers; see clipping.py."""
        self.passes.tell_left()
        if not self.counts():
            return 1.0
        return exchange.norm(chosen, order, self._weight(self._exchanges.index(exchange)))

    @property
    def over(self) -> bool:
        return self._ending.over

    def log(self, loss: float | None, values: dict[str, float]) -> None:
        """Record a loss of the batch in hand, and other values of the step; behind an epoch, of the epoch."""
        progress = self.progress
        if self._catching_up.is_muted or not self._catching_up.joined:
            return
        self.passes.tell_left()
        if self.passes.is_behind and not progress.row.stepped:
            progress.log_behind(loss, values if self.rank == 0 else {})
            return
        if (self.over and not progress.row.stepped) or (progress.batch_stepped and progress.batch_dropped):
            return
        if loss is not None:
            progress.log_loss(loss)
        if values and self.rank == 0:
            step = progress.row.key if progress.row.stepped else progress.step_number
            self._channel.send(messages.Logged(step, values))

    # --- the end ---

    def close(self) -> None:
        """Tell the launcher of every round not told yet."""
        self.progress.close_row()
        self.progress.flush()

    def finish(self) -> None:
        """The script has come to its end: say so to everybody."""
        self.passes.tell_left()
        if self.left_out is not None and self.rank == 0 and self.has_joined and self.num_workers > 1:
            for text in self.left_out.found(self._exchanges, self.passes.count, self.progress):
                self._channel.send(messages.Alarm(f"note: {text}"))
        self.saving.at_border()
        if not self.progress.in_rounds:
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
            self._settling.forgo(self.rank)
        self.context.ring()


def _nothing(entry: Entry) -> None:
    """What is counted is the first optimizer's steps."""
