"""Gradients of embedding tables as rows: which parameters have them, and how they are written, read and folded.

In a slot a parameter's rows lie compactly: ``area`` is int64[rows + 1], a count and then so many row numbers, unique
and ascending; as many rows of values stand at the start of the parameter's range of the gradient vector. There is room
for all rows, but what lies behind those counted means nothing and is not looked at: the work of a step grows with the
rows that it has, not with the table. (Parallax, Kim et al. 2019, sends sparse gradients to servers in the same way.)

    fold: g = sum over contributors w of  (n_w / N) g_w,   row by row, in rank order
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

Rows = tuple[torch.Tensor, torch.Tensor]  # int64[n], unique and ascending; values [n, row]


def gradient_of(rows: Rows, size: Sequence[int]) -> torch.Tensor:
    """The rows as the gradient of a parameter of ``size``: a coalesced sparse tensor over them (aliases)."""
    indices, values = rows
    return torch.sparse_coo_tensor(indices[None], values, tuple(size), is_coalesced=True, check_invariants=False)


def parameters_with_rows(models: Iterable[nn.Module]) -> set[int]:
    """ids of the weights of the models' nn.Embedding and nn.EmbeddingBag with ``sparse=True``."""
    modules = [module for model in models for module in model.modules()]
    tables = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse]
    weights = [table.weight for table in tables]
    return {id(w) for w in weights if w.dim() == 2 and w.numel() and w.is_contiguous()}


def unchecked() -> AbstractContextManager[Any]:
    """Within it sparse tensors are made without looking for mistakes in them, and without torch's warning that it does
    not look: its own optimizers make some."""
    return torch.sparse.check_sparse_tensor_invariants(False)


def write(area: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor | None) -> None:
    """Write a gradient [rows, row] into a slot; ``values`` is the parameter's flat range. None writes no rows.

    Duplicates are summed. Of a dense gradient (the table is also used densely, as by tied weights) the rows that are
    not zero are written.
    """
    if gradient is None:
        area[0] = 0
        return
    if gradient.is_sparse and gradient.sparse_dim() == 1:
        gradient = gradient.coalesce()
        indices, rows = gradient.indices()[0], gradient.values()
    else:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        indices = gradient.ne(0).any(1).nonzero()[:, 0]
        rows = gradient[indices]
    count = len(indices)
    values[: rows.numel()].view(rows.shape).copy_(rows, non_blocking=True)
    area[1 : count + 1].copy_(indices, non_blocking=True)
    area[0] = count


def read(area: torch.Tensor, values: torch.Tensor, row: int, start: int, stop: int) -> Rows:
    """What a slot has of the table's rows ``[start, stop)``, numbered from ``start``. The values are aliases."""
    indices = area[1 : int(area[0]) + 1]
    first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
    indices = indices[first:last]
    return indices - start if start else indices, values[first * row : last * row].view(-1, row)


def fold(sources: Sequence[Rows], shares: Sequence[float], wide: torch.dtype) -> Rows:
    """The sum of ``shares`` times the sources, in their order for every row; it runs in dtype ``wide``."""
    _, first = sources[0]
    indices = torch.unique(torch.cat([own for own, _ in sources]))
    values = torch.zeros(len(indices), first.shape[1], dtype=wide)
    for (own, rows), share in zip(sources, shares, strict=True):
        values.index_add_(0, torch.searchsorted(indices, own), rows.to(wide), alpha=share)
    return indices, values.to(first.dtype)
