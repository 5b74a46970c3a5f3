"""The cut of parameters into shares: complete, in order, aligned and even."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.partition import ALIGN, Piece, deal, grid, padded, partition

SIZES = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5 * ALIGN), st.integers(0, 10**12)), max_size=12)
PARTS = st.integers(1, 40)


def flat(shares: Sequence[Sequence[Piece]]) -> list[Piece]:
    return [piece for share in shares for piece in share]


def values(share: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in share)


@given(SIZES, PARTS, st.booleans())
def test_every_padded_value_is_in_exactly_one_piece_in_order(sizes: list[int], parts: int, whole: bool) -> None:
    shares = partition(sizes, parts, whole=whole)
    assert len(shares) == parts
    place = {param: 0 for param, size in enumerate(sizes) if size}
    last = -1
    for piece in flat(shares):
        assert piece.param >= last
        assert piece.start == place[piece.param] < piece.stop
        last, place[piece.param] = piece.param, piece.stop
    assert place == {param: padded(size) for param, size in enumerate(sizes) if size}


@given(SIZES, PARTS)
def test_cuts_fall_on_multiples_of_align_and_shares_differ_by_one_line(sizes: list[int], parts: int) -> None:
    shares = partition(sizes, parts)
    assert all(piece.start % ALIGN == 0 == piece.stop % ALIGN for piece in flat(shares))
    lengths = [values(share) for share in shares]
    assert max(lengths) - min(lengths) <= ALIGN


@given(SIZES, PARTS)
def test_whole_cuts_no_parameter(sizes: list[int], parts: int) -> None:
    pieces = flat(partition(sizes, parts, whole=True))
    assert pieces == [Piece(param, 0, padded(size)) for param, size in enumerate(sizes) if size]


@given(SIZES, PARTS)
def test_whole_shares_differ_from_even_ones_by_less_than_the_largest_parameter(sizes: list[int], parts: int) -> None:
    lengths = [values(share) for share in partition(sizes, parts, whole=True)]
    largest = max((padded(size) for size in sizes), default=0)
    even = sum(lengths) / parts
    assert all(abs(length - even) <= largest for length in lengths)


@given(st.lists(st.integers(1, 4 * ALIGN), min_size=1, max_size=5), st.integers(6, 60))
def test_more_parts_than_lines_leave_parts_empty_and_no_value_out(sizes: list[int], parts: int) -> None:
    shares = partition(sizes, parts)
    assert sum(map(values, shares)) == sum(map(padded, sizes))
    lines = sum(map(padded, sizes)) // ALIGN
    assert sum(1 for share in shares if share) == min(parts, lines)


@given(SIZES, PARTS, st.booleans())
def test_the_cut_depends_on_nothing_but_its_arguments(sizes: list[int], parts: int, whole: bool) -> None:
    assert partition(sizes, parts, whole=whole) == partition(tuple(sizes), parts, whole=whole)


@pytest.mark.parametrize(
    ("sizes", "parts", "expected"),
    [
        ([], 3, [[], [], []]),
        ([0, 0], 2, [[], []]),
        ([1], 1, [[Piece(0, 0, 64)]]),
        ([1], 3, [[], [], [Piece(0, 0, 64)]]),
        ([1, 0, 1], 2, [[Piece(0, 0, 64)], [Piece(2, 0, 64)]]),
        ([65], 2, [[Piece(0, 0, 64)], [Piece(0, 64, 128)]]),
        ([64, 128], 2, [[Piece(0, 0, 64)], [Piece(1, 0, 128)]]),
        ([192, 64], 2, [[Piece(0, 0, 128)], [Piece(0, 128, 192), Piece(1, 0, 64)]]),
    ],
)
def test_examples(sizes: list[int], parts: int, expected: list[list[Piece]]) -> None:
    assert [list(share) for share in partition(sizes, parts)] == expected


ROWS = st.integers(1, 5 * ALIGN).map(lambda row: math.lcm(ALIGN, row))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.just(ALIGN), ROWS)), max_size=12), PARTS)
def test_tables_are_cut_between_rows_and_nothing_is_left_out(of: list[tuple[int, int]], parts: int) -> None:
    """Each share ends within half a grain (and a line) of where it would if values were cut apart."""
    sizes, grains = [size for size, _ in of], [grain for _, grain in of]
    shares = partition(sizes, parts, grains=grains)
    place = [0] * len(sizes)
    for piece in flat(shares):
        assert piece.start == place[piece.param] < piece.stop
        assert piece.start % grains[piece.param] == 0
        assert piece.stop % grains[piece.param] == 0 or piece.stop == padded(sizes[piece.param])
        place[piece.param] = piece.stop
    assert place == [padded(size) for size in sizes]
    before, total = 0, sum(place)
    for part, share in enumerate(shares[:-1]):
        before += values(share)
        assert abs(before - total * (part + 1) / parts) <= max(grains, default=ALIGN) / 2 + ALIGN


@given(SIZES, PARTS)
def test_without_rows_the_grain_changes_nothing(sizes: list[int], parts: int) -> None:
    assert partition(sizes, parts, grains=[ALIGN] * len(sizes)) == partition(sizes, parts)


@given(st.integers(0, 10**15))
def test_padding_is_the_next_multiple(size: int) -> None:
    assert padded(size) % ALIGN == 0
    assert 0 <= padded(size) - size < ALIGN


# --- the grid ---

GRIDS = st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([64, 64, 192, 320])), min_size=1, max_size=6)


@given(GRIDS, st.integers(1, 7), st.integers(1, 9), st.integers(1, 12), st.booleans())
def test_blocks_are_dealt_whole_and_in_order(
    of: list[tuple[int, int]], parts: int, shares: int, lines: int, whole: bool
) -> None:
    sizes, grains = [size for size, _ in of], [grain for _, grain in of]
    tables = {param for param, grain in enumerate(grains) if grain > 64}
    blocks = grid(sizes, parts, most=lines * ALIGN, whole=whole, grains=grains, tables=tables)
    dealt = deal(blocks, shares)
    assert [block for share in dealt for block in share] == list(blocks)
    assert len(dealt) == shares
    for block in blocks:
        assert block.stop - block.start <= lines * ALIGN or whole or block.param in tables
        assert block.start < block.stop
        assert block.start % grains[block.param] == 0
    for param, size in enumerate(sizes):
        own = [block for block in blocks if block.param == param]
        assert [block.start for block in own[1:]] == [block.stop for block in own[:-1]]
        assert (own[0].start, own[-1].stop) == (0, padded(size)) if size else not own


@given(GRIDS, st.integers(1, 7), st.integers(1, 12))
def test_for_as_many_as_the_grid_was_made_for_shares_are_as_equal_as_cut_anew(
    of: list[tuple[int, int]], parts: int, lines: int
) -> None:
    sizes, grains = [size // grain * grain if grain > 64 else size for size, grain in of], [grain for _, grain in of]
    tables = {param for param, grain in enumerate(grains) if grain > 64}
    blocks = grid(sizes, parts, most=lines * ALIGN, grains=grains, tables=tables)
    for dealt, cut in zip(deal(blocks, parts), partition(sizes, parts, grains=grains), strict=True):
        assert _merged(dealt) == list(cut)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces:
        if merged and (merged[-1].param, merged[-1].stop) == (piece.param, piece.start):
            piece = Piece(piece.param, merged.pop().start, piece.stop)
        merged.append(piece)
    return merged
