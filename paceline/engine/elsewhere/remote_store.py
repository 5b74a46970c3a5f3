"""The tensors of a ``run.store`` of a worker elsewhere: they lie at home, where every push and every look goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim

from paceline.engine.elsewhere.line import Line
from paceline.params import optimizers
from paceline.protocol import remote
from paceline.transport.link import Link


class RemoteStore:
    """As an ``Exchange`` that is a store's, over the parameters of ``optimizer``; ``number`` is home's of it."""

    def __init__(
        self, optimizer: optim.Optimizer, number: int, link: Link, line: Line, ask: Callable[[remote.Request], Any]
    ) -> None:
        self._number, self._link, self._line, self._ask = number, link, line, ask
        self._parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self._settings = optimizers.Settings(optimizer)

    def push(self) -> None:
        """Bring the parameters' gradients; returns when home has them."""
        pushed = {}
        for place, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            pushed[place] = gradient.sparse_dim() if gradient.is_sparse else 0
            if gradient.is_sparse:
                self._line.put(self._link, f"indices/{place}", gradient._indices().cpu())
                gradient = gradient._values()
            self._line.put(self._link, f"pushed/{place}", gradient.cpu())
        changed = self._settings.changed()
        settings = b"" if changed is None else optimizers.encode(changed)
        self._ask(remote.PushStore(self._number, pushed, settings))

    def pull(self, place: int) -> None:
        """Take the newest value of this tensor."""
        parameter = self._parameters[place]
        self._ask(remote.PullStore(self._number, place))
        value = self._line.mail.take(f"pulled/{place}", parameter.dtype, parameter.shape)
        with torch.no_grad():
            parameter.copy_(value)

    def finish(self) -> None:
        """Wait until this worker's last push is applied."""
        self._ask(remote.AwaitStore(self._number))
