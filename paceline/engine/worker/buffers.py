"""Buffers (batch norm's running statistics): each worker's own in training, made equal at the end of every pass.

Floating ones become the mean weighted by the samples of the pass, others (counts) the maximum. So batch norm is not
bitwise one process's; ``SyncBatchNorm`` is there for who needs that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.params.table import Table
from paceline.transport.segment import Memory, page_up
from paceline.transport.slots import carve_vectors

_COPIES = 2  # by parity of the pass: a fast worker may write the next pass's while a slow one reads this one's


def size_bytes(table: Table, workers: int) -> int:
    return page_up(workers * _COPIES * 8) + workers * _COPIES * page_up(max(table.offsets_bytes()[""], 1))


def by_place(table: Table, workers: int) -> tuple[tuple[int, int, int], ...]:
    """Which ranges of it belong to single workers."""
    return ((page_up(workers * _COPIES * 8), _COPIES * page_up(max(table.offsets_bytes()[""], 1)), workers),)


class Buffers:
    """The buffers ``tensors``, described by ``table``, of all workers in ``memory``."""

    def __init__(self, memory: Memory, table: Table, tensors: Sequence[torch.Tensor], rank: int, workers: int) -> None:
        self._tensors, self._rank, self._workers = list(tensors), rank, workers
        self._weights = memoryview(memory)[: workers * _COPIES * 8].cast("d")
        first, each = page_up(workers * _COPIES * 8), page_up(max(table.offsets_bytes()[""], 1))
        self._views = []
        for place in range(workers * _COPIES):
            vectors = carve_vectors(memory, first + place * each, table.sizes)
            self._views.append([table.view(entry, vectors[entry.dtype]) for entry in table.entries])

    def write(self, number: int, weight: float) -> None:
        """Give this worker's buffers after pass ``number``, with ``weight`` samples behind them."""
        place = self._place(number, self._rank)
        self._weights[place] = weight
        with torch.no_grad():
            for view, tensor in zip(self._views[place], self._tensors, strict=True):
                view.copy_(tensor)

    def forget(self) -> None:
        """What lies here is of a worker that has left."""
        for number in range(_COPIES):
            self._weights[self._place(number, self._rank)] = 0.0

    def average(self, number: int, members: Sequence[int]) -> None:
        """Set the buffers to the mean of those of ``members``, who have all written; the same on all workers."""
        places = [self._place(number, member) for member in members]
        places = [place for place in places if self._weights[place] > 0]
        total = sum(self._weights[place] for place in places)
        with torch.no_grad():
            for index, tensor in enumerate(self._tensors):
                given = [self._views[place][index] for place in places]
                if not given:
                    return
                if tensor.is_floating_point() or tensor.is_complex():
                    wide = torch.zeros_like(given[0], dtype=torch.promote_types(tensor.dtype, torch.float32))
                    for place, one in zip(places, given, strict=True):
                        wide.add_(one, alpha=self._weights[place] / total)
                    tensor.copy_(wide)
                else:
                    most = given[0].clone()
                    for one in given[1:]:
                        torch.maximum(most, one, out=most)
                    tensor.copy_(most)

    def _place(self, number: int, worker: int) -> int:
        return worker * _COPIES + number % _COPIES
