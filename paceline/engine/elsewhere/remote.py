"""A worker in a process that home has not forked, perhaps on another host: a stub with a worker's face.

    script --> RemoteWorker --Ask--> link --> its deputy at home, which is the worker there --Answer--> script

Here are the model, its gradients, the data and local steps; all else is asked for. The newest parameters are received
straight into the memory that the model's parameters are views of. What needs no answer is kept and goes with the next
that does, so that a step is one round trip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset

from paceline import errors
from paceline.config import Async, Job, Sync
from paceline.data.fingerprint import fingerprint
from paceline.data.loader import Count, share
from paceline.data.part import Part
from paceline.data.trained import Trained
from paceline.engine.elsewhere.around import Around
from paceline.engine.elsewhere.line import Asked, Line
from paceline.engine.elsewhere.mail import describe_document, send_packed
from paceline.engine.elsewhere.range_links import RangeLinks, Spread
from paceline.engine.elsewhere.remote_exchange import RemoteExchange, check_elsewhere
from paceline.engine.elsewhere.remote_gradients import RemoteGradients
from paceline.engine.elsewhere.remote_host import RemoteHost
from paceline.engine.elsewhere.remote_passes import RemotePasses
from paceline.engine.elsewhere.remote_store import RemoteStore
from paceline.engine.exchange.meeting import Push
from paceline.engine.exchange.spec import describe
from paceline.engine.setup import decode_job
from paceline.engine.worker import clipping
from paceline.engine.worker.keeping import Keeper
from paceline.engine.worker.left_out import LeftOut
from paceline.engine.worker.weights import Zeroing
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.params import optimizers
from paceline.params.packing import Tensors
from paceline.params.table import tabulate
from paceline.protocol import messages, remote
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link
from paceline.transport.slots import Spec

_MOST_NOTES = 1000


class RemoteWorker:
    """The face of ``engine/worker/`` that ``run/``, the loaders and clipping use. Not for several threads."""

    def __init__(self, link: Link, line: Line, rank: int, around: Around) -> None:
        """Raises NotLetIn if the place is not free yet."""
        self.rank, self._link, self._line, self._mail = rank, link, line, line.mail
        self._status = remote.Status()
        self._gradients, self._around = RemoteGradients(link, line, rank), around
        self._host = RemoteHost(rank, around, self._gradients, line, self._ask)
        self._notes: list[remote.Note] = []
        self._fill: Callable[[], Any] = lambda: None  # sends what was asked to be shared last
        self._exchanges: list[RemoteExchange] = []
        self._buffers: list[list[torch.Tensor]] = []
        self.left_out = LeftOut(asked_rank=True)  # of the script that runs in this process
        self.is_over = False  # has it said that it has finished, or failed?
        self.passes = RemotePasses(self)
        self.zeroing = Zeroing(self._exchanges, lambda exchange, in_hand: self.note(remote.Dropped(exchange, in_hand)))
        self.passes.drawing = self.zeroing.drawing
        self.collectives = _Collectives(self)
        self.saving = _Saving()
        told = self._ask(remote.Who(around.host(rank), os.getpid()))
        line.is_in = True
        self._is_newcomer = not self._status.joined and not told["resumes"]
        self.job: Job = decode_job(told["job"])
        self._kind = self._host.choose(self.job, told, link, is_newcomer=self._is_newcomer)
        servers: dict[int, tuple[str, int]] = {int(server): tuple(place) for server, place in told["servers"].items()}
        self._servers = RangeLinks(link, servers) if servers else None
        self.directory = Path(told["directory"])
        self._part = Part(
            *((0, 1) if self.job.data == "own" else (rank, self.job.workers)),
            "round_robin" if self.job.assign == "lease" else self.job.assign or "round_robin",
            self.job.seed,
            msgspec.convert(told["trained"], tuple[tuple[Trained, ...], ...]),
        )

    @property
    def num_workers(self) -> int:
        """How many the run is to have."""
        return self._status.workers

    @property
    def is_behind(self) -> bool:
        """Does this process still do again what the worker before it in its place had done?"""
        return self._status.behind

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
        exchange = RemoteExchange(
            optimizer, names, with_rows, self.job, len(self._exchanges), share=share, travels=self._is_from_afar
        )
        if self._servers is not None:
            exchange.spread = Spread(exchange.index, exchange.spec, self._servers)
        kind = self._host.lay_out(exchange, self._kind)
        request = self._to_wrap(optimizer, exchange.spec, with_rows, kind)
        members, crew = self._host.members(exchange, kind)
        request = msgspec.structs.replace(request, members=members, crew=crew)
        self._exchanges.append(exchange)
        place = self._ask_to_share(request, exchange.parameters, optimizer)
        if kind == remote.HOME:
            exchange.attach(tuple(place), self.rank)
        exchange.adopt(lambda: self._show_state(exchange))
        if isinstance(self.job.pace, Sync):
            clipping.register(self)
            if self._status.joined:
                self._send_early([exchange])
        return exchange

    def _to_wrap(self, optimizer: optim.Optimizer, spec: Spec, with_rows: set[int], kind: str) -> remote.WrapOptimizer:
        parameters = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        return remote.WrapOptimizer(
            optimizer=optimizers.class_path(type(optimizer)),
            settings=optimizers.encode(optimizers.settings(optimizer)),
            parameters=[
                remote.Parameter(e.name, e.shape, e.stride, e.dtype, g, id(p) in with_rows)
                for e, (g, p) in zip(spec.table.entries, parameters, strict=True)
            ],
            state=describe_document(_state(optimizer)),
            spec=msgspec.msgpack.encode(spec),
            memory=kind,
        )

    @property
    def _is_from_afar(self) -> bool:
        """Does what this worker brings go to another host?"""
        return self._around.are_apart or self.job.servers_apart

    def _send_early(self, exchanges: Sequence[RemoteExchange]) -> None:
        """Gradients of ghost batches are nobody's business; those from here on are."""
        if self._is_from_afar and not self._is_newcomer and isinstance(self.job.pace, Sync):
            for exchange in exchanges:
                self._gradients.send_early(exchange)

    def add_store(self, optimizer: optim.Optimizer, names: dict[int, str]) -> RemoteStore:
        """As ``Worker.add_store``. Raises ConfigError."""
        check_elsewhere(optimizer)
        spec, _ = describe(optimizer, names, set(), self.job, Async())
        request = self._to_wrap(optimizer, spec, set(), remote.STORE)
        number = self._ask_to_share(request, _parameters(optimizer), optimizer)
        return RemoteStore(optimizer, number, self._link, self._line, self._ask)

    def average_buffers(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """As ``Worker.average_buffers``."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        self._buffers.append([tensor for _, tensor in tensors])
        self._ask(remote.WrapBuffers(msgspec.msgpack.encode(table)))

    def share_loader(self, loader: Any, count: Count | None) -> Any:
        """As ``Worker.share_loader``."""
        index = self._ask(remote.WrapLoader(fingerprint(loader)))
        self.passes.add(index, draws_ahead=_draws_ahead(loader))
        return share(loader, index, self._part, self.passes, count)

    def copy_from_first(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """As ``Collectives.copy_from_first``."""
        table = tabulate((name, 0, tensor) for name, tensor in tensors)
        values = [tensor for _, tensor in tensors]
        self._ask_to_share(remote.CopyFirst(msgspec.msgpack.encode(table)), values)
        self._take(values, "copied")

    def _ask_to_share(
        self, request: remote.Request, values: Sequence[torch.Tensor], optimizer: optim.Optimizer | None = None
    ) -> Any:
        """Ask for a collective that begins with the values, and the state, of one worker: of this one, if told so."""

        def fill() -> Any:
            for place, value in enumerate(values):
                self._line.put(self._link, f"value/{place}", value.cpu())
            return None if optimizer is None else self._line.put_document(self._link, "state", _state(optimizer))

        self._fill = fill
        return self._ask(request)

    def barrier(self) -> None:
        self._ask(remote.Barrier())

    def knows(self, models: Sequence[nn.Module]) -> None:
        self.passes.models = list(models)

    # --- the training loop ---

    def exchange(self, index: int, *, void: bool = False) -> None:
        """One optimizer step of exchange ``index``, as the pace says."""
        one = self._exchanges[index]
        self.zeroing.stepped(index)
        if self.over:
            self._ask(remote.Step(index, void, b"", {}, b""))  # it has to be told where training was interrupted
            one.stepped()
            return
        if self.passes.has_ghost or not (self._status.joined or self._ask(remote.Counts())):
            return
        one.replica.check_unchanged()
        if one.inner is not None:
            self._local_step(one, void=void)
            return
        self._ask(self._gradients.bring(one, void=void))
        self._host.check(one, is_over=self.over)
        one.stepped()

    def _local_step(self, one: RemoteExchange, *, void: bool) -> None:
        assert one.inner is not None
        bad = None if void else one.first_bad()
        ends = one.inner.step(Push(-1.0 if void or bad is not None else 1.0, (0.0, 0.0), stop=False))
        self._notes.append(remote.LocalStep(one.index, void, bad))
        steps = self.job.steps
        if ends or len(self._notes) > _MOST_NOTES or (steps is not None and self.step_number >= steps):
            self._ask(remote.Meet({e.index: e.changed_settings() for e in self._exchanges}))

    def norm(self, exchange: Any, chosen: bytes, order: float) -> float:
        """The norm of a gradient of this exchange over all workers; see engine/worker/clipping.py."""
        return float(self._ask(self._gradients.measure(exchange, chosen, order)))

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
        state = _state(one.optimizer)
        self._ask(remote.Load(index, False, self._line.put_document(self._link, "state", state)))
        if one.inner is None:
            one.optimizer.state.clear()

    def log(self, loss: float | None, values: dict[str, float]) -> None:
        self._notes.append(remote.Told(loss, values))
        if len(self._notes) > _MOST_NOTES:
            self._ask(remote.Meet({}))

    def _show_state(self, one: RemoteExchange) -> None:
        """Let the script's optimizer show the state that home has."""
        told = self._ask(remote.ShowState(one.index))
        for parameter, values in self._mail.take_states("shown", told, one.parameters):
            one.optimizer.state[parameter] = values

    # --- the end ---

    def close(self) -> None:
        """There is nothing that home has not been told."""

    def finish(self) -> None:
        """The script has come to its end."""
        if not self.is_over:
            self._line.is_leaving = True
            self._ask(remote.Finish(self.left_out.asked_rank, self.left_out.of_models(self._exchanges)))
            self._leave()

    def broke(self, failure: messages.Failed) -> None:
        """The script has raised this."""
        if not self.is_over:
            self._notes = []
            self._line.is_leaving = True
            self._ask(remote.Broke(failure))
            self._leave()

    def _leave(self) -> None:
        self.abandon()
        self._link.close()

    def abandon(self) -> None:
        """Home is told nothing more."""
        self.is_over = self._line.is_over = True
        self._gradients.stop()
        self._host.stop()
        if self._servers is not None:
            self._servers.stop()

    def printed(self, data: bytes) -> None:
        """For the log at home. May be called by another thread."""
        with suppress(LinkEnded):
            self._link.send(remote.Printed(data))

    def terminated(self) -> None:
        """This process has been asked to end: all shall, behind one step. May be called by another thread."""
        with suppress(LinkEnded):
            self._link.send(remote.Terminated())

    # --- asking ---

    def note(self, note: remote.Note) -> None:
        self._notes.append(note)

    def _ask(self, request: remote.Request) -> Any:
        """Blocks until the deputy has done it. Raises what the deputy's worker raised; ends the process if the run is
        being stopped, or home is lost."""
        with self._line.asking():
            self._send(request)
            answer = self._line.answer(self._heed)
            self._take_status(answer.status)
        if answer.failure is not None:
            _raise(answer.failure)
        return answer.value

    ask = _ask

    def _heed(self, asked: Asked) -> None:
        """What the deputy asks meanwhile."""
        if isinstance(asked, remote.Close):
            self._follow(asked.exchange, asked.follow)
            return
        keeper, shown = self.saving.keeper, remote.Shown()
        try:
            if isinstance(asked, remote.SendFold | remote.SendOwn):
                shown = remote.Shown(self._host.heed(asked, self._exchange(asked.exchange)))
            elif isinstance(asked, remote.Fill):
                shown = remote.Shown(self._fill())
            elif isinstance(asked, remote.Show):
                tensors: Tensors = {}
                document = keeper.state(self._exchanges, tensors, random=asked.random)
                with self._line.kept():
                    shown = remote.Shown(send_packed(self._link, "kept", document, tensors))
            else:
                keeper.load(*self._mail.take_packed("keep", asked.kept), self._exchanges, random=asked.random)
                self._put_buffers()  # at the end of a pass of ghosts those that went with it were others
        except PacelineError as error:
            shown = remote.Shown(failure=messages.Failed(type(error).__name__, error.what, error.why, error.fix))
        with self._line.kept():
            self._link.send(shown)

    def _send(self, request: remote.Request) -> None:
        notes, self._notes = self._notes, []
        if any(isinstance(note, remote.Left) for note in notes) or isinstance(request, remote.End):
            self._put_buffers()
        for exchange in self._exchanges:
            if exchange.inner is not None:
                self._gradients.bring_local(exchange, notes)
        with self._line.kept():
            self._link.send(remote.Ask(notes, request, self._gradients.letters.take()))

    def _put_buffers(self) -> None:
        for index, tensors in enumerate(self._buffers):
            for place, tensor in enumerate(tensors):
                self._line.put(self._link, f"buffers/{index}/{place}", tensor.cpu())

    def _take_status(self, status: remote.Status) -> None:
        if status.joined and not self._status.joined:
            self.forget_gradients()
            self._send_early(self._exchanges)
        self._status = status
        self.passes.take(status)
        for exchange, steps in zip(self._exchanges, status.periods, strict=False):
            if exchange.inner is not None and not steps:
                exchange.inner.begin()
        for index, awaited in status.awaits.items():
            with self._line.kept():
                self._exchange(index).take_from_servers(awaited)
        for index, tables in status.fresh.items():
            self._exchange(index).take_newest(self._mail, tables)
        if status.buffers:
            for index, tensors in enumerate(self._buffers):
                self._take(tensors, f"averaged/{index}")
        for index, told in status.follow.items():
            self._follow(index, told)
        for index, values in status.brought.items():
            self._host.bring(self._exchange(index), values)
        for index in status.apart:
            self._host.leave(self._exchange(index))

    def _follow(self, index: int, told: remote.Follow) -> None:
        one = self._exchange(index)
        if (mistake := one.mistaken(told)) is not None:
            raise HostError(f"home has told this worker to step what cannot be: {mistake}")
        if self._host.follow(one, told):
            with self._line.kept():
                self._link.send(remote.Took(index, told.number))

    def _exchange(self, index: int) -> RemoteExchange:
        """Raises HostError."""
        if not 0 <= index < len(self._exchanges):
            raise HostError(f"home speaks of exchange {index}; this worker has {len(self._exchanges)}")
        return self._exchanges[index]

    def forget_gradients(self) -> None:
        """Those of ghost batches, which are not to be in the next step."""
        for exchange in self._exchanges:
            for parameter in exchange.parameters:
                parameter.grad = None

    def _take(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        with torch.no_grad():
            for place, tensor in enumerate(tensors):
                tensor.copy_(self._mail.take(f"{name}/{place}", tensor.dtype, tensor.shape))


def _parameters(optimizer: optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state(optimizer: optim.Optimizer) -> dict[str, dict[str, Any]]:
    """By the parameter's place, of those that have any."""
    state = optimizer.state
    return {str(place): dict(state[p]) for place, p in enumerate(_parameters(optimizer)) if state.get(p)}


def _draws_ahead(loader: Any) -> bool:
    """Does it draw batches before the script asks for them, or that may not be there? A plain loader does neither."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.num_workers > 0


class _Collectives:
    def __init__(self, worker: RemoteWorker) -> None:
        self.copy_from_first, self.barrier = worker.copy_from_first, worker.barrier


class _Saving:
    """As ``checkpoint.saving.Saving``, of which only what the script keeps is here."""

    def __init__(self) -> None:
        self.keeper = Keeper()

    def keep_if_possible(self, item: Any) -> None:
        with suppress(ConfigError):  # training is none the worse for it
            self.keeper.add(item)


def _raise(failure: messages.Failed) -> NoReturn:
    if failure.kind == "Interrupted":
        raise KeyboardInterrupt
    if failure.kind == "SystemExit":
        raise SystemExit(0)
    raise errors.kind_of(failure.kind, HostError)(failure.what, why=failure.why, fix=failure.fix)
