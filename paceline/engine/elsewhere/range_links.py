"""A worker's links to servers on other hosts than home's: its gradients go straight there, and parameters come back.

gradients of a range -> its server's slot for this worker; home's part -> home        before the step is asked for
Newest, parameters   <- each server, by itself when it has stepped                    the step waits for all of them
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from paceline.engine.elsewhere.early import Bucket
from paceline.engine.elsewhere.mail import Mail, send, send_range
from paceline.engine.elsewhere.range_server import ROLE
from paceline.engine.elsewhere.ranges import Range, parts, whole
from paceline.engine.elsewhere.table_parts import rows_of
from paceline.errors import HostError
from paceline.protocol import ranges, remote
from paceline.protocol.link import Senseless
from paceline.transport.connect import connect
from paceline.transport.ends import Ended, Event, LinkEnded, Received
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory, Slot, Spec
from paceline.transport.turns import Turns

_CONNECT_S = 30.0
_MOST_AHEAD = 2**10  # rounds or entries: nothing that this worker brings comes so far behind what it waits for
_MOST_TOLD = 2**16  # exchanges and parts, of which something has come; tables that are not taken


class RangeLinks:
    """Of the worker whose link to its deputy is ``home``. ``addresses``: where servers elsewhere are."""

    def __init__(self, home: Link, addresses: Mapping[int, tuple[str, int]]) -> None:
        """Raises HostError."""
        self._changed = threading.Condition()
        self._mails: dict[int, Mail] = {server: Mail() for server in addresses}
        self._came: dict[tuple[int, int, int], int] = {}  # by server, exchange and part: which number is here
        self._tables: list[tuple[int, ranges.Newest]] = []  # of which rows have come and are not taken
        self._lost: str | None = None
        self._wants = 0
        end = dataclasses.replace(
            home.made_by, messages=ranges.ToWorker, sink=self._sink, place=self._place, turns=Turns()
        )
        self._links: dict[int, Link] = {}
        for server, address in addresses.items():
            link = self._links[server] = connect(end, address, _CONNECT_S)
            if (link.peer.role, link.peer.host) != (ROLE, server):
                raise HostError(f"{link.peer} is where server {server} is to be, at {address[0]}:{address[1]}")

    @property
    def servers(self) -> Sequence[int]:
        return list(self._links)

    def mail(self, server: int) -> Mail:
        return self._mails[server]

    def link(self, server: int) -> Link:
        return self._links[server]

    def stop(self) -> None:
        for link in self._links.values():
            link.close(1.0)

    def flush(self) -> None:
        """Until all servers have what was sent to them. Raises LinkEnded."""
        for link in self._links.values():
            link.flush()

    def want(self, index: int, loads: int) -> int:
        """Ask all for what they have; the number of their answers. Raises LinkEnded."""
        self._wants += 1
        for link in self._links.values():
            link.send(ranges.Want(index, self._wants, loads))
        return self._wants

    def await_newest(
        self, index: int, of: Mapping[int, Sequence[int]], number: int
    ) -> Sequence[tuple[int, ranges.Newest]]:
        """Wait until of each server these parts have come, as of that number at least; whose rows have, by server.
        Raises LinkEnded; HostError where what has come is of a number that is far from there."""
        awaited = [(server, index, part) for server, some in of.items() for part in some]
        with self._changed:
            while any(self._came.get(key, -1) < number for key in awaited):
                if self._lost is not None:
                    raise LinkEnded(self._lost)
                self._changed.wait()
            if any(self._came[key] > number + _MOST_AHEAD for key in awaited):
                raise HostError(f"servers say that they are at {[self._came[key] for key in awaited]}, not {number}")
            mine = [come for come in self._tables if come[1].exchange == index]
            self._tables = [come for come in self._tables if come[1].exchange != index]
        return mine

    # --- by the links' threads ---

    def _sink(self, event: Event) -> None:
        match event:
            case Received(link=link, message=ranges.Newest() as come):
                with self._changed:
                    self._came[link.peer.host, come.exchange, come.part] = come.number
                    if max(len(self._came), len(self._tables), len(come.tables)) > _MOST_TOLD:
                        raise Senseless(f"{link.peer} has told of more than there can be")
                    if come.tables:
                        self._tables.append((link.peer.host, come))
                    self._changed.notify_all()
            case Ended(link=link, reason=reason):
                with self._changed:
                    self._lost = f"server {link.peer.host}: {reason}"
                    self._changed.notify_all()

    def _place(self, link: Link, message: Any, size_bytes: int) -> memoryview | None:
        mail = self._mails.get(link.peer.host)
        return None if mail is None else mail.place(link, message, size_bytes)


class Spread:
    """Exchange ``index`` of a worker, of which servers elsewhere have a part: whose is what."""

    def __init__(self, index: int, spec: Spec, links: RangeLinks) -> None:
        self._index, self._spec, self._links = index, spec, links
        at_home = [server for server in range(spec.servers) if server not in links.servers]
        self._home = whole(spec, at_home)
        self._ranges = {server: whole(spec, [server]) for server in links.servers}
        self._parts = {server: list(parts(spec, server)) for server in links.servers}

    def expect(self, memory: ExchangeMemory) -> None:
        """Parameters come there."""
        for server in self._ranges:
            for vector in self._spec.table.dense_sizes:
                self._links.mail(server).expect(f"parameters/{self._index}/{vector}", memory.params[vector])

    def put(self, home: Link, bucket: Bucket, gradient: Mapping[str, torch.Tensor]) -> None:
        """Send a bucket of gradients to whom its values belong. Raises LinkEnded."""
        name, vector = f"gradient/{self._index}/{bucket.vector}", gradient[bucket.vector]
        for link, one in self._all(home):
            for start, stop in one.within(bucket.vector, bucket.start, bucket.stop):
                send_range(link, name, vector, start, stop)

    def put_rows(self, home: Link, slot: Slot) -> dict[int, int]:
        """The same of the rows in the slot; how many of each table went home, as in ``remote.Step``. Raises
        LinkEnded."""
        counts: dict[int, int] = {}
        for param in slot.rows:
            if not slot.mask[param]:
                continue
            brought = rows_of(slot, param, self._spec.table.entries[param])
            for link, one in self._all(home):
                some = brought.select(one.rows_in(param, brought.indices))
                count = len(some.indices) if some.unique else -len(some.indices)
                if link is home:
                    counts[param] = count
                else:
                    send(link, f"count/{self._index}/{param}", torch.tensor([count]))
                send(link, f"numbers/{self._index}/{param}", some.numbers)
                send(link, f"values/{self._index}/{param}", some.values)
        return counts

    def flush(self) -> None:
        """Until the servers have all. Raises LinkEnded."""
        self._links.flush()

    def take_newest(self, told: remote.Await, shared: Callable[[int], torch.Tensor]) -> None:
        """Wait until what is newest has come, and write its rows to ``shared(param)``. Raises LinkEnded, HostError,
        ConfigError."""
        if told.comes:
            come = self._links.await_newest(self._index, self._parts, told.number)
        else:
            number = self._links.want(self._index, told.loads)
            come = self._links.await_newest(self._index, {server: [ranges.WHOLE] for server in self._ranges}, number)
        for server, newest in come:
            mail = self._links.mail(server)
            for param in newest.tables:
                numbers = mail.take(f"numbers/{self._index}/{newest.part}/{param}", torch.int64)
                if not len(numbers) or len(self._ranges[server].rows_in(param, numbers)) < len(numbers):
                    raise HostError(f"server {server} has sent rows of parameter {param} that it has not")
                table = shared(param)
                shape = (len(numbers), table.shape[1])
                rows = mail.take(f"rows/{self._index}/{newest.part}/{param}", table.dtype, shape)
                with torch.no_grad():
                    table[numbers] = rows

    def _all(self, home: Link) -> Sequence[tuple[Link, Range]]:
        return [(home, self._home), *((self._links.link(server), one) for server, one in self._ranges.items())]
