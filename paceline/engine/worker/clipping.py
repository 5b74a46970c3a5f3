"""``clip_grad_norm_`` of the user's loop, made to mean the global norm.

Clipped by the norm of its own batch, each worker's gradient would be scaled by another factor, and n workers would not
be one process on the whole batch. All of torch's clipping asks ``torch.nn.utils.clip_grad._get_total_norm`` for the
norm; a worker answers there with the norm of the folded gradient. Scaling the local gradients by the same factor
everywhere then scales the fold by it. An exchange is told the factor, so that what has been sent for the norm may be
the step's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.utils import clip_grad

from paceline.errors import ConfigError


class Asked(Protocol):
    """Who can tell the norm of all workers' gradient: a worker."""

    @property
    def exchanges(self) -> Sequence[Any]: ...  # each with its ``parameters``, and ``clipped(factor)``

    def norm(self, exchange: Any, chosen: bytes, order: float) -> float: ...


# With the thread that each was made in. Tests have the workers of a job in one process, and a gradient must not be read
# from another thread: backward passes replace it without Python's lock, and what is read may be freed by then.
_workers: weakref.WeakKeyDictionary[Asked, int] = weakref.WeakKeyDictionary()
_registering = threading.Lock()
_local_norm = clip_grad._get_total_norm
_local_clip = clip_grad._clip_grads_with_norm_


def register(worker: Asked) -> None:
    """From now on norms of gradients of this worker's exchanges are those of all workers'."""
    with _registering:
        _workers[worker] = threading.get_ident()
    clip_grad._get_total_norm = _total_norm
    clip_grad._clip_grads_with_norm_ = _clip


def _shared() -> list[tuple[Asked, Any]]:
    """Workers with their exchanges: of this thread, if it has any."""
    with _registering:
        workers = dict(_workers)
    own = [one for one, thread in workers.items() if thread == threading.get_ident()]
    return [(one, exchange) for one in own or workers for exchange in one.exchanges]


def _total_norm(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    gradients = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    asked = {id(gradient) for gradient in gradients}
    order = float(norm_type)
    parts, found = [], 0
    for worker, exchange in _shared():
        chosen = bytes(p.grad is not None and id(p.grad) in asked for p in exchange.parameters)
        if any(chosen):
            found += sum(chosen)
            parts.append(worker.norm(exchange, chosen, order))
    if not found:
        local: torch.Tensor = _local_norm(gradients, norm_type, error_if_nonfinite, foreach)
        return local
    if found != len(asked):
        raise ConfigError(
            f"clip_grad_norm_ got {len(asked)} gradients, {found} of them of wrapped parameters",
            why="the others are this worker's own, so there is no norm of all",
            fix="clip wrapped and other parameters in two calls",
        )
    total: Any = torch.linalg.vector_norm(torch.tensor(parts, dtype=torch.float64), order)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of order {norm_type} of the gradients is {float(total)}")
    return torch.as_tensor(total, dtype=gradients[0].dtype, device=gradients[0].device)


def _clip(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    total_norm: torch.Tensor,
    foreach: bool | None = None,
) -> None:
    clipped = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    _local_clip(clipped, max_norm, total_norm, foreach)
    asked = set(map(id, clipped))
    factor = torch.clamp(float(max_norm) / (total_norm + 1e-6), max=1.0)  # as torch has it
    for _, exchange in _shared():
        if any(id(parameter) in asked for parameter in exchange.parameters):
            exchange.clipped(factor)
