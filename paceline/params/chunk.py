"""A chunk of a shard: the pieces that are folded, saved and stepped in one go (params/undo.py).

What is folded is still in the core's cache when it is stepped. Of a table with sparse rows (params/rows.py), as many
rows are stepped in one go as there is room to save. Where torch's kernel for the step is known it is called directly
(params/kernels.py). Knows memory and tensors, not processes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import optim

from paceline.params import kernels, rows
from paceline.params.fold import WIDE, Fold, Folding, Vectors, spans_of
from paceline.params.optimizers import Group
from paceline.params.rows import Rows
from paceline.params.state import State
from paceline.params.table import Table
from paceline.params.undo import Undo, lay_over
from paceline.protocol.partition import Piece

_NORM_DTYPE = WIDE | {torch.float32: torch.float64}

Make = Callable[[list[Group]], optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Target:
    """What is stepped: parameter ``vectors`` (the table's, shared) and the optimizer's ``state``, by clones that
    ``make(groups)`` gives. ``whole``: every piece is a whole parameter and is stepped in its own shape. ``stamps``, by
    parameter with sparse rows: int64[rows], in which step each was last, for who sends rows that have changed."""

    table: Table
    vectors: Vectors
    state: State
    make: Make
    groups: list[Group]
    whole: bool
    stamps: Mapping[int, torch.Tensor] = field(default_factory=dict)


class Chunk:
    """A part of a shard: what is folded, saved and stepped in one go. Of a table with sparse rows, as many rows in one
    go as there is room to save."""

    def __init__(
        self, target: Target, pieces: Sequence[Piece], buffers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        table, vectors, state, whole = target.table, target.vectors, target.state, target.whole
        numbers = [state.plan.number(block) for block in pieces]
        self._entry = table.entries[pieces[0].param]
        self._by_rows = self._entry.row > 0
        if self._by_rows:  # as one block, the first: so its cells are those of all
            pieces = [Piece(pieces[0].param, pieces[0].start, pieces[-1].stop)]
        self._pieces, self._state, self._whole = tuple(pieces), state, whole
        self._folding = Folding(table, vectors, self._pieces, buffers, whole=whole)
        self._tensors: list[torch.Tensor] = []
        stepped: list[Group] = [{**group, "params": []} for group in target.groups]
        for piece in self._pieces:
            entry = table.entries[piece.param]
            at = entry.offset + piece.start
            if entry.row:
                stop = entry.offset + min(piece.stop, entry.size)
                tensor = vectors[entry.vector][at:stop].view(-1, entry.row)
            else:
                tensor = vectors[entry.vector][at : entry.offset + piece.stop]
                if whole:
                    tensor = tensor.as_strided(entry.shape, entry.stride, tensor.storage_offset())
            self._tensors.append(tensor)
            stepped[entry.group]["params"].append(tensor)
        # A class of the user's may look at all of its groups; torch's own do not.
        self._groups = [g for g, group in enumerate(stepped) if whole or group["params"]]
        self._optimizer = target.make([stepped[g] for g in self._groups])
        self._step = kernels.bare_step(self._optimizer)
        self._kept = 0  # pieces whose state lies in shared memory
        self._kernel: kernels.Kernel | None = None  # steps without the optimizer's own ``step``
        self._is_kernel_known = False
        self._cells = state.cells(numbers[0], numbers[0 if self._by_rows else -1] + 1)
        self._live = [*self._cells]
        self._others: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stamps: torch.Tensor | None = None
        if self._by_rows:
            stamps = target.stamps.get(pieces[0].param)
            if stamps is not None:
                first = pieces[0].start // self._entry.row
                self._stamps = stamps[first : first + len(self._tensors[0])]
            self._tables = self._find_tables()
            if len(numbers) > 1 and not state.is_empty:
                others = state.cells(numbers[1], numbers[-1] + 1)
                self._others = [
                    (one.view(-1, len(first)), first) for one, first in zip(others, self._cells, strict=True)
                ]
            self._rows_at = sum(one.numel() + -one.numel() % 64 for one in self._cells)
        else:
            for vector, start, stop in spans_of(table, pieces):
                self._live += [vectors[vector][start:stop]]
                self._live += state.beside(vector, start, stop)
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
            gradients = [rows.gradient_of(self._folding.rows(fold), self._tensors[0].shape).coalesce().values()]
        else:
            gradients = self._folding.dense(fold)
        flat = [g for piece, g in zip(self._pieces, gradients, strict=True) if chosen is None or chosen[piece.param]]
        norms = [
            torch.linalg.vector_norm(values, order, dtype=_NORM_DTYPE.get(values.dtype, values.dtype))
            for values in flat
            if values.numel()
        ]
        return [float(norm) for norm in norms]

    def step(
        self, fold: Fold, has_gradient: bytes | None, undo: Undo | None, done: int, place: int, stamp: int = 0
    ) -> int:
        """Step as number ``place`` and on of the chunks of the share, of which ``done`` (see ``Undo.begin``) are; the
        number of the next. ``stamp``: which step it is."""
        if self._by_rows:
            return self._step_rows(fold, has_gradient, undo, done, place, stamp)
        if done < 2 * place + 2:
            given = self._folding.dense(fold)
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

    def _step_rows(
        self, fold: Fold, has_gradient: bytes | None, undo: Undo | None, done: int, place: int, stamp: int
    ) -> int:
        (tensor,) = self._tensors
        if has_gradient is not None and not has_gradient[self._pieces[0].param]:
            return place
        folded = self._folding.rows(fold)
        if self._stamps is not None:
            self._stamps.index_fill_(0, folded.indices, stamp)  # before: who sends them meanwhile does so again
        most = max(1, self._room(undo)) if undo is not None else max(1, len(folded.indices))
        count = max(1, -(-len(folded.indices) // most))
        for number in range(count):
            part = slice(number * most, (number + 1) * most)
            some = folded if count == 1 else folded.part(part)
            if done < 2 * place + 2:
                if undo is not None:
                    if done == 2 * place + 1:
                        self._restore_rows(undo)
                        self.forget()
                        self.resume()
                    else:
                        self._save_rows(undo, some.indices)
                        undo.advance(2 * place + 1)
                else:
                    self._fetch_rows(some.indices)
                rate = kernels.rate_of_rows(self._optimizer)
                if rate is None:
                    self._run(some)
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

    def _run(self, given: Rows | None = None) -> None:
        """Step with the gradients that the tensors have, or with rows of a table."""
        if self._kept < len(self._tensors):
            self._begin_momentum()
        with rows.unchecked() if self._by_rows else nullcontext():
            if given is None:
                self._step()
            elif self._kept == 0 or not kernels.step_rows(self._optimizer, given):
                (tensor,) = self._tensors
                tensor.grad = rows.gradient_of(given, tensor.shape)
                self._step()
        if self._whole or self._state.has_numbers or len(self._optimizer.state) != self._kept:
            for piece, tensor in zip(self._pieces, self._tensors, strict=True):
                if tensor in self._optimizer.state:
                    self._state.save(piece, self._optimizer.state[tensor], whole=self._whole)
            self._kept = len(self._optimizer.state)
            self._is_kernel_known = False  # there may be state now
        for others, first in self._others:
            others.copy_(first)

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

    def _rows_places(self, undo: Undo) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Where the undo area has the numbers of as many rows as there is room for, and their values in each table,
        [rows, row]."""
        known = self._saved_rows.get(undo)
        if known is None:
            room, tables = max(1, self._room(undo)), self._tables
            sizes = [(torch.int64, room), *((one.dtype, room * one.stride(0)) for one in tables)]
            indices, *values = lay_over(undo.area, sizes, self._rows_at)
            known = self._saved_rows[undo] = indices, [flat.view(room, -1) for flat in values]
        return known

    def _save_rows(self, undo: Undo, indices: torch.Tensor) -> None:
        torch._foreach_copy_(self._places(undo), self._cells)
        kept, values = self._rows_places(undo)
        count = undo.rows = len(indices)
        kept[:count].copy_(indices)
        self._fetch_rows(indices)
        for place, table in zip(values, self._tables, strict=True):
            torch.index_select(table, 0, indices, out=place[:count])

    def _fetch_rows(self, indices: torch.Tensor) -> None:
        for table in self._tables:
            rows.fetch(table, indices)

    def _restore_rows(self, undo: Undo) -> None:
        torch._foreach_copy_(self._cells, self._places(undo))
        indices, values = self._rows_places(undo)
        count = undo.rows
        for place, table in zip(values, self._tables, strict=True):
            table.index_copy_(0, indices[:count], place[:count])

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
