"""An optimizer's state in shared memory, so that any process of the host can go on with any piece of it.

"like" state (one value a parameter value) lies in vectors parallel to the parameters' own; everything else in
cells of its own. A parameter's cells belong to the process that steps its first piece: the others hold equal
private copies, since each of them advances its own (``step += 1`` twice on one cell would be two steps).
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

    def __init__(self, table: Table, items: Sequence[StateItem]) -> None:
        self.items = items
        self.vectors: dict[tuple[str, str, str], tuple[int, int]] = {}  # (key, dtype, of dtype) -> offset, count
        self.cells: dict[tuple[int, str], int] = {}
        place = -(-len(table.entries) // 64) * 64  # one byte a parameter: has it state yet?
        for item in items:
            if item.kind == "like":
                of = table.entries[item.param].dtype
                if (item.key, item.dtype, of) not in self.vectors:
                    self.vectors[item.key, item.dtype, of] = (place, table.sizes[of])
                    place += -(-table.sizes[of] * DTYPES[item.dtype].itemsize // 64) * 64
            else:
                self.cells[item.param, item.key] = place
                count = max(1, torch.Size(item.shape).numel())
                place += -(-count * DTYPES[item.dtype].itemsize // 64) * 64
        self.size_bytes = place


class State:
    """The state of all parameters of one optimizer, over memory that ``carve`` hands out."""

    def __init__(self, table: Table, plan: StatePlan, carve: Carve) -> None:
        self._table = table
        self.present = carve(torch.uint8, 0, max(len(table.entries), 1))
        vectors = {key: carve(DTYPES[key[1]], offset, count) for key, (offset, count) in plan.vectors.items()}
        self._items: dict[int, list[tuple[StateItem, torch.Tensor]]] = {}
        for item in plan.items:
            entry = table.entries[item.param]
            if item.kind == "like":
                start, count = entry.offset, -(-entry.size // ALIGN) * ALIGN
                memory = vectors[item.key, item.dtype, entry.dtype][start : start + count]
            else:
                numel = torch.Size(item.shape).numel()
                memory = carve(DTYPES[item.dtype], plan.cells[item.param, item.key], numel).view(item.shape)
            self._items.setdefault(item.param, []).append((item, memory))

    def load(self, piece: Piece, *, whole: bool) -> dict[str, Any]:
        """The state of one piece, as its optimizer wants it; empty if the parameter has none yet.

        "like" tensors are aliases; cells are aliases in a parameter's first piece, copies in the others.
        """
        if not self.present[piece.param]:
            return {}
        state: dict[str, Any] = {}
        for item, memory in self._items.get(piece.param, ()):
            state[item.key] = self._alias(item, memory, piece, whole)
            if item.kind in ("int", "float"):
                state[item.key] = _number(item, memory)
            elif item.kind == "tensor" and piece.start:
                state[item.key] = memory.clone()
        return state

    def save(self, piece: Piece, state: dict[str, Any], *, whole: bool) -> None:
        """Move what a step has made or replaced into shared memory, and put aliases of it into ``state``."""
        if not any(value is not None for value in state.values()):
            return
        first = piece.start == 0
        for item, memory in self._items.get(piece.param, ()):
            value = state.get(item.key)
            if value is None:
                continue
            if item.kind in ("int", "float"):
                if first:
                    memory.fill_(float(value))
            elif item.kind == "like" or first:
                alias = self._alias(item, memory, piece, whole)
                if value.data_ptr() != alias.data_ptr():
                    alias.copy_(value)
                    state[item.key] = alias
        if first:
            self.present[piece.param] = 1

    def view(self, param: int) -> dict[str, Any]:
        """The whole state of a parameter in the parameter's own shape (aliases), as the user's optimizer shows it."""
        return self.load(Piece(param, 0, -(-self._table.entries[param].size // ALIGN) * ALIGN), whole=True)

    def _alias(self, item: StateItem, memory: torch.Tensor, piece: Piece, whole: bool) -> torch.Tensor:
        if item.kind != "like":
            return memory
        if whole:
            entry = self._table.entries[piece.param]
            return memory.as_strided(entry.shape, entry.stride, memory.storage_offset())
        return memory[piece.start : piece.stop]


def _number(item: StateItem, memory: torch.Tensor) -> int | float:
    value = float(memory)
    return int(value) if item.kind == "int" else value
