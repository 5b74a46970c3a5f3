"""A deputy's copies of its worker's buffers: they come before a pass ends, and go back as the mean of all workers'."""

from __future__ import annotations

import torch

from paceline.engine.elsewhere.deputy_line import DeputyLine
from paceline.engine.elsewhere.mail import send
from paceline.engine.elsewhere.making import make_all
from paceline.engine.worker.worker import Worker
from paceline.params.table import Table


class DeputyBuffers:
    def __init__(self, worker: Worker, line: DeputyLine) -> None:
        self._worker, self._line = worker, line
        self._buffers: list[list[torch.Tensor]] = []
        self._averaged = 0  # passes after which the worker was told them

    def wrap(self, table: Table) -> None:
        """As ``Worker.average_buffers``: a collective."""
        tensors = make_all(table.entries)
        self._buffers.append(tensors)
        self._worker.average_buffers([(e.name, tensor) for e, tensor in zip(table.entries, tensors, strict=True)])

    def take(self) -> None:
        """The worker's own have come."""
        for index, tensors in enumerate(self._buffers):
            for place, tensor in enumerate(tensors):
                self._line.mail.take_into(f"buffers/{index}/{place}", tensor)

    def send_if_due(self, *, anyway: bool) -> bool:
        """Send them if a pass has ended since, or ``anyway``. Were they sent?"""
        passes = self._worker.progress.passes
        if not self._buffers or not (anyway or passes > self._averaged):
            return False
        self._averaged = passes
        for index, tensors in enumerate(self._buffers):
            for place, tensor in enumerate(tensors):
                send(self._line.link, f"averaged/{index}/{place}", tensor)
        return True
