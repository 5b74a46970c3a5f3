"""The fold: what makes one gradient of the contributors', for the pieces of a chunk at a time.

    g = sum over contributors w of  (n_w / N) g_w

in rank order for every value, so no bit depends on how the parameters are cut. A single gradient is not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from paceline.params import rows
from paceline.params.rows import Rows
from paceline.params.table import Entry, Table, vector_dtype
from paceline.protocol.partition import Piece

WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}  # sums of 16-bit gradients run in these

Vectors = Mapping[str, torch.Tensor]


class Pushed(Protocol):
    """A worker's whole gradient, as it lies in its slot: the table's flat vectors, and for each parameter with sparse
    rows the numbers of those that it has (params/rows.py)."""

    gradient: dict[str, torch.Tensor]
    rows: dict[int, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Fold:
    """What is to be folded; ``shares`` sum to one, and the sum counts by ``factor``. ``computed_on`` and ``strength``:
    one source, to be compensated for its delay.

    One of two sources may be a fold itself: the gradients of one host, where those of the other have come as one.
    """

    sources: Sequence[Pushed | Fold]
    shares: Sequence[float]
    computed_on: Vectors | None = None
    strength: float = 0.0
    factor: float = 1.0
    rows: dict[int, list[Rows]] = field(default_factory=dict)  # of the sources, by table, where they have been read


@dataclass(frozen=True, slots=True)
class _Run:
    """Adjacent dense pieces: they fold in one go. ``sum`` and ``gradient`` are one tensor but for 16 bits."""

    vector: str
    start: int
    stop: int
    sum: torch.Tensor
    gradient: torch.Tensor


class Folding:
    """Of ``pieces`` of the parameters ``vectors``, dense ones or one of a table with sparse rows. ``buffers``: see
    ``buffers_for``. ``whole``: gradients have their parameters' own shapes."""

    def __init__(
        self,
        table: Table,
        vectors: Vectors,
        pieces: Sequence[Piece],
        buffers: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        *,
        whole: bool,
    ) -> None:
        self._table, self._vectors, self._pieces, self._whole = table, vectors, pieces, whole
        self._runs = _runs(spans_of(table, pieces), buffers)
        self._gradients: list[torch.Tensor] = []
        for piece in pieces:
            entry = table.entries[piece.param]
            at = entry.offset + piece.start
            if not entry.row:
                run = next(run for run in self._runs if run.vector == entry.vector and run.start <= at < run.stop)
                gradient = run.gradient[at - run.start : entry.offset + piece.stop - run.start]
                self._gradients.append(self._shaped(entry, gradient))
        # id of a gradient -> it, its ranges: the pieces' and the runs'
        self._aliases: dict[int, tuple[Vectors, list[torch.Tensor]]] = {}
        self._ranges: dict[int, tuple[Vectors, list[torch.Tensor]]] = {}

    def dense(self, fold: Fold) -> list[torch.Tensor]:
        """The pieces' gradients: aliases of what was pushed, or of buffers that the next fold writes."""
        if fold.computed_on is not None:
            (source,) = fold.sources
            assert not isinstance(source, Fold)
            for run in self._runs:
                g = source.gradient[run.vector][run.start : run.stop]
                drift = self._vectors[run.vector][run.start : run.stop]
                drift = drift - fold.computed_on[run.vector][run.start : run.stop]
                torch.addcmul(g, g * g, drift, value=fold.strength, out=run.gradient)
            return self._gradients
        if len(fold.sources) == 1 and fold.factor == 1.0:
            (only,) = fold.sources
            return self.dense(only) if isinstance(only, Fold) else self._alias(only.gradient)
        by_source = [self._ranges_of(source) for source in fold.sources]
        for run, gradients in zip(self._runs, zip(*by_source, strict=True), strict=True):
            fold_into(run.sum, gradients, fold.shares)
            if fold.factor != 1.0:
                run.sum.mul_(fold.factor)
            if run.sum is not run.gradient:
                run.gradient.copy_(run.sum)
        return self._gradients

    def _ranges_of(self, source: Pushed | Fold) -> list[torch.Tensor]:
        """The runs' ranges of a gradient; of a fold, in the buffers where it is made."""
        if not isinstance(source, Fold):
            return self._run_ranges(source)
        if len(source.sources) == 1:
            return self._ranges_of(source.sources[0])
        self.dense(source)
        return [run.gradient for run in self._runs]

    def _alias(self, source: Vectors) -> list[torch.Tensor]:
        """The pieces' ranges of a gradient, where it lies."""
        known = self._aliases.get(id(source))
        if known is None:
            ranges = []
            for piece in self._pieces:
                entry = self._table.entries[piece.param]
                gradient = source[entry.vector][entry.offset + piece.start : entry.offset + piece.stop]
                ranges.append(self._shaped(entry, gradient))
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

    def rows(self, fold: Fold) -> Rows:
        """The gradient of the one piece, of a table with sparse rows; rows are counted from the piece's first."""
        (piece,) = self._pieces
        entry = self._table.entries[piece.param]
        first, end = piece.start // entry.row, min(piece.stop, entry.size) // entry.row
        whole = slice(entry.offset, entry.offset + entry.size)
        if piece.param not in fold.rows:
            fold.rows[piece.param] = [
                rows.written(source.rows[piece.param], source.gradient[entry.vector][whole], entry.row)
                for source in fold.sources
                if not isinstance(source, Fold)  # a host's fold is dense
            ]
        given = [rows.between(source, first, end, entry.rows) for source in fold.rows[piece.param]]
        dtype = self._vectors[entry.vector].dtype
        return given[0] if len(given) == 1 else rows.fold(given, fold.shares, WIDE.get(dtype, dtype))

    def _shaped(self, entry: Entry, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.as_strided(entry.shape, entry.stride, gradient.storage_offset()) if self._whole else gradient


def fold_into(total: torch.Tensor, gradients: Sequence[torch.Tensor], shares: Sequence[float]) -> None:
    """The sum of gradients, each times its share, in this order, in their type or WIDE. ``total`` may be one of two."""
    if total.dtype != gradients[0].dtype:
        total.copy_(gradients[0]).mul_(shares[0])
    elif len(gradients) == 2:
        torch.lerp(gradients[0], gradients[1], shares[1], out=total)  # the same in one reading
        return
    else:
        torch.mul(gradients[0], shares[0], out=total)
    for gradient, share in zip(gradients[1:], shares[1:], strict=True):
        total.add_(gradient, alpha=share)


def counted_as(weights: Sequence[float], factors: Sequence[float]) -> Sequence[float]:
    """By what gradients of these weights count among themselves: where factors are equal, as without them."""
    if len(set(factors)) == 1:
        return weights
    return [weight * factor for weight, factor in zip(weights, factors, strict=True)]


def shares_of(weights: Sequence[float], factors: Sequence[float]) -> tuple[list[float], float]:
    """Shares that sum to one, and by what the sum is to be multiplied."""
    counted = counted_as(weights, factors)
    total = sum(counted)
    factor = factors[0] if len(set(factors)) == 1 else total / sum(weights)
    return [one / total for one in counted], factor


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
        wide = WIDE.get(gradient.dtype)
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
