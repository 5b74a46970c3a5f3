"""A server on another host than home's: it has the values of its range alone, and steps them when its deputy says so.

    workers --gradients--> slots here
    its deputy --Step, Apply--> fold, step --> parameters, Newest --> workers;  Stepped, Applied --> its deputy

What it steps with are the hands of any server, over memory laid out as home's, of which only its range is ever touched.
A worker says that it has pushed when all servers have what it brings: so what a deputy names has come.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from paceline.config import MAX_WORKERS
from paceline.engine.elsewhere import specs
from paceline.engine.elsewhere.mail import PATIENCE, Mail
from paceline.engine.elsewhere.mirror import expect_values, note
from paceline.engine.elsewhere.ranges import parts, send_parameters, send_rows, send_span, send_state
from paceline.engine.exchange.applier import Applier
from paceline.engine.exchange.shards import Shards, counting
from paceline.engine.exchange.stepper import Stepper
from paceline.errors import ConfigError, HostError, PacelineError
from paceline.params import optimizers, rows
from paceline.params.fold import Vectors
from paceline.protocol import range_checks, ranges
from paceline.protocol.link import Peer, Senseless
from paceline.protocol.log import STEP, Entry
from paceline.protocol.messages import Failed
from paceline.protocol.remote import Piece, Stop
from paceline.transport import segment
from paceline.transport.connect import connect
from paceline.transport.ends import End, Ended, Event, Joined, LinkEnded, Received
from paceline.transport.keys import JobKey
from paceline.transport.link import Link
from paceline.transport.listener import Listener
from paceline.transport.slots import ExchangeMemory, Spec, size_bytes
from paceline.transport.tls import Credentials

ROLE = "server"
_CONNECT_S = 30.0

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The run is being stopped, or home is lost; the reason in words."""


