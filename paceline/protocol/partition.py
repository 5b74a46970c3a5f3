"""Cut parameters into equal shares: a pure function of sizes, so that every process finds the same cut.

A piece is a range of one parameter, ``[start, stop)`` in values. Cuts inside a parameter fall on multiples
of ``ALIGN`` values counted from its first one: torch's fused kernels give other last bits when a vector
starts elsewhere (measured: SGD cut at odd offsets was not bitwise equal, at multiples of 16 it was). Parameters
that are stepped by rows are cut between rows: at multiples of a larger grain.

What is cut once is the *grid*: blocks, each of which has its optimizer's state to itself. Whoever steps is dealt whole
blocks, so any process can go on with any of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

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


def partition(
    sizes: Sequence[int], parts: int, *, whole: bool = False, grains: Sequence[int] = ()
) -> tuple[tuple[Piece, ...], ...]:
    """Cut parameters of ``sizes`` values into ``parts`` contiguous shares, in order.

    Every padded value of every parameter is in exactly one piece; shares differ by at most ALIGN values,
    or, with ``whole`` (cuts between parameters only), by at most the largest parameter. A share may be empty.
    ``grains[i]`` is a multiple of ALIGN: parameter i is cut at multiples of it only (default: ALIGN), and a share
    begins and ends within half a grain of where it would without.
    """
    assert parts >= 1, "no parts to cut into"
    assert not any(grain % ALIGN for grain in grains), "a grain that is no multiple of ALIGN"
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
        grain = grains[param] if grains else ALIGN
        while start < stop:
            while before + start >= ends[part]:
                part += 1
            cut = stop if part == parts - 1 else min(stop, (ends[part] - before + grain // 2) // grain * grain)
            if cut > start:
                shares[part].append(Piece(param, start, cut))
                start = cut
            if start < stop:
                part += 1
        before += stop
    return tuple(tuple(share) for share in shares)


def grid(
    sizes: Sequence[int],
    parts: int,
    *,
    most: int,
    whole: bool = False,
    grains: Sequence[int] = (),
    tables: Container[int] = (),
) -> tuple[Piece, ...]:
    """The blocks of ``partition``'s shares, in order, cut on into at most ``most`` values each; those of ``tables``,
    parameters with sparse rows, are not."""
    assert most >= ALIGN, "blocks of less than a line"
    blocks = []
    for piece in (piece for share in partition(sizes, parts, whole=whole, grains=grains) for piece in share):
        lines = (piece.stop - piece.start) // ALIGN
        count = 1 if whole or piece.param in tables else -(-lines // (most // ALIGN))
        cuts = [piece.start + lines * number // count * ALIGN for number in range(count)] + [piece.stop]
        blocks += [Piece(piece.param, start, stop) for start, stop in pairwise(cuts)]
    return tuple(blocks)


def deal(blocks: Sequence[Piece], parts: int) -> tuple[tuple[Piece, ...], ...]:
    """Deal blocks in order into ``parts`` contiguous shares, each block where its middle lies.

    Where the grid was made of as many parts, the shares are those of ``partition``.
    """
    lines = sum(block.stop - block.start for block in blocks) // ALIGN
    ends = [lines * (part + 1) // parts * ALIGN for part in range(parts)]
    shares: list[list[Piece]] = [[] for _ in range(parts)]
    before = 0
    for block in blocks:
        size = block.stop - block.start
        shares[bisect_left(ends, before + size / 2)].append(block)
        before += size
    return tuple(tuple(share) for share in shares)
