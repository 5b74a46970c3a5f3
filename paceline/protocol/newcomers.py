"""Who tells a newcomer what a script keeps of its own: functions of the board; see ``engine/worker/handover.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.protocol.rounds import PRESENT, Column, Waiting


class Board(Protocol):
    """``asks[w]`` is what newcomers in worker w's place have asked, ``answers[w]`` what they have been told: equal, or
    ``asks[w]`` is one more for a newcomer that is to ask, and two more for one that asks."""

    @property
    def gone(self) -> Column: ...

    @property
    def parked(self) -> Column: ...

    @property
    def ended(self) -> Column: ...

    @property
    def deaths(self) -> Column: ...

    @property
    def settled(self) -> Sequence[int]: ...

    @property
    def asks(self) -> Column: ...

    @property
    def answers(self) -> Sequence[int]: ...

    @property
    def width(self) -> int: ...

    @property
    def common(self) -> int: ...


def answer_to(newcomer: int, board: Board, collectives: int) -> bool | Waiting:
    """Has somebody answered? False: nobody is there who could, since all others have ended, are dead (perhaps in a
    round that waits for the newcomer), ask themselves or wait in a collective, where they do not look at the board.

    ``collectives``: the number of the loader that stands for these.
    """
    if board.answers[newcomer] == board.asks[newcomer]:
        return True
    for worker in range(board.width):
        trains = board.gone[worker] == PRESENT and not board.ended[worker]
        trains = trains and board.deaths[worker] == board.settled[worker]
        asks = board.asks[worker] != board.answers[worker]  # or is to
        if worker != newcomer and trains and not asks and board.parked[worker] != collectives + 1:
            return Waiting(board.common, f"nobody has told worker {newcomer} what scripts keep")
    # Who could have answered may have done so before it ended.
    return board.answers[newcomer] == board.asks[newcomer]


def asking(board: Board) -> list[int]:
    """The newcomers that wait for an answer."""
    return [w for w in range(board.width) if board.asks[w] != board.answers[w] and not board.asks[w] & 1]
