"""The deals of a pass whose batches are dealt by number: pure functions of the board (docs/decisions/0020).

A pass has one deal as a rule, of all its samples to those who share it. What a worker that is given up has not trained
on is dealt anew, when nobody is left that reads: that is the next deal, of what is left to those who stand at the tail
of this one. A loader's deals are numbered, through all its passes that have one place on the board.

Law 8, beside those of ``rounds.py``. Who has read all of its part of a deal parks at the deal's tail. It goes on with
its part of the next one, or to the end of the pass. Which, is decided under the run's lock, as soon as everybody who is
not LEFT is at that tail or has finished the pass: if nobody was given up within the deal the pass is drained. If
somebody was, those who have finished the pass must be parked too, and then the next deal is made. So nobody is in a
round at that moment whom those at the tail are excused from, and all of them count in the next. Who is away is waited
for: its newcomer goes on with its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paceline.protocol.rounds import (
    DEAL,
    EMPTY,
    LEFT,
    Board,
    Waiting,
    barrier_open,
    deal_parked_at,
    is_let_go,
    parked_at,
    place_of,
)

ALL = 1 << 40  # batches: more than anybody has


class Deal(NamedTuple):
    """Part number ``rank`` (-1: none) of ``workers``, of what the pass's deals before this one have left: ``before``
    tells of each how many batches of each part count."""

    rank: int
    workers: int
    before: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Dealt:
    """How a pass is dealt by now: its deals are ``first`` to ``newest``.

    ``sharers``: of the first, lowest rank first; ``outs``: who of them shares no later deal than this one, and how many
    batches of its part in that count.
    """

    first: int
    newest: int
    sharers: tuple[int, ...]
    outs: Mapping[int, tuple[int, int]]

    def sharers_of(self, deal: int) -> tuple[int, ...]:
        return tuple(worker for worker in self.sharers if self.outs.get(worker, (deal, 0))[0] >= deal)

    def before(self, deal: int) -> tuple[tuple[int, ...], ...]:
        """Of each deal before this one, how many batches of each part count."""
        return tuple(
            tuple(self.outs[w][1] if self.outs.get(w, (deal, 0))[0] == one else ALL for w in self.sharers_of(one))
            for one in range(self.first, deal)
        )

    def is_in(self, worker: int) -> bool:
        """Does this worker share all deals?"""
        return worker in self.sharers and worker not in self.outs

    def part(self, worker: int, deal: int) -> Deal:
        """The part of a worker that is not out yet."""
        sharers = self.sharers_of(deal)
        return Deal(sharers.index(worker) if self.is_in(worker) else -1, len(sharers), self.before(deal))


def may_settle(loader: int, number: int, board: Board) -> bool:
    """May it be told on the board how pass ``number`` (the first is 0) is dealt? Not while somebody may be in the one
    two before it, whose place that is: then one has gone on by law 4 twice, and this is most likely an evaluation."""
    return barrier_open(loader, number - 1, board)


def place_at_tail(loader: int, deal: int, *, is_empty: bool) -> int:
    """The board's word for who is parked there."""
    return loader + 1 + DEAL + (EMPTY if is_empty else 0) + (deal << 35)


def is_at_tail(worker: int, loader: int, number: int, board: Board) -> bool:
    """Is the worker parked at the tail of the newest deal, in pass ``number``? Deals of two passes may have one number,
    where somebody is a pass ahead by law 4."""
    place = place_at_tail(loader, board.deals[place_of(loader, number - 1)], is_empty=False)
    return board.parked[worker] & ~EMPTY == place and board.passes(loader)[worker] + 1 == number


def more_of_pass(worker: int, board: Board) -> bool | Waiting:
    """Is there another deal for ``worker``, which is parked at the tail of one, or is the pass drained?

    What is not decided yet is only seen to be due: see ``deal_over``.
    """
    parked = board.parked[worker]
    loader = parked_at(parked)
    number = board.passes(loader)[worker] + 1
    if board.drained[loader] >= number:
        return False
    if board.deals[place_of(loader, number - 1)] > deal_parked_at(parked):
        return True
    over = deal_over(loader, number, None, board)
    if not isinstance(over, Waiting) or not parked & EMPTY:
        return over
    return False if is_let_go(worker, parked, board) else Waiting(board.common, over.reason)


def deal_over(
    loader: int, number: int, arriving: int | None, board: Board, leaving: Sequence[int] = ()
) -> bool | Waiting:
    """Must the newest deal of pass ``number`` be followed by another (True), or is the pass drained?

    ``arriving`` is a worker that is about to park at its tail, ``leaving`` are about to be LEFT. To be acted upon under
    the run's lock only.
    """
    passes, lost = board.passes(loader), board.lost[place_of(loader, number - 1)] != 0
    for worker in range(board.width):
        if worker == arriving or worker in leaving or board.gone[worker] == LEFT:
            continue
        if is_at_tail(worker, loader, number, board):
            continue
        if passes[worker] < number:
            return Waiting(worker, f"worker {worker} has not finished its part of the data")
        if lost and not board.parked[worker]:
            return Waiting(worker, f"worker {worker} has left the pass, and may be about to step")
    return lost
