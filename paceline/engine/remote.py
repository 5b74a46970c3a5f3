"""A worker in a process that home has not forked, perhaps on another host: a stub with a worker's face.

    script --> RemoteWorker --Ask--> link --> its deputy at home, which is the worker there --Answer--> script

Here are the model, its gradients, the data and local steps; all else is asked for. The newest parameters are received
straight into the memory that the model's parameters are views of. What needs no answer is kept and goes with the next
that does, so that a step is one round trip.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset

from paceline import errors
from paceline.config import Job, Local, Quorum, Sync
from paceline.data.loader import Count, share
from paceline.data.part import Part
from paceline.engine import clipping
from paceline.engine.exchange import make_inner
from paceline.engine.keeping import Keeper
from paceline.engine.mail import Mail, send, send_document
from paceline.engine.meeting import Push
from paceline.engine.passes import gradient_marks
from paceline.engine.replica import Replica
from paceline.engine.setup import decode_job
from paceline.engine.spec import describe
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.params import optimizers
from paceline.params.table import tabulate
from paceline.protocol import messages, remote
from paceline.transport.ends import Ended, Event, LinkEnded, Received
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory, size_bytes

STOPPED = 75  # the exit status of a worker that was told to stop, or has lost home
_GRACE_S = 2.0  # for the script to come to its next call
_MOST_NOTES = 1000


class RemoteWorker:
    """The face of ``engine.worker.Worker`` that ``run/``, the loaders and clipping use. Not for several threads."""

    is_behind = False  # there are no newcomers among workers elsewhere

    def __init__(self, link: Link, line: Line, rank: int) -> None:
        self.rank, self._link, self._line, self._mail = rank, link, line, line.mail
        self._status = remote.Status()
        self._notes: list[remote.Note] = []
        self._exchanges: list[RemoteExchange] = []
        self._buffers: list[list[torch.Tensor]] = []
        self.is_over = False  # has it said that it has finished, or failed?
        self.passes = RemotePasses(self)
        told = self._ask(remote.Who())
        self.job: Job = decode_job(told["job"])
        self.directory = Path(told["directory"])
        self._part = Part(
            *((0, 1) if self.job.data == "own" else (rank, self.job.workers)),
            "round_robin" if self.job.assign == "lease" else self.job.assign or "round_robin",
            self.job.seed,
        )
        self.collectives = _Collectives(self)
        self.saving = _Saving()

    @property
    def num_workers(self) -> int:
        """How many the run was started with."""
        return self.job.workers

    @property
    def exchanges(self) -> Sequence[RemoteExchange]:
        return self._exchanges

    @property
    def over(self) -> bool:
        return self._status.over

    @property
    def holds(self) -> bool:
        return self._status.holds

    @property
    def status(self) -> remote.Status:
        return self._status

    @property
    def step_number(self) -> int:
        return self._status.step + sum(isinstance(n, remote.LocalStep) and n.exchange == 0 for n in self._notes)

    # --- sharing ---

    def add_exchange(
        self, optimizer: optim.Optimizer, names: dict[int, str], with_rows: set[int], *, share: bool
    ) -> RemoteExchange:
        """As ``Worker.add_exchange``: a collective. Raises ConfigError."""
        _check(optimizer)
        exchange = RemoteExchange(optimizer, names, with_rows, self.job, len(self._exchanges), share=share)
        exchange.expect(self._mail)
        groups = [g for g, group in enumerate(optimizer.param_groups) for _ in group["params"]]
        if self.rank == 0:
            for place, parameter in enumerate(exchange.parameters):
                self._line.put(self._link, f"value/{place}", parameter.cpu())
        state = {str(i): dict(optimizer.state[p]) for i, p in enumerate(exchange.parameters) if optimizer.state.get(p)}
        entries = exchange.spec.table.entries
        request = remote.WrapOptimizer(
            optimizer=optimizers.class_path(type(optimizer)),
            settings=optimizers.encode(optimizers.settings(optimizer)),
            parameters=[
                remote.Parameter(e.name, e.shape, e.stride, e.dtype, g, id(p) in with_rows)
                for e, g, p in zip(entries, groups, exchange.parameters, strict=True)
            ],
            state=self._line.put_document(self._link, "state", state),
            spec=msgspec.msgpack.encode(exchange.spec),
        )
        self._exchanges.append(exchange)
        self._ask(request)
        exchange.adopt(lambda: self._show_state(exchange))
        if isinstance(self.job.pace, Sync):
            clipping.register(self)
        return exchange

    def add_store(self, optimizer: optim.Optimizer, names: dict[int, str]) -> NoReturn:
        raise ConfigError(
            "run.store does not work yet in workers that paceline run has not started (torchrun)",
            fix="paceline run SCRIPT on one host",
        )

    def average_buffers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """As ``Worker.average_buffers``."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        self._buffers.append([tensor for _, tensor in tensors])
        self._ask(remote.WrapBuffers(msgspec.msgpack.encode(table)))

    def share_loader(self, loader: Any, count: Count | None) -> Any:
        """As ``Worker.share_loader``."""
        index = self._ask(remote.WrapLoader())
        self.passes.add(index, draws_ahead=_draws_ahead(loader))
        return share(loader, index, self._part, self.passes, count)

    def copy_from_first(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """As ``Collectives.copy_from_first``."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        if self.rank == 0:
            for place, (_, tensor) in enumerate(tensors):
                self._line.put(self._link, f"copy/{place}", tensor.cpu())
        self._ask(remote.CopyFirst(msgspec.msgpack.encode(table)))
        self._take([tensor for _, tensor in tensors], "copied")

    def barrier(self) -> None:
        self._ask(remote.Barrier())

    def knows(self, models: Sequence[nn.Module]) -> None:
        self.passes.models = list(models)

    # --- the training loop ---

    def exchange(self, index: int, *, void: bool = False) -> None:
        """One optimizer step of exchange ``index``, as the pace says."""
        one = self._exchanges[index]
        if self.over:
            self._ask(remote.Step(index, void, b"", {}, b""))  # it has to be told where training was interrupted
            return
        one.replica.check_unchanged()
        if one.inner is not None:
            self._local_step(one, void=void)
            return
        mask, rows = (b"", {}) if void else self._send_gradients(one)
        self._ask(remote.Step(index, void, mask, rows, one.changed_settings()))

    def _local_step(self, one: RemoteExchange, *, void: bool) -> None:
        assert one.inner is not None
        bad = None if void else one.first_bad()
        ends = one.inner.step(Push(-1.0 if void or bad is not None else 1.0, (0.0, 0.0), stop=False))
        self._notes.append(remote.LocalStep(one.index, void, bad))
        steps = self.job.steps
        if ends or len(self._notes) > _MOST_NOTES or (steps is not None and self.step_number >= steps):
            self._ask(remote.Meet({e.index: e.changed_settings() for e in self._exchanges}))

    def _send_gradients(self, one: RemoteExchange) -> tuple[bytes, dict[int, bool]]:
        one.replica.write_gradients()
        for what, tensor in one.gradients():
            self._line.put(self._link, what, tensor)
        return bytes(one.replica.slot.mask), one.unique_rows()

    def norm(self, exchange: Any, chosen: bytes, order: float) -> float:
        """The norm of a gradient of this exchange over all workers; see engine/clipping.py."""
        mask, rows = self._send_gradients(exchange)
        return float(self._ask(remote.Norm(exchange.index, mask, rows, chosen, order)))

    def loaded(self, parameters: Iterable[nn.Parameter]) -> None:
        """The script has loaded a checkpoint into these parameters: it counts for all workers."""
        given = {id(parameter) for parameter in parameters}
        for exchange in self._exchanges:
            if any(id(parameter) in given for parameter in exchange.parameters):
                for place, parameter in enumerate(exchange.parameters):
                    self._line.put(self._link, f"value/{place}", parameter.cpu())
                self._ask(remote.Load(exchange.index, True, None))

    def loaded_state(self, index: int) -> None:
        """The script has loaded a checkpoint into an optimizer."""
        one = self._exchanges[index]
        if one.steps_by_itself:
            return
        optimizer = one.optimizer
        state = {str(i): dict(optimizer.state[p]) for i, p in enumerate(one.parameters) if optimizer.state.get(p)}
        self._ask(remote.Load(index, False, self._line.put_document(self._link, "state", state)))
        if one.inner is None:
            optimizer.state.clear()

    def log(self, loss: float | None, values: dict[str, float]) -> None:
        self._notes.append(remote.Told(loss, values))
        if len(self._notes) > _MOST_NOTES:
            self._ask(remote.Meet({}))

    def _show_state(self, one: RemoteExchange) -> None:
        """Let the script's optimizer show the state that home has."""
        told = self._ask(remote.ShowState(one.index))
        for place, values in self._mail.take_document("shown", told).items():
            one.optimizer.state[one.parameters[int(place)]] = values

    # --- the end ---

    def close(self) -> None:
        """There is nothing that home has not been told."""

    def finish(self) -> None:
        """The script has come to its end."""
        if not self.is_over:
            self._line.is_leaving = True
            self._ask(remote.Finish())
            self._leave()

    def broke(self, failure: messages.Failed) -> None:
        """The script has raised this."""
        if not self.is_over:
            self._notes = []
            self._line.is_leaving = True
            self._ask(remote.Broke(failure))
            self._leave()

    def _leave(self) -> None:
        self.is_over = self._line.is_over = True
        self._link.close()

    # --- asking ---

    def note(self, note: remote.Note) -> None:
        self._notes.append(note)

    def _ask(self, request: remote.Request) -> Any:
        """Blocks until the deputy has done it. Raises what the deputy's worker raised; ends the process if the run is
        being stopped, or home is lost."""
        self._send(request)
        answer = self._line.answer()
        self._take_status(answer.status)
        if answer.failure is not None:
            _raise(answer.failure)
        return answer.value

    ask = _ask

    def _send(self, request: remote.Request) -> None:
        notes, self._notes = self._notes, []
        if any(isinstance(note, remote.Left) for note in notes) or isinstance(request, remote.End):
            for index, tensors in enumerate(self._buffers):
                for place, tensor in enumerate(tensors):
                    self._line.put(self._link, f"buffers/{index}/{place}", tensor.cpu())
        for exchange in self._exchanges:
            if exchange.inner is not None:
                self._bring(exchange, notes)
        with self._line.kept():
            self._link.send(remote.Ask(notes, request))

    def _bring(self, one: RemoteExchange, notes: list[remote.Note]) -> None:
        """What local steps have come to goes with the last of them that counts: home may close the period."""
        for place in range(len(notes) - 1, -1, -1):
            note = notes[place]
            if isinstance(note, remote.LocalStep) and note.exchange == one.index and not note.void and note.bad is None:
                one.write_local()
                for what, tensor in one.gradients():
                    self._line.put(self._link, what, tensor)
                notes[place] = msgspec.structs.replace(note, brings=True, mask=bytes(one.replica.slot.mask))
                return

    def _take_status(self, status: remote.Status) -> None:
        self._status = status
        self.passes.take(status)
        for exchange, steps in zip(self._exchanges, status.periods, strict=False):
            if exchange.inner is not None and not steps:
                exchange.inner.begin()
        for index, tables in status.fresh.items():
            self._exchanges[index].take_newest(self._mail, tables)
        if status.buffers:
            for index, tensors in enumerate(self._buffers):
                self._take(tensors, f"averaged/{index}")

    def _take(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        with torch.no_grad():
            for place, tensor in enumerate(tensors):
                tensor.copy_(self._mail.take(f"{name}/{place}", tensor.dtype).view(tensor.shape))


class RemoteExchange:
    """One wrapped optimizer: its parameters in memory of this process, laid out as at home."""

    def __init__(
        self,
        optimizer: optim.Optimizer,
        names: dict[int, str],
        with_rows: set[int],
        job: Job,
        index: int,
        *,
        share: bool,
    ) -> None:
        optimizers.check(optimizer)
        self.optimizer, self.index, self._pace = optimizer, index, job.pace
        self.parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self.spec, stepped_by = describe(optimizer, names, with_rows, job, job.pace)
        self.steps_by_itself = stepped_by is not optimizer
        own = msgspec.structs.replace(self.spec, workers=1, servers=0, parts=0, state=())
        self._memory = ExchangeMemory(mmap.mmap(-1, size_bytes(own)), own)
        self.replica = Replica(optimizer, own, self._memory, 0, views=share and not isinstance(job.pace, Local))
        self.inner = make_inner(self.replica, job.pace)
        self._settings = optimizers.Settings(optimizer)

    def expect(self, mail: Mail) -> None:
        for vector in self.spec.table.dense_sizes:
            mail.expect(f"parameters/{self.index}/{vector}", self._memory.params[vector])

    def adopt(self, show_state: Callable[[], None]) -> None:
        """The newest values have come: from now on the parameters lie where these come."""
        self.replica.adopt()
        if not self.steps_by_itself and self.inner is None:
            self.optimizer.state.clear()
            self.optimizer.register_state_dict_pre_hook(lambda _: show_state())

    def take_newest(self, mail: Mail, tables: Sequence[int]) -> None:
        """They have come; of these tables the rows that have changed."""
        with torch.no_grad():
            for place in tables:
                entry = self.spec.table.entries[place]
                numbers = mail.take(f"numbers/{self.index}/{place}", torch.int64)
                shared = self.replica.shared[place]
                shared[numbers] = mail.take(f"rows/{self.index}/{place}", shared.dtype).view(-1, entry.row)
        self.replica.pull()

    def gradients(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What is in the slot: dense vectors, and rows with their numbers; aliases."""
        slot = self.replica.slot
        for vector in self.spec.table.dense_sizes:
            yield f"gradient/{self.index}/{vector}", slot.gradient[vector]
        for place, count in self._rows().items():
            entry = self.spec.table.entries[place]
            values = self.spec.table.view(entry, slot.gradient[entry.vector]).view(-1)
            yield f"numbers/{self.index}/{place}", slot.rows[place][1 : count + 1]
            yield f"values/{self.index}/{place}", values[: count * entry.row]

    def unique_rows(self) -> dict[int, bool]:
        return {place: int(self.replica.slot.rows[place][0]) >= 0 for place in self._rows()}

    def _rows(self) -> dict[int, int]:
        """How many rows each table's gradient has, of those that have one."""
        slot = self.replica.slot
        return {place: abs(int(area[0])) for place, area in slot.rows.items() if slot.mask[place]}

    def write_local(self) -> None:
        """Into the slot, what local steps have come to: the parameters, or the sum that is there."""
        assert self.inner is not None
        if not isinstance(self._pace, Local):
            self.inner.brought()
            return
        entries, vectors = self.spec.table.entries, self.replica.slot.gradient
        with torch.no_grad():
            for entry, parameter in zip(entries, self.parameters, strict=True):
                self.spec.table.view(entry, vectors[entry.vector]).copy_(parameter)

    def first_bad(self) -> int | None:
        """The first parameter whose gradient is not finite."""
        if self.replica.has_finite_gradients():
            return None
        gradients = [p.grad for p in self.parameters]
        return next(i for i, g in enumerate(gradients) if g is not None and not torch.isfinite(g.to_dense()).all())

    def changed_settings(self) -> bytes:
        """The hyper-parameters of the optimizer that steps at home, if they have changed."""
        changed = None if self.steps_by_itself else self._settings.changed()
        return b"" if changed is None else optimizers.encode(changed)


class RemotePasses:
    """A ``data.loader.Passes`` that asks the deputy's."""

    def __init__(self, worker: RemoteWorker) -> None:
        self._worker = worker
        self.models: list[nn.Module] = []
        self._epochs: list[int] = []
        self._skips: dict[int, int] = {}
        self._draw_ahead: set[int] = set()
        self._leased: dict[int, bool] = {}
        self._verdicts: dict[int, bool] = {}
        self._marks: tuple[int, object] = (0, None)

    def add(self, loader: int, *, draws_ahead: bool) -> None:
        """One more loader. ``draws_ahead``: batches that it has drawn need not go to the script."""
        if draws_ahead:
            self._draw_ahead.add(loader)

    def take(self, status: remote.Status) -> None:
        """What an answer tells of passes."""
        if status.epochs:
            self._epochs = status.epochs
        for loader, counted in status.verdicts.items():
            self._verdicts[loader] = counted or self._verdicts.get(loader, False)

    @property
    def over(self) -> bool:
        return self._worker.over

    @property
    def may_drop(self) -> bool:
        return isinstance(self._worker.job.pace, Quorum)

    def begin(self, loader: int, length: int | None) -> bool:
        request = remote.Begin(loader, length, self._is_training(), self._count_marks())
        is_real, self._skips[loader], self._leased[loader] = self._worker.ask(request)
        return bool(is_real)

    def epoch(self, loader: int) -> int:
        return self._epochs[loader] if loader < len(self._epochs) else 0

    def skip(self, loader: int) -> int:
        return self._skips[loader]

    def deal(self, loader: int) -> None:
        """Nobody comes, and who is lost takes its part along."""

    def fetching(self) -> None:
        """Only newcomers have something to do here."""

    def fetched(self, loader: int) -> None:
        self._worker.note(remote.Fetched(loader))

    def border(self) -> None:
        self._worker.note(remote.Border())

    def needs_ghost(self, loader: int) -> bool:
        return False

    def drawn(self, samples: int) -> None:
        self._worker.note(remote.Drawn(samples))

    def leases(self, loader: int) -> _Leases | None:
        if not self._leased[loader]:
            return None
        return _Leases(self._worker, loader, draws_ahead=loader in self._draw_ahead)

    def more(self, loader: int) -> bool:
        return bool(self._worker.ask(remote.More(loader)))

    def verdict(self, loader: int) -> bool | None:
        return self._verdicts.pop(loader, None)

    def end(self, loader: int) -> None:
        self._worker.ask(remote.End(loader, self._is_training(), self._count_marks()))

    def leave(self, loader: int) -> None:
        self._worker.note(remote.Left(loader, self._count_marks()))

    def _is_training(self) -> bool:
        return torch.is_grad_enabled() and (not self.models or any(model.training for model in self.models))

    def _count_marks(self) -> int:
        """Another number whenever a backward pass has added to a gradient."""
        marks = gradient_marks([p for exchange in self._worker.exchanges for p in exchange.parameters])
        if marks != self._marks[1]:
            self._marks = (self._marks[0] + 1, marks)
        return self._marks[0]


class _Leases:
    """A ``data.loader.Leases``. Each call is a round trip: whose a batch still is, is known at home alone. Where what
    is drawn is the next that the script gets, it is begun with that."""

    def __init__(self, worker: RemoteWorker, loader: int, *, draws_ahead: bool) -> None:
        self._worker, self._loader, self._draws_ahead = worker, loader, draws_ahead

    def draw(self, total: int | None, at_least: int = 0) -> int | None:
        request = remote.DrawLease(self._loader, total, at_least, not self._draws_ahead)
        ordinal: int | None = self._worker.ask(request)
        return ordinal

    def drop(self) -> None:
        self._worker.ask(remote.DropLease(self._loader))

    def begin(self) -> bool:
        return not self._draws_ahead or bool(self._worker.ask(remote.BeginLease(self._loader)))


def _draws_ahead(loader: Any) -> bool:
    """Does it draw batches before the script asks for them, or that may not be there? A plain loader does neither."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.num_workers > 0


class _Collectives:
    def __init__(self, worker: RemoteWorker) -> None:
        self.copy_from_first, self.barrier = worker.copy_from_first, worker.barrier


class _Saving:
    """What scripts keep is not in checkpoints that home makes; it is checked all the same."""

    def __init__(self) -> None:
        self.keeper = Keeper()

    def keep_if_possible(self, item: Any) -> None:
        pass


class Line:
    """This process's end of the link: what comes, and what its end means. ``sink`` is called by the link's thread."""

    def __init__(self, rank: int) -> None:
        self._rank, self.mail, self.is_over = rank, Mail(), False
        self.is_leaving = False  # the next answer is the last
        self._said = threading.Lock()

    def sink(self, event: Event) -> None:
        """Tell of the end at once, and end a process that does not come to hear it."""
        is_stop = isinstance(event, Received) and isinstance(event.message, remote.Stop)
        if self.is_leaving and isinstance(event, Received) and isinstance(event.message, remote.Answer):
            self.is_over = True  # the deputy hangs up now
        if not self.is_over and (is_stop or isinstance(event, Ended)):
            self._tell(event)
        self.mail.events.put(event)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Sending, within it, ends the process if home is lost."""
        try:
            yield
        except LinkEnded as lost:
            self.give_up(str(lost))

    def put(self, link: Link, what: str, tensor: torch.Tensor) -> None:
        with self.kept():
            send(link, what, tensor)

    def put_document(self, link: Link, prefix: str, value: Any) -> Any:
        with self.kept():
            return send_document(link, prefix, value)

    def answer(self) -> remote.Answer:
        while True:
            match self.mail.events.get():
                case Received(message=remote.Answer() as answer):
                    return answer
                case Received(message=remote.Stop(reason=reason)):
                    self.give_up(reason)
                case Ended(reason=reason):
                    self.give_up(reason)

    def give_up(self, reason: str) -> NoReturn:
        """Raises SystemExit. Why has been told already, or is on its way."""
        self._say(f"home is lost: {reason}")
        self.is_over = True
        raise SystemExit(STOPPED)

    def _tell(self, event: Event) -> None:
        if isinstance(event, Received):
            self._say(f"told to stop: {event.message.reason}")
        elif isinstance(event, Ended):
            self._say(f"home is lost: {event.reason}")
        watch = threading.Timer(_GRACE_S, self._end_by_force)
        watch.daemon = True
        watch.start()

    def _say(self, text: str) -> None:
        if self._said.acquire(blocking=False):  # once
            sys.stderr.write(f"paceline: worker {self._rank} ends: {text}\n")
            sys.stderr.flush()

    def _end_by_force(self) -> None:
        if not self.is_over:
            os._exit(STOPPED)


def _check(optimizer: optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer that cannot be made anew at home."""
    kind = type(optimizer)
    own = optimizers.own_attributes(optimizer)
    if own:
        raise ConfigError(
            f"{kind.__name__} keeps {own[0]!r} in the object; home, which steps, gets the class and param_groups only",
            fix="keep it in param_groups (the constructor's defaults)",
        )
    if kind.__module__ == "__main__":
        raise ConfigError(
            f"optimizer {kind.__qualname__} is defined in the script, which home does not import",
            fix="put the class in a module beside the script",
        )


def _raise(failure: messages.Failed) -> NoReturn:
    if failure.kind == "Interrupted":
        raise KeyboardInterrupt
    if failure.kind == "SystemExit":
        raise SystemExit(0)
    kind = getattr(errors, failure.kind, HostError)
    assert issubclass(kind, PacelineError)
    raise kind(failure.what, why=failure.why, fix=failure.fix)
