"""Step without all that torch has around a step.

A shard is stepped chunk by chunk, and ``Adam.step`` takes 29 microseconds to find out for each what does not change
from one step to the next: which tensors there are, of which dtypes, whether the state is there. Called with all that at
hand the kernel takes 10. It is the same kernel, so the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import optim
from torch.optim.optimizer import _global_optimizer_post_hooks as _after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as _before_all

from paceline.params import rows
from paceline.params.rows import Rows

_OF_SCALERS = ("grad_scale", "found_inf")  # attributes that GradScaler gives an optimizer for one step
_DTYPES_OF_ROWS = (torch.float32, torch.float64)
Kernel = Callable[[list[torch.Tensor]], None]  # steps with these gradients


def bare_step(optimizer: optim.Optimizer) -> Callable[[], Any]:
    """``optimizer.step`` without torch's wrapping for profilers and hooks, which takes longer than small steps do.

    Hooks that a script has registered for all optimizers are kept.
    """
    step = type(optimizer).step
    inner = getattr(step, "__wrapped__", None)
    if not getattr(step, "hooked", False) or inner is None:
        return optimizer.step
    return lambda: optimizer.step() if are_watched() else inner(optimizer)


def are_watched() -> bool:
    """Has a script registered hooks for the steps of all optimizers? Then they are to be stepped as torch does."""
    return bool(_before_all or _after_all)


def find_kernel(optimizer: optim.Optimizer) -> Kernel | None:
    """What does as ``optimizer.step()`` would with a gradient for each tensor, in the groups' order; None if unknown.

    It holds on to the tensors and the state of now, and reads the settings at each step. Call it again when the state
    has been replaced.
    """
    if any(getattr(optimizer, name, None) is not None for name in _OF_SCALERS):
        return None
    kernels: list[tuple[int, Kernel]] = []
    for group in optimizer.param_groups:
        kernel = _find(optimizer, group)
        if kernel is None:
            return None
        kernels.append((len(group["params"]), kernel))
    if len(kernels) == 1:
        return kernels[0][1]

    def step(gradients: list[torch.Tensor]) -> None:
        start = 0
        for count, kernel in kernels:
            kernel(gradients[start : start + count])
            start += count

    return step


def rate_of_rows(optimizer: optim.Optimizer) -> float | None:
    """What sparse rows are multiplied with and then added to their table, where that is all that a step does."""
    if type(optimizer) is not optim.SGD or are_watched():
        return None
    (group,) = optimizer.param_groups
    if group["momentum"] or group["weight_decay"] or group["params"][0].dtype not in _DTYPES_OF_ROWS:
        return None
    rate: float = group["lr"] if group["maximize"] else -group["lr"]
    return rate


def step_rows(optimizer: optim.Optimizer, given: Rows) -> bool:
    """Step the optimizer's one parameter, a table [rows, row], with these rows as its gradient, if it is known how.

    The classes of torch do it with sparse tensors: adding one to a table takes twice the time of adding rows, and a
    table's values at one four times that of reading rows. The arithmetic is theirs, operation by operation.
    """
    step = _BY_ROWS.get(type(optimizer))
    if step is None or not given.unique or are_watched():
        return False
    (group,) = optimizer.param_groups
    (table,) = group["params"]
    does_more = group.get("fused") or group.get("weight_decay")  # which torch's own refuse
    if table not in optimizer.state or table.dtype not in _DTYPES_OF_ROWS or does_more:
        return False
    step(table, optimizer.state[table], group, given.indices, -given.values if group["maximize"] else given.values)
    return True


def _step_sparse_adam(
    table: torch.Tensor, state: dict[str, Any], group: dict[str, Any], indices: torch.Tensor, g: torch.Tensor
) -> None:
    state["step"] += 1
    beta1, beta2 = group["betas"]
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    old_mean, old_square = mean.index_select(0, indices), square.index_select(0, indices)
    new_mean = g.sub(old_mean).mul_(1 - beta1).add_(old_mean)
    new_square = g.pow(2).sub_(old_square).mul_(1 - beta2).add_(old_square)
    mean.index_copy_(0, indices, new_mean)
    square.index_copy_(0, indices, new_square)
    rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    rows.add(table, Rows(indices, new_mean.div_(new_square.sqrt_().add_(group["eps"]))), -rate)


def _step_adagrad(
    table: torch.Tensor, state: dict[str, Any], group: dict[str, Any], indices: torch.Tensor, g: torch.Tensor
) -> None:
    state["step"] += 1
    rate = group["lr"] / (1 + (state["step"].item() - 1) * group["lr_decay"])
    total = state["sum"].index_select(0, indices).add_(g.pow(2))
    state["sum"].index_copy_(0, indices, total)
    step = Rows(indices, g / total.sqrt_().add_(group["eps"]))
    table.add_(rows.gradient_of(step, table.shape), alpha=-rate)  # in one rounding; two would be other bits


_BY_ROWS = {optim.SparseAdam: _step_sparse_adam, optim.Adagrad: _step_adagrad}


def _find(optimizer: optim.Optimizer, group: dict[str, Any]) -> Kernel | None:
    tensors, kind = group["params"], type(optimizer)
    if group.get("fused") is not True or len({tensor.dtype for tensor in tensors}) != 1:
        return None
    if kind in (optim.Adam, optim.AdamW):
        return _adam(optimizer, group, tensors)
    if kind is optim.SGD:
        return _sgd(optimizer, group, tensors)
    return None


def _adam(optimizer: optim.Optimizer, group: dict[str, Any], tensors: list[torch.Tensor]) -> Kernel | None:
    state = [optimizer.state[tensor] for tensor in tensors if tensor in optimizer.state]
    if len(state) < len(tensors):
        return None
    decoupled = group.get("decoupled_weight_decay", type(optimizer) is optim.AdamW)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    steps, averages = [one["step"] for one in state], [one["exp_avg"] for one in state]
    squares = [one["exp_avg_sq"] for one in state]
    most = [one["max_exp_avg_sq"] for one in state] if group["amsgrad"] else []

    def step(gradients: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        kernel(
            tensors,
            gradients,
            averages,
            squares,
            most,
            steps,
            amsgrad=group["amsgrad"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    return step


def _sgd(optimizer: optim.Optimizer, group: dict[str, Any], tensors: list[torch.Tensor]) -> Kernel | None:
    momenta: list[Any] = []
    if group["momentum"]:
        momenta = [optimizer.state.get(tensor, {}).get("momentum_buffer") for tensor in tensors]
        if any(one is None for one in momenta):
            return None

    def step(gradients: list[torch.Tensor]) -> None:
        torch._fused_sgd_(
            tensors,
            gradients,
            momenta,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
        )

    return step