class _Held:
    """Exchange ``index`` as this server has it."""

    def __init__(self, index: int, spec: Spec, server: int) -> None:
        """Raises ConfigError, HostError."""
        if server >= spec.servers:
            raise ConfigError(f"exchange {index} is of {spec.servers} servers; this is server {server}")
        if not spec.stamps:
            raise ConfigError(f"exchange {index} is one of which nobody notes what rows have changed")
        self.index, self.spec, self._server = index, spec, server
        self._class, self._groups = specs.find_optimizer(spec), len(optimizers.decode(spec.settings))
        try:
            self.memory = ExchangeMemory(segment.own(size_bytes(spec)), spec)
        except OSError as error:
            raise HostError(f"there are no {size_bytes(spec) >> 20} MB for exchange {index}: {error}") from None
        self.parts = parts(spec, server)
        self._sizes = range_checks.Sizes(spec.workers, len(spec.table.entries), spec.parts, spec.settings_bytes)
        self._done = dict.fromkeys(self.parts, 0)  # the last round, or entry
        self.loads = -1  # it has no values yet
        self._told: dict[tuple[int, int], int] = {}  # by worker and part: as of which it has it
        self._take_up()

    def _take_up(self) -> None:
        """What is there is others' doing."""
        shards = Shards(self.spec, self.memory, self._class, {})
        self._stepper = Stepper(shards, self.memory, saves=False)
        self._applier = Applier(self.spec, shards, self.memory)

    def expect_from_home(self, mail: Mail) -> None:
        expect_values(mail, self.index, self.memory, self.spec.table)

    def expect(self, mail: Mail, worker: int) -> None:
        """What a worker brings comes to its slot."""
        slot, index, table = self.memory.slots[worker], self.index, self.spec.table
        for vector in table.dense_sizes:
            mail.expect(f"gradient/{index}/{vector}", slot.gradient[vector])
        for param, area in slot.rows.items():
            entry = table.entries[param]
            mail.expect(f"count/{index}/{param}", area[:1])
            mail.make_room(f"numbers/{index}/{param}", area[1:])
            mail.make_room(f"values/{index}/{param}", slot.gradient[entry.vector][entry.offset :][: entry.size])

    def fill(self, loads: int) -> None:
        self.loads = loads
        self._take_up()
        self._told.clear()

    def forget(self, worker: int) -> None:
        """Another process is this worker now."""
        self._told = {key: number for key, number in self._told.items() if key[0] != worker}

    def step(self, told: ranges.Step) -> None:
        """Raises HostError, ConfigError for what cannot be."""
        self._check(range_checks.mistaken_step(told, self._sizes, self._done), told.follow.settings)
        note(self.memory, told.follow)
        sources = told.follow.sources
        shares = counting([weight for _, weight, _, _ in sources])
        counted = [source[0] for source, share in zip(sources, shares, strict=True) if share is not None]
        if not all(mask for worker, _, _, mask in sources if worker in counted):
            raise HostError(f"home has not said what gradients there are of workers {counted}")
        self._check_rows(counted)
        self._done[ranges.SHARE] = told.follow.number
        self._stepper.step(told.follow.number, tuple(source[0] for source in sources), self._server, self.spec.servers)

    def apply(self, told: ranges.Apply) -> None:
        """Raises HostError, ConfigError for what cannot be."""
        self._check(range_checks.mistaken_apply(told, self._sizes, self._done), told.settings)
        memory = self.memory
        for worker, pushed, weight, mask in told.members:
            memory.pushed[worker] = pushed
            memory.slots[worker].write_weight(pushed, weight)
            memory.slots[worker].mask[:] = mask
        members = tuple(member[0] for member in told.members)
        if told.settings:
            memory.slots[members[0]].write_settings(told.settings)
        self._check_rows(members)
        kind = STEP if members else 0
        by = told.workers[0]
        self._done[told.part] = told.number
        self._applier.apply(told.part, Entry(told.number, kind, by, 0, told.staleness, members or tuple(told.workers)))

    def _check(self, mistake: str | None, settings: bytes) -> None:
        if mistake is None and self.loads < 0:
            mistake = f"exchange {self.index}, of which it has not sent the values"
        if mistake is not None:
            raise HostError(f"home has told server {self._server} to step what cannot be: {mistake}")
        if settings and (groups := len(optimizers.decode(settings))) != self._groups:
            raise ConfigError(f"settings of {groups} groups are not for {self._groups}")

    def _check_rows(self, workers: Sequence[int]) -> None:
        """What has come of tables is rows of theirs. Raises HostError: torch would write anywhere."""
        for worker in workers:
            slot = self.memory.slots[worker]
            for param, area in slot.rows.items():
                count = abs(int(area[0]))
                if not slot.mask[param] or not count:
                    continue
                size, numbers = self.spec.table.entries[param].rows, area[1 : count + 1]
                if count > size or rows.stray(numbers, size, unique=int(area[0]) > 0) is not None:
                    raise HostError(f"worker {worker} has sent rows that table {param} of {size} rows has not")
                if int(area[0]) > 0 and bool((numbers[1:] <= numbers[:-1]).any()):
                    raise HostError(f"worker {worker} has sent rows of table {param} that are not in order")

    def send(self, link: Link, worker: int, part: int, number: int, vectors: Vectors) -> None:
        """What a worker has not of a part, or of the WHOLE, and that it has come. Raises LinkEnded."""
        parts = self.parts if part == ranges.WHOLE else {part: self.parts[part]}
        changed: dict[int, list[torch.Tensor]] = {}
        for own, one in parts.items():
            for span in one.spans:
                send_span(link, self.index, vectors, *span)
            told = self._told.get((worker, own), -1)
            for param, first, end in one.tables:
                newer = np.flatnonzero(self.memory.stamps[param][first:end].numpy() > told)
                changed.setdefault(param, []).append(torch.from_numpy(newer + first))
            self._told[worker, own] = self._done[own]
        with_rows = []
        for param, some in changed.items():
            entry, numbers = self.spec.table.entries[param], torch.cat(some)
            if len(numbers):
                table = self.spec.table.view(entry, self.memory.params[entry.vector])
                send_rows(link, self.index, part, param, numbers, table)
                with_rows.append(param)
        link.send(ranges.Newest(self.index, part, number, with_rows))


