"""A deputy's side of ``remote_passes.py``: passes over loaders that are elsewhere, as the gradients are."""

from __future__ import annotations

from torch import nn

from paceline.data.passes import Leases
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError
from paceline.protocol import remote


class DeputyPasses:
    """Tells the worker's passes what a script's models and gradients would: the mode, and what backward has added. What
    is said of a loader, or of a pass, that is not there raises ConfigError."""

    def __init__(self, worker: Worker) -> None:
        self._passes = worker.passes
        self._leases: dict[int, Leases] = {}  # by loader, of the pass in progress
        self._begun: dict[int, bool] = {}  # loader -> was it a real pass, ever?
        self._mode = nn.Module()  # stands for the script's models: in training mode or not
        self._marks = 0
        worker.knows([self._mode])
        worker.passes.marks = lambda: self._marks

    def begin(self, request: remote.Begin) -> tuple[bool, int, bool]:
        """Is it a real one? How many batches are to be skipped; are there leases?"""
        passes, loader = self._passes, self.known(request.loader)
        self._look_at(request.marks, is_training=request.is_training)
        is_real = passes.begin(loader, request.length)
        self._begun[loader] = is_real or self._begun.get(loader, False)
        leases = passes.leases(loader) if is_real else None
        if leases is not None:
            self._leases[loader] = leases
        return is_real, passes.skip(loader) if is_real else 0, leases is not None

    def known(self, loader: int) -> int:
        """One that the worker has wrapped."""
        if not 0 <= loader < self._passes.count:
            raise ConfigError(f"there is no loader {loader}; {self._passes.count} have been wrapped")
        return loader

    def begun(self, loader: int) -> int:
        """One with a pass."""
        if loader not in self._begun:
            raise ConfigError(f"no pass of loader {loader} has begun")
        return loader

    def lease(self, loader: int) -> Leases:
        if loader not in self._leases:
            raise ConfigError(f"no pass of loader {loader} is drawn by lease")
        return self._leases[loader]

    def fetched(self, loader: int) -> None:
        if not self._begun.get(loader):
            raise ConfigError(f"a batch of loader {loader} has come before a pass of it has begun")
        self._passes.fetched(loader)

    def draw(self, request: remote.DrawLease) -> int | None:
        leases = self.lease(request.loader)
        while True:
            ordinal = leases.draw(request.total, request.at_least)
            if ordinal is None or not request.begins or leases.begin():
                return ordinal

    def end(self, request: remote.End) -> None:
        self._look_at(request.marks, is_training=request.is_training)
        self._passes.end(self.begun(request.loader))

    def leave(self, loader: int, marks: int) -> None:
        self._marks = marks
        self._passes.leave(self.begun(loader))

    def _look_at(self, marks: int, *, is_training: bool) -> None:
        self._marks = marks
        self._mode.train(is_training)
