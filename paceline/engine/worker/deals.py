"""Who shares the batches of a pass where they are dealt by number: settled by the first worker to begin it.

So who has which does not depend on how fast anybody is, and workers come and leave between passes only
(docs/decisions/0012).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from paceline.engine.context import Context
from paceline.protocol.rounds import LEFT


class Deals:
    """Of one worker; ``leased``: the loaders whose batches are drawn by lease, and not dealt at all."""

    def __init__(self, context: Context, leased: Container[int]) -> None:
        self._board, self._lock, self._rank = context.board, context.lock, context.rank
        # Otherwise each has all of its own, or worker 0 reads and nobody comes or leaves.
        self._is_shared = context.job.data == "shared"
        self._leased = leased
        self._deals: dict[int, tuple[int, int] | None] = {}  # by loader, of its pass in progress

    def of(self, loader: int) -> tuple[int, int] | None:
        """(which, of how many) parts of the pass in progress, or of one that begins now, are this worker's; which is -1
        if none is, None where nothing is dealt."""
        return self._deals[loader] if loader in self._deals else self._deal_to(self._sharers(leaving=True))

    def settle(self, loader: int, number: int, *, trains: bool) -> bool:
        """Pass ``number`` begins. An evaluation is each worker's own business. Has this worker a part?"""
        board, sharers = self._board, None
        if trains and loader not in self._leased:
            with self._lock:
                sharers = board.sharers(loader, number)
                if sharers is None:
                    sharers = self._sharers(leaving=False) or self._sharers(leaving=True)
                    board.settle_sharers(loader, number, sharers)
        deal = self._deals[loader] = self._deal_to(self._sharers(leaving=True) if sharers is None else sharers)
        return deal is None or deal[0] >= 0

    def take_any(self, loader: int) -> None:
        """For a ghost batch any part will do, where this worker has none."""
        deal = self.of(loader)
        if deal is not None and deal[0] < 0:
            self._deals[loader] = (self._rank % deal[1], deal[1])

    def end(self, loader: int) -> None:
        """The pass is over."""
        self._deals.pop(loader, None)

    def keeps(self, loader: int) -> bool:
        """Is a part of a pass over this loader its worker's until that is over?"""
        return self._is_shared and loader not in self._leased

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

    def _deal_to(self, sharers: Sequence[int]) -> tuple[int, int] | None:
        if not self._is_shared:
            return None
        return (sharers.index(self._rank) if self._rank in sharers else -1, len(sharers))
