"""How the batches of passes are dealt by number: a part of the board that is changed under the run's lock.

What is decided from it stands in ``protocol/deals.py``. Of each loader there is room for two passes, since by law 4 one
worker may be in the next when others have yet to begin this one.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.protocol.deals import Dealt
from paceline.protocol.rounds import place_of
from paceline.transport.journal import Watched

PASSES = 2  # of a loader
_COUNT_BITS = 41  # of how many batches of a part count: in a word, with the deal before them


def words_of_shares(workers: int) -> int:
    """Of a pass: 1 + its number, its first deal, and a set of workers."""
    return 2 + -(-workers // 64)


class Shares:
    """``deals``, ``lost``: the board's columns; ``outs``: of a pass and worker a word, in which deal it was out, and
    with how many batches of its part."""

    def __init__(self, deals: Watched, lost: Watched, shares: Watched, outs: Watched, workers: int) -> None:
        self._deals, self._lost, self._shares, self._outs, self._workers = deals, lost, shares, outs, workers
        self._size = words_of_shares(workers)

    def dealt(self, loader: int, number: int) -> Dealt | None:
        """How the batches of pass ``number`` (the first is 0) are dealt by now; None where that is not settled."""
        place = place_of(loader, number)
        start, outs = place * self._size, place * self._workers
        if self._shares[start] != number + 1:
            return None
        first = self._shares[start + 1]
        masks = [self._shares[start + 2 + word] for word in range(self._size - 2)]
        sharers = tuple(worker for worker in range(self._workers) if masks[worker // 64] >> worker % 64 & 1)
        words = ((worker, self._outs[outs + worker]) for worker in sharers)
        known = {w: (first + (word >> _COUNT_BITS) - 1, word & (1 << _COUNT_BITS) - 1) for w, word in words if word}
        return Dealt(first, self._deals[place], sharers, known)

    def settle(self, loader: int, number: int, workers: Sequence[int]) -> None:
        """The batches of pass ``number`` are dealt to these. The pass that was two before it is over."""
        place, masks = place_of(loader, number), [0] * (self._size - 2)
        for worker in workers:
            masks[worker // 64] |= 1 << worker % 64
        for word, value in enumerate((number + 1, self._deals[place], *masks)):
            self._shares[place * self._size + word] = value
        for worker in range(self._workers):
            self._outs[place * self._workers + worker] = 0
        self._lost[place] = 0

    def passes(self) -> list[tuple[int, int]]:
        """The loaders of which passes have been dealt, each with the last ones."""
        words = [(place, self._shares[place * self._size]) for place in range(len(self._deals))]
        return [(place // PASSES, word - 1) for place, word in words if word]

    def take_out(self, loader: int, number: int, worker: int, batches: int) -> None:
        """Of a worker's part in the newest deal of a pass so many batches count, and it shares no later one."""
        place = place_of(loader, number)
        deal = self._deals[place] - self._shares[place * self._size + 1]
        self._outs[place * self._workers + worker] = deal + 1 << _COUNT_BITS | batches

    def lose(self, loader: int, number: int) -> None:
        """Somebody was given up within the newest deal of a pass."""
        self._lost[place_of(loader, number)] = 1

    def deal_anew(self, loader: int, number: int) -> None:
        place = place_of(loader, number)
        self._lost[place] = 0
        self._deals[place] += 1
