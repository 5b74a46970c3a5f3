"""One ``run.store`` of a worker elsewhere, as its deputy has it: the other end of ``remote_store.py``."""

from __future__ import annotations

import torch

from paceline.engine.elsewhere.deputy_exchange import filling
from paceline.engine.elsewhere.deputy_line import DeputyLine
from paceline.engine.elsewhere.mail import send
from paceline.engine.elsewhere.making import make, parameters_of
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError
from paceline.params import optimizers, rows
from paceline.protocol import remote


class DeputyStore:
    """A collective. Raises ConfigError."""

    def __init__(self, worker: Worker, request: remote.WrapOptimizer, line: DeputyLine) -> None:
        optimizer, names, _ = make(request)
        self._names, self._line = [told.name for told in request.parameters], line
        with filling(worker, line, parameters_of(optimizer), optimizer):
            self._at_home = worker.add_store(optimizer, names)
        self.sent_bytes = 0

    def push(self, request: remote.PushStore) -> None:
        """Raises ConfigError, and changes nothing, for what does not fit a tensor or is not finite."""
        for parameter in self._at_home.parameters:
            parameter.grad = None
        for place, sparse_dim in request.pushed.items():
            self._at_home.parameters[place].grad = self._take(place, sparse_dim)
        if request.settings:
            self._at_home.load_settings(optimizers.decode(request.settings))
        self._at_home.push()

    def pull(self, place: int) -> None:
        self._at_home.refresh()
        self.sent_bytes += send(self._line.link, f"pulled/{place}", self._at_home.parameters[self._checked(place)])

    def finish(self) -> None:
        self._at_home.finish()

    def _take(self, place: int, sparse_dim: int) -> torch.Tensor:
        """What has come for this tensor. Raises ConfigError."""
        parameter, mail = self._at_home.parameters[self._checked(place)], self._line.mail
        what = f"push of {self._names[place]}"
        values = mail.take(f"pushed/{place}", parameter.dtype)
        if not torch.isfinite(values).all():
            raise ConfigError(f"{what} has values that are not finite; they would stay in it for all workers")
        if not 0 <= sparse_dim <= parameter.dim():
            raise ConfigError(f"{what} has indices of {sparse_dim} dimensions, the tensor has {parameter.dim()}")
        try:
            if not sparse_dim:
                return values.view(parameter.shape)
            indices = mail.take(f"indices/{place}", torch.int64).view(sparse_dim, -1)
            values = values.view(indices.shape[1], *parameter.shape[sparse_dim:])
            made = torch.sparse_coo_tensor(indices, values, parameter.shape, check_invariants=False)
        except RuntimeError as error:
            raise ConfigError(f"{what} does not fit {list(parameter.shape)}: {error}") from None
        rows.check(made, parameter.shape, what)
        return made

    def _checked(self, place: int) -> int:
        """Raises ConfigError."""
        if not 0 <= place < len(self._names):
            raise ConfigError(f"the store has {len(self._names)} tensors, there is no number {place}")
        return place
