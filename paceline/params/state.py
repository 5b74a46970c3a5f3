"""An optimizer's state in shared memory, so that any process of the host can go on with any block of it.

"like" state (one value a parameter value) lies in vectors parallel to the parameters' own; everything else in cells,
of which every block of the grid (protocol/partition.py) has its own: a count of steps, say. So nothing that one block's
step changes is read by another's, and what a step is about to change can be saved before it (``places``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.params.optimizers import StateItem
from paceline.params.table import DTYPES, Table, vector_dtype
from paceline.protocol.partition import ALIGN, Piece

# frombuffer(dtype, offset in bytes, count) -> an alias of shared memory
Carve = Callable[[torch.dtype, int, int], torch.Tensor]
_LINE = 64


class StatePlan:
    """Where each item of state lies, in bytes from the start of the state's area. A pure function of its inputs."""

    def __init__(self, table: Table, items: Sequence[StateItem], blocks: Sequence[Piece]) -> None:
        self.items, self.blocks = items, blocks
        self._table = table
        self._numbers = {(block.param, block.start): number for number, block in enumerate(blocks)}
        self._starts: dict[int, list[int]] = {}
        for block in blocks:
            self._starts.setdefault(block.param, []).append(block.start)
        self.vectors: dict[tuple[str, str, str], tuple[int, int]] = {}  # (key, dtype, of vector) -> offset, count
        self.cells: dict[tuple[int, int, str], int] = {}  # (parameter, start of block, key) -> offset
        place = -(-max(len(blocks), 1) // _LINE) * _LINE  # one byte a block: has it state yet?
        kept: dict[int, list[StateItem]] = {}
        for item in items:
            if item.kind != "like":
                kept.setdefault(item.param, []).append(item)
                continue
            of = table.entries[item.param].vector
            if (item.key, item.dtype, of) not in self.vectors:
                self.vectors[item.key, item.dtype, of] = (place, table.sizes[of])
                place += -(-table.sizes[of] * DTYPES[item.dtype].itemsize // _LINE) * _LINE
        self._cells_end = [place]
        for block in blocks:  # block by block, so that those of a chunk are one range of bytes
            for item in kept.get(block.param, ()):
                count = max(1, torch.Size(item.shape).numel())
                self.cells[block.param, block.start, item.key] = place
                place += -(-count * DTYPES[item.dtype].itemsize // _LINE) * _LINE
            self._cells_end.append(place)
        self.size_bytes = place

    def number(self, block: Piece) -> int:
        """The block's place in the grid."""
        return self._numbers[block.param, block.start]

    def starts(self, param: int) -> list[int]:
        """Where the parameter's blocks begin, in values; none for a parameter of no values."""
        return self._starts.get(param, [])

    def cells_of(self, first: int, stop: int) -> tuple[int, int]:
        """Where the cells of blocks ``[first, stop)`` lie: offset and number of bytes."""
        return self._cells_end[first], self._cells_end[stop] - self._cells_end[first]

    def ranges(self, blocks: Sequence[Piece]) -> list[tuple[int, int]]:
        """Where all that belongs to these blocks lies: ``[start, stop)`` in bytes, adjacent ones as one."""
        found = []
        for block in blocks:
            number, entry = self.number(block), self._table.entries[block.param]
            offset, size = self.cells_of(number, number + 1)
            found += [(number, number + 1), (offset, offset + size)]
            for (_, dtype, of), (first, _) in self.vectors.items():
                if of == entry.vector:
                    item = DTYPES[dtype].itemsize
                    start, stop = entry.offset + block.start, entry.offset + block.stop
                    found.append((first + start * item, first + stop * item))
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(found):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            elif stop > start:
                merged.append((start, stop))
        return merged

    def value_bytes(self, vector: str) -> int:
        """A parameter value of this vector and the state beside it, in bytes."""
        likes = sum(DTYPES[dtype].itemsize for _, dtype, of in self.vectors if of == vector)
        return vector_dtype(vector).itemsize + likes

    def block_bytes(self, block: Piece) -> int:
        """All that a step of the block may change, in bytes; of a block with sparse rows, one row of it."""
        entry = self._table.entries[block.param]
        number = self.number(block)
        values = entry.row or block.stop - block.start
        return values * self.value_bytes(entry.vector) + self.cells_of(number, number + 1)[1] + 1


class State:
    """The state of all parameters of one optimizer, over memory that ``carve`` hands out."""

    def __init__(self, table: Table, plan: StatePlan, carve: Carve) -> None:
        self._table, self.plan, self._carve = table, plan, carve
        self._has_numbers = any(item.kind in ("int", "float") for item in plan.items)
        self.present = carve(torch.uint8, 0, max(len(plan.blocks), 1))
        self._vectors = {key: carve(DTYPES[key[1]], offset, count) for key, (offset, count) in plan.vectors.items()}
        self._items: dict[int, list[tuple[StateItem, dict[int, torch.Tensor]]]] = {}
        for item in plan.items:
            entry = table.entries[item.param]
            if item.kind == "like":
                start, count = entry.offset, -(-entry.size // ALIGN) * ALIGN
                memory = {0: self._vectors[item.key, item.dtype, entry.vector][start : start + count]}
            else:
                numel = torch.Size(item.shape).numel()
                memory = {
                    start: carve(DTYPES[item.dtype], plan.cells[item.param, start, item.key], numel).view(item.shape)
                    for start in plan.starts(item.param)
                }
            self._items.setdefault(item.param, []).append((item, memory))

    def load(self, block: Piece, *, whole: bool) -> dict[str, Any]:
        """The state of one block, as its optimizer wants it (tensors are aliases); empty if it has none yet."""
        if not self.present[self.plan.number(block)]:
            return {}
        state: dict[str, Any] = {}
        for item, memory in self._items.get(block.param, ()):
            state[item.key] = alias = self._alias(item, memory, block, whole)
            if item.kind in ("int", "float"):
                state[item.key] = _number(item, alias)
        return state

    def save(self, block: Piece, state: dict[str, Any], *, whole: bool) -> None:
        """Move what a step has made or replaced into shared memory, and put aliases of it into ``state``."""
        if not any(value is not None for value in state.values()):
            return
        for item, memory in self._items.get(block.param, ()):
            value = state.get(item.key)
            if value is None:
                continue
            alias = self._alias(item, memory, block, whole)
            if item.kind in ("int", "float"):
                alias.fill_(float(value))
            elif value.data_ptr() != alias.data_ptr():
                alias.copy_(value)
                state[item.key] = alias
        self.present[self.plan.number(block)] = 1

    @property
    def is_empty(self) -> bool:
        """Does the optimizer keep no state at all, as plain SGD?"""
        return not self.plan.items

    @property
    def has_numbers(self) -> bool:
        """Is any of it a Python number, of which there are no aliases?"""
        return self._has_numbers

    def fill(self, param: int, state: dict[str, Any]) -> None:
        """Take in the state of a whole parameter (an optimizer's own, in the parameter's shape); copies it."""
        for start in self.plan.starts(param):
            self.save(self._all_of(param, start), dict(state), whole=True)

    def clear(self) -> None:
        """Forget all state: parameters have none until they are stepped."""
        self.present.zero_()

    def view(self, param: int) -> dict[str, Any]:
        """The whole state of a parameter in the parameter's own shape (aliases), as the user's optimizer shows it."""
        starts = self.plan.starts(param)
        return self.load(self._all_of(param, starts[0]), whole=True) if starts else {}

    def beside(self, vector: str, start: int, stop: int) -> list[torch.Tensor]:
        """The "like" state of values ``[start, stop)`` of a parameter vector: flat aliases."""
        return [memory[start:stop] for (_, _, of), memory in self._vectors.items() if of == vector]

    def cells(self, first: int, stop: int) -> list[torch.Tensor]:
        """Everything else that belongs to blocks ``[first, stop)`` of the grid, as uint8 aliases."""
        offset, size = self.plan.cells_of(first, stop)
        cells = [self._carve(torch.uint8, offset, size)] if size else []
        return [self.present[first:stop], *cells]

    def _all_of(self, param: int, start: int) -> Piece:
        """The whole parameter under the name of its block at ``start``: with that block's cells."""
        return Piece(param, start, -(-self._table.entries[param].size // ALIGN) * ALIGN)

    def _alias(self, item: StateItem, memory: dict[int, torch.Tensor], block: Piece, whole: bool) -> torch.Tensor:
        if item.kind != "like":
            return memory[block.start]
        values, entry = memory[0], self._table.entries[block.param]
        if whole:
            return values.as_strided(entry.shape, entry.stride, values.storage_offset())
        if entry.row:
            return values[block.start : min(block.stop, entry.size)].view(-1, entry.row)
        return values[block.start : block.stop]


def _number(item: StateItem, memory: torch.Tensor) -> int | float:
    value = float(memory)
    return int(value) if item.kind == "int" else value
