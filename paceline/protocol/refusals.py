"""What was refused at the door, told once in words: a flood of one kind is one line now and one line a while later."""

from __future__ import annotations

from dataclasses import dataclass

EVERY_S = 10.0
MAX_KINDS = 64


@dataclass
class _Kind:
    told_s: float
    untold: int = 0


class Refusals:
    """Counts refusals by their reason and says when to tell of one. Bounded, whatever strangers send."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._kinds: dict[str, _Kind] = {}
        self.total = 0

    def told(self, now_s: float, address: str, reason: str) -> str | None:
        """The line to log for this one, or None if its like was told of a moment ago."""
        self.total += 1
        kind = self._kinds.get(reason)
        if kind is None:
            if len(self._kinds) >= MAX_KINDS:
                del self._kinds[min(self._kinds, key=lambda reason: self._kinds[reason].told_s)]
            self._kinds[reason] = _Kind(now_s)
            return f"refused {address}: {reason}"
        if now_s - kind.told_s < self._every_s:
            kind.untold += 1
            return None
        more = f" (and {kind.untold:,} more since)" if kind.untold else ""
        kind.told_s, kind.untold = now_s, 0
        return f"refused {address}: {reason}{more}"
