"""What of an epoch had been trained on when a checkpoint was made, for a run that goes on with other workers.

Then the rest is dealt anew, as an epoch that is shorter. With as many workers as before nobody needs this: each skips
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from paceline.data.assign import owners

T = TypeVar("T")

ALL = 1 << 40  # batches: more than anybody has


@dataclass(frozen=True)
class Trained:
    """In ``epoch``, dealt to ``workers`` by ``assign``, worker w had trained on ``done[w]`` of its batches.

    By lease instead: ``first`` and ``before`` as ``Ledger.left`` tells them.
    """

    epoch: int
    workers: int
    assign: str
    seed: int
    done: tuple[int, ...] = ()
    first: int = 0
    before: tuple[int, ...] = ()

    def batches_left(self, batches: Iterable[T], total: int | None) -> Iterator[T]:
        """Of batches in their order, those that are left; ``total`` as in ``Part.owns_batch``."""
        is_trained = self._by_ordinal(total)
        for ordinal, batch in enumerate(batches):
            if not is_trained(ordinal):
                yield batch

    def samples_left(self, order: np.ndarray, size: int, total: int) -> np.ndarray:
        """Of an order of sample numbers (int64[n]; ``total`` in the data set), cut into batches of ``size``, those that
        are left, in their order."""
        trained = np.zeros(len(order), dtype=bool)
        if self.assign in ("round_robin", "lease"):
            batches = -(-len(order) // size)
            is_trained = self._by_ordinal(batches)
            for ordinal in filter(is_trained, range(batches)):
                trained[ordinal * size : (ordinal + 1) * size] = True
        else:
            owner = owners(self.assign, order, total, self.workers, self.seed, self.epoch)
            for worker, done in enumerate(self.done):
                trained[np.flatnonzero(owner == worker)[: done * size]] = True
        return order[~trained]

    def _by_ordinal(self, total: int | None) -> Callable[[int], bool]:
        """Is the batch of this ordinal trained on? To be asked in order, of each once."""
        if self.assign == "lease":
            before = set(self.before)
            return lambda ordinal: ordinal < self.first and ordinal not in before
        assign = "round_robin" if self.assign == "block" and total is None else self.assign
        left = list(self.done)

        def is_trained(ordinal: int) -> bool:
            number = np.array([ordinal], dtype=np.int64)
            owner = int(owners(assign, number, total or 1, self.workers, self.seed, self.epoch)[0])
            left[owner] -= 1
            return left[owner] >= 0

        return is_trained
