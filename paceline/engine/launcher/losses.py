"""The mean of a run's last losses, in memory that does not grow with the run."""

from __future__ import annotations

from array import array

_BINS = 4096
_SHARE = 20  # the last twentieth of the steps


class Losses:
    """Losses in the order of their steps, as sums of equally many; twice as many to a sum when there are 2 x _BINS."""

    def __init__(self) -> None:
        self._sums, self._size = array("d"), 1
        self._rest, self._resting = 0.0, 0  # not yet as many as a sum has

    def add(self, loss: float) -> None:
        self._rest += loss
        self._resting += 1
        if self._resting < self._size:
            return
        self._sums.append(self._rest)
        self._rest, self._resting = 0.0, 0
        if len(self._sums) == 2 * _BINS:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums, self._size = array("d", (one + other for one, other in pairs)), 2 * self._size

    def last(self) -> float | None:
        """The mean over the last 5 % of the steps, at least one; of a long run up to a thousandth of it more."""
        steps = len(self._sums) * self._size + self._resting
        if not steps:
            return None
        wanted = max(1, steps // _SHARE)
        bins = -(-max(wanted - self._resting, 0) // self._size)
        found = sum(self._sums[len(self._sums) - bins :]) + self._rest
        return float(found) / (bins * self._size + self._resting)
