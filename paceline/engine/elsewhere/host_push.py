"""A deputy's side of the push of its worker's host: one for all of its workers, or one for each (protocol/hosts.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.engine.context import Context
from paceline.protocol import hosts
from paceline.protocol.rounds import Waiting
from paceline.transport.slots import ExchangeMemory


class HostPush:
    """Of worker ``context.rank``, one of ``members``. ``fetch_fold(number, weights)``: have the host's fold sent, of
    the members with these weights; ``fetch_own()``: this worker's gradient. Both return when it is in the slot."""

    def __init__(
        self,
        memory: ExchangeMemory,
        context: Context,
        members: Sequence[int],
        fetch_fold: Callable[[int, list[float]], None],
        fetch_own: Callable[[], None],
    ) -> None:
        self._memory, self._board, self._lock, self._rank = memory, context.board, context.lock, context.rank
        self._members, self._lead = tuple(members), members[0]
        self._fetch_fold, self._fetch_own = fetch_fold, fetch_own
        self.offers = False  # is the next gradient on the worker's host, for the fold?

    @property
    def is_one(self) -> bool:
        """Can the host's workers still push as one?"""
        return hosts.is_one(self._members, self._memory.offered, self._board.deaths)

    def leave(self) -> None:
        """The worker takes part in no fold any more. It has pushed no round that is not over."""
        with self._lock:
            self._memory.offered[self._rank] = hosts.LEAVES
        self._board.ring(self._rank)

    def claim(self, number: int, loads: int) -> bool:
        """Is it on this worker to be sent home's values for all of its host?"""
        newest = hosts.version(number, loads)
        with self._lock:
            if self._memory.brought[self._lead] >= newest:
                return False
            self._memory.brought[self._lead] = newest
            return True

    def bring(self, number: int, weight: float) -> None:
        """Push this worker's gradient to round ``number``, whose header is written; as ``Rounds.bring``. Raises
        Aborted, WorkersLost."""
        memory, board, rank = self._memory, self._board, self._rank
        offers = self.offers and weight > 0  # among weights of nothing it is not known before who counts
        memory.offered[rank] = hosts.offer(number) if offers else hosts.alone(number)
        board.ring(rank)
        if not (offers and self._is_pushed_as_one(number)):
            if self.offers:
                self._fetch_own()
            memory.slots[rank].write_lies_in(number, None)
        memory.pushed[rank] = number
        board.ring(rank)

    def _is_pushed_as_one(self, number: int) -> bool:
        """Wait for it; False: it never will be with this worker's gradient in it."""
        are_all_there = self._board.wait(lambda: self._ask(number))
        if are_all_there and self._rank == self._lead:
            slots = self._memory.slots
            self._fetch_fold(number, [slots[member].weight(number) for member in self._members])
        with self._lock:
            if self._rank == self._lead and self._are_together(number) is True:
                self._push_as_one(number)
            if self._is_pushed(number):
                return True
            self._memory.offered[self._rank] = hosts.alone(number)
            return False

    def _ask(self, number: int) -> bool | Waiting:
        if self._is_pushed(number):
            return True
        answer = self._are_together(number)
        if answer is True and self._rank != self._lead:
            return Waiting(self._lead, f"worker {self._lead} has not sent what its host brings to round {number}")
        return answer

    def _push_as_one(self, number: int) -> None:
        memory, lead = self._memory, self._lead
        for member in self._members:
            memory.slots[member].write_lies_in(number, lead)
        memory.brought[lead] = hosts.version(number, memory.loads[0])  # the host steps it by itself
        memory.pushed[lead] = number

    def _is_pushed(self, number: int) -> bool:
        return hosts.is_pushed(self._rank, number, self._memory.pushed, self._memory.slots)

    def _are_together(self, number: int) -> bool | Waiting:
        return hosts.are_together(number, self._members, self._memory.offered, self._board.deaths, self._board)
