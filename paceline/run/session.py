"""``init`` and ``wrap``: the three lines that make a plain training script distributed.

Alone (``python train.py``) nothing is changed: ``wrap`` returns what it was given. Inside a run, ``wrap`` moves the
optimizer's parameters into memory shared by the workers, makes ``optimizer.step()`` the exchange, and gives the loader
this worker's part of the data.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from paceline.config import Job, Pace, Sync
from paceline.data.seeds import part_ways
from paceline.engine import context as contexts
from paceline.engine.context import Context
from paceline.engine.elsewhere.remote import RemoteWorker
from paceline.engine.elsewhere.remote_exchange import RemoteExchange
from paceline.engine.exchange.exchange import Exchange
from paceline.engine.worker import scaling
from paceline.engine.worker.left_out import LeftOut
from paceline.engine.worker.watching import watch
from paceline.engine.worker.worker import Worker
from paceline.errors import ConfigError, UsageError
from paceline.params.rows import parameters_with_rows
from paceline.params.table import names_of
from paceline.run.store import Store


class Run:
    """A worker's run. Made by ``init``; there is one a process. ``worker`` is for the engine (None: alone)."""

    def __init__(self, context: Context | None, elsewhere: RemoteWorker | None = None) -> None:
        """``elsewhere``: this is a worker of a run whose home is another process."""
        self._context: Context | RemoteWorker | None = context or elsewhere
        self.worker: Worker | RemoteWorker | None = Worker(context) if context is not None else elsewhere
        self._left_out = LeftOut()
        if self.worker is not None:
            self.worker.left_out = self._left_out
        self._models: list[nn.Module] = []
        self._wrapped: set[int] = set()
        self._copied: set[int] = set()
        self._own_stream = False
        self._directory: Path | None = None

    @property
    def rank(self) -> int:
        """This worker's number, 0 to ``num_workers - 1``."""
        self._left_out.asked_rank = True
        return self._rank

    @property
    def num_workers(self) -> int:
        """How many workers the run is to have; ``paceline scale`` changes it."""
        self._left_out.asked_rank = True
        return self.worker.num_workers if self.worker else 1

    @property
    def _rank(self) -> int:
        return self.worker.rank if self.worker else 0

    @property
    def is_main(self) -> bool:
        """Is this worker 0, the one that prints and saves? Not while it catches up in the place of one that died."""
        return self._rank == 0 and not (self.worker and self.worker.is_behind)

    @property
    def step(self) -> int:
        """Rounds finished; 0 when alone."""
        return self.worker.step_number if self.worker else 0

    @property
    def pace(self) -> Pace:
        return self._context.job.pace if self._context else Sync()

    @property
    def directory(self) -> Path:
        """The run's directory, for pictures and checkpoints. Alone, one is made when first asked for."""
        if self._context is not None:
            return self._context.directory
        if self._directory is None:
            name = Path(sys.argv[0]).stem or "python"
            self._directory = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-alone"
            (self._directory / "plots").mkdir(parents=True, exist_ok=True)
        return self._directory

    def wrap(self, *objects: Any, share_parameters: bool = True, count: Callable[[Any], int] | None = None) -> Any:
        """Share models, optimizers, schedulers and loaders with the other workers; returns them, in order.

        Models, optimizers and schedulers are changed in place and come back as they are; loaders come back
        rebuilt. One object comes back bare, several as a tuple. May be called again for more; every worker must
        call it as often, in the same order. ``share_parameters=False`` gives each worker a copy of the
        parameters instead of a view of the shared ones. ``count(batch)`` tells the samples of a batch that
        paceline cannot count. Blocks until all workers have called it. Raises ConfigError.
        """
        if not objects:
            raise UsageError("run.wrap needs something to wrap: a model, an optimizer, a loader, a scheduler")
        if self.worker is None:
            return objects[0] if len(objects) == 1 else objects
        self._models += [item for item in objects if isinstance(item, nn.Module)]
        self.worker.knows(self._models)
        for item in objects:
            if isinstance(item, optim.Optimizer):
                self._wrap_optimizer(item, share_parameters)
        for item in objects:
            if isinstance(item, nn.Module):
                self._wrap_model(item)
        if not self._own_stream:
            part_ways(self._rank)  # models have been built alike; from here on dropout must differ between workers
            self._own_stream = True
        for item in objects:
            if isinstance(item, LRScheduler):
                _hold_at_end(item, self.worker)
            if isinstance(item, LRScheduler | ReduceLROnPlateau):
                self.worker.saving.keep_if_possible(item)
        wrapped = tuple(self._wrap_loader(item, count) for item in objects)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def store(self, *, optimizer: Callable[[Any], optim.Optimizer] | None = None, **tensors: torch.Tensor) -> Store:
        """Named tensors shared by all workers, for ``push``, ``pull`` and ``wait``; worker 0's values count.

        ``optimizer`` makes the optimizer that pushed values are gradients for; without one they are added. Every
        worker must call it, in the same order as ``wrap``. Blocks until all have. Raises ConfigError.
        """
        return Store(self.worker, tensors, optimizer)

    def keep(self, *objects: Any) -> None:
        """Put these into checkpoints and back at ``paceline resume``: anything with ``state_dict`` and
        ``load_state_dict``. What is wrapped is kept anyway. Raises ConfigError."""
        worker = self.worker
        for item in objects if worker is not None else ():
            assert worker is not None
            worker.saving.keeper.add(item)

    def barrier(self) -> None:
        """Block until every worker has called it, as often and in the same order as ``wrap``."""
        if self.worker is not None:
            self.worker.collectives.barrier()

    def log(self, loss: Any = None, **values: Any) -> None:
        """Report this step's loss (a number or a tensor of one value), and other numbers, to the run; behind the loop
        over the training loader, the epoch's.

        The loss is averaged over workers by samples; of other values worker 0's are kept.
        """
        if self.worker is None:
            return
        numbers = {name: _number(name, value) for name, value in values.items()}
        self.worker.log(None if loss is None else _number("loss", loss), numbers)

    def _wrap_optimizer(self, optimizer: optim.Optimizer, share_parameters: bool) -> None:
        assert self.worker is not None
        if id(optimizer) in self._wrapped:
            return
        wanted = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names = names_of(wanted, self._models)
        with_rows = parameters_with_rows(self._models)
        exchange = self.worker.add_exchange(optimizer, names, with_rows, share=share_parameters)
        index = len(self._wrapped)
        self._wrapped.add(id(optimizer))
        self._copied.update(id(parameter) for parameter in exchange.parameters)
        worker = self.worker
        _replace_step(optimizer, worker, index, exchange)
        _replace_zero_grad(optimizer, worker, index)
        scaling.register(optimizer, worker, index)
        optimizer.register_load_state_dict_post_hook(lambda _: worker.loaded_state(index))

    def _wrap_model(self, model: nn.Module) -> None:
        """Frozen parameters and buffers are each worker's own; they begin as worker 0's. What is loaded into the model
        later is taken by all."""
        assert self.worker is not None
        tensors = [*model.named_parameters(), *model.named_buffers()]
        fresh = [(name, tensor) for name, tensor in tensors if id(tensor) not in self._copied]
        if fresh:
            self.worker.collectives.copy_from_first(fresh)
            self._copied.update(id(tensor) for _, tensor in fresh)
        fresh_ids = {id(tensor) for _, tensor in fresh}
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if id(buffer) in fresh_ids]
        self.worker.saving.keeper.add_buffers(buffers)
        assert self._context is not None
        if buffers and self._context.job.places > 1:
            self.worker.average_buffers(buffers)
        watch(model, self.worker)
        self._left_out.wrapped(model)

    def _wrap_loader(self, item: Any, count: Callable[[Any], int] | None) -> Any:
        assert self.worker is not None
        if isinstance(item, nn.Module | optim.Optimizer | LRScheduler | ReduceLROnPlateau):
            return item
        return self.worker.share_loader(item, count)


