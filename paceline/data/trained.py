"""What of an epoch has been trained on, so that the rest of it can be dealt anew, as an epoch that is shorter.

It is when a run goes on from a checkpoint with other workers (with as many as before each skips its own), and when one
that shares the epoch is given up. The rest of a rest is dealt likewise: there may be several of these for one epoch, in
their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from paceline.data.assign import owners

T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """In ``epoch``, dealt to ``workers`` by ``assign`` behind ``deal`` other deals, worker w has trained on ``done[w]``
    of its batches.

    By lease instead: ``first`` and ``before`` as ``Ledger.left`` tells them.
    """

    epoch: int
    workers: int
    assign: str
    seed: int
    done: tuple[int, ...] = ()
    first: int = 0
    before: tuple[int, ...] = ()
    deal: int = 0

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
            owner = owners(self.assign, order, total, self.workers, self.seed, self.epoch, self.deal)
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
            owner = int(owners(assign, number, total or 1, self.workers, self.seed, self.epoch, self.deal)[0])
            left[owner] -= 1
            return left[owner] >= 0

        return is_trained
