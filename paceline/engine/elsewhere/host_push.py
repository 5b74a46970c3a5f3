"""A deputy's side of the push of its worker's host: one for all of its workers, or one for each (protocol/hosts.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.engine.context import Context
from paceline.engine.exchange.rounds import not_asked
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
        self._first = self._lead  # of those who share a mirror
        self._fetch_fold, self._fetch_own = fetch_fold, fetch_own
        self.checked: Callable[[bool | Waiting], bool | Waiting] = lambda answer: answer  # as ``Rounds.checked``
        self.offers = False  # is the next gradient on the worker's host, for the fold?
        self._at_home: tuple[int, list[float]] | None = None  # of the lead: the round and weights of the fold there

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
        """Is it on this worker to be sent home's values for all of its host? Then ``arrived`` follows. Waits until what
        another one was sent is there, so that it does not come over what is newer. Raises Aborted."""
        words, newest = self._memory.brought, hosts.version(number, loads)
        while self._board.wait(self._may_claim):
            with self._lock:
                if hosts.has_version(words[self._first], newest):
                    return False
                if hosts.is_there(words[self._first]) is True:
                    words[self._first] = hosts.sent(newest, self._rank)
                    return True
        return False  # the mirror is left

    def _may_claim(self) -> bool | Waiting:
        return hosts.is_there(self._memory.brought[self._first]) if self.is_one else False

    def arrived(self, number: int, loads: int) -> None:
        """What was claimed is there."""
        self._memory.brought[self._first] = hosts.arrived(hosts.version(number, loads))
        self._board.ring(self._rank)

    def bring(self, number: int, weight: float) -> None:
        """Push this worker's gradient to round ``number``, whose header is written; as ``Rounds.bring``. Raises
        Aborted, WorkersLost."""
        self._bring(number, weight, None)

    def ask(self, number: int, weight: float, norm: int) -> None:
        """Ask for this norm of round ``number``, for which the header is written; as ``Rounds.ask``. Raises Aborted,
        WorkersLost, ConfigError if another of the host pushes without."""
        self._bring(number, weight, norm)

    def _bring(self, number: int, weight: float, norm: int | None) -> None:
        memory, board, rank = self._memory, self._board, self._rank
        offers = self.offers and weight > 0  # among weights of nothing it is not known before who counts
        memory.offered[rank] = hosts.offer(number, norm) if offers else hosts.alone(number, norm)
        board.ring(rank)
        if not (offers and self._is_brought_as_one(number, norm)):
            self._at_home = None
            if self.offers:
                self._fetch_own()
            memory.slots[rank].write_lies_in(number, None)
        words, least = self._words(number, norm)
        words[rank] = least
        board.ring(rank)

    def _words(self, number: int, norm: int | None) -> tuple[memoryview[int], int]:
        """Where it is said that it is brought, and what."""
        return (self._memory.pushed, number) if norm is None else (self._memory.asked, norm)

    def _is_brought_as_one(self, number: int, norm: int | None) -> bool:
        """Wait for it; False: it never will be with this worker's gradient in it."""
        are_all_there = self._board.wait(lambda: self._ask(number, norm))
        if are_all_there and self._rank == self._lead:
            self._have_fold(number, norm)
        with self._lock:
            if self._rank == self._lead and self._are_together(number, norm) is True:
                self._bring_as_one(number, norm)
            if self._is_brought(number, norm):
                return True
            self._memory.offered[self._rank] = hosts.alone(number, norm)
            return False

    def _have_fold(self, number: int, norm: int | None) -> None:
        """Where a norm was that of the fold as it is, it is here already."""
        slots = [self._memory.slots[member] for member in self._members]
        fold = (number, [slot.weight(number) for slot in slots])
        if norm is not None or fold != self._at_home or not all(slot.is_as_measured(number) for slot in slots):
            self._fetch_fold(*fold)
        self._at_home = fold

    def _ask(self, number: int, norm: int | None) -> bool | Waiting:
        answer = self._have_come(number, norm)
        if answer is True and self._rank != self._lead and not self._is_brought(number, norm):
            return Waiting(self._lead, f"worker {self._lead} has not sent what its host brings to round {number}")
        return answer

    def _have_come(self, number: int, norm: int | None) -> bool | Waiting:
        """Have all of them, with what can be one push?"""
        if self._is_brought(number, norm):
            return True
        if norm is not None:
            for member in self._members:
                if hosts.comes_to(number, member, self._memory.offered) and self._memory.asked[member] < norm:
                    raise not_asked(self._rank, member, number)
            return self.checked(self._are_together(number, norm))
        return self._are_together(number, norm)

    def _bring_as_one(self, number: int, norm: int | None) -> None:
        memory, lead = self._memory, self._lead
        for member in self._members:
            memory.slots[member].write_lies_in(number, lead)
            if norm is None:  # hosts step it by themselves
                memory.brought[member] = hosts.arrived(hosts.version(number, memory.loads[0]))
        words, least = self._words(number, norm)
        words[lead] = least

    def _is_brought(self, number: int, norm: int | None) -> bool:
        words, least = self._words(number, norm)
        return hosts.is_pushed(self._rank, number, words, self._memory.slots, least)

    def _are_together(self, number: int, norm: int | None) -> bool | Waiting:
        memory, board = self._memory, self._board
        answer = hosts.are_together(number, self._members, memory.offered, board.deaths, board, norm)
        if norm is None and answer is True:
            # One fold has one factor.
            return len({memory.slots[member].factor(number) for member in self._members}) == 1
        return answer
