"""A deputy: the process at home that stands for a worker elsewhere, and is the worker to everybody here.

    remote worker --Ask--> link --> deputy: Worker, Passes, Exchange, ... in the shared memory of home --Answer-->

It runs no script and has no model: parameters are made from what the worker tells of them, and every call is made by
the code that a local worker's script calls. So paces, the ledger, stop rules and deaths are what they are on one host.
If the link is lost for good the deputy ends, as its worker has. The next one waits at the same port for a worker that
comes in the place of the lost one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import msgspec
import torch
from torch import nn, optim

from paceline.config import Local, Sync
from paceline.data.passes import Leases
from paceline.engine.context import Context
from paceline.engine.exchange import Exchange
from paceline.engine.forward import Forward
from paceline.engine.keeping import Keeper, Kept
from paceline.engine.mail import PATIENCE, Mail, send, send_document, send_packed
from paceline.engine.mirror import arithmetic
from paceline.engine.program import CAME, GONE, WAITS
from paceline.engine.setup import Door, encode_job
from paceline.engine.worker import Worker
from paceline.errors import ConfigError, HostError, NotBack, PacelineError, WorkersLost
from paceline.params import optimizers, rows
from paceline.params.packing import Tensors, unpack
from paceline.params.table import DTYPES, Entry, Table
from paceline.protocol import messages, remote
from paceline.protocol.link import Peer
from paceline.transport.board import Aborted
from paceline.transport.borrow import this_host
from paceline.transport.channel import Closed
from paceline.transport.ends import End, Ended, Joined, LinkEnded, Received
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.tls import Credentials

_LOOK_S = 0.1  # how often a deputy that waits for its worker looks whether the run is being stopped
_LAST_WORD_S = 1.0


def deputize(context: Context, door: Door, report: int, key: JobKey | None, made: Callable[[Worker], None]) -> None:
    """Stand for worker ``context.rank`` until its script is over. Raises WorkersLost, HostError, Aborted.

    ``made`` is told the Worker that this process then is.
    """
    mail = Mail()
    end = End(
        me=Peer(context.rank, "deputy"),
        job=door.job,
        messages=remote.Any_,
        sink=mail.sink,
        place=mail.place,
        credentials=None if key is None else Credentials.issue(key),
        insecure=door.insecure,
        patience=PATIENCE,
    )
    listener = Listener(end, door.host, door.ports[context.rank], shared=True)
    _report(report, context.rank, WAITS)
    try:
        link = _await_worker(context, mail, door.starter)
    except NotBack:
        _report(report, context.rank, GONE)
        raise
    _report(report, context.rank, CAME)
    kept = _Kept()
    worker = Worker(context, kept)
    made(worker)
    deputy = kept.ask_of = _Deputy(context, worker, link, mail)
    try:
        deputy.serve()
    except (Aborted, Closed) as stopped:
        _say_stop(context, link, str(stopped))
        raise
    except (SystemExit, WorkersLost):
        raise
    except BaseException as error:
        _say_stop(context, link, f"its deputy at home failed: {error}")
        raise
    finally:
        deputy.stop()
        link.close()
        listener.close()


def _report(descriptor: int, rank: int, what: str) -> None:
    """To whoever starts workers."""
    with contextlib.suppress(BrokenPipeError):  # it may have ended since
        os.write(descriptor, f"{rank} {what}\n".encode())


def _await_worker(context: Context, mail: Mail, starter: int) -> Link:
    """The link to the worker, when it comes. Raises HostError, NotBack."""
    rank, limit_s = context.rank, context.job.return_timeout
    comes_again = context.board.deaths[rank] > 0
    began_s = time.monotonic()
    with context.board.waiting():
        while True:
            try:
                event = mail.events.get(timeout=_LOOK_S)
            except queue.Empty:
                _check_abort(context)
                if comes_again and time.monotonic() > began_s + limit_s:
                    raise NotBack(
                        f"worker {rank} has not come within {limit_s:g} s",
                        why="nobody has started its process again, or it does not reach home",
                        fix="--return-timeout, PACELINE_RETURN_TIMEOUT: how long it is waited for",
                    ) from None
                if not comes_again and not os.path.exists(f"/proc/{starter}"):
                    raise HostError(
                        f"worker {rank} has not come, and the process that was to start it has ended"
                    ) from None
                continue
            if isinstance(event, Joined):
                if event.link.peer.host == rank and event.link.peer.role == "worker":
                    return event.link
                event.link.end(f"this is the deputy of worker {rank}")


def _check_abort(context: Context) -> None:
    if context.board.abort:
        raise Aborted("the run is being stopped")


def _say_stop(context: Context, link: Link, reason: str) -> None:
    """Tell the worker why, in the launcher's words if it has said some."""
    poll = select.poll()
    with contextlib.suppress(Closed, OSError, ValueError):
        poll.register(context.channel, select.POLLIN)
        if poll.poll(_LAST_WORD_S * 1000):
            for message, _ in context.channel.drain():
                reason = message.reason if isinstance(message, messages.Stop) else reason
    with contextlib.suppress(LinkEnded, TimeoutError):
        link.send(remote.Stop(reason), timeout_s=_LAST_WORD_S)
        link.flush(_LAST_WORD_S)


