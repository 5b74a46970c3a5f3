"""What a step is about to change is saved first, so that a process killed in its midst leaves nothing torn.

A share is stepped in *chunks*. Each is copied to the stepper's undo area, then stepped; one word tells how far it has
come. Whoever goes on for a process that has died puts back the chunk that was in progress, skips those that are done,
and steps the rest with the same folded gradient: to the last bit what the dead one would have left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from paceline.params.state import StatePlan
from paceline.params.table import Table
from paceline.protocol.partition import Piece

CHUNK_BYTES = 1 << 21  # parameters and state; smaller ones are nearer in the cache, but each costs 20 microseconds
BLOCK_VALUES = 1 << 17
HEADER_WORDS = 8
_NUMBER, _PROGRESS, _ROWS = 0, 1, 2
_SLACK_BYTES = 4096  # every tensor saved begins at a multiple of 64


class Undo:
    """One stepper's area: ``words`` is its header, zeros at first; ``area`` is uint8[n]."""

    def __init__(self, words: memoryview[int], area: torch.Tensor) -> None:
        self._words, self.area = words, area

    def begin(self, number: int) -> int:
        """The step of this round, or entry of the log, begins, or is gone on with: how far it has come already.

        2n: n chunks are done; 2n + 1: the next is in progress, and what it was before is in the area.
        """
        words = self._words
        if words[_NUMBER] != number:
            words[_PROGRESS] = 0
            words[_NUMBER] = number
        return words[_PROGRESS]

    def advance(self, progress: int) -> None:
        self._words[_PROGRESS] = progress

    @property
    def rows(self) -> int:
        """How many rows of a table are saved."""
        return self._words[_ROWS]

    @rows.setter
    def rows(self, count: int) -> None:
        self._words[_ROWS] = count


def lay_over(area: torch.Tensor, sizes: Iterable[tuple[torch.dtype, int]], offset: int = 0) -> list[torch.Tensor]:
    """A place in the area for each flat tensor of so many values, one after the other from byte ``offset``."""
    places = []
    for dtype, count in sizes:
        size = count * dtype.itemsize
        places.append(area[offset : offset + size].view(dtype))
        offset += size + -size % 64
    return places


def chunks(pieces: Sequence[Piece], table: Table, plan: StatePlan, most_bytes: int) -> list[list[Piece]]:
    """Cut a share, which is whole blocks, into chunks of at most so many bytes; of a table with sparse rows all blocks
    are one chunk."""
    cut: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size, by_rows = plan.block_bytes(piece), table.entries[piece.param].row > 0
        goes_on = bool(cut) and (cut[-1][-1].param == piece.param if by_rows else size <= room)
        if not goes_on:
            cut.append([])
            room = most_bytes
        cut[-1].append(piece)
        room = 0 if by_rows else room - size
    return cut


def area_bytes(table: Table, plan: StatePlan, most_bytes: int = CHUNK_BYTES) -> int:
    """How large an undo area must be for any chunk of any share."""
    sizes = [plan.block_bytes(block) for block in plan.blocks]
    for entry in table.entries:
        if entry.row:
            sizes.append(min(most_bytes, entry.rows * (entry.row * plan.value_bytes(entry.vector) + 8)))
    return max(min(sum(sizes), most_bytes), *sizes, 0, 0) + _SLACK_BYTES
