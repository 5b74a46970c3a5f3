"""Named tensors on the parameter server, used directly: ``push``, ``pull``, ``wait``.

No model, no loop: below ``optimizer.step()`` this is what the servers (or, without any, the workers) do anyway. Pushes
are applied in the order they come, whatever the run's pace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import nn, optim

from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError, UsageError
from paceline.params.rows import check

MakeOptimizer = Callable[[Iterable[nn.Parameter]], optim.Optimizer]


class _Shared(Protocol):
    """What all workers have of it, with the gradients of this worker's parameters on the way in."""

    def push(self) -> None: ...

    def pull(self, place: int) -> None: ...

    def finish(self) -> None: ...


class Store:
    """The tensors ``named``, shared by all workers; each begins as worker 0's. Made by ``Run.store``.

    Without an optimizer a push adds to the tensor; with one (``lambda p: torch.optim.Adam(p, lr=0.01)``) the pushed
    value is a gradient that it steps with. Handles are numbers from 1 on, rising.
    """

    def __init__(
        self, worker: Worker | RemoteWorker | None, named: Mapping[str, torch.Tensor], optimizer: MakeOptimizer | None
    ) -> None:
        if not named:
            raise UsageError("run.store needs at least one tensor: run.store(weights=torch.zeros(10))")
        for name, tensor in named.items():
            if not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
                kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ConfigError(f"{name} is {kind}; a store holds tensors of floating-point or complex numbers")
        self._own = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in named.items()}
        self._sign = 1 if optimizer is not None else -1  # adding is a step of SGD with rate 1 against the value
        make = optimizer or (lambda parameters: optim.SGD(parameters, lr=1.0))
        self._optimizer = make(self._own.values())
        self._exchange: _Shared | None = None
        if worker is not None:
            self._exchange = worker.add_store(self._optimizer, {id(p): name for name, p in self._own.items()})
        self._pushed = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._own)

    def push(self, **values: torch.Tensor) -> int:
        """Add each value to the tensor of its name (or step with it as gradient); a handle for ``wait``.

        All values of a push are applied together. With servers it returns when the values are copied, and the servers
        go on; a worker has one push on its way, so the next waits for it. Raises ConfigError, and changes nothing, for
        a wrong name, shape or dtype, a row that the tensor does not have, or a value that is not finite.
        """
        if not values:
            raise UsageError(f"push needs a value for one of: {', '.join(self._own)}")
        for name, value in values.items():
            self._check(name, value)
        for parameter in self._own.values():
            parameter.grad = None
        for name, value in values.items():
            parameter = self._own[name]
            parameter.grad = (self._sign * value.detach()).to(parameter)
        if self._exchange is None:
            self._optimizer.step()
        else:
            self._exchange.push()
        self._pushed += 1
        return self._pushed

    def pull(self, name: str) -> torch.Tensor:
        """The tensor's newest value, with all pushes that any worker has made before; a copy. Blocks."""
        parameter = self._parameter(name)
        if self._exchange is not None:
            self._exchange.pull(self.names.index(name))
        return parameter.detach().clone()

    def wait(self, handle: int | None = None) -> None:
        """Return when the push of this handle is applied, and all before it (None: all so far)."""
        if handle is not None and not 1 <= handle <= self._pushed:
            raise UsageError(
                f"wait got handle {handle}; {self._pushed} pushes were made, so it must be 1 to {self._pushed}"
            )
        if self._exchange is not None and (handle is None or handle == self._pushed):
            self._exchange.finish()

    def _check(self, name: str, value: torch.Tensor) -> None:
        """Raise ConfigError for what cannot be pushed to the tensor of this name."""
        parameter, what = self._parameter(name), f"push of {name}"
        if not isinstance(value, torch.Tensor):
            raise ConfigError(f"{what} is a {type(value).__name__}; it must be a tensor")
        if value.is_complex() and not parameter.is_complex():
            raise ConfigError(f"{what} has dtype {value.dtype}; it must be real, as {parameter.dtype}")
        check(value, parameter.shape, what)
        if not torch.isfinite(value.coalesce().values() if value.is_sparse else value).all():
            raise ConfigError(f"{what} has values that are not finite; they would stay in it for all workers")

    def _parameter(self, name: str) -> nn.Parameter:
        if name not in self._own:
            raise ConfigError(f"the store has no tensor {name!r}; it has: {', '.join(self._own)}")
        return self._own[name]