class _Deputy:
    def __init__(self, context: Context, worker: Worker, link: Link, mail: Mail) -> None:
        self._context, self._worker, self._link, self._mail = context, worker, link, mail
        self._local, self._in_slots = isinstance(context.job.pace, Local), isinstance(context.job.pace, Sync)
        self._mode = nn.Module()  # stands for the script's models: in training mode or not
        worker.knows([self._mode])
        self._marks = 0
        worker.passes.marks = lambda: self._marks
        self._gradients: list[dict[str, torch.Tensor]] = []  # by exchange, as they have come
        self._tables: list[dict[int, torch.Tensor]] = []  # by exchange: those with sparse rows, as the worker has them
        self._process = -1  # the worker's, as a descriptor, if it is on this host
        self._told: list[int] = []  # by exchange: the number of the values that the worker has
        self._buffers: list[list[torch.Tensor]] = []
        self._averaged = 0  # passes after which the worker was told the buffers
        self._leases: dict[int, Leases] = {}
        self._finished = False
        self._had_joined = worker.has_joined
        self._sent_bytes = self._counted_bytes = 0
        self._kinds: list[str] = []  # by exchange: where the worker's parameters lie
        self._forwards: dict[int, Forward] = {}  # by exchange, of those with a mirror
        mail.on_took = self._take

    def stop(self) -> None:
        for forward in self._forwards.values():
            forward.stop()

    def _take(self, told: remote.Took) -> None:
        """The link's thread: a mirror has stepped a round."""
        if told.exchange in self._forwards:
            self._forwards[told.exchange].took(told.number)

    def serve(self) -> None:
        while not self._finished:
            ask = self._next()
            answer = self._answer(ask)
            try:
                self._link.send(answer)
            except LinkEnded as lost:
                if not self._finished:
                    raise self._lost(str(lost)) from None

    def _next(self) -> remote.Ask:
        with self._context.board.waiting():  # so that nobody takes it for stuck: it is the worker that computes
            while True:
                try:
                    event = self._mail.events.get(timeout=_LOOK_S)
                except queue.Empty:
                    _check_abort(self._context)
                    continue
                match event:
                    case Received(link=link, message=remote.Ask() as ask) if link is self._link:
                        return ask
                    case Received(link=link, message=remote.Printed(data=data)) if link is self._link:
                        os.write(1, data)  # its log
                    case Ended(link=link, reason=reason) if link is self._link:
                        raise self._lost(reason)
                    case Joined(link=link) if link is not self._link:
                        # It comes again, to the deputy after this one: that is a newcomer's.
                        raise self._lost("another process has come in its place")

    def _lost(self, reason: str) -> WorkersLost:
        """The worker is given up. One that maps this memory is killed first: it may be stopped, and write later."""
        if self._process >= 0 and remote.HOME in self._kinds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)
            select.select([self._process], [], [], _LAST_WORD_S)
        return WorkersLost(
            f"worker {self._context.rank} is lost: {reason}",
            why="its process has ended, its host is down, or the network between is cut",
        )

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
        try:
            return remote.Answer(self._status(ask.request), value, failure)
        except LinkEnded as lost:
            raise self._lost(str(lost)) from None

    def ask_worker(self, asked: remote.Show | remote.Keep) -> remote.Shown:
        """While the worker waits for an answer: its script stands still. Raises WorkersLost, Aborted, and what it could
        not do."""
        try:
            self._link.send(asked)
        except LinkEnded as lost:
            raise self._lost(str(lost)) from None
        with self._context.board.waiting():
            while True:
                try:
                    event = self._mail.events.get(timeout=_LOOK_S)
                except queue.Empty:
                    _check_abort(self._context)
                    continue
                match event:
                    case Received(link=link, message=remote.Shown() as shown) if link is self._link:
                        if shown.failure is not None:
                            raise ConfigError(shown.failure.what, why=shown.failure.why, fix=shown.failure.fix)
                        return shown
                    case Received(link=link, message=remote.Printed(data=data)) if link is self._link:
                        os.write(1, data)
                    case Ended(link=link, reason=reason) if link is self._link:
                        raise self._lost(reason)

    def shown(self) -> tuple[Any, Tensors]:
        """What the worker's script keeps."""
        told: tuple[Any, Tensors] = self._mail.take_packed("kept", self.ask_worker(remote.Show()).kept)
        return told

    def let_keep(self, document: Any, tensors: Tensors) -> None:
        """Let it keep this."""
        self.ask_worker(remote.Keep(send_packed(self._link, "keep", document, tensors)))

    # --- notes ---

    def _note(self, note: remote.Note) -> None:
        worker, passes = self._worker, self._worker.passes
        match note:
            case remote.Fetched(loader=loader):
                passes.fetched(loader)
            case remote.Drawn(samples=samples):
                passes.drawn(samples)
            case remote.Border():
                passes.border()
            case remote.Left(loader=loader, marks=marks):
                self._marks = marks
                self._take_buffers()
                passes.leave(loader)
            case remote.Told(loss=loss, values=values):
                worker.log(loss, values)
            case remote.LocalStep():
                self._local_step(note)

    def _local_step(self, note: remote.LocalStep) -> None:
        exchange = self._exchange(note.exchange)
        _forget(exchange)
        if note.brings and self._local:
            with torch.no_grad():
                for parameter, value in zip(exchange.parameters, self._views(note.exchange), strict=True):
                    assert value is not None
                    parameter.copy_(value)
        elif note.brings:
            self._give(note.exchange, note.mask, {})
        if note.bad is not None:
            parameter = exchange.parameters[note.bad]
            parameter.grad = torch.full_like(parameter, torch.nan)
        self._worker.exchange(note.exchange, void=note.void)

    # --- requests ---

    def _do(self, request: remote.Request) -> Any:
        worker, passes = self._worker, self._worker.passes
        match request:
            case remote.Who(host=host, pid=pid):
                if host == this_host() and pid != os.getpid():
                    with contextlib.suppress(ProcessLookupError):
                        self._process = os.pidfd_open(pid)
                # A descriptor that the worker may try to open, as it would open that of an exchange's memory.
                home = (os.getpid(), os.memfd_create("paceline-door")) if host == this_host() else None
                return {
                    "job": encode_job(self._context.job),
                    "directory": str(self._context.directory),
                    "arithmetic": arithmetic(),
                    "try": home,
                }
            case remote.WrapOptimizer():
                return self._wrap_optimizer(request)
            case remote.CopyFirst(table=data):
                self._copy_first(msgspec.msgpack.decode(data, type=Table))
            case remote.WrapBuffers(table=data):
                table = msgspec.msgpack.decode(data, type=Table)
                self._buffers.append([_empty(entry) for entry in table.entries])
                worker.average_buffers([(e.name, t) for e, t in zip(table.entries, self._buffers[-1], strict=True)])
            case remote.WrapLoader():
                return worker.add_loader()
            case remote.Barrier():
                worker.collectives.barrier()
            case remote.Begin():
                return self._begin(request)
            case remote.DrawLease():
                return self._draw(request)
            case remote.DropLease(loader=loader):
                self._leases[loader].drop()
            case remote.BeginLease(loader=loader):
                return self._leases[loader].begin()
            case remote.More(loader=loader):
                return passes.more(loader)
            case remote.End(loader=loader, is_training=is_training, marks=marks):
                self._look_at(marks, is_training=is_training)
                self._take_buffers()
                passes.end(loader)
            case remote.Step():
                exchange = self._exchange(request.exchange)
                self._give(request.exchange, request.mask, request.rows)
                self._set(exchange, request.settings)
                worker.exchange(request.exchange, void=request.void)
            case remote.Meet(settings=changed):
                for index, settings in changed.items():
                    self._set(self._exchange(index), settings)
            case remote.Norm():
                self._give(request.exchange, request.mask, request.rows)
                return worker.norm(self._exchange(request.exchange), request.chosen, request.order)
            case remote.Load():
                self._load(request)
            case remote.ShowState(exchange=index):
                return self._show_state(self._exchange(index))
            case remote.Finish():
                worker.finish()
                self._finished = True
            case remote.Counts():
                return worker.counts()
            case remote.Fetching():
                passes.fetching()
            case remote.NeedsGhost(loader=loader):
                return passes.needs_ghost(loader)
            case remote.Broke(failure=failure):
                self._break(failure)
        return None

    def _wrap_optimizer(self, request: remote.WrapOptimizer) -> tuple[int, int] | None:
        index = len(self._worker.exchanges)
        groups = optimizers.decode(request.settings)
        for group in groups:
            group["params"] = []
        parameters, names, with_rows = [], {}, set()
        for place, told in enumerate(request.parameters):
            tensor = torch.empty_strided(told.shape, told.stride, dtype=DTYPES[told.dtype]).zero_()
            value = self._mail.take(f"value/{place}", tensor.dtype)
            if value.numel():
                tensor.copy_(value.view(told.shape))
            parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
            groups[told.group]["params"].append(parameter)
            parameters.append(parameter)
            names[id(parameter)] = told.name
            if told.rows:
                with_rows.add(id(parameter))
        optimizer = optimizers.clone({}, _find(request.optimizer), groups)
        for place, values in self._mail.take_document("state", request.state).items():
            optimizer.state[parameters[int(place)]] = values
        collectives, is_home = self._worker.collectives, request.memory == remote.HOME
        collectives.keeps = is_home
        exchange = self._worker.add_exchange(optimizer, names, with_rows, share=True)
        collectives.keeps = False
        if msgspec.msgpack.encode(exchange.spec) != request.spec:
            raise ConfigError(
                f"{type(optimizer).__name__} is not the same at home as on worker {self._context.rank}",
                why="made of the same settings it keeps other state there, so versions differ",
                fix="install the same versions of torch and of the optimizer's module on all hosts",
            )
        self._kinds.append(request.memory)
        self._gradients.append(self._expect(index, exchange))
        self._tables.append({})
        self._told.append(-1)
        if request.memory == remote.MIRROR:
            others = [worker for worker in range(self._context.job.workers) if worker != self._context.rank]
            self._forwards[index] = Forward(exchange, index, others, others[0], self._link)
        return (os.getpid(), collectives.kept) if is_home else None

    def _expect(self, index: int, exchange: Exchange) -> dict[str, torch.Tensor]:
        """Where gradients come: in lockstep to the slot itself, which nobody reads until they are pushed."""
        table, slot = exchange.spec.table, exchange.memory.slots[self._context.rank]
        if not self._in_slots:
            vectors = {v: torch.zeros(n, dtype=DTYPES[v]) for v, n in table.dense_sizes.items()}
        else:
            vectors = {v: slot.gradient[v] for v in table.dense_sizes}
            for place, area in slot.rows.items():
                entry = table.entries[place]
                self._mail.make_room(f"numbers/{index}/{place}", area[1:])
                self._mail.make_room(
                    f"values/{index}/{place}", slot.gradient[entry.vector][entry.offset :][: entry.size]
                )
        for vector, tensor in vectors.items():
            self._mail.expect(f"gradient/{index}/{vector}", tensor)
        return vectors

    def _copy_first(self, table: Table) -> None:
        tensors = [_empty(entry) for entry in table.entries]
        for place, tensor in enumerate(tensors):
            value = self._mail.take(f"copy/{place}", tensor.dtype)
            if value.numel():
                tensor.copy_(value.view(tensor.shape))
        named = [(entry.name, tensor) for entry, tensor in zip(table.entries, tensors, strict=True)]
        self._worker.collectives.copy_from_first(named)
        for place, tensor in enumerate(tensors):
            send(self._link, f"copied/{place}", tensor)

    def _begin(self, request: remote.Begin) -> tuple[bool, int, bool]:
        passes, loader = self._worker.passes, request.loader
        self._look_at(request.marks, is_training=request.is_training)
        is_real = passes.begin(loader, request.length)
        leases = passes.leases(loader) if is_real else None
        if leases is not None:
            self._leases[loader] = leases
        return is_real, passes.skip(loader) if is_real else 0, leases is not None

    def _draw(self, request: remote.DrawLease) -> int | None:
        leases = self._leases[request.loader]
        while True:
            ordinal = leases.draw(request.total, request.at_least)
            if ordinal is None or not request.begins or leases.begin():
                return ordinal

    def _look_at(self, marks: int, *, is_training: bool) -> None:
        self._marks = marks
        self._mode.train(is_training)

    def _load(self, request: remote.Load) -> None:
        exchange = self._exchange(request.exchange)
        if request.parameters:
            with torch.no_grad():
                for place, parameter in enumerate(exchange.parameters):
                    value = self._mail.take(f"value/{place}", parameter.dtype)
                    parameter.copy_(value.view(parameter.shape))
            self._worker.loaded(exchange.parameters)
            return
        for place, values in self._mail.take_document("state", request.state).items():
            exchange.optimizer.state[exchange.parameters[int(place)]] = values
        self._worker.loaded_state(request.exchange)

    def _show_state(self, exchange: Exchange) -> Any:
        state = {str(place): values for place, (_, values) in enumerate(exchange.shared_state()) if values}
        return send_document(self._link, "shown", state)

    def _break(self, failure: messages.Failed) -> NoReturn:
        """The script has raised."""
        with contextlib.suppress(Aborted):
            self._worker.close()
        self._context.channel.send(failure)
        with contextlib.suppress(LinkEnded):
            self._link.send(remote.Answer(remote.Status()))
        raise SystemExit(1)

    # --- arrays ---

    def _exchange(self, index: int) -> Exchange:
        if not 0 <= index < len(self._worker.exchanges):
            raise ConfigError(f"there is no exchange {index}; worker {self._context.rank} has been told of others")
        return self._worker.exchanges[index]

    def _set(self, exchange: Exchange, settings: bytes) -> None:
        if settings:
            exchange.load_settings(optimizers.decode(settings))

    def _views(self, index: int) -> list[torch.Tensor | None]:
        """What has come as the gradients, by parameter; None for those with sparse rows."""
        table, vectors = self._exchange(index).spec.table, self._gradients[index]
        return [None if entry.row else table.view(entry, vectors[entry.vector]) for entry in table.entries]

    def _give(self, index: int, mask: bytes, counts: dict[int, int]) -> None:
        """Give the parameters in ``mask`` their gradients, and the others none."""
        exchange = self._exchange(index)
        _forget(exchange)
        if not mask:
            return
        entries = exchange.spec.table.entries
        if len(mask) != len(entries):
            raise ConfigError(f"{len(mask)} gradients have come for {len(entries)} parameters")
        for place, view in enumerate(self._views(index)):
            parameter = exchange.parameters[place]
            if not mask[place]:
                continue
            if view is not None:
                parameter.grad = view
                continue
            numbers, values = self._rows_of(index, place, counts[place])
            if len(numbers) != len(values):
                raise ConfigError(f"{len(values)} rows have come with {len(numbers)} numbers")
            parameter.grad = rows.gradient_of(rows.Rows(numbers, values, counts[place] >= 0), parameter.shape)

    def _rows_of(self, index: int, place: int, signed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers and values of rows that have come."""
        exchange, count = self._exchange(index), abs(signed)
        entry = exchange.spec.table.entries[place]
        if not self._in_slots:
            numbers = self._mail.take(f"numbers/{index}/{place}", torch.int64)
            return numbers, self._mail.take(f"values/{index}/{place}", DTYPES[entry.dtype]).view(-1, entry.row)
        slot = exchange.memory.slots[self._context.rank]
        area = slot.rows[place]
        if count >= len(area):
            raise ConfigError(f"{count} rows have come of a table of {entry.rows}")
        area[0] = signed
        values = slot.gradient[entry.vector][entry.offset : entry.offset + count * entry.row]
        return area[1 : count + 1], values.view(-1, entry.row)

    def _take_buffers(self) -> None:
        """The worker's own have come before a pass ends."""
        with torch.no_grad():
            for index, tensors in enumerate(self._buffers):
                for place, tensor in enumerate(tensors):
                    value = self._mail.take(f"buffers/{index}/{place}", tensor.dtype)
                    if value.numel():
                        tensor.copy_(value.view(tensor.shape))

    def _status(self, request: remote.Request) -> remote.Status:
        """Where the worker is; what it has to know of the newest values is sent before it."""
        worker, passes = self._worker, self._worker.passes
        if self._finished:
            return remote.Status(over=worker.over, step=worker.step_number, workers=worker.num_workers)
        has_just_joined = worker.has_joined and not self._had_joined
        self._had_joined = worker.has_joined
        fresh, follow = {}, {}
        for index, exchange in enumerate(worker.exchanges[: len(self._told)]):
            if exchange.in_period or not (has_just_joined or self._is_due(request, index, exchange)):
                continue
            told = self._follow(index, exchange)
            if told is None:
                fresh[index] = self._send_newest(index, exchange)
            else:
                follow[index] = told
        forwarded = sum(forward.sent_bytes for forward in self._forwards.values())
        travelled = self._sent_bytes + self._mail.received_bytes + forwarded
        worker.progress.row.bytes_sent += travelled - self._counted_bytes
        self._counted_bytes = travelled
        buffers = bool(self._buffers) and (worker.progress.passes > self._averaged or has_just_joined)
        if buffers:
            self._averaged = worker.progress.passes
            for index, tensors in enumerate(self._buffers):
                for place, tensor in enumerate(tensors):
                    send(self._link, f"averaged/{index}/{place}", tensor)
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
            deals=[passes.deal(loader) for loader in range(passes.count)],
            workers=worker.num_workers,
            joined=worker.has_joined,
            behind=worker.is_behind,
            takes=worker.is_to_take,
        )

    def _follow(self, index: int, exchange: Exchange) -> remote.Follow | None:
        """What a mirror is told of the round that it has to step to be the newest, if that is one."""
        if index not in self._forwards or self._told[index] != exchange.number - 1:
            return None
        told = self._forwards[index].follow(exchange.number)
        if told is not None:
            self._told[index] = exchange.number
        return told

    def _is_due(self, request: remote.Request, index: int, exchange: Exchange) -> bool:
        """May its values be others than those that the worker has?"""
        match request:
            case remote.Step(exchange=stepped):
                return index == stepped and (index not in self._forwards or exchange.number != self._told[index])
            case remote.WrapOptimizer():
                return self._told[index] < 0
            case remote.Load(exchange=loaded):
                return index == loaded
            case remote.Meet() | remote.More() | remote.End() if not self._in_slots:
                return True
            case (
                remote.More()
                | remote.End()
                | remote.Begin()
                | remote.Counts()
                | remote.Barrier()
                | remote.CopyFirst()
                | remote.WrapLoader()
            ):
                return exchange.number != self._told[index]
        return False

    def _send_newest(self, index: int, exchange: Exchange) -> list[int]:
        """Send them; of parameters whose gradients are sparse rows, those rows that have changed. Which those are."""
        table, vectors = exchange.spec.table, exchange.newest()
        self._told[index] = exchange.number
        if self._kinds[index] == remote.HOME:
            return []  # they lie where the worker sees them
        for vector in table.sizes if index in self._forwards else table.dense_sizes:
            self._sent_bytes += send(self._link, f"parameters/{index}/{vector}", vectors[vector])
        if index in self._forwards:
            self._sent_bytes += send(self._link, f"state/{index}", exchange.memory.state_bytes())
            self._forwards[index].took(exchange.number)
            return []
        known, changed_tables = self._tables[index], []
        for place, entry in enumerate(table.entries):
            if not entry.row:
                continue
            now = table.view(entry, vectors[entry.vector])
            if place not in known:
                known[place], changed = now.clone(), torch.arange(len(now))
            else:
                changed = now.ne(known[place]).any(1).nonzero()[:, 0]
                known[place][changed] = now[changed]
            if len(changed):
                changed_tables.append(place)
                self._sent_bytes += send(self._link, f"numbers/{index}/{place}", changed)
                self._sent_bytes += send(self._link, f"rows/{index}/{place}", known[place][changed])
        return changed_tables


