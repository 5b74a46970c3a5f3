"""A deputy's side of ``remote_passes.py``: passes over loaders that are elsewhere, as the gradients are."""

from __future__ import annotations

from torch import nn

from paceline.data.passes import Leases
from paceline.engine.worker.worker import Worker
from paceline.protocol import remote


class DeputyPasses:
    """Tells the worker's passes what a script's models and gradients would: the mode, and what backward has added."""

    def __init__(self, worker: Worker) -> None:
        self._passes = worker.passes
        self.leases: dict[int, Leases] = {}  # by loader, of the pass in progress
        self._mode = nn.Module()  # stands for the script's models: in training mode or not
        self._marks = 0
        worker.knows([self._mode])
        worker.passes.marks = lambda: self._marks

    def begin(self, request: remote.Begin) -> tuple[bool, int, bool]:
        """Is it a real one? How many batches are to be skipped; are there leases?"""
        passes, loader = self._passes, request.loader
        self._look_at(request.marks, is_training=request.is_training)
        is_real = passes.begin(loader, request.length)
        leases = passes.leases(loader) if is_real else None
        if leases is not None:
            self.leases[loader] = leases
        return is_real, passes.skip(loader) if is_real else 0, leases is not None

    def draw(self, request: remote.DrawLease) -> int | None:
        leases = self.leases[request.loader]
        while True:
            ordinal = leases.draw(request.total, request.at_least)
            if ordinal is None or not request.begins or leases.begin():
                return ordinal

    def end(self, request: remote.End) -> None:
        self._look_at(request.marks, is_training=request.is_training)
        self._passes.end(request.loader)

    def leave(self, loader: int, marks: int) -> None:
        self._marks = marks
        self._passes.leave(loader)

    def _look_at(self, marks: int, *, is_training: bool) -> None:
        self._marks = marks
        self._mode.train(is_training)
