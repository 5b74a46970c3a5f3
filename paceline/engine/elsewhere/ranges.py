"""What of an exchange each server has, where servers are on several hosts; and sending it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.engine.elsewhere.mail import send, send_range
from paceline.params.fold import Vectors, spans_of
from paceline.params.table import Table
from paceline.protocol.partition import Piece
from paceline.protocol.ranges import parts_of
from paceline.transport.link import Link
from paceline.transport.slots import ExchangeMemory, Spec


@dataclass(frozen=True)
class Range:
    """Some blocks of an exchange: ranges of its dense vectors, and (parameter, first row, end) of its tables."""

    blocks: tuple[Piece, ...]
    spans: Sequence[tuple[str, int, int]]
    tables: Sequence[tuple[int, int, int]]

    @staticmethod
    def of(table: Table, blocks: Sequence[Piece]) -> Range:
        tables = []
        for block in blocks:
            entry = table.entries[block.param]
            if entry.row:
                tables.append((block.param, block.start // entry.row, min(block.stop, entry.size) // entry.row))
        return Range(tuple(blocks), spans_of(table, blocks), tables)

    def within(self, vector: str, start: int, stop: int) -> Iterable[tuple[int, int]]:
        """What of these values of a vector is in it."""
        for of, first, end in self.spans:
            if of == vector and max(first, start) < min(end, stop):
                yield max(first, start), min(end, stop)

    def rows_in(self, param: int, numbers: torch.Tensor) -> torch.Tensor:
        """Which of these rows of a table are in it, as places in ``numbers``."""
        of_them, is_in = numbers.numpy(), np.zeros(len(numbers), dtype=bool)
        for of, first, end in self.tables:
            if of == param:
                is_in |= (of_them >= first) & (of_them < end)
        return torch.from_numpy(np.flatnonzero(is_in))  # a sixth of what torch's nonzero takes


def parts(spec: Spec, server: int) -> dict[int, Range]:
    """What a server has, by part."""
    cuts = spec.cut(spec.parts or spec.servers)
    mine = parts_of(server, spec.servers, spec.parts)
    return {part: Range.of(spec.table, cuts[part if spec.parts else server]) for part in mine}


def whole(spec: Spec, servers: Iterable[int]) -> Range:
    """What these have together."""
    of_them = [one for server in servers for one in parts(spec, server).values()]
    return Range.of(spec.table, [block for one in of_them for block in one.blocks])


def send_parameters(link: Link, index: int, memory: ExchangeMemory, table: Table, some: Range) -> None:
    """Of exchange ``index``, also of tables. Raises LinkEnded."""
    for span in some.spans:
        send_span(link, index, memory.params, *span)
    for param, first, end in some.tables:
        entry = table.entries[param]
        start = entry.offset + first * entry.row
        send_span(link, index, memory.params, entry.vector, start, start + (end - first) * entry.row)


def send_state(link: Link, index: int, memory: ExchangeMemory, some: Range) -> None:
    """The optimizer's. Raises LinkEnded."""
    state = memory.state_bytes()
    for first, end in memory.state.plan.ranges(some.blocks):
        send_range(link, f"state/{index}", state, first, end)


def send_span(link: Link, index: int, vectors: Vectors, vector: str, start: int, stop: int) -> int:
    """Parameters, straight to where the peer has them. Raises LinkEnded."""
    return send_range(link, f"parameters/{index}/{vector}", vectors[vector], start, stop)


def send_rows(link: Link, index: int, part: int, param: int, numbers: torch.Tensor, table: torch.Tensor) -> None:
    """These rows of a table; ``part`` as in ``ranges.Newest``. Raises LinkEnded."""
    send(link, f"numbers/{index}/{part}/{param}", numbers)
    send(link, f"rows/{index}/{part}/{param}", table[numbers])
