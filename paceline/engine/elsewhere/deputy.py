"""A deputy: it does what a worker elsewhere asks, as the worker that it is at home, and answers.

    remote worker --Ask--> link --> deputy: Worker, Passes, Exchange, ... in the shared memory of home --Answer-->

It runs no script and has no model: parameters are made from what the worker tells of them, and every call is made by
the code that a local worker's script calls. So paces, the ledger, stop rules and deaths are what they are on one host.
Its process is ``deputizing.py``'s; what is an exchange's, a loader's or a buffer's is in ``deputy_*.py``.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any, NoReturn

from paceline.engine.context import Context
from paceline.engine.elsewhere.deputy_buffers import DeputyBuffers
from paceline.engine.elsewhere.deputy_exchange import DeputyExchange, filling, wrap
from paceline.engine.elsewhere.deputy_line import DeputyLine
from paceline.engine.elsewhere.deputy_passes import DeputyPasses
from paceline.engine.elsewhere.deputy_store import DeputyStore
from paceline.engine.elsewhere.mail import send
from paceline.engine.elsewhere.making import make_all
from paceline.engine.elsewhere.mirror import arithmetic
from paceline.engine.elsewhere.range_deputy import addresses
from paceline.engine.setup import encode_job
from paceline.engine.worker.left_out import LeftOut
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError, PacelineError
from paceline.params.table import Table, decode
from paceline.protocol import messages, remote
from paceline.protocol.ranges import elsewhere
from paceline.transport.board import Aborted
from paceline.transport.borrow import this_host
from paceline.transport.ends import LinkEnded

_LOOK_S = 0.02


class Deputy:
    """The face that ``Worker`` has for the worker at the other end of ``line``."""

    def __init__(self, context: Context, worker: Worker, line: DeputyLine) -> None:
        self._context, self._worker, self._line = context, worker, line
        self._passes, self._buffers = DeputyPasses(worker), DeputyBuffers(worker, line)
        self._exchanges: dict[int, DeputyExchange] = {}
        self._stores: list[DeputyStore] = []
        self._finished = False
        self._had_joined = worker.has_joined
        self._counted_bytes = 0  # of what has travelled, told to the launcher
        line.mail.on_took = self._take

    def stop(self) -> None:
        for exchange in self._exchanges.values():
            exchange.stop()

    def take_buffers(self) -> None:
        """The worker's have come."""
        self._buffers.take()

    def _take(self, told: remote.Took) -> None:
        """The link's thread: a mirror has stepped a round."""
        if told.exchange in self._exchanges:
            self._exchanges[told.exchange].took(told.number)

    def serve(self) -> None:
        """Until the script is over. Raises WorkersLost, Aborted; SystemExit when the script has raised."""
        while not self._finished:
            ask = self._line.next_ask()
            with self._line.kept():
                answer = self._answer(ask)
            with suppress(LinkEnded) if self._finished else self._line.kept():
                self._line.link.send(answer)

    def _answer(self, ask: remote.Ask) -> remote.Answer:
        """Do what is asked; the arrays that belong to the answer are sent before it."""
        value, failure = None, None
        try:
            for note in ask.notes:
                self._note(note)
            value = self._do(ask.request)
        except PacelineError as error:
            failure = messages.Failed(type(error).__name__, error.what, error.why, error.fix)
        except KeyboardInterrupt:
            failure = messages.Failed("Interrupted", "stopped by Ctrl-C")
        except SystemExit:
            if isinstance(ask.request, remote.Broke):
                raise
            failure = messages.Failed("SystemExit", "training is over")
        return remote.Answer(self._status(ask.request), value, failure)

    # --- notes and requests ---

    def _note(self, note: remote.Note) -> None:
        worker, passes = self._worker, self._worker.passes
        match note:
            case remote.Fetched(loader=loader):
                self._passes.fetched(loader)
            case remote.Drawn(loader=loader, samples=samples):
                passes.drawn(self._passes.known(loader), samples)
            case remote.Border():
                passes.border(saves=False)  # the script has drawn its next batch since
            case remote.Left(loader=loader, marks=marks):
                self._buffers.take()
                self._passes.leave(loader, marks)
            case remote.Dropped(exchange=index, in_hand=in_hand):
                worker.dropped(self._exchange(index).index, in_hand)
            case remote.Told(loss=loss, values=values):
                worker.log(loss, values)
            case remote.LocalStep():
                self._exchange(note.exchange).step_locally(note)
                worker.exchange(note.exchange, void=note.void)

    def _do(self, request: remote.Request) -> Any:
        worker, passes = self._worker, self._worker.passes
        match request:
            case remote.Who():
                return self._introduce(request)
            case remote.WrapOptimizer(memory=remote.STORE):
                self._stores.append(DeputyStore(worker, request, self._line))
                return len(self._stores) - 1
            case remote.WrapOptimizer():
                exchange, place = wrap(worker, request, self._line)
                self._exchanges[exchange.index] = exchange
                return place
            case remote.CopyFirst(table=data):
                self._copy_first(decode(data))
            case remote.WrapBuffers(table=data):
                self._buffers.wrap(decode(data))
            case remote.WrapLoader(fingerprint=mark):
                return worker.add_loader(mark)
            case remote.Barrier():
                worker.collectives.barrier()
            case remote.Begin():
                return self._passes.begin(request)
            case remote.DrawLease():
                return self._passes.draw(request)
            case remote.DropLease(loader=loader):
                self._passes.lease(loader).drop()
            case remote.BeginLease(loader=loader):
                return self._passes.lease(loader).begin()
            case remote.More(loader=loader):
                return passes.more(self._passes.begun(loader))
            case remote.End():
                self._buffers.take()
                self._passes.end(request)
            case remote.Step():
                exchange = self._exchange(request.exchange)
                exchange.take(request)
                exchange.at_home.factor = request.factor
                exchange.set(request.settings)
                worker.exchange(request.exchange, void=request.void)
            case remote.Meet(settings=changed):
                for index, settings in changed.items():
                    self._exchange(index).set(settings)
            case remote.Norm():
                exchange = self._exchange(request.exchange)
                exchange.take(request)
                if len(request.chosen) != len(exchange.at_home.parameters):
                    raise ConfigError(f"a norm is asked of {len(request.chosen)} parameters")
                return worker.norm(exchange.at_home, request.chosen, request.order)
            case remote.Load():
                self._load(request)
            case remote.ShowState(exchange=index):
                return self._exchange(index).show_state()
            case remote.Finish(asked_rank=asked_rank, left_out=told):
                worker.left_out = LeftOut(asked_rank=asked_rank, told=told)
                worker.finish()
                self._finished = True
            case remote.Counts():
                return worker.counts()
            case remote.Fetching():
                passes.fetching()
            case remote.NeedsGhost(loader=loader):
                return passes.needs_ghost(self._passes.known(loader))
            case remote.Leave(exchange=index):
                self._exchange(index).leave()
            case remote.IsWhole(exchange=index):
                return self._exchange(index).is_whole
            case remote.PushStore():
                self._store(request.store).push(request)
            case remote.PullStore():
                self._store(request.store).pull(request.tensor)
            case remote.AwaitStore(store=index):
                self._store(index).finish()
            case remote.Border():
                passes.border()
            case remote.Broke(failure=failure):
                self._break(failure)
        return None

    def _introduce(self, who: remote.Who) -> dict[str, Any]:
        """What home is."""
        is_here = who.host == this_host()
        if is_here and who.pid != os.getpid():
            self._line.knows_process(who.pid)
        return {
            "job": encode_job(self._context.job),
            "directory": str(self._context.directory),
            "arithmetic": arithmetic(),
            "host": this_host(),
            "trained": self._worker.trained_before,
            "servers": self._await_servers(),
            "resumes": self._worker.resumes,
            # A descriptor that the worker may try to open, as it would open that of an exchange's memory.
            "try": (os.getpid(), os.memfd_create("paceline-door")) if is_here else None,
        }

    def _await_servers(self) -> dict[int, tuple[str, int]]:
        """Where the worker finds servers on other hosts than home's; when all have come. Raises Aborted."""
        job, board = self._context.job, self._context.board
        servers = elsewhere(job.servers, job.server_hosts)
        while (found := addresses(self._context.directory, servers)) is None:
            if board.abort:
                raise Aborted("the run is being stopped")
            time.sleep(_LOOK_S)
        return found

    def _exchange(self, index: int) -> DeputyExchange:
        if index not in self._exchanges:
            raise ConfigError(f"there is no exchange {index}; worker {self._context.rank} has been told of others")
        return self._exchanges[index]

    def _store(self, index: int) -> DeputyStore:
        if not 0 <= index < len(self._stores):
            raise ConfigError(f"there is no store {index}; worker {self._context.rank} has made {len(self._stores)}")
        return self._stores[index]

    def _copy_first(self, table: Table) -> None:
        tensors = make_all(table.entries)
        named = [(entry.name, tensor) for entry, tensor in zip(table.entries, tensors, strict=True)]
        with filling(self._worker, self._line, tensors):
            self._worker.collectives.copy_from_first(named)
        for place, tensor in enumerate(tensors):
            send(self._line.link, f"copied/{place}", tensor)

    def _load(self, request: remote.Load) -> None:
        exchange = self._exchange(request.exchange)
        if request.parameters:
            exchange.take_parameters()
            self._worker.loaded(exchange.at_home.parameters)
        else:
            exchange.take_state(request.state)
            self._worker.loaded_state(request.exchange)

    def _break(self, failure: messages.Failed) -> NoReturn:
        """The script has raised."""
        with suppress(Aborted):
            self._worker.close()
        self._context.channel.send(failure)
        with suppress(LinkEnded):
            self._line.link.send(remote.Answer(remote.Status()))
        raise SystemExit(1)

    # --- where the worker is ---

    def _status(self, request: remote.Request) -> remote.Status:
        """What it has to know of the newest values is sent before it."""
        worker, passes = self._worker, self._worker.passes
        if self._finished:
            return remote.Status(over=worker.over, step=worker.step_number, workers=worker.num_workers)
        has_just_joined = worker.has_joined and not self._had_joined
        self._had_joined = worker.has_joined
        fresh, follow, brought, apart, awaits = {}, {}, {}, [], {}
        for index, exchange in self._exchanges.items():
            if exchange.at_home.in_period or not (has_just_joined or exchange.is_due(request)):
                continue
            if exchange.is_apart:
                apart.append(index)  # it asks for what is newest when it has memory of its own
            elif (told := exchange.follow()) is not None:
                follow[index] = told
            elif (values := exchange.bring()) is not None:
                brought[index] = values
            else:
                if exchange.is_spread:
                    awaits[index] = exchange.what_servers_have()
                fresh[index] = exchange.send_newest()
        self._count_travelled()
        buffers = self._buffers.send_if_due(anyway=has_just_joined)
        verdicts = {loader: passes.verdict(loader) for loader in range(passes.count)}
        return remote.Status(
            over=worker.over,
            holds=worker.holds,
            step=worker.step_number,
            epochs=[passes.epoch(loader) for loader in range(passes.count)],
            verdicts={loader: told for loader, told in verdicts.items() if told is not None},
            periods=[0 if e.inner is None else e.inner.steps for e in worker.exchanges],
            fresh=fresh,
            buffers=buffers,
            follow=follow,
            brought=brought,
            apart=apart,
            deals=[passes.deal(loader) for loader in range(passes.count)],
            workers=worker.num_workers,
            joined=worker.has_joined,
            behind=worker.is_behind,
            takes=worker.is_to_take,
            saves=worker.saving.is_due,
            awaits=awaits,
        )

    def _count_travelled(self) -> None:
        sent = sum(e.sent_bytes for e in self._exchanges.values()) + sum(store.sent_bytes for store in self._stores)
        travelled = self._line.mail.received_bytes + sent
        self._worker.progress.row.bytes_sent += travelled - self._counted_bytes
        self._counted_bytes = travelled
