"""A chunk of a shard: the pieces that are folded, saved and stepped in one go (params/undo.py).

What is folded is still in the core's cache when it is stepped. Of a table with sparse rows (params/rows.py), as many
rows are stepped in one go as there is room to save. Where torch's kernel for the step is known it is called directly
(params/kernels.py). Knows memory and tensors, not processes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import optim

from paceline.params import kernels, rows
from paceline.params.optimizers import Group
from paceline.params.rows import Rows
from paceline.params.state import State
from paceline.params.table import Table, vector_dtype
from paceline.params.undo import Undo, lay_over
from paceline.protocol.partition import Piece

_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums of 16-bit gradients run in these
_NORM_DTYPE = _WIDE | {torch.float32: torch.float64}

Vectors = Mapping[str, torch.Tensor]
Make = Callable[[list[Group]], optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Target:
    """What is stepped: parameter ``vectors`` (the table's, shared) and the optimizer's ``state``, by clones that
    ``make(groups)`` gives. ``whole``: every piece is a whole parameter and is stepped in its own shape."""

    table: Table
    vectors: Vectors
    state: State
    make: Make
    groups: list[Group]
    whole: bool


class Pushed(Protocol):
    """A worker's whole gradient, as it lies in its slot: the table's flat vectors, and for each parameter with sparse
    rows the numbers of those that it has (params/rows.py)."""

    gradient: dict[str, torch.Tensor]
    rows: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """What is to be folded. ``computed_on`` and ``strength``: one source, to be compensated for its delay."""

    sources: Sequence[Pushed]
    shares: Sequence[float]
    computed_on: Vectors | None = None
    strength: float = 0.0


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent dense pieces: they fold in one go. ``sum`` and ``gradient`` are one tensor but for 16 bits."""

    vector: str
    start: int
    stop: int
    sum: torch.Tensor
    gradient: torch.Tensor


class Chunk:
    """A part of a shard: what is folded, saved and stepped in one go. Of a table with sparse rows, as many rows in one
    go as there is room to save."""

    def __init__(
        self, target: Target, pieces: Sequence[Piece], buffers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        table, vectors, state, whole = target.table, target.vectors, target.state, target.whole
        self._table, self._pieces, self._state, self._whole = table, tuple(pieces), state, whole
        self._vectors = vectors
        self._runs = _runs(spans_of(table, pieces), buffers)
        self._entry = table.entries[pieces[0].param]
        self._by_rows = self._entry.row > 0
        self._tensors: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        stepped: list[Group] = [{**group, "params": []} for group in target.groups]
        for piece in self._pieces:
            entry = table.entries[piece.param]
            at = entry.offset + piece.start
            if entry.row:
                stop = entry.offset + min(piece.stop, entry.size)
                tensor = vectors[entry.vector][at:stop].view(-1, entry.row)
            else:
                run = next(run for run in self._runs if run.vector == entry.vector and run.start <= at < run.stop)
                tensor = vectors[entry.vector][at : entry.offset + piece.stop]
                gradient = run.gradient[at - run.start : entry.offset + piece.stop - run.start]
                if whole:
                    tensor = tensor.as_strided(entry.shape, entry.stride, tensor.storage_offset())
                    gradient = gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset())
                self._gradients.append(gradient)
            self._tensors.append(tensor)
            stepped[entry.group]["params"].append(tensor)
        # A class of the user's may look at all of its groups; torch's own do not.
        self._groups = [g for g, group in enumerate(stepped) if whole or group["params"]]
        self._optimizer = target.make([stepped[g] for g in self._groups])
        self._step = kernels.bare_step(self._optimizer)
        self._kept = 0  # pieces whose state lies in shared memory
        self._kernel: kernels.Kernel | None = None  # steps without the optimizer's own ``step``
        self._is_kernel_known = False
        # id of a gradient -> it, its ranges: the pieces' and the runs'
        self._aliases: dict[int, tuple[Vectors, list[torch.Tensor]]] = {}
        self._ranges: dict[int, tuple[Vectors, list[torch.Tensor]]] = {}
        numbers = [state.plan.number(piece) for piece in self._pieces]
        self._cells = state.cells(numbers[0], numbers[-1] + 1)
        self._live = [*self._cells]
        if self._by_rows:
            self._tables = self._find_tables()
            self._rows_at = sum(one.numel() + -one.numel() % 64 for one in self._cells)
        else:
            for run in self._runs:
                self._live += [vectors[run.vector][run.start : run.stop]]
                self._live += state.beside(run.vector, run.start, run.stop)
        self._saved: dict[Undo, list[torch.Tensor]] = {}
        self._saved_rows: dict[Undo, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def set(self, settings: Sequence[Group]) -> None:
        for group, place in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings[place])
        self._is_kernel_known = False

    def resume(self) -> None:
        if self._state.is_empty:
            return
        for piece, tensor in zip(self._pieces, self._tensors, strict=True):
            state = self._state.load(piece, whole=self._whole)
            if state:
                self._optimizer.state[tensor] = state
        self._kept = len(self._optimizer.state)
        self._is_kernel_known = False

    def follow(self) -> None:
        if self._kept < len(self._tensors) or self._state.has_numbers:
            self.resume()

    def forget(self) -> None:
        self._optimizer.state.clear()
        self._kept = 0
        self._is_kernel_known = False

    def norms(self, fold: Fold, chosen: bytes | None, order: float) -> list[float]:
        if self._by_rows:
            gradients = [rows.gradient_of(self._fold_rows(fold), self._tensors[0].shape).coalesce().values()]
        else:
            gradients = self._fold_dense(fold)
        flat = [g for piece, g in zip(self._pieces, gradients, strict=True) if chosen is None or chosen[piece.param]]
        norms = [
            torch.linalg.vector_norm(values, order, dtype=_NORM_DTYPE.get(values.dtype, values.dtype))
            for values in flat
            if values.numel()
        ]
        return [float(norm) for norm in norms]

    def step(self, fold: Fold, has_gradient: bytes | None, undo: Undo | None, done: int, place: int) -> int:
        """Step as number ``place`` and on of the chunks of the share, of which ``done`` (see ``Undo.begin``) are; the
        number of the next."""
        if self._by_rows:
            return self._step_rows(fold, has_gradient, undo, done, place)
        if done < 2 * place + 2:
            given = self._fold_dense(fold)
            if undo is not None:
                saved = self._places(undo)
                if done == 2 * place + 1:
                    torch._foreach_copy_(self._live, saved)
                    self.forget()
                    self.resume()
                else:
                    torch._foreach_copy_(saved, self._live)
                    undo.advance(2 * place + 1)
            all_have = has_gradient is None or all(has_gradient[piece.param] for piece in self._pieces)
            if not self._is_kernel_known:
                self._find_kernel()
            if self._kernel is not None and all_have and not kernels.are_watched():
                self._kernel(given)
            else:
                for piece, tensor, gradient in zip(self._pieces, self._tensors, given, strict=True):
                    tensor.grad = gradient if has_gradient is None or has_gradient[piece.param] else None
                self._run()
            if undo is not None:
                undo.advance(2 * place + 2)
        return place + 1

    def _step_rows(self, fold: Fold, has_gradient: bytes | None, undo: Undo | None, done: int, place: int) -> int:
        (tensor,) = self._tensors
        if has_gradient is not None and not has_gradient[self._pieces[0].param]:
            return place
        folded = self._fold_rows(fold)
        most = max(1, self._room(undo)) if undo is not None else max(1, len(folded.indices))
        count = max(1, -(-len(folded.indices) // most))
        for number in range(count):
            part = slice(number * most, (number + 1) * most)
            some = folded if count == 1 else Rows(folded.indices[part], folded.values[part], folded.unique)
            if done < 2 * place + 2:
                if undo is not None:
                    if done == 2 * place + 1:
                        self._restore_rows(undo)
                        self.forget()
                        self.resume()
                    else:
                        self._save_rows(undo, some.indices)
                        undo.advance(2 * place + 1)
                rate = kernels.rate_of_rows(self._optimizer)
                if rate is None:
                    tensor.grad = rows.gradient_of(some, tensor.shape)
                    self._run()
                else:
                    rows.add(tensor, some, rate)
                if undo is not None:
                    if number < count - 1 and len(self._cells) > 1:  # it is one step: what counts them goes up once
                        self._cells[1].copy_(self._places(undo)[1])
                        self.follow()
                    undo.advance(2 * place + 2)
            place += 1
        return place

    def _find_kernel(self) -> None:
        self._is_kernel_known = True
        ordered = [tensor for group in self._optimizer.param_groups for tensor in group["params"]]
        in_order = all(map(operator.is_, ordered, self._tensors)) and not self._state.has_numbers
        self._kernel = kernels.find_kernel(self._optimizer) if in_order else None

    def _run(self) -> None:
        if self._kept < len(self._tensors):
            self._begin_momentum()
        with rows.unchecked() if self._by_rows else nullcontext():
            self._step()
        if self._whole or self._state.has_numbers or len(self._optimizer.state) != self._kept:
            for piece, tensor in zip(self._pieces, self._tensors, strict=True):
                if tensor in self._optimizer.state:
                    self._state.save(piece, self._optimizer.state[tensor], whole=self._whole)
            self._kept = len(self._optimizer.state)
            self._is_kernel_known = False  # there may be state now

    def _fold_dense(self, fold: Fold) -> list[torch.Tensor]:
        """The pieces' gradients."""
        if fold.computed_on is not None:
            for run in self._runs:
                g = fold.sources[0].gradient[run.vector][run.start : run.stop]
                drift = self._vectors[run.vector][run.start : run.stop]
                drift = drift - fold.computed_on[run.vector][run.start : run.stop]
                torch.addcmul(g, g * g, drift, value=fold.strength, out=run.gradient)
            return self._gradients
        if len(fold.sources) == 1:
            return self._alias(fold.sources[0].gradient)
        for run, gradients in zip(self._runs, zip(*map(self._run_ranges, fold.sources), strict=True), strict=True):
            if run.sum is run.gradient and len(gradients) == 2:
                torch.lerp(*gradients, fold.shares[1], out=run.sum)  # the same in one reading
                continue
            if run.sum is run.gradient:
                torch.mul(gradients[0], fold.shares[0], out=run.sum)
            else:
                run.sum.copy_(gradients[0]).mul_(fold.shares[0])
            for gradient, share in zip(gradients[1:], fold.shares[1:], strict=True):
                run.sum.add_(gradient, alpha=share)
            if run.sum is not run.gradient:
                run.gradient.copy_(run.sum)
        return self._gradients

    def _alias(self, source: Vectors) -> list[torch.Tensor]:
        """The pieces' ranges of a gradient, where it lies."""
        known = self._aliases.get(id(source))
        if known is None:
            ranges = []
            for piece in self._pieces:
                entry = self._table.entries[piece.param]
                gradient = source[entry.vector][entry.offset + piece.start : entry.offset + piece.stop]
                if self._whole:
                    gradient = gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset())
                ranges.append(gradient)
            known = self._aliases[id(source)] = source, ranges
        return known[1]

    def _run_ranges(self, source: Pushed) -> list[torch.Tensor]:
        """The runs' ranges of a gradient, where it lies."""
        gradient = source.gradient
        known = self._ranges.get(id(gradient))
        if known is None:
            ranges = [gradient[run.vector][run.start : run.stop] for run in self._runs]
            known = self._ranges[id(gradient)] = gradient, ranges
        return known[1]

    def _fold_rows(self, fold: Fold) -> Rows:
        (piece,), entry, tensor = self._pieces, self._entry, self._tensors[0]
        first = piece.start // entry.row
        given = [
            rows.read(
                source.rows[piece.param],
                source.gradient[entry.vector][entry.offset : entry.offset + entry.size],
                entry.row,
                first,
                first + len(tensor),
            )
            for source in fold.sources
        ]
        wide = _WIDE.get(tensor.dtype, tensor.dtype)
        return given[0] if len(given) == 1 else rows.fold(given, fold.shares, wide)

    # --- saving what a step is about to change ---

    def _places(self, undo: Undo) -> list[torch.Tensor]:
        """Where the undo area has what is saved whole: of dense pieces everything, of rows the cells."""
        saved = self._saved.get(undo)
        if saved is None:
            saved = self._saved[undo] = lay_over(undo.area, [(one.dtype, one.numel()) for one in self._live])
        return saved

    def _find_tables(self) -> list[torch.Tensor]:
        """The parameter's rows and those of the state beside it, each [rows, row]."""
        (piece,), entry, (tensor,) = self._pieces, self._entry, self._tensors
        start = entry.offset + piece.start
        beside = self._state.beside(entry.vector, start, start + tensor.numel())
        return [tensor, *(one.view(tensor.shape) for one in beside)]

    def _room(self, undo: Undo) -> int:
        """How many rows there is room to save for."""
        each = sum(one.stride(0) * one.itemsize for one in self._tables) + 8
        return (len(undo.area) - self._rows_at - 64 * (2 + len(self._tables))) // each

    def _rows_places(self, undo: Undo, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Where the undo area has the numbers of so many rows, and their values in each table, [count, row]."""
        known = self._saved_rows.get(undo)
        if known is None or len(known[0]) != count:  # most batches have as many as the one before
            sizes = [(torch.int64, 1), *((one.dtype, one.stride(0)) for one in self._tables)]
            indices, *values = lay_over(undo.area, [(dtype, count * row) for dtype, row in sizes], self._rows_at)
            known = self._saved_rows[undo] = indices, [flat.view(count, -1) for flat in values] if count else []
        return known

    def _save_rows(self, undo: Undo, indices: torch.Tensor) -> None:
        torch._foreach_copy_(self._places(undo), self._cells)
        kept, values = self._rows_places(undo, len(indices))
        kept.copy_(indices)
        for place, table in zip(values, self._tables, strict=False):
            torch.index_select(table, 0, indices, out=place)
        undo.rows = len(indices)

    def _restore_rows(self, undo: Undo) -> None:
        torch._foreach_copy_(self._cells, self._places(undo))
        indices, values = self._rows_places(undo, undo.rows)
        for place, table in zip(values, self._tables, strict=False):
            table.index_copy_(0, indices, place)

    def _begin_momentum(self) -> None:
        """torch's fused SGD wants momentum for all of its tensors or for none; a layer first used late has none.

        Zeros are what the first step would make of it (no dampening: see optimizers.choose_fused).
        """
        for group in self._optimizer.param_groups:
            if not isinstance(self._optimizer, optim.SGD) or not (group["fused"] and group["momentum"]):
                continue
            for tensor in group["params"]:
                if tensor.grad is not None and self._optimizer.state[tensor].get("momentum_buffer") is None:
                    self._optimizer.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)


def spans_of(table: Table, pieces: Sequence[Piece]) -> list[tuple[str, int, int]]:
    """The dense pieces as ranges of their vectors, adjacent ones as one."""
    spans: list[tuple[str, int, int]] = []
    ends: dict[str, int] = {}
    for piece in pieces:
        entry = table.entries[piece.param]
        if entry.row:
            continue
        start, stop = entry.offset + piece.start, entry.offset + piece.stop
        last = ends.get(entry.vector)
        if last is not None and spans[last][2] == start:
            spans[last] = (entry.vector, spans[last][1], stop)
        else:
            ends[entry.vector] = len(spans)
            spans.append((entry.vector, start, stop))
    return spans


def buffers_for(table: Table, cut: Sequence[Sequence[Piece]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(sum, gradient) by vector, large enough for any chunk; all use the same, so that it stays in the cache."""
    most: dict[str, int] = {}
    for pieces in cut:
        sizes: dict[str, int] = {}
        for vector, start, stop in spans_of(table, pieces):
            sizes[vector] = sizes.get(vector, 0) + stop - start
        most |= {vector: max(size, most.get(vector, 0)) for vector, size in sizes.items()}
    buffers = {}
    for vector, size in most.items():
        gradient = torch.zeros(size, dtype=vector_dtype(vector))
        wide = _WIDE.get(gradient.dtype)
        buffers[vector] = (gradient.to(wide) if wide else gradient, gradient)
    return buffers


def _runs(
    spans: Sequence[tuple[str, int, int]], buffers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> list[_Run]:
    runs, used = [], dict.fromkeys(buffers, 0)
    for vector, start, stop in spans:
        total, gradient = buffers[vector]
        place = slice(used[vector], used[vector] + stop - start)
        used[vector] = place.stop
        own = gradient[place]
        runs.append(_Run(vector, start, stop, own if total is gradient else total[place], own))
    return runs