class _Kept(Keeper):
    """What a script keeps that runs elsewhere. Its worker is asked for it."""

    ask_of: _Deputy

    def state(self, exchanges: Sequence[Kept], tensors: Tensors) -> dict[str, Any]:
        document, own = self.ask_of.shown()
        tensors.update(own)
        return dict(document)

    def load(self, document: dict[str, Any], tensors: Tensors, exchanges: Sequence[Kept]) -> None:
        self.ask_of.let_keep(document, tensors)
        for exchange, settings in zip(exchanges, document["settings"], strict=True):
            exchange.load_settings(unpack(settings, tensors))


def _forget(exchange: Exchange) -> None:
    for parameter in exchange.parameters:
        parameter.grad = None


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty_strided(entry.shape, entry.stride, dtype=DTYPES[entry.dtype]).zero_()


def _find(path: str) -> type[optim.Optimizer]:
    """The optimizer's class. Raises ConfigError."""
    try:
        found = optimizers.find_class(path)
    except ConfigError:
        found = object
    if not issubclass(found, optim.Optimizer):
        module, _, name = path.partition(":")
        raise ConfigError(
            f"optimizer {name} cannot be imported at home (module {module}), where it is to step the parameters",
            fix="put the class in a module beside the script, on the host of rank 0 too",
        )
    return found
