"""Who shares the batches of a pass where they are dealt by number: settled by the first worker to begin it.

So who has which does not depend on how fast anybody is, and workers come and leave between passes only
(docs/decisions/0012). What is left of the part of one that is given up is dealt once more, to those who share the pass
(docs/decisions/0020).
"""

from __future__ import annotations

from collections.abc import Container

from paceline.engine.context import Context
from paceline.engine.worker.position import key_of
from paceline.protocol.deals import Deal, Dealt, may_settle
from paceline.protocol.rounds import LEFT


class Deals:
    """Of one worker; ``leased``: the loaders whose batches are drawn by lease, and not dealt at all."""

    def __init__(self, context: Context, leased: Container[int]) -> None:
        self._board, self._lock, self._rank = context.board, context.lock, context.rank
        # Otherwise each has all of its own, or worker 0 reads and nobody comes or leaves.
        self._is_shared = context.job.data == "shared"
        self._leased = leased
        # By loader, of its pass in progress.
        self._deals: dict[int, Deal | None] = {}
        self._firsts: dict[int, Deal] = {}  # of the first deal
        self._reading: dict[int, tuple[int, int]] = {}  # where it is settled who shares it: which pass, which deal

    def of(self, loader: int) -> Deal | None:
        """This worker's part of the pass in progress, or of one that begins now; None where nothing is dealt."""
        return self._deals[loader] if loader in self._deals else self._part_of(self._sharers(leaving=True))

    def number(self, loader: int) -> int | None:
        """Which deal of the pass in progress this worker reads; None where it has not been settled who shares it."""
        return self._reading[loader][1] if loader in self._reading else None

    def settle(self, loader: int, number: int, *, trains: bool) -> bool:
        """Pass ``number`` begins. An evaluation is each worker's own business. Has this worker a part?"""
        self.end(loader)
        board = self._board
        if not trains or loader in self._leased or not self._is_shared:
            self._deals[loader] = self._part_of(self._sharers(leaving=True))
            return True
        with self._lock:
            if board.shares.dealt(loader, number) is None and may_settle(loader, number, board):
                sharers = self._sharers(leaving=False) or self._sharers(leaving=True)
                board.shares.settle(loader, number, sharers)
            dealt = board.shares.dealt(loader, number)
        if dealt is None:
            self._deals[loader] = self._part_of(self._sharers(leaving=True))
            return True
        deal = self._first_to_read(loader, number, dealt)
        self._reading[loader] = number, deal
        part = self._deals[loader] = dealt.part(self._rank, deal)
        self._firsts[loader] = dealt.part(self._rank, dealt.first)
        return part.rank >= 0

    def go_on(self, loader: int) -> bool:
        """The next deal of the pass is made; False if the others have gone on to another pass."""
        number, deal = self._reading[loader]
        with self._lock:
            dealt = self._board.shares.dealt(loader, number)
        if dealt is None:
            return False
        self._reading[loader] = number, deal + 1
        self._deals[loader] = dealt.part(self._rank, deal + 1)
        return True

    def take_any(self, loader: int) -> None:
        """For a ghost batch any part will do, where this worker has none, or nothing in it."""
        deal = self._firsts.get(loader, self.of(loader))
        if deal is not None:
            self._deals[loader] = Deal(deal.rank if deal.rank >= 0 else self._rank % deal.workers, deal.workers)

    def end(self, loader: int) -> None:
        """The pass is over."""
        self._deals.pop(loader, None)
        self._firsts.pop(loader, None)
        self._reading.pop(loader, None)

    def keeps(self, loader: int) -> bool:
        """Is a part of a pass over this loader its worker's until that is over?"""
        return self._is_shared and loader not in self._leased

    def _first_to_read(self, loader: int, number: int, dealt: Dealt) -> int:
        """The deal that a worker before this one in its place has come to; else the first that there is for it."""
        key = self._board.places[2 * self._rank]
        for deal in range(dealt.newest, dealt.first, -1):
            if key == key_of(loader, number, deal):
                return deal
        return dealt.first if dealt.is_in(self._rank) else dealt.newest

    def _sharers(self, *, leaving: bool) -> tuple[int, ...]:
        """Who shares a pass that begins now; with ``leaving`` also who is here, but has been asked to leave.

        Who is just gone because its script is over takes its part along: so who has which batches does not depend on
        how fast one is.
        """
        board = self._board
        return tuple(
            worker
            for worker in range(board.width)
            if (worker == self._rank and leaving)
            or (
                not (board.coming[worker] or board.given_up[worker])
                and (not board.leaving[worker] or (leaving and board.gone[worker] != LEFT))
            )
        )

    def _part_of(self, sharers: tuple[int, ...]) -> Deal | None:
        return Dealt(0, 0, sharers, {}).part(self._rank, 0) if self._is_shared else None
