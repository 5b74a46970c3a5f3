"""Local steps between two meetings: paces ``local:H`` and ``async:H``.

A worker takes H steps of its own optimizer on its own copy of the parameters. What it then brings to the meeting is
their difference to the shared ones (local: Stich 2019, Douillard et al. 2023), or the sum of its gradients (async:
Downpour, Dean et al. 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.engine.exchange.meeting import Push
from paceline.engine.exchange.replica import Replica


class Inner:
    """The period of local steps that a worker is in. ``sums``: gradients are pushed, not the difference."""

    def __init__(self, replica: Replica, every: int, *, sums: bool) -> None:
        self._replica, self._every, self._sums = replica, every, sums
        self.own_step: Callable[[], Any] = lambda: None  # the user's optimizer's, as it was before run.wrap
        self._void = True
        self._weight, self._loss, self._stop, self._place = 0.0, (0.0, 0.0), False, (0, 0)
        self.steps = 0

    def step(self, push: Push) -> bool:
        """Take one local step. Is the period over? A push of negative weight is a step that GradScaler has skipped."""
        if push.weight >= 0:
            if self._sums:
                self._replica.add_gradients(first=self._void)
            self.own_step()
            self._void = False
        self.steps += 1
        self._weight += max(push.weight, 0.0)
        self._loss, self._place = push.loss, push.place
        self._stop = self._stop or push.stop
        return self.steps >= self._every

    def close(self) -> Push:
        """What the period has come to, written into the slot; the next one begins."""
        if not self._sums:
            self._replica.write_difference()
        push = Push(-1.0 if self._void else self._weight, self._loss, self._stop, self.steps, self._place)
        self.begin()
        return push

    def begin(self) -> None:
        """The next period begins."""
        self._void, self._weight, self._loss, self._stop, self.steps = True, 0.0, (0.0, 0.0), False, 0

    def brought(self) -> bool:
        """What was summed is being brought, within the period: sums begin anew. Was there anything?"""
        was, self._void = not self._void, True
        return was
