"""An optimizer's state in shared memory, so that any process of the host can go on with any piece of it.

"like" state (one value a parameter value) lies in vectors parallel to the parameters' own; everything else in
cells of its own. Where all pieces of a parameter are stepped in one round, by whoever takes part in it, its cells
belong to the process that steps its first piece: the others hold equal private copies, since each of them advances
its own (``step += 1`` twice on one cell would be two steps). Where the cut is fixed and pieces are stepped at
different times (``cut``), every piece has cells of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.params.optimizers import StateItem
from paceline.params.table import DTYPES, Table
from paceline.protocol.partition import ALIGN, Piece

# frombuffer(dtype, offset in bytes, count) -> an alias of shared memory
Carve = Callable[[torch.dtype, int, int], torch.Tensor]


class StatePlan:
    """Where each item of state lies, in bytes from the start of the state's area. A pure function of its inputs."""

    def __init__(self, table: Table, items: Sequence[StateItem], cut: Sequence[Piece] = ()) -> None:
        self.items = items
        self._starts: list[list[int]] = [[] if cut else [0] for _ in table.entries]
        for piece in cut:
            self._starts[piece.param].append(piece.start)
        self._rows: dict[tuple[int, int], int] = {}  # (parameter, start of a piece with cells) -> its number
        for param, starts in enumerate(self._starts):
            for start in starts or [0]:  # a parameter of no values is in no piece
                self._rows[param, start] = len(self._rows)
        self.vectors: dict[tuple[str, str, str], tuple[int, int]] = {}  # (key, dtype, of vector) -> offset, count
        self.cells: dict[tuple[int, int, str], int] = {}  # (parameter, start of piece, key) -> offset
        place = -(-len(self._rows) // 64) * 64  # one byte a piece with cells: has it state yet?
        for item in items:
            if item.kind == "like":
                of = table.entries[item.param].vector
                if (item.key, item.dtype, of) not in self.vectors:
                    self.vectors[item.key, item.dtype, of] = (place, table.sizes[of])
                    place += -(-table.sizes[of] * DTYPES[item.dtype].itemsize // 64) * 64
            else:
                count = max(1, torch.Size(item.shape).numel())
                for start in self._starts[item.param] or [0]:
                    self.cells[item.param, start, item.key] = place
                    place += -(-count * DTYPES[item.dtype].itemsize // 64) * 64
        self.size_bytes = place

    @property
    def rows(self) -> int:
        """How many pieces have cells of their own."""
        return len(self._rows)

    def owns_cells(self, piece: Piece) -> bool:
        return (piece.param, piece.start) in self._rows

    def row(self, piece: Piece) -> int:
        """The number of the piece whose cells tell of this one."""
        return self._rows.get((piece.param, piece.start), self._rows[piece.param, self.starts(piece.param)[0]])

    def starts(self, param: int) -> list[int]:
        return self._starts[param] or [0]


class State:
    """The state of all parameters of one optimizer, over memory that ``carve`` hands out."""

    def __init__(self, table: Table, plan: StatePlan, carve: Carve) -> None:
        self._table, self._plan = table, plan
        self._has_numbers = any(item.kind in ("int", "float") for item in plan.items)
        self.present = carve(torch.uint8, 0, max(plan.rows, 1))
        vectors = {key: carve(DTYPES[key[1]], offset, count) for key, (offset, count) in plan.vectors.items()}
        self._items: dict[int, list[tuple[StateItem, dict[int, torch.Tensor]]]] = {}
        for item in plan.items:
            entry = table.entries[item.param]
            if item.kind == "like":
                start, count = entry.offset, -(-entry.size // ALIGN) * ALIGN
                memory = {0: vectors[item.key, item.dtype, entry.vector][start : start + count]}
            else:
                numel = torch.Size(item.shape).numel()
                memory = {
                    start: carve(DTYPES[item.dtype], plan.cells[item.param, start, item.key], numel).view(item.shape)
                    for start in plan.starts(item.param)
                }
            self._items.setdefault(item.param, []).append((item, memory))

    def load(self, piece: Piece, *, whole: bool) -> dict[str, Any]:
        """The state of one piece, as its optimizer wants it; empty if the parameter has none yet.

        "like" tensors are aliases; cells are aliases in a piece that has its own, copies in the others.
        """
        if not self.present[self._plan.row(piece)]:
            return {}
        state: dict[str, Any] = {}
        for item, memory in self._items.get(piece.param, ()):
            state[item.key] = alias = self._alias(item, memory, piece, whole)
            if item.kind in ("int", "float"):
                state[item.key] = _number(item, alias)
            elif item.kind == "tensor" and not self._plan.owns_cells(piece):
                state[item.key] = alias.clone()
        return state

    def save(self, piece: Piece, state: dict[str, Any], *, whole: bool) -> None:
        """Move what a step has made or replaced into shared memory, and put aliases of it into ``state``."""
        if not any(value is not None for value in state.values()):
            return
        first = self._plan.owns_cells(piece)
        for item, memory in self._items.get(piece.param, ()):
            value = state.get(item.key)
            if value is None:
                continue
            if item.kind in ("int", "float"):
                if first:
                    self._alias(item, memory, piece, whole).fill_(float(value))
            elif item.kind == "like" or first:
                alias = self._alias(item, memory, piece, whole)
                if value.data_ptr() != alias.data_ptr():
                    alias.copy_(value)
                    state[item.key] = alias
        if first:
            self.present[self._plan.row(piece)] = 1

    @property
    def is_empty(self) -> bool:
        """Does the optimizer keep no state at all, as plain SGD?"""
        return not self._plan.items

    @property
    def has_numbers(self) -> bool:
        """Is any of it a Python number, of which there are no aliases?"""
        return self._has_numbers

    def fill(self, param: int, state: dict[str, Any]) -> None:
        """Take in the state of a whole parameter (an optimizer's own, in the parameter's shape); copies it."""
        for start in self._plan.starts(param):
            self.save(self._all_of(param, start), dict(state), whole=True)

    def clear(self) -> None:
        """Forget all state: parameters have none until they are stepped."""
        self.present.zero_()

    def view(self, param: int) -> dict[str, Any]:
        """The whole state of a parameter in the parameter's own shape (aliases), as the user's optimizer shows it."""
        return self.load(self._all_of(param, self._plan.starts(param)[0]), whole=True)

    def _all_of(self, param: int, start: int) -> Piece:
        """The whole parameter under the name of its piece at ``start``: with that piece's cells."""
        return Piece(param, start, -(-self._table.entries[param].size // ALIGN) * ALIGN)

    def _alias(self, item: StateItem, memory: dict[int, torch.Tensor], piece: Piece, whole: bool) -> torch.Tensor:
        if item.kind != "like":
            return memory.get(piece.start, memory[min(memory)])
        values, entry = memory[0], self._table.entries[piece.param]
        if whole:
            return values.as_strided(entry.shape, entry.stride, values.storage_offset())
        if entry.row:
            return values[piece.start : min(piece.stop, entry.size)].view(-1, entry.row)
        return values[piece.start : piece.stop]


def _number(item: StateItem, memory: torch.Tensor) -> int | float:
    value = float(memory)
    return int(value) if item.kind == "int" else value
