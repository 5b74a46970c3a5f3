"""Whose turn it is to write, of links that go out of one interface.

Links that write all they have at once share the wire as their congestion controls find it out, and what one leaves of
it the others take up late. Where all that is sent is waited for, the last one counts: so each writes a little when it
has its turn, and all come equally far. A link that has no others writes as little, too: where processors are
busier than the wire that was measured to be faster than to leave the kernel all at once (LOG.md).
"""

from __future__ import annotations

import threading
import time
from collections import deque

TURN_BYTES = 32 * 1024
UNSENT_BYTES = 16 * 1024  # so much a link may leave to the kernel that is not on its way as its turn ends
_PATIENCE_S = 0.05  # who takes longer is not waited for: its peer may have died


class Turns:
    """In the order in which they come for them."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._busy = threading.Lock()
        self._queue: deque[_Turn] = deque()  # the first has its turn, the others wait for theirs
        self._since_s = 0.0  # when that began

    def taken(self) -> _Turn:
        """A turn; who enters it waits for it, and has it within."""
        return _Turn(self)

    def _come(self, mine: _Turn) -> None:
        with self._busy:
            self._queue.append(mine)
            if self._queue[0] is mine:
                self._since_s = time.monotonic()
                return
            mine.gate.acquire()
        while not mine.gate.acquire(timeout=self._left_s()):
            with self._busy:
                if not mine.has_begun and self._left_s() <= 0:  # it may be one's own by now, or have been
                    self._end(self._queue[0])

    def _left_s(self) -> float:
        return max(self._since_s + self._patience_s - time.monotonic(), 0.0)

    def _leave(self, turn: _Turn) -> None:
        with self._busy:
            self._end(turn)

    def _end(self, turn: _Turn) -> None:
        """Unless somebody has ended it already, who waited for too long."""
        if self._queue and self._queue[0] is turn:
            self._queue.popleft()
            if self._queue:
                self._since_s = time.monotonic()
                self._queue[0].has_begun = True
                self._queue[0].gate.release()


class _Turn:
    """``gate``: closed while it waits."""

    __slots__ = ("_turns", "gate", "has_begun")

    def __init__(self, turns: Turns) -> None:
        self._turns, self.gate, self.has_begun = turns, threading.Lock(), False

    def __enter__(self) -> None:
        self._turns._come(self)

    def __exit__(self, *_: object) -> None:
        self._turns._leave(self)
