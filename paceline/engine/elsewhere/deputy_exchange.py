"""One wrapped optimizer of a worker elsewhere, as its deputy has it: the other end of ``remote_exchange.py``.

link --> gradients, rows --> the worker's slot, or vectors of its own --> engine/exchange/exchange.py
link <-- the newest values that the worker has not, or what its mirror is to step (forward.py) <--'
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import torch
from torch import optim

from paceline.config import Local, Sync
from paceline.engine.context import Context
from paceline.engine.elsewhere.changed_rows import ChangedRows
from paceline.engine.elsewhere.deputy_line import DeputyLine
from paceline.engine.elsewhere.forward import Forward
from paceline.engine.elsewhere.host_push import HostPush
from paceline.engine.elsewhere.mail import send, send_document
from paceline.engine.elsewhere.making import make, parameters_of, set_state
from paceline.engine.elsewhere.owners_push import OwnersPush
from paceline.engine.elsewhere.ranges import send_span, whole
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError
from paceline.params import optimizers, rows
from paceline.params.table import DTYPES
from paceline.protocol import remote
from paceline.protocol.ranges import at_home as at_home_of
from paceline.transport.ends import LinkEnded


def wrap(
    worker: Worker, request: remote.WrapOptimizer, line: DeputyLine
) -> tuple[DeputyExchange, tuple[int, int] | None]:
    """Share the worker's optimizer: a collective. With the process and descriptor of home's memory, where the worker is
    to have that in use. Raises ConfigError."""
    index, collectives, is_home = len(worker.exchanges), worker.collectives, request.memory == remote.HOME
    optimizer, names, with_rows = make(request)
    check_crew(request, worker.rank, worker.context.job.workers)
    collectives.keeps = is_home
    with filling(worker, line, parameters_of(optimizer), optimizer):
        exchange = worker.add_exchange(optimizer, names, with_rows, share=True)
    collectives.keeps = False
    if msgspec.msgpack.encode(exchange.spec) != request.spec:
        raise ConfigError(
            f"{type(optimizer).__name__} is not the same at home as on worker {worker.rank}",
            why="made of the same settings it keeps other state there, so versions differ",
            fix="install the same versions of torch and of the optimizer's module on all hosts",
        )
    line.maps_home = line.maps_home or is_home
    made = DeputyExchange(exchange, index, request, worker.context, line)
    return made, (os.getpid(), collectives.kept) if is_home else None


class DeputyExchange:
    """``at_home`` is exchange ``index``, which was made as was ``asked``."""

    def __init__(
        self, at_home: Exchange, index: int, asked: remote.WrapOptimizer, context: Context, line: DeputyLine
    ) -> None:
        memory, members, crew = asked.memory, asked.members or [context.rank], asked.crew
        self.at_home, self.index, self._memory = at_home, index, memory
        self._line, self._link, self._mail, self._lock = line, line.link, line.mail, context.lock
        self._table, self._slot = at_home.spec.table, at_home.memory.slots[context.rank]
        self._is_local = isinstance(context.job.pace, Local)
        # Are servers on other hosts part of it, which have what they step? Home's range is with home.
        self.is_spread = at_home.spec.hosts > 1
        spec = at_home.spec
        self._range = whole(spec, at_home_of(spec.servers, spec.hosts)) if self.is_spread else None
        self._is_sync = isinstance(context.job.pace, Sync)
        self._in_slots = self._is_sync or self.is_spread
        self._told = -1  # the number of the values that the worker has
        self._has_state = False  # an owner: with the state that belongs to them?
        self._changed = ChangedRows(at_home.memory, at_home.spec)
        self._gradients = self._expect()
        self._forward: Forward | None = None
        self._sent_bytes = 0
        host = HostPush(at_home.memory, context, members, self._fetch_fold, self._fetch_own)
        self._owners: OwnersPush | None = None
        if crew:
            host = self._owners = OwnersPush(at_home.memory, context, crew, members, self._fetch_folds, self._fetch_own)
        self._host = host if asked.members else None
        self._is_lead, self._shares = context.rank == members[0], memory == remote.HOST  # a mirror with others
        if self._host is None:
            host.leave()
        if memory in (remote.MIRROR, remote.HOST, remote.OWNER):
            others = [worker for worker in range(context.job.workers) if worker not in members]
            link = line.link if self._is_lead and not crew else None
            self._forward = Forward(at_home, index, others, crew or asked.members, link, self._close)
        self._set_way()

    def _set_way(self) -> None:
        rounds = self.at_home.in_rounds
        if rounds is not None:
            if self._host is not None:
                self._host.checked = rounds.checked
            rounds.bring = None if self._host is None else self._host.bring
            rounds.ask = None if self._host is None else self._host.ask

    def stop(self) -> None:
        if self._forward is not None:
            self._forward.stop()

    # --- a host's fold ---

    def take(self, request: remote.Step | remote.Norm) -> None:
        """The worker's gradients have come, or are where its host folds them. Raises ConfigError."""
        if request.offers:
            self._offer(request.mask, request.rows)
        elif self._is_sync and not self.is_spread and isinstance(request, remote.Step) and request.finite:
            self._bring_slot(request.mask, request.rows)
        else:
            self.give(request.mask, request.rows)

    def _bring_slot(self, mask: bytes, counts: dict[int, int]) -> None:
        """As ``give``, of what lies in the slot as it is to be and has been looked at by the worker."""
        self._begin(mask)
        for place in self._slot.rows if mask else ():
            if mask[place] and self._memory != remote.HOME:
                self._come_of(place, counts)
        self.at_home.offered = mask or None

    def _offer(self, mask: bytes, counts: dict[int, int]) -> None:
        if (self._host is None and not self.is_spread) or len(mask) != len(self.at_home.parameters):
            raise ConfigError(f"a fold was offered of {len(mask)} parameters")
        self._forget()
        if self._host is None:  # all servers have their part of it
            for place, count in counts.items():
                self._count_rows(place, count)
            self.at_home.offered = mask
            return
        for place in self._slot.rows if self._memory != remote.HOME else ():
            self._count_rows(place, counts.get(place, 0))  # they follow, if the gradient is to come alone
        self.at_home.offered, self._host.offers = mask, True

    def _fetch_fold(self, number: int, weights: list[float]) -> None:
        self._line.ask_worker(remote.SendFold(self.index, number, weights))

    def _fetch_folds(self, number: int, weights: list[float]) -> bool:
        sent_bytes = self._line.ask_worker(remote.SendFold(self.index, number, weights)).kept
        if not isinstance(sent_bytes, int | None):
            raise ConfigError(f"worker {self._line.rank} has sent {sent_bytes!r} bytes")
        self._sent_bytes += sent_bytes or 0
        return sent_bytes is not None

    def _fetch_own(self) -> None:
        self._line.ask_worker(remote.SendOwn(self.index))

    @property
    def is_apart(self) -> bool:
        """Is the worker to leave the mirror that its host shares?"""
        return self._host is not None and not self._host.is_one

    @property
    def is_whole(self) -> bool:
        """Do all of the worker's host share a mirror?"""
        return self._host is not None and self._host.is_one

    def leave(self) -> None:
        """The worker has memory of its own now."""
        self.stop()
        self._sent_bytes = self.sent_bytes
        if self._host is not None:
            self._host.leave()
        rounds = self.at_home.in_rounds
        assert rounds is not None
        rounds.on_close = lambda number, contributors: None
        self._host = self._owners = self._forward = None
        if self._memory != remote.HOME:
            self._memory, self._told = remote.OWN, -1
        self._set_way()

    def bring(self) -> remote.Brought | None:
        """Have the newest values come to the mirror that the worker's host shares; None if it has none."""
        host, at_home = self._host, self.at_home
        if host is None:
            return None
        number, loads = at_home.number, at_home.memory.loads[0]
        if self._owners is not None and not self._shares:
            # What is folded next needs the state too; while somebody is missing nothing is.
            # They may be told again: where a run is resumed, in a ghost batch, nobody has pushed the last round.
            is_known = self._told == number and self._has_state
            comes = self._has_state = not number or is_known or self._owners.were_all_in(number)
            if self._memory != remote.HOME:
                self._send_all(with_state=comes)
            self._told = number
            return remote.Brought(number, loads, comes)
        # As the exchange is shared the first worker makes the mirror: the others may not have it yet.
        comes = (self._told >= 0 or self._is_lead) and host.claim(number, loads)
        if comes:
            self._send_all()
            self._line.flush()
            host.arrived(number, loads)
        self._told = number
        self.took(number)
        return remote.Brought(number, loads, comes)

    @property
    def sent_bytes(self) -> int:
        """Of values and pushes."""
        return self._sent_bytes + (0 if self._forward is None else self._forward.sent_bytes)

    # --- what has come ---

    def _expect(self) -> dict[str, torch.Tensor]:
        """Where gradients come: in lockstep to the slot itself, which nobody reads until they are pushed."""
        table, slot, index = self._table, self._slot, self.index
        if not self._in_slots:
            vectors = {v: torch.zeros(n, dtype=DTYPES[v]) for v, n in table.dense_sizes.items()}
        else:
            vectors = {v: slot.gradient[v] for v in table.dense_sizes}
            for place, area in slot.rows.items():
                entry = table.entries[place]
                values = slot.gradient[entry.vector][entry.offset :][: entry.size]
                self._mail.make_room(f"numbers/{index}/{place}", area[1:])
                self._mail.make_room(f"values/{index}/{place}", values)
        for vector, tensor in vectors.items():
            self._mail.expect(f"gradient/{index}/{vector}", tensor)
        return vectors

    def give(self, mask: bytes, counts: dict[int, int]) -> None:
        """Give the parameters in ``mask`` the gradients that have come, and the others none. ``counts``: of rows, as in
        ``remote.Step``. Raises ConfigError."""
        parameters = self.at_home.parameters
        self._begin(mask)
        for place, view in enumerate(self._views()) if mask else ():
            parameter = parameters[place]
            if not mask[place]:
                continue
            if view is not None:
                parameter.grad = view
                continue
            parameter.grad = rows.gradient_of(rows.of_numbers(*self._come_of(place, counts)), parameter.shape)

    def _begin(self, mask: bytes) -> None:
        """Before something else is given. Raises ConfigError for what cannot be a mask."""
        self._forget()
        self.at_home.offered = None
        if self._host is not None:
            self._host.offers = False
        if mask and len(mask) != len(self.at_home.parameters):
            raise ConfigError(f"{len(mask)} gradients have come for {len(self.at_home.parameters)} parameters")

    def step_locally(self, note: remote.LocalStep) -> None:
        """Let it look here as after the worker's local step: what that has brought is the gradients, at pace local the
        parameters."""
        parameters = self.at_home.parameters
        self._forget()
        if note.brings and self._is_local:
            with torch.no_grad():
                for parameter, value in zip(parameters, self._views(), strict=True):
                    assert value is not None
                    parameter.copy_(value)
        elif note.brings:
            self.give(note.mask, {})
        if note.bad is not None:
            if note.bad >= len(parameters):
                raise ConfigError(f"the gradient of parameter {note.bad} is not finite; there are {len(parameters)}")
            parameters[note.bad].grad = torch.full_like(parameters[note.bad], torch.nan)

    def set(self, settings: bytes) -> None:
        """The hyper-parameters, if any have come."""
        if settings:
            self.at_home.load_settings(optimizers.decode(settings))

    def take_parameters(self) -> None:
        """All their values have come."""
        with torch.no_grad():
            for place, parameter in enumerate(self.at_home.parameters):
                parameter.copy_(self._mail.take(f"value/{place}", parameter.dtype, parameter.shape))

    def take_state(self, told: Any) -> None:
        """The optimizer's state has come."""
        set_state(self.at_home.optimizer, self._mail.take_states("state", told, self.at_home.parameters))

    def _forget(self) -> None:
        for parameter in self.at_home.parameters:
            parameter.grad = None

    def _views(self) -> list[torch.Tensor | None]:
        """What has come as the gradients, by parameter; None for those with sparse rows."""
        table, vectors = self._table, self._gradients
        return [None if entry.row else table.view(entry, vectors[entry.vector]) for entry in table.entries]

    def _come_of(self, place: int, counts: dict[int, int]) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """What has come of a table's rows, as ``rows.of_numbers`` takes it. Raises ConfigError."""
        entry, index = self._table.entries[place], self.index
        if place not in counts:
            raise ConfigError(f"it is not told how many rows of {entry.name} have come")
        count, unique = abs(counts[place]), counts[place] >= 0
        if self._in_slots:
            numbers = self._count_rows(place, counts[place])[1 : count + 1]
            values = self._slot.gradient[entry.vector][entry.offset :][: count * entry.row].view(-1, entry.row)
            values = values[: rows.count_values(numbers)]
        else:
            numbers = self._mail.take(f"numbers/{index}/{place}", torch.int64)
            values = self._mail.take(f"values/{index}/{place}", DTYPES[entry.dtype], (-1, entry.row))
        if len(numbers) != count or rows.count_values(numbers) != len(values):
            raise ConfigError(f"{len(numbers)} rows and {len(values)} of values have come, {count} rows were told")
        if (wrong := rows.stray(numbers, entry.rows, unique=unique)) is not None:
            raise ConfigError(f"row {wrong} of {entry.name} has come; there are rows 0 to {entry.rows - 1}")
        return numbers, values, unique

    def _count_rows(self, place: int, signed: int) -> torch.Tensor:
        area = self._slot.rows[place]
        if abs(signed) >= len(area):
            raise ConfigError(f"{abs(signed)} rows have come of a table of {len(area) - 1}")
        area[0] = signed
        return area

    # --- what is sent ---

    def is_due(self, request: remote.Request) -> bool:
        """May its values be others than those that the worker has, who has asked this?"""
        is_newer = self.at_home.number != self._told
        match request:
            case remote.Step(exchange=stepped):
                return self.index == stepped and (self._forward is None or is_newer)
            case remote.WrapOptimizer():
                return self._told < 0
            case remote.Load(exchange=asked) | remote.Leave(exchange=asked):
                return self.index == asked
            case remote.Meet() | remote.More() | remote.End() if not self._is_sync:
                return True  # at others a copy may be another, and of the same number
            case (
                remote.More()
                | remote.End()
                | remote.Begin()
                | remote.Counts()
                | remote.Barrier()
                | remote.CopyFirst()
                | remote.WrapLoader()
            ):
                return is_newer
        return False

    def follow(self) -> remote.Follow | None:
        """What a mirror is told of the round that it has to step to be the newest, if that is one."""
        if self._forward is None or self._told != self.at_home.number - 1:
            return None
        told = self._forward.follow(self.at_home.number)
        if told is not None:
            self._told = self.at_home.number
        return told

    def _close(self, told: remote.Follow) -> None:
        """A round is closed: a mirror of one worker steps it while home does. One that several share waits for all of
        them, and whoever waits there asks home, which has to be free to answer."""
        if not self._shares and self._told == told.number - 1:
            self._told = told.number
            with suppress(LinkEnded):  # who answers the worker finds it out
                self._link.send(remote.Close(self.index, told))

    def took(self, number: int) -> None:
        """The link's thread: the mirror has stepped this round."""
        if self._forward is not None:
            self._forward.took(number)

    def send_newest(self) -> list[int]:
        """Send them; of parameters whose gradients are sparse rows, those rows that have changed. Which those are."""
        vectors = self.at_home.newest()
        self._told = self.at_home.number
        if self._memory == remote.HOME:
            return []  # they lie where the worker sees them
        if self._forward is not None:
            self._send_all()
            self._forward.took(self.at_home.number)
            return []
        if self.is_spread:
            return self._send_range(vectors)
        for vector in self._table.dense_sizes:
            self._send(f"parameters/{self.index}/{vector}", vectors[vector])
        tables = [place for place, entry in enumerate(self._table.entries) if entry.row]
        return [place for place in tables if self._send_rows(place, vectors)]

    def what_servers_have(self) -> remote.Await:
        """What the worker is to have from servers elsewhere, which send it by themselves to who was in the step."""
        at_home = self.at_home
        if at_home.spec.parts:
            return remote.Await(at_home.taken, True, 0)
        number = at_home.number
        comes = 0 <= self._told < number and self._slot.pushed_in(number)
        return remote.Await(number, comes, at_home.memory.loads[0])

    def _send_range(self, vectors: dict[str, torch.Tensor]) -> list[int]:
        """What home's own servers have."""
        assert self._range is not None
        for span in self._range.spans:
            self._sent_bytes += send_span(self._link, self.index, vectors, *span)
        tables: dict[int, list[tuple[int, int]]] = {place: [] for place, _, _ in self._range.tables}
        for place, first, end in self._range.tables:
            tables[place].append((first, end))
        return [place for place, some in tables.items() if self._send_rows(place, vectors, some)]

    def _send_all(self, *, with_state: bool = True) -> None:
        """The parameters and the optimizer's state, to a mirror."""
        vectors = self.at_home.newest()
        for vector in self._table.sizes:
            self._send(f"parameters/{self.index}/{vector}", vectors[vector])

        if with_state:
            self._send(f"state/{self.index}", self.at_home.memory.state_bytes())

    def _send_rows(self, place: int, vectors: dict[str, torch.Tensor], some: Sequence[tuple[int, int]] = ()) -> bool:
        """Send the rows of a table, or those of ``some`` ranges, that the worker has otherwise. Are there any?"""
        entry = self._table.entries[place]
        numbers, values = self._changed.take(place, self._table.view(entry, vectors[entry.vector]), some)
        self._send(f"numbers/{self.index}/{place}", numbers)
        self._send(f"rows/{self.index}/{place}", values)
        return len(numbers) > 0

    def show_state(self) -> Any:
        """Send the optimizer's state: a document, see ``Mail.take_document``."""
        with self._lock:
            self.at_home.bring_home(parameters=False)
        state = {str(place): values for place, (_, values) in enumerate(self.at_home.shared_state()) if values}
        return send_document(self._link, "shown", state)

    def _send(self, what: str, tensor: torch.Tensor) -> None:
        self._sent_bytes += send(self._link, what, tensor)


def check_crew(request: remote.WrapOptimizer, rank: int, workers: int) -> None:
    """Raises ConfigError where those with whom worker ``rank`` folds cannot be."""
    for some in (request.members, request.crew):
        if some and not (rank in some and set(some) <= set(range(workers))):
            raise ConfigError(f"worker {rank} folds what it brings with workers {list(some)} of {workers}")


@contextmanager
def filling(
    worker: Worker, line: DeputyLine, values: Sequence[torch.Tensor], optimizer: optim.Optimizer | None = None
) -> Iterator[None]:
    """Where what all share within it begins with this worker's values, they are asked for, with the state."""

    def ask() -> None:
        told = line.ask_worker(remote.Fill()).kept
        for place, value in enumerate(values):
            line.mail.take_into(f"value/{place}", value)
        if optimizer is not None:
            set_state(optimizer, line.mail.take_states("state", told, parameters_of(optimizer)))

    collectives = worker.collectives
    before, collectives.before_filling = collectives.before_filling, ask
    try:
        yield
    finally:
        collectives.before_filling = before
