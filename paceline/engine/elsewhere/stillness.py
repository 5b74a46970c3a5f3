"""A worker elsewhere tells home for how long its process has stood still: home sees only the link, which is alive.

Who waits for whom is known at home, whether a process computes only where it is. What the kernel tells of local ones
(``engine/launcher/watch.py``) this process tells of itself. One that is stopped tells nothing: its link falls silent.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from paceline.engine.elsewhere.line import Line
from paceline.protocol.remote import Still
from paceline.transport.ends import LinkEnded
from paceline.transport.link import Link

_LOOK_S = 1.0
_SHARE = 0.02  # of a core: the link's own threads take less, a script that computes more


class Stillness:
    """For how long a process has used less than a fiftieth of a core."""

    def __init__(self, now_s: float, used_s: float) -> None:
        self._since_s = self._looked_s = now_s
        self._used_s = used_s

    def look(self, now_s: float, used_s: float, *, is_excused: bool) -> float:
        """For how many seconds until now; at most since the last look at which it was excused."""
        if is_excused or used_s - self._used_s > _SHARE * (now_s - self._looked_s):
            self._since_s = now_s
        self._looked_s, self._used_s = now_s, used_s
        return now_s - self._since_s


def tell_of_stillness(link: Link, line: Line) -> None:
    """From now on, by a thread of its own, until the link ends."""
    threading.Thread(target=_watch, args=(link, line), name="paceline-still", daemon=True).start()


def _watch(link: Link, line: Line) -> None:
    stillness = Stillness(time.monotonic(), time.process_time())
    pause = threading.Event()
    with suppress(LinkEnded):
        while not (pause.wait(_LOOK_S) or line.is_over or link.ended):
            still_s = stillness.look(time.monotonic(), time.process_time(), is_excused=line.asks)
            if still_s >= _LOOK_S:
                link.send(Still(still_s))