def _mail() -> Mail:
    """Nothing comes but what is expected."""
    return Mail(0)


class RangeServer:
    """Server ``server`` of ``job``, whose deputy listens at ``address``. ``key``: None for plain text."""

    def __init__(
        self, server: int, job: str, address: tuple[str, int], key: JobKey | None, own_host: str | None = None
    ) -> None:
        """Raises HostError if there is no way to home. ``own_host``: the address that workers come to; None: that of
        the link home."""
        self._server = server
        self._events: queue.SimpleQueue[Event | PacelineError] = queue.SimpleQueue()
        self._mails: dict[int, Mail] = {}  # by worker
        self._home_mail = _mail()
        self._held: dict[int, _Held] = {}
        self._workers: dict[int, Link] = {}
        self._expecting = threading.Lock()
        self._wants: dict[int, ranges.Want] = {}  # by worker, which waits for its answer
        end = End(
            me=Peer(server, ROLE),
            job=job,
            messages=ranges.FromHome,
            sink=self._hear_home,
            place=self._home_mail.place,
            credentials=None if key is None else Credentials.issue(key),
            insecure=key is None,
            patience=PATIENCE,
        )
        self._home = connect(end, address, _CONNECT_S)
        host = own_host or self._home.own_address
        self._listener = Listener(
            dataclasses.replace(end, messages=ranges.FromWorker, sink=self._hear_worker, place=self._place), host
        )
        self._home.send(ranges.Here(host, self._listener.port))

    # --- by the links' threads: what comes next over a link belongs to where these say, so it is said at once ---

    def _place(self, link: Link, message: Any, size_bytes: int) -> memoryview | None:
        mail = self._mails.get(link.peer.host)
        return None if mail is None else mail.place(link, message, size_bytes)

    def _hear_worker(self, event: Event) -> None:
        with self._expecting:
            match event:
                case Joined(link=link):
                    worker = link.peer.host
                    if link.peer.role != "worker" or worker >= self._places:
                        raise Senseless(f"{link.peer} is none of {self._places} workers")
                    self._workers[worker] = link
                    for held in self._held.values():
                        held.expect(self._mails.setdefault(worker, _mail()), worker)
        self._put(event)

    @property
    def _places(self) -> int:
        return min((held.spec.workers for held in self._held.values()), default=MAX_WORKERS)

    def _hear_home(self, event: Event) -> None:
        with self._expecting:
            match event:
                case Received(message=ranges.Attach() as told):
                    try:
                        self._attach(told)
                    except PacelineError as error:
                        self._events.put(error)
                        return
        self._put(event)

    def _put(self, event: Event) -> None:
        """For the thread that works; pieces are where they belong already."""
        if not (isinstance(event, Received) and isinstance(event.message, Piece)):
            self._events.put(event)

    def _attach(self, told: ranges.Attach) -> None:
        """Raises ConfigError, HostError for an exchange that cannot be, or whose optimizer is not here."""
        if told.exchange != len(self._held):
            raise HostError(f"home speaks of a new exchange {told.exchange}; this server has {len(self._held)}")
        held = _Held(told.exchange, specs.decode(told.spec), self._server)
        held.expect_from_home(self._home_mail)
        for worker, link in list(self._workers.items()):
            if worker < held.spec.workers:
                held.expect(self._mails.setdefault(worker, _mail()), worker)
            else:
                del self._workers[worker]
                link.end(f"there are {held.spec.workers} workers")
        self._held[told.exchange] = held

    def terminated(self) -> None:
        """This process has been asked to end: all shall, behind one step. May be called by another thread."""
        with suppress(LinkEnded):
            self._home.send(ranges.Terminated())

    def serve(self) -> None:
        """Until the run is over. Raises Stopped where it has not come to a good end."""
        try:
            while self._take(self._events.get()):
                pass
        except LinkEnded as lost:
            raise Stopped(str(lost)) from None
        except Stopped:
            raise
        except PacelineError as error:
            self._fail(Failed(type(error).__name__, error.what, error.why, error.fix))
            raise
        except Exception as error:  # the outermost line: home is to know why there is no server any more
            logger.exception("server %d", self._server)
            self._fail(Failed("HostError", f"server {self._server} raised {type(error).__name__}: {error}"))
            raise Stopped(str(error)) from None
        finally:
            self._listener.close()
            for link in [*self._workers.values(), self._home]:
                link.close(2.0)

    def _fail(self, failure: Failed) -> None:
        with suppress(LinkEnded):
            self._home.send(ranges.Failing(failure))

    def _take(self, event: Event | PacelineError) -> bool:
        """Do what has come; is there more to come?"""
        match event:
            case PacelineError():
                raise event
            case Joined(link=link) if link is not self._home:
                self._wants.pop(link.peer.host, None)
                for held in self._held.values():
                    held.forget(link.peer.host)
            case Received(link=link, message=ranges.Want() as want) if link is self._workers.get(link.peer.host):
                self._wants[link.peer.host] = want
                self._heed_wants()
            case Received(link=link, message=message) if link is self._home:
                self._obey(message)
            case Ended(link=link, reason=reason) if link is self._home:
                if link.peer_left:
                    return False
                raise Stopped(reason)
        return True

    def _obey(self, message: Any) -> None:
        match message:
            case ranges.Fill(exchange=index, loads=loads):
                self._exchange(index).fill(loads)
                self._heed_wants()
            case ranges.Step(exchange=index, follow=follow):
                held = self._exchange(index)
                held.step(message)
                for source in follow.sources:
                    self._send(held, source[0], ranges.SHARE, follow.number, held.memory.params)
                self._home.send(ranges.Stepped(index, follow.number))
            case ranges.Apply(exchange=index, part=part, number=number, workers=workers):
                held = self._exchange(index)
                held.apply(message)
                for worker in workers:
                    self._send(held, worker, part, number, held.memory.slots[worker].copy)
                self._home.send(ranges.Applied(index, part, number))
            case ranges.Fetch(exchange=index, number=number):
                held = self._exchange(index)
                if held.loads < 0:
                    raise HostError(f"home asks for exchange {index}, of which it has not sent the values")
                parameters, state = ranges.fetches(number)
                for one in held.parts.values():
                    if parameters:
                        send_parameters(self._home, index, held.memory, held.spec.table, one)
                    if state:
                        send_state(self._home, index, held.memory, one)
                # What was sent lies where the next step writes: it must have gone before one is asked for.
                self._home.flush()
                self._home.send(ranges.Fetched(index, number))
            case Stop(reason=reason):
                raise Stopped(reason)

    def _exchange(self, index: int) -> _Held:
        """Raises HostError."""
        held = self._held.get(index)
        if held is None:
            raise HostError(f"home speaks of exchange {index}; this server has {len(self._held)}")
        return held

    def _send(self, held: _Held, worker: int, part: int, number: int, vectors: Vectors) -> None:
        link = self._workers.get(worker)
        if link is None:
            return  # it has died since
        try:
            held.send(link, worker, part, number, vectors)
        except LinkEnded:
            self._workers.pop(worker, None)

    def _heed_wants(self) -> None:
        """What a worker asks for is of an exchange that is filled, with what scripts have loaded."""
        for worker, want in list(self._wants.items()):
            held = self._held.get(want.exchange)
            if held is None or held.loads < max(want.loads, 0):
                continue
            del self._wants[worker]
            self._send(held, worker, ranges.WHOLE, want.number, held.memory.params)
            with suppress(LinkEnded, KeyError):
                self._workers[worker].flush()  # nobody waits for it who steps: what was sent must not change meanwhile
