"""Gradients of embedding tables as rows: which parameters have them, and how they are written, read and folded.

In a slot a parameter's rows lie compactly: ``area`` is int64[rows + 1], a count and then so many row numbers; as many
rows of values stand at the start of the parameter's range of the gradient vector. There is room for all rows, but what
lies behind those counted means nothing and is not looked at: the work of a step grows with the rows that it has, not
with the table. (Parallax, Kim et al. 2019, sends sparse gradients to servers in the same way.)

The numbers are unique and ascending, with duplicates summed; or, where the optimizer only adds them up (``raw``), as
the gradient has them, told by a negative count: sorting them costs as much as such a step. Of those a number -1 - n
stands for row n with the values of the row before it, which are not written again: all rows of a bag of nn.EmbeddingBag
have the same gradient, of ten or a hundred rows one in so many is written, sent and folded.

    fold: g = sum over contributors w of  (n_w / N) g_w,   row by row, in rank order
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from paceline.errors import ConfigError

_CACHE_BYTES = 1 << 20  # what of a table is likely to be in a core's own cache anyway
_LOOKED_AT = 512  # rows of a gradient
_OFTEN = 1 / 8  # to sum takes as long as an eighth of the rows travel at 1 Gbit/s


class Rows(NamedTuple):
    """int64[n] and values [n, row]. ``unique``: and ascending. ``which`` int64[n], where rows share values: the place
    in ``values`` of each, ascending."""

    indices: torch.Tensor
    values: torch.Tensor
    unique: bool = True
    which: torch.Tensor | None = None

    @property
    def each(self) -> torch.Tensor:
        """The values of every row, [n, row]."""
        return self.values if self.which is None else self.values.index_select(0, self.which)

    def part(self, part: slice) -> Rows:
        """Of these rows those."""
        if self.which is None:
            return self._replace(indices=self.indices[part], values=self.values[part])
        return self._replace(indices=self.indices[part], which=self.which[part])

    def select(self, places: torch.Tensor) -> Rows:
        """The rows at these places, ascending, and no values that they do not have."""
        indices = self.indices[places]
        if self.which is None:
            return self._replace(indices=indices, values=self.values[places])
        kept, which = torch.unique_consecutive(self.which[places], return_inverse=True)
        return self._replace(indices=indices, values=self.values[kept], which=which)

    @property
    def numbers(self) -> torch.Tensor:
        """int64[n]: the rows' numbers as they are written, which tell what values each has."""
        if self.which is None:
            return self.indices
        numbers, which = self.indices.numpy(), self.which.numpy()
        told = numbers.copy()
        np.invert(told[1:], out=told[1:], where=which[1:] == which[:-1])
        return torch.from_numpy(told)


def gradient_of(rows: Rows, size: Sequence[int]) -> torch.Tensor:
    """The rows as the gradient of a parameter of ``size``: a sparse tensor over them (aliases, but for values that rows
    share)."""
    place, shape = rows.indices[None], tuple(size)
    return torch.sparse_coo_tensor(place, rows.each, shape, is_coalesced=rows.unique, check_invariants=False)


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


def check(gradient: torch.Tensor, shape: Sequence[int], what: str) -> None:
    """Raise ConfigError for a gradient of another shape, or one whose sparse indices lie outside of it: torch makes
    those without a look, and whoever steps them would read or write some other memory."""
    if tuple(gradient.shape) != tuple(shape):
        raise ConfigError(f"{what} has shape {list(gradient.shape)}; it must be {list(shape)}")
    if not gradient.is_sparse or not gradient._nnz():
        return
    for indices, size in zip(gradient._indices(), shape, strict=False):
        check_numbers(indices, size, what)


def check_numbers(numbers: torch.Tensor, size: int, what: str) -> None:
    """Raise ConfigError for numbers of rows that a table of ``size`` rows has not."""
    low, high = (int(bound) for bound in torch.aminmax(numbers)) if len(numbers) else (0, -1)
    if low < 0 or high >= size:
        raise ConfigError(f"{what} has row {low if low < 0 else high}; there are rows 0 to {size - 1}")


