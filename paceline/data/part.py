"""Which part of an epoch is a worker's, where batches are not drawn by lease."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paceline.data.assign import owners
from paceline.data.trained import Trained


@dataclass(frozen=True)
class Part:
    """Which part of an epoch is this worker's: number ``rank`` of so many."""

    rank: int
    workers: int
    assign: str
    seed: int
    trained: tuple[Trained | None, ...] = ()  # by loader: what a resumed run had trained on in its epoch

    def of(self, deal: tuple[int, int] | None) -> Part:
        """The same for a pass that is dealt so; see ``Passes.deal``."""
        return self if deal is None else replace(self, rank=deal[0], workers=deal[1])

    def left_of(self, loader: int, epoch: int) -> Trained | None:
        """What of this epoch need not be dealt any more."""
        trained = self.trained[loader] if loader < len(self.trained) else None
        return trained if trained is not None and trained.epoch == epoch else None

    def mine(self, numbers: np.ndarray, total: int, epoch: int) -> np.ndarray:
        """bool[k]: which of ``numbers`` (int64[k], of ``total``) are this worker's in this epoch."""
        owner = owners(self.assign, numbers, total, self.workers, self.seed, epoch)
        return np.asarray(owner == self.rank)

    def count(self, batches: int, epoch: int) -> int:
        """How many of an epoch's ``batches`` are this worker's, or may be where they are dealt in turn."""
        if self.assign == "round_robin":
            return -(-batches // self.workers)
        return int(self.mine(np.arange(batches), batches, epoch).sum())

    def rest(self, loader: int, epoch: int, batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        """Of all batches of an epoch, those that are still to be dealt."""
        trained = self.left_of(loader, epoch)
        return batches if trained is None else trained.batches_left(batches, total)

    def owns_batch(self, ordinal: int, total: int | None, epoch: int) -> bool:
        assign = "round_robin" if self.assign == "block" and total is None else self.assign
        number = np.array([ordinal], dtype=np.int64)
        owner = owners(assign, number, total or 1, self.workers, self.seed, epoch)
        return bool(owner[0] == self.rank)
