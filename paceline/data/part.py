"""Which part of an epoch is a worker's, where batches are not drawn by lease."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paceline.data.assign import owners
from paceline.data.trained import Trained
from paceline.protocol.deals import Deal


@dataclass(frozen=True)
class Part:
    """Which part of an epoch is this worker's: number ``rank`` of so many."""

    rank: int
    workers: int
    assign: str
    seed: int
    trained: tuple[tuple[Trained, ...], ...] = ()  # by loader: what a resumed run had trained on in its epoch
    before: tuple[tuple[int, ...], ...] = ()  # as in ``Deal``: what counts of the pass's deals before this one

    def of(self, deal: Deal | None) -> Part:
        """The same for a pass that is dealt so."""
        return self if deal is None else replace(self, rank=deal.rank, workers=deal.workers, before=deal.before)

    @property
    def whole(self) -> Part:
        """All that there is to be dealt, in its order."""
        return replace(self, rank=0, workers=1, assign="round_robin", before=())

    def trained_in(self, loader: int, epoch: int) -> tuple[Trained, ...]:
        """What of this epoch need not be dealt any more: each behind the one before it."""
        known = [one for one in self.trained[loader] if one.epoch == epoch] if loader < len(self.trained) else []
        for done in self.before:
            known.append(Trained(epoch, len(done), self.assign, self.seed, done, deal=len(known)))
        return tuple(known)

    def deal(self, loader: int, epoch: int) -> int:
        """How many deals of this epoch were before this one."""
        return len(self.trained_in(loader, epoch))

    def mine(self, numbers: np.ndarray, total: int, epoch: int, deal: int = 0) -> np.ndarray:
        """bool[k]: which of ``numbers`` (int64[k], of ``total``) are this worker's in this deal of an epoch."""
        owner = owners(self.assign, numbers, total, self.workers, self.seed, epoch, deal)
        return np.asarray(owner == self.rank)

    def count(self, batches: int, epoch: int) -> int:
        """How many of an epoch's ``batches`` are this worker's, or may be where they are dealt in turn."""
        if self.assign == "round_robin":
            return -(-batches // self.workers)
        return int(self.mine(np.arange(batches), batches, epoch).sum())

    def dealt(self, batches: int, epoch: int) -> int:
        """How many of an epoch's ``batches`` are this worker's, where none has been trained on before."""
        if self.assign == "round_robin":
            return len(range(self.rank, batches, self.workers)) if self.rank >= 0 else 0
        return self.count(batches, epoch)

    def rest(self, loader: int, epoch: int, batches: Iterable[Any], total: int | None) -> Iterable[Any]:
        """Of all batches of an epoch, those that are still to be dealt; ``total`` as in ``owns_batch``."""
        for trained in self.trained_in(loader, epoch):
            batches = trained.batches_left(batches, total)
        return batches

    def rest_of(self, loader: int, epoch: int, batches: list[Any]) -> list[Any]:
        """The same of a list, where ``total`` is as many as are left each time."""
        for trained in self.trained_in(loader, epoch):
            batches = list(trained.batches_left(batches, len(batches)))
        return batches

    def owns_batch(self, ordinal: int, total: int | None, epoch: int, deal: int = 0) -> bool:
        assign = "round_robin" if self.assign == "block" and total is None else self.assign
        number = np.array([ordinal], dtype=np.int64)
        owner = owners(assign, number, total or 1, self.workers, self.seed, epoch, deal)
        return bool(owner[0] == self.rank)