def write(
    area: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor | None, *, raw: bool = False, travels: bool = False
) -> None:
    """Write a gradient [rows, row] into a slot; ``values`` is the parameter's flat range. None writes no rows.

    Duplicates are summed, but for ``raw`` where there is room for them; then only if they ``travel`` to another host
    and come often, as words of a text do, or goods that sell well, and do not share values. Of a dense gradient (the
    table is also used densely, as by tied weights) the rows that are not zero are written.
    """
    if gradient is None:
        area[0] = 0
        return
    if gradient.is_sparse and gradient.sparse_dim() == 1:
        indices, rows = gradient._indices()[0], gradient._values()
        if rows.data_ptr() == values.data_ptr():
            return  # it is made of what is there
        raw = raw and not gradient.is_coalesced() and len(indices) < len(area)
        if raw and (again := _again(rows)) is not None:
            lay(area, values, _shared(indices, rows, again))
            return
        if not gradient.is_coalesced() and (not raw or (travels and _come_often(indices))):
            indices, rows, *_ = summed(indices, rows)
    else:
        raw = False
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        indices = gradient.ne(0).any(1).nonzero()[:, 0]
        rows = gradient[indices]
    lay(area, values, Rows(indices, rows, unique=not raw))


def lay(area: torch.Tensor, values: torch.Tensor, some: Rows) -> None:
    """Copy rows into a slot; ``values`` is the parameter's flat range."""
    count = some.indices.shape[0]
    values[: some.values.numel()].view(some.values.shape).copy_(some.values, non_blocking=True)
    area[1 : count + 1].copy_(some.numbers, non_blocking=True)
    area[0] = count if some.unique else -count


