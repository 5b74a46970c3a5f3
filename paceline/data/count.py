"""How many samples are in a batch, where nobody has counted them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from paceline.errors import ConfigError


def count_samples(batch: Any) -> int:
    """The length of the first dimension of the first tensor (or array) found in ``batch``.

    Looks into tuples, lists, mappings and objects with a ``__dict__``, in order. Raises ConfigError.
    """
    found = _first_length(batch, depth=4)
    if found is None:
        raise ConfigError(
            f"cannot count the samples in a batch of type {type(batch).__name__}: there is no tensor in it "
            "with a first dimension",
            why="gradients are averaged by samples, so every batch must have a count",
            fix="yield tensors whose first dimension is the sample, or pass run.wrap(..., count=function)",
        )
    return found


def _first_length(value: Any, depth: int) -> int | None:
    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.ndim else None
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape and isinstance(shape[0], int):
        return shape[0]
    if depth == 0 or isinstance(value, str | bytes):
        return None
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, tuple | list):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = vars(value).values()
    for item in inner:
        length = _first_length(item, depth - 1)
        if length is not None:
            return length
    return None
