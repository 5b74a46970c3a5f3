"""What was refused at the door, told once in words: a flood of one kind is one line now and one line a while later."""

from __future__ import annotations

from dataclasses import dataclass

EVERY_S = 10.0
MAX_LINES = 16  # in so long, of whatever kinds: the words may hold what a stranger has sent


@dataclass
class _Kind:
    told_s: float
    untold: int = 0


class Refusals:
    """Counts refusals by their reason and says when to tell of one. Bounded, whatever strangers send."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._told: dict[str, _Kind] = {}
        self._others = 0  # untold, of kinds that there was no line left for
        self.total = 0

    def told(self, now_s: float, address: str, reason: str) -> str | None:
        """The line to log for this one, or None if its like was told of a moment ago."""
        self.total += 1
        kind = self._told.get(reason)
        if kind is not None and now_s - kind.told_s < self._every_s:
            kind.untold += 1
            return None
        for old in [old for old, kind in self._told.items() if now_s - kind.told_s >= self._every_s and old != reason]:
            self._others += self._told.pop(old).untold
        if kind is None and len(self._told) >= MAX_LINES:
            self._others += 1
            return None
        untold = kind.untold if kind is not None else 0
        self._told[reason] = _Kind(now_s)
        line = f"refused {address}: {reason}" + (f" (and {untold:,} more like it since)" if untold else "")
        if self._others:
            line += f" (and {self._others:,} others)"
            self._others = 0
        return line
