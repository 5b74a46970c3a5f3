"""A mirror of home's memory of an exchange, on another host: it is stepped there as home steps, to the bit.

    what the others have pushed --Pieces, Follow--> their slots here -> fold, step (the same code, the same order)

So gradients cross the network in both directions, which is as much as they are, and can do so during backward;
parameters do not. Home stays what counts: when a mirror has missed a round it is filled anew.

Several workers of a host have one mirror between them (``HostMirror``): the first of them makes it and is sent what the
others have pushed, folded; all write their gradients to their slots in it, and each steps a share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import optim

from paceline.engine.elsewhere.mail import Mail
from paceline.engine.exchange.shards import Shards, counting
from paceline.engine.exchange.stepper import Stepper
from paceline.params.table import Table
from paceline.protocol import hosts, remote
from paceline.transport import segment
from paceline.transport.borrow import borrow
from paceline.transport.slots import ExchangeMemory, Slot, Spec, by_place, size_bytes

_LOOK_S = 2.0  # how often a worker that waits for the others of its host asks home whether they are alive


class Broken(Exception):
    """The workers of this host share a mirror no more: one of them has died, or left it."""


def arithmetic() -> str:
    """What must be equal for two processes to come to the same bits."""
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def expect_values(mail: Mail, index: int, memory: ExchangeMemory, table: Table) -> None:
    """Parameters and state of exchange ``index`` that come belong there."""
    for vector in table.sizes:
        mail.expect(f"parameters/{index}/{vector}", memory.params[vector])
    mail.expect(f"state/{index}", memory.state_bytes())


def sources_of(
    slots: Sequence[Slot], number: int, contributors: Sequence[int]
) -> list[tuple[int, float, float, bytes]]:
    """What is told of the pushes of a round, as in ``Follow``; of one that does not count no mask."""
    weights = [slots[worker].weight(number) for worker in contributors]
    return [
        (worker, weight, slots[worker].factor(number), b"" if share is None else bytes(slots[worker].mask))
        for worker, weight, share in zip(contributors, weights, counting(weights), strict=True)
    ]


def note(memory: ExchangeMemory, told: remote.Follow) -> None:
    """Write what belongs to the pushes of a round beside the gradients."""
    memory.loads[0] = told.loads
    for worker, weight, factor, mask in told.sources:
        slot = memory.slots[worker]
        slot.write_weight(told.number, weight)
        slot.write_factor(told.number, factor)
        if mask:
            slot.mask[:] = mask
    if told.settings:
        memory.slots[told.sources[0][0]].write_settings(told.settings)


class Mirror:
    """Of exchange ``index``, for worker ``rank``; ``memory`` is laid out as home's."""

    def __init__(self, spec: Spec, index: int, rank: int, memory: ExchangeMemory | None = None) -> None:
        self.memory = memory or ExchangeMemory(segment.own(size_bytes(spec)), spec)
        self._spec, self._index, self._rank = spec, index, rank
        self._stepper: Stepper | None = None

    def expect(self, mail: Mail) -> None:
        """Where parameters and state belong, and what others push."""
        table, memory, index = self._spec.table, self.memory, self._index
        expect_values(mail, index, memory, table)
        for worker, slot in enumerate(memory.slots):
            if worker == self._rank:
                continue
            for vector in table.dense_sizes:
                mail.expect(f"push/{index}/{worker}/{vector}", slot.gradient[vector])
            for param, area in slot.rows.items():
                entry = table.entries[param]
                values = slot.gradient[entry.vector][entry.offset : entry.offset + entry.size]
                mail.expect(f"push/{index}/{worker}/count/{param}", area[:1])
                mail.make_room(f"push/{index}/{worker}/numbers/{param}", area[1:])
                mail.make_room(f"push/{index}/{worker}/values/{param}", values)

    def follow(self, told: remote.Follow, optimizer: optim.Optimizer) -> None:
        """Step this round, of which everything has come."""
        note(self.memory, told)
        self._step(told, optimizer, 0, 1)

    def _step(self, told: remote.Follow, optimizer: optim.Optimizer, share: int, shares: int) -> None:
        if self._stepper is None:
            shards = Shards(self._spec, self.memory, type(optimizer), vars(optimizer))
            self._stepper = Stepper(shards, self.memory, saves=False)  # if this process dies, so does the mirror
        contributors = tuple(source[0] for source in told.sources)
        self._stepper.step(told.number, contributors, share, shares)


class HostMirror(Mirror):
    """That of ``members``, of which this worker is one; ``others`` is in whose slot the fold of all others comes."""

    def __init__(
        self, spec: Spec, index: int, rank: int, memory: ExchangeMemory, members: Sequence[int], others: int
    ) -> None:
        super().__init__(spec, index, rank, memory)
        self.members, self._lead, self._others = tuple(members), members[0], others
        self.is_whole: Callable[[], bool] = lambda: True  # asks home whether the members still share it

    @staticmethod
    def make(spec: Spec) -> tuple[int, ExchangeMemory]:
        """Memory for it, in huge pages, and its descriptor. Raises HostError."""
        size, stripes = size_bytes(spec), by_place(spec)
        descriptor = segment.create("mirror", size, stripes, spec.workers)
        memory = segment.attach(descriptor)
        segment.enlarge(memory, segment.in_use(size, stripes, spec.workers))
        return descriptor, ExchangeMemory(memory, spec)

    @staticmethod
    def open(spec: Spec, place: tuple[int, int]) -> ExchangeMemory:
        """That of a descriptor of a process of this host. Raises OSError, HostError."""
        return ExchangeMemory(borrow(*place), spec)

    @property
    def is_lead(self) -> bool:
        return self._rank == self._lead

    def follow(self, told: remote.Follow, optimizer: optim.Optimizer) -> None:
        """This worker's share of it; returns when all is stepped. Raises Broken."""
        memory, number = self.memory, told.number
        if self.is_lead:
            self._take_in(told)
            memory.tell_word(memory.pushed, self._lead, number)
        self._await(memory.pushed, self._lead, number)  # what came over the first one's link is there
        self._step(told, optimizer, self.members.index(self._rank), len(self.members))
        memory.tell_word(memory.stepped, self._rank, number)
        for member in self.members:
            self._await(memory.stepped, member, number)
        if self.is_lead:
            memory.tell_word(memory.brought, self._lead, hosts.version(number, told.loads))

    def _take_in(self, told: remote.Follow) -> None:
        """Of the first one: what is to be stepped is here."""
        note(self.memory, told)
        for worker, *_ in told.sources:
            is_here = worker in self.members
            self.memory.slots[worker].write_lies_in(told.number, None if is_here else self._others)

    def fill(self, told: remote.Brought) -> None:
        """Home's values are here, if they were sent to this worker; else wait for them. Raises Broken."""
        memory, version = self.memory, hosts.version(told.number, told.loads)
        # Each its own words: a worker may hear of what came over its link when others are further already.
        memory.stepped[self._rank] = told.number
        if told.comes:
            memory.brought[self._rank] = version
            memory.wake_word(memory.brought, self._lead)
        while max(memory.brought[member] for member in self.members) < version:
            seen = memory.brought[self._lead]
            memory.await_word(memory.brought, self._lead, seen, _LOOK_S)
            if max(memory.brought[member] for member in self.members) < version and not self.is_whole():
                raise Broken

    def _await(self, words: memoryview[int], place: int, least: int) -> None:
        while (seen := words[place]) < least:
            self.memory.await_word(words, place, seen, _LOOK_S)
            if words[place] == seen and not self.is_whole():
                raise Broken
