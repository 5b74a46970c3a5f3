"""A deputy's side of the push of all owners: what they have folded, or each its own (protocol/hosts.py, owners.py).

As of a host's workers, but of those of all hosts. The first of each host folds a share, and home's lays what all have
folded into its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.engine.context import Context
from paceline.engine.elsewhere.host_push import HostPush
from paceline.protocol import hosts
from paceline.transport.slots import ExchangeMemory


class OwnersPush(HostPush):
    """Of the worker of ``context``, one of the ``crew`` and of ``members``, its host's. ``fetch_folds(number,
    weights)``, of the first of them: have it fold its share; does it have what all have folded?"""

    def __init__(
        self,
        memory: ExchangeMemory,
        context: Context,
        crew: Sequence[int],
        members: Sequence[int],
        fetch_folds: Callable[[int, list[float]], bool],
        fetch_own: Callable[[], None],
    ) -> None:
        super().__init__(memory, context, crew, lambda number, weights: None, fetch_own)
        self._fetch_folds, self._first = fetch_folds, members[0]

    def were_all_in(self, number: int) -> bool:
        """Did all of them contribute to this round, the last?"""
        return self.is_one and all(self._memory.slots[member].pushed_in(number) for member in self._members)

    def _is_brought_as_one(self, number: int, norm: int | None) -> bool:
        is_lead = self._rank == self._lead
        is_there = bool(self._board.wait(lambda: self._have_come(number, norm)))
        if is_there and self._rank == self._first:
            is_there = self._have_folds(number, norm)
        if is_there and not is_lead:
            self._board.wait(lambda: self._ask(number, norm))
        with self._lock:
            if is_lead and is_there and self._are_together(number, norm) is True:
                self._bring_as_one(number, norm)
            if self._is_brought(number, norm):
                return True
            self._memory.offered[self._rank] = hosts.alone(number, norm)
        self._board.ring(self._rank)
        return False

    def _have_folds(self, number: int, norm: int | None) -> bool:
        """Those of which a norm was asked in this round are there. They are not made twice."""
        slots = [self._memory.slots[member] for member in self._members]
        folds = (number, [slot.weight(number) for slot in slots])
        if self._at_home is None or self._at_home[0] != number:
            self._at_home = folds
            return self._fetch_folds(*folds)
        return folds == self._at_home and (norm is not None or all(slot.is_as_measured(number) for slot in slots))