def _again(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """bool[n]: which rows have the values of the row before, to the bit. None where hardly any have."""
    if values.device.type != "cpu" or not values.is_contiguous() or not values.numel():
        return None
    bits: Any = values.detach().view(torch.int32).numpy()
    if bits.shape[1] % 2 == 0:
        bits = bits.view(np.int64)
    few = _equal(bits[:_LOOKED_AT])
    if np.count_nonzero(few) < _OFTEN * max(len(few), 1):
        return None
    again = np.zeros(len(bits), dtype=bool)
    again[1:] = _equal(bits)
    return again


def _equal(bits: Any) -> Any:
    """bool[n - 1]: is each row as the one before?"""
    differ = bits[1:] != bits[:-1]
    if differ.shape[1] % 8 == 0:
        differ = differ.view(np.int64) != 0  # eight at once: a fifth of what ``any`` takes
    return ~(differ[:, 0] if differ.shape[1] == 1 else differ.any(axis=1))


def _shared(indices: torch.Tensor, values: torch.Tensor, again: Any) -> Rows:
    first = torch.from_numpy((~again).nonzero()[0])
    return Rows(indices, values.index_select(0, first), unique=False, which=torch.from_numpy(_places(again)))


def _places(again: Any) -> Any:
    """int64[n]: which of the values that are written each row has."""
    which = (~again).cumsum()
    which -= 1
    return which


def _come_often(indices: torch.Tensor) -> bool:
    """Do many rows come several times, as far as the first few hundred show? Of one gradient always the same."""
    few = indices[:_LOOKED_AT]
    return len(torch.unique(few)) <= (1 - _OFTEN) * len(few)


def of_numbers(numbers: torch.Tensor, values: torch.Tensor, unique: bool) -> Rows:
    """What is written so: numbers int64[n] or int32[n], and values [most, row], of which no more are meant than numbers
    tell of (aliases). Numbers are not checked."""
    count = numbers.shape[0]
    if not unique:
        told = numbers.numpy()
        again = told < 0
        if np.count_nonzero(again):
            indices = torch.from_numpy(np.maximum(told, ~told)).to(torch.int64)
            which = _places(again)
            return Rows(indices, values[: int(which[-1]) + 1], unique=False, which=torch.from_numpy(which))
    return Rows(numbers.to(torch.int64), values[:count], unique)


def stray(numbers: torch.Tensor, size: int, *, unique: bool) -> int | None:
    """One of these numbers, as they are written, which a table of ``size`` rows has no row for, nor a row before."""
    if not len(numbers):
        return None
    low, high = (int(bound) for bound in torch.aminmax(numbers))
    shares = low < 0 and not unique
    if shares and int(numbers[0]) < 0:
        return int(numbers[0])
    if high >= size:
        return high
    return low if low < (-size if shares else 0) else None


def count_values(numbers: torch.Tensor) -> int:
    """How many rows of values are written with these numbers."""
    return int(np.count_nonzero(numbers.numpy() >= 0))


def read(area: torch.Tensor, values: torch.Tensor, row: int, start: int, stop: int) -> Rows:
    """What a slot has of the table's rows ``[start, stop)``, numbered from ``start``. The values are aliases."""
    return between(written(area, values, row), start, stop, area.shape[0] - 1)


def written(area: torch.Tensor, values: torch.Tensor, row: int) -> Rows:
    """All that a slot has of the table's rows (aliases)."""
    count = int(area[0])
    return of_numbers(area[1 : abs(count) + 1], values[: abs(count) * row].view(-1, row), count >= 0)


def between(whole: Rows, start: int, stop: int, size: int) -> Rows:
    """Of rows of a table of ``size`` those in ``[start, stop)``, numbered from ``start``. The values are aliases."""
    if start == 0 and stop == size:
        return whole
    if not whole.unique:
        numbers = whole.indices.numpy()
        is_in = numbers < stop if start == 0 else numbers >= start
        if start > 0 and stop < size:
            is_in &= numbers < stop
        among = is_in.nonzero()[0]  # a sixth of what torch's nonzero takes
        indices, places = torch.from_numpy(numbers[among] - start), torch.from_numpy(among)
        which = places if whole.which is None else whole.which[places]
        if 2 * whole.values.shape[0] < len(among):
            return Rows(indices, whole.values, unique=False, which=which)
        return Rows(indices, whole.values.index_select(0, which), unique=False)
    indices, rows, *_ = whole
    first, last = torch.searchsorted(indices, torch.tensor([start, stop])).tolist()
    indices = indices[first:last]
    return Rows(indices - start if start else indices, rows[first:last])


def fold(sources: Sequence[Rows], shares: Sequence[float], wide: torch.dtype) -> Rows:
    """The sum of ``shares`` times the sources, in their order for every row; it runs in dtype ``wide``."""
    indices = torch.cat([source.indices for source in sources])
    if not any(source.unique for source in sources) and wide == sources[0].values.dtype:
        return _all_of(indices, sources, shares)
    scaled = torch.cat([source.each.to(wide) * share for source, share in zip(sources, shares, strict=True)])
    folded = summed(indices, scaled)
    return folded._replace(values=folded.values.to(sources[0].values.dtype))


def _all_of(indices: torch.Tensor, sources: Sequence[Rows], shares: Sequence[float]) -> Rows:
    scaled = torch.cat([source.values * share for source, share in zip(sources, shares, strict=True)])
    if all(source.which is None for source in sources):
        return Rows(indices, scaled, unique=False)
    which, before = [], 0
    for source in sources:
        own = torch.arange(len(source.indices)) if source.which is None else source.which
        which.append(own + before)
        before += len(source.values)
    return Rows(indices, scaled, unique=False, which=torch.cat(which))


def fetch(table: torch.Tensor, indices: torch.Tensor) -> None:
    """Bring these rows of a table [rows, row] into the processor's cache, if they are too many to be there.

    What works on them calls a routine for each row, and a processor waits for one or two at a time; reads of one value
    of each, in one loop, it has on their way by the dozen.
    """
    if table.numel() * table.itemsize > _CACHE_BYTES:
        table[:, 0].index_select(0, indices)


def add(table: torch.Tensor, rows: Rows, rate: float) -> None:
    """Add ``rate`` times the rows to a table [rows, row], in their order, as a step of plain SGD does.

    It takes half the time that torch takes to add a sparse tensor, by a call of a routine for vectors for each row.
    """
    values = rows._replace(values=rows.values * rate).each
    table.scatter_add_(0, rows.indices[:, None].expand_as(values), values)


def summed(indices: torch.Tensor, values: torch.Tensor) -> Rows:
    """The rows with their duplicates summed, in the order in which they come. About twice as fast as ``coalesce``,
    since torch sorts integers in vectors, and few rows of a batch are duplicates."""
    ascending, order = torch.sort(indices, stable=True)
    unique, place, counts = torch.unique_consecutive(ascending, return_inverse=True, return_counts=True)
    if len(unique) == len(indices):
        return Rows(ascending, values.index_select(0, order))
    first = counts.cumsum(0) - counts
    again = torch.ones(len(indices), dtype=torch.bool, device=indices.device).index_fill_(0, first, value=False)
    again = again.nonzero()[:, 0]
    sums = values.index_select(0, order.index_select(0, first))
    place, rest = place.index_select(0, again), values.index_select(0, order.index_select(0, again))
    return Rows(unique, sums.scatter_add_(0, place[:, None].expand_as(rest), rest))
