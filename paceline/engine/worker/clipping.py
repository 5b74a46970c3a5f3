"""``clip_grad_norm_`` of the user's loop, made to mean the global norm.

Clipped by the norm of its own batch, each worker's gradient would be scaled by another factor, and n workers would not
be one process on the whole batch. All of torch's clipping asks ``torch.nn.utils.clip_grad._get_total_norm`` for the
norm, which a worker makes that of the folded gradient. Scaling the local gradients by the same factor everywhere then
scales the fold by it. An exchange is told the factor, so that what has been sent for the norm may be the step's.

Whom the norm is asked of must not depend on who has a gradient, or those who have none of an optimizer's would leave
the others waiting. torch asks for the norm with the gradients that there are, and then has all parameters clipped by
it. So the norm is a tensor without a value until these are known, which is before anybody else sees it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.utils import clip_grad

from paceline.errors import ConfigError


class Asked(Protocol):
    """Who can tell the norm of all workers' gradient: a worker."""

    @property
    def exchanges(self) -> Sequence[Any]: ...  # each with its ``parameters``, and ``clipped(factor)``

    def norm(self, exchange: Any, chosen: bytes, order: float) -> float: ...


@dataclass(frozen=True)
class _Open:
    """A norm of this order that torch has asked for, and has not clipped by yet; ``total`` is to be it."""

    total: torch.Tensor
    order: float
    must_be_finite: bool


class _OpenNorm(threading.local):
    norm: _Open | None = None


# With the thread that each was made in. Tests have the workers of a job in one process, and a gradient must not be read
# from another thread: backward passes replace it without Python's lock, and what is read may be freed by then.
_workers: weakref.WeakKeyDictionary[Asked, int] = weakref.WeakKeyDictionary()
_registering = threading.Lock()
_open = _OpenNorm()
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
    """The local norm of a script's own gradients; of others a tensor that ``_clip`` writes the norm of all to."""
    gradients = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    asked = {id(gradient) for gradient in gradients}
    if asked and not any(id(p.grad) in asked for _, exchange in _shared() for p in exchange.parameters):
        local: torch.Tensor = _local_norm(gradients, norm_type, error_if_nonfinite, foreach)
        return local
    like = gradients[0] if gradients else torch.zeros(())
    total = torch.zeros((), dtype=like.dtype, device=like.device)
    _open.norm = _Open(total, float(norm_type), error_if_nonfinite)
    return total


def _clip(
    parameters: torch.Tensor | Iterable[torch.Tensor],
    max_norm: float,
    total_norm: torch.Tensor,
    foreach: bool | None = None,
) -> None:
    clipped = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    asked = set(map(id, clipped))
    shared = [pair for pair in _shared() if any(id(parameter) in asked for parameter in pair[1].parameters)]
    norm, open_, _open.norm = total_norm, _open.norm, None
    chosen = _choose(clipped, [exchange for _, exchange in shared])
    if open_ is not None and open_.total is total_norm and shared:
        first = next((p.grad for p in clipped if p.grad is not None), clipped[0])
        # Of the same type on all workers, also one that has no gradient and whose script is told it as torch has it.
        norm = torch.as_tensor(_ask(shared, chosen, open_), dtype=first.dtype, device=first.device)
        total_norm.copy_(norm)
    _local_clip(clipped, max_norm, norm, foreach)
    factor = torch.clamp(float(max_norm) / (norm + 1e-6), max=1.0)  # as torch has it
    for _, exchange in shared:
        exchange.clipped(factor)


def _choose(parameters: Sequence[torch.Tensor], exchanges: Sequence[Any]) -> list[bytes]:
    """By exchange, which of its parameters have a gradient and are among these. Raises ConfigError if others have."""
    asked = {id(parameter) for parameter in parameters if parameter.grad is not None}
    chosen = [bytes(id(parameter) in asked for parameter in exchange.parameters) for exchange in exchanges]
    found = sum(map(sum, chosen))
    if exchanges and found != len(asked):
        raise ConfigError(
            f"clip_grad_norm_ got {len(asked)} gradients, {found} of them of wrapped parameters",
            why="the others are this worker's own, so there is no norm of all",
            fix="clip wrapped and other parameters in two calls",
        )
    return chosen


def _ask(shared: Sequence[tuple[Asked, Any]], chosen: Sequence[bytes], of: _Open) -> torch.Tensor:
    """The norm of all workers' gradients that were ``chosen``. Raises RuntimeError if it is to be finite and is not."""
    parts = [worker.norm(exchange, mask, of.order) for (worker, exchange), mask in zip(shared, chosen, strict=True)]
    total: torch.Tensor = torch.linalg.vector_norm(torch.tensor(parts, dtype=torch.float64), of.order)
    if of.must_be_finite and not torch.isfinite(total):
        raise RuntimeError(f"the total norm of order {of.order} of the gradients is {float(total)}")
    return total
