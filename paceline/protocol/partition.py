"""Cut parameters into equal shares: a pure function of sizes, so that every process finds the same cut.

A piece is a range of one parameter, ``[start, stop)`` in values. Cuts inside a parameter fall on multiples
of ``ALIGN`` values counted from its first one: torch's fused kernels give other last bits when a vector
starts elsewhere (measured: SGD cut at odd offsets was not bitwise equal, at multiples of 16 it was).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 64  # values; one cache line of the narrowest dtype, a multiple of every vector width


@dataclass(frozen=True, slots=True)
class Piece:
    """Values ``[start, stop)`` of parameter number ``param``."""

    param: int
    start: int
    stop: int


def padded(size: int) -> int:
    """``size`` rounded up to whole multiples of ALIGN; nothing for nothing."""
    return -(-size // ALIGN) * ALIGN


def partition(sizes: Sequence[int], parts: int, *, whole: bool = False) -> tuple[tuple[Piece, ...], ...]:
    """Cut parameters of ``sizes`` values into ``parts`` contiguous shares, in order.

    Every padded value of every parameter is in exactly one piece; shares differ by at most ALIGN values,
    or, with ``whole`` (cuts between parameters only), by at most the largest parameter. A share may be empty.
    """
    assert parts >= 1, "no parts to cut into"
    shares: list[list[Piece]] = [[] for _ in range(parts)]
    total = sum(padded(size) for size in sizes)
    if whole:
        before = 0
        for param, size in enumerate(sizes):
            if size:
                middle = before + padded(size) // 2
                shares[min(middle * parts // max(total, 1), parts - 1)].append(Piece(param, 0, padded(size)))
            before += padded(size)
        return tuple(tuple(share) for share in shares)
    lines = total // ALIGN
    ends = [lines * (part + 1) // parts * ALIGN for part in range(parts)]
    part, before = 0, 0
    for param, size in enumerate(sizes):
        start, stop = 0, padded(size)
        while start < stop:
            while before + start >= ends[part]:
                part += 1
            cut = min(stop, ends[part] - before)
            shares[part].append(Piece(param, start, cut))
            start = cut
        before += stop
    return tuple(tuple(share) for share in shares)
