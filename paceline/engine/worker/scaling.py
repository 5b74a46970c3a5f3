"""GradScaler's skipped steps, made to be void pushes.

``torch.amp.GradScaler`` does not call ``optimizer.step()`` when a gradient overflowed. A worker that left a round out
would be a round behind the others ever after; so it brings a push that weighs nothing.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import optim
from torch.amp.grad_scaler import GradScaler


class Skips(Protocol):
    """A worker."""

    def exchange(self, index: int, *, void: bool) -> None: ...


# Of each wrapped optimizer, as which exchange. Weak: in tests a process is many workers, one after the other.
_wrapped: weakref.WeakKeyDictionary[optim.Optimizer, tuple[weakref.ref[Skips], int]] = weakref.WeakKeyDictionary()
_usual_step = GradScaler._maybe_opt_step


def register(optimizer: optim.Optimizer, worker: Skips, index: int) -> None:
    """From now on where a GradScaler leaves out a step of this optimizer the worker brings a void push."""
    _wrapped[optimizer] = weakref.ref(worker), index
    # Fused classes would unscale in their kernel, behind the exchange; this has the scaler do it before.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    GradScaler._maybe_opt_step = _step_or_skip  # type: ignore[method-assign, assignment]


def _step_or_skip(
    scaler: GradScaler, optimizer: optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
) -> float | None:
    known, index = _wrapped.get(optimizer, (None, 0))
    worker = None if known is None else known()
    if worker is not None and sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
        worker.exchange(index, void=True)
        return None
    return _usual_step(scaler, optimizer, optimizer_state, *args, **kwargs)