_current: Run | None = None


def init(**options: Any) -> Run:
    """This process's run: as one of its workers inside ``paceline run`` or torchrun, else alone. The same one at each
    call.

    ``options`` are fields of ``paceline.Job`` (``pace="bounded:4"``, ``steps=1000``), for torchrun, where there is no
    command line of ours; rank 0's count. Elsewhere they are checked and have no effect.
    """
    global _current
    _check_options(options)
    if contexts.importing_main:
        raise UsageError(
            "paceline.init() was called while a worker imported the main module",
            fix="put what the program does under: if __name__ == '__main__':",
        )
    if _current is None:
        if contexts.current is None and int(os.environ.get("WORLD_SIZE") or "1") > 1:
            from paceline.run.torchrun import join

            _current = Run(None, join(options))
        else:
            _current = Run(contexts.current)
        contexts.worker = _current.worker
    return _current


def take_place(worker: RemoteWorker) -> None:
    """This process is that worker, before its script begins; ``init`` finds it so."""
    global _current
    _current = Run(None, worker)
    contexts.worker = worker


def _check_options(options: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(Job)} - {"name", "workers", "engine", "ray_address"}
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise UsageError(f"paceline.init got {unknown!r}; it takes: {', '.join(sorted(known))}")


def _replace_step(
    optimizer: optim.Optimizer, worker: Worker | RemoteWorker, index: int, exchange: Exchange | RemoteExchange
) -> None:
    """Make ``optimizer.step()`` the exchange, for torch's schedulers and hooks the same method as before."""
    before = optimizer.step
    if exchange.inner is not None:
        exchange.inner.own_step = before

    @wraps(before)
    def step(closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if exchange.inner is not None:  # then the step is the optimizer's own, hooks included
            worker.exchange(index)
            return loss
        for hook in list(optimizer._optimizer_step_pre_hooks.values()):
            hook(optimizer, (), {})
        worker.exchange(index)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look for
        for hook in list(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
        return loss

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler made before is not lost
    optimizer.step = step  # type: ignore[method-assign]


def _replace_zero_grad(optimizer: optim.Optimizer, worker: Worker | RemoteWorker, index: int) -> None:
    """Have the worker hear of it: a push weighs as many samples as have a gradient in it."""
    before = optimizer.zero_grad

    @wraps(before)
    def zero_grad(set_to_none: bool = True) -> None:
        before(set_to_none)
        worker.zeroing.zeroed(index)

    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _hold_at_end(scheduler: LRScheduler, worker: Worker | RemoteWorker) -> None:
    """A scheduler of a known length keeps its last rate: a fast worker may take more steps than its share."""
    before = scheduler.step

    @wraps(before)
    def step(*args: Any, **kwargs: Any) -> None:
        total = getattr(scheduler, "total_steps", None)
        if worker.holds or (total is not None and scheduler.last_epoch + 1 >= total):
            return
        before(*args, **kwargs)

    def state_dict() -> dict[str, Any]:
        return {key: value for key, value in own_state().items() if key not in ("step", "state_dict")}

    own_state = scheduler.state_dict
    scheduler.step = step  # type: ignore[method-assign]
    scheduler.state_dict = state_dict  # type: ignore[method-assign]  # torch's is all of its attributes, step included


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"run.log got {name} of type {type(value).__name__}; it must be one number",
            fix=f"log a scalar: run.log({name}={name}.mean())",
        ) from None
