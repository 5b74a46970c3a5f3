"""At home: a worker's optimizer and tensors, made of what it tells of them. What it claims is looked at before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn, optim

from paceline.engine.elsewhere.mail import MOST_BYTES, without_values
from paceline.errors import ConfigError
from paceline.params import optimizers
from paceline.params.table import DTYPES, Entry, zeros
from paceline.protocol import remote

State = Sequence[tuple[nn.Parameter, dict[str, Any]]]  # an optimizer's, of those parameters that have any


def make(request: remote.WrapOptimizer) -> tuple[optim.Optimizer, dict[int, str], set[int]]:
    """The worker's optimizer over parameters of this process, their names by id, and the ids of those with sparse rows.
    Parameters are zeros, and tensors of the state have no values: where they are needed they come (``remote.Fill``).
    Raises ConfigError."""
    groups = optimizers.decode(request.settings)
    for group in groups:
        group["params"] = []
    check(request.parameters)
    parameters, names, with_rows = [], {}, set()
    for told in request.parameters:
        if told.group >= len(groups):
            raise ConfigError(f"{told.name} is of group {told.group}; the optimizer has {len(groups)}")
        tensor = zeros(told.shape, told.stride, told.dtype)
        parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
        groups[told.group]["params"].append(parameter)
        parameters.append(parameter)
        names[id(parameter)] = told.name
        if told.rows:
            with_rows.add(id(parameter))
    optimizer = optimizers.clone({}, _find(request.optimizer), groups)
    set_state(optimizer, without_values("state", request.state, parameters))
    return optimizer, names, with_rows


def parameters_of(optimizer: optim.Optimizer) -> list[nn.Parameter]:
    """In the order in which all tell of them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_state(optimizer: optim.Optimizer, state: State) -> None:
    """To this, and no other."""
    optimizer.state.clear()
    for parameter, values in state:
        optimizer.state[parameter] = values


def check(told: Sequence[remote.Parameter | Entry]) -> int:
    """How many bytes these tensors take. Raises ConfigError for such as cannot be."""
    size_bytes = 0
    for one in told:
        if (
            one.dtype not in DTYPES
            or len(one.shape) != len(one.stride)
            or min((*one.shape, *one.stride), default=0) < 0
        ):
            raise ConfigError(f"{one.name} cannot be: {one.dtype} of shape {one.shape}, laid out by {one.stride}")
        last = sum((size - 1) * step for size, step in zip(one.shape, one.stride, strict=True))
        size_bytes += (last + 1) * DTYPES[one.dtype].itemsize if all(one.shape) else 0
        if size_bytes > MOST_BYTES:
            raise ConfigError(f"{one.name} of shape {one.shape} is more than {MOST_BYTES >> 30} GB")
    return size_bytes


def make_all(table: Sequence[Entry]) -> list[torch.Tensor]:
    """Tensors as these entries say. Raises ConfigError."""
    check(table)
    return [zeros(entry.shape, entry.stride, entry.dtype) for entry in table]


def _find(path: str) -> type[optim.Optimizer]:
    """The optimizer's class. Raises ConfigError."""
    try:
        found = optimizers.find_class(path)
    except ConfigError:
        found = object
    if not issubclass(found, optim.Optimizer):
        module, _, name = path.partition(":")
        raise ConfigError(
            f"optimizer {name} cannot be imported at home (module {module}), where it is to step the parameters",
            fix="put the class in a module beside the script, on the host of rank 0 too",
        )
    return found
