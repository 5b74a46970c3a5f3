"""GradScaler's skipped steps, made to be void pushes.

``torch.amp.GradScaler`` does not call ``optimizer.step()`` when a gradient overflowed. A worker that left a round out
would be a round behind the others ever after; so it brings a push that weighs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import optim
from torch.amp.grad_scaler import GradScaler

_skips: dict[optim.Optimizer, Callable[[], None]] = {}  # who is wrapped is so to the end of the run
_usual_step = GradScaler._maybe_opt_step


def register(optimizer: optim.Optimizer, skip: Callable[[], None]) -> None:
    """From now on ``skip`` is called where a GradScaler leaves out a step of this optimizer."""
    _skips[optimizer] = skip
    # Fused classes would unscale in their kernel, behind the exchange; this has the scaler do it before.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    GradScaler._maybe_opt_step = _step_or_skip  # type: ignore[method-assign, assignment]


def _step_or_skip(
    scaler: GradScaler, optimizer: optim.Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
) -> float | None:
    skip = _skips.get(optimizer)
    if skip is not None and sum(found.item() for found in optimizer_state["found_inf_per_device"].values()):
        skip()
        return None
    return _usual_step(scaler, optimizer, optimizer_state, *args, **kwargs)
