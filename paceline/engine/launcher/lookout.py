"""The launcher's lookout: which processes are to be killed because others wait for them and they do not get on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from paceline.engine.launcher.watch import StepTimes, Watch, Whose
from paceline.transport.board import Board

_LOOK_S = 0.2  # how often processes are looked after


class Lookout:
    """Looks at the kernel's word (``watch.py``) and at what processes have told on the board."""

    def __init__(self, board: Board, hang_timeout_s: float) -> None:
        self._board, self._watch, self._looked_s = board, Watch(hang_timeout_s), 0.0
        self._steps = StepTimes(board.longest_ns)

    def steps_took(self, seconds: Iterable[float]) -> None:
        """Some workers' last steps."""
        self._steps.add(seconds)

    def is_due(self, now_s: float) -> bool:
        """Asked again and again: is it time for another look?"""
        if now_s < self._looked_s + _LOOK_S:
            return False
        self._looked_s = now_s
        return True

    def stuck(self, alive: Mapping[Whose, int], now_s: float) -> Iterator[tuple[Whose, str]]:
        """Who, and what it is that is wrong with it."""
        return self._watch.look(alive, now_s, self._hangs, self._in_hand, self._steps)

    def _hangs(self, role: str, rank: int) -> bool:
        """Do others wait, and this one neither for them nor, as a deputy does, for its worker?"""
        member = rank if role == "worker" else self._board.workers + rank
        return not self._board.asleep[member] and self._board.is_awaited(member)

    def _in_hand(self, role: str, rank: int) -> int:
        return self._board.in_hand[rank] if role == "worker" else 0
