"""Mirrors that are stepped with what all hosts have folded in shares (owners.py): of one worker, or of a host's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import optim

from paceline.engine.elsewhere.mirror import Broken, HostMirror, Mirror, note
from paceline.engine.elsewhere.owners import FOLDS, Owners
from paceline.protocol import remote
from paceline.transport.slots import ExchangeMemory, Spec


class OwnerMirror(Mirror):
    """Of a worker that is alone on its host."""

    def __init__(self, spec: Spec, index: int, rank: int, memory: ExchangeMemory, owners: Owners) -> None:
        super().__init__(spec, index, rank, memory)
        self._owners = owners

    def follow(self, told: remote.Follow, optimizer: optim.Optimizer) -> None:
        """Step this round. Raises Broken if it is not all here, nor will be."""
        _await(told, self._owners)
        note(self.memory, told)
        _say_where(told, self.memory)
        self._step(told, optimizer, 0, 1)
        self._owners.begin(told.number + 1, is_on=True)


class OwnerHostMirror(HostMirror):
    """Of several, for the first of them, which is an owner."""

    def __init__(
        self, spec: Spec, index: int, rank: int, memory: ExchangeMemory, members: Sequence[int], owners: Owners
    ) -> None:
        super().__init__(spec, index, rank, memory, members, FOLDS)
        self._owners = owners

    def follow(self, told: remote.Follow, optimizer: optim.Optimizer) -> None:
        """As of a host's mirror."""
        super().follow(told, optimizer)
        self._owners.begin(told.number + 1, is_on=True)

    def _take_in(self, told: remote.Follow) -> None:
        _await(told, self._owners)
        note(self.memory, told)
        _say_where(told, self.memory)


def _await(told: remote.Follow, owners: Owners) -> None:
    if not owners.await_whole(told.number):
        owners.has_missed = True
        raise Broken


def _say_where(told: remote.Follow, memory: ExchangeMemory) -> None:
    for worker, *_ in told.sources:
        memory.slots[worker].write_lies_in(told.number, FOLDS)
