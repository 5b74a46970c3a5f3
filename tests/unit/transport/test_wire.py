"""What a payload's sum tells, where there is no TLS."""

from __future__ import annotations

import itertools
import random

import pytest

from paceline.transport.wire import summed

ROW = 8 * 509  # bytes; see ``summed``
SIZES = (1, 7, 8, ROW - 1, ROW, ROW + 3, 9 * ROW, 70_000, 400_001)


def flipped(data: bytes, *bits: int) -> memoryview:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return memoryview(changed)


@pytest.mark.parametrize("size", SIZES)
def test_a_flipped_bit_changes_the_sum(size: int) -> None:
    chance = random.Random(size)
    data = chance.randbytes(size)
    total = summed(memoryview(data))
    for bit in {0, 8 * size - 1, *(chance.randrange(8 * size) for _ in range(200))}:
        assert summed(flipped(data, bit)) != total, bit


@pytest.mark.parametrize("size", [size for size in SIZES if size > 70])
def test_two_bits_that_are_flipped_in_opposite_directions_change_the_sum(size: int) -> None:
    """Bits of one place in their words: the sum of all words is as it was."""
    chance = random.Random(size)
    words = size // 8
    for place, apart in itertools.product(range(64), (1, 2, 7, 64, 508, 510, 512, 1024, 8192)):
        if apart >= words:
            continue
        first = chance.randrange(words - apart)
        data = bytearray(chance.randbytes(size))
        low, high = 64 * first + place, 64 * (first + apart) + place
        data[low // 8] |= 1 << low % 8
        data[high // 8] &= ~(1 << high % 8)
        assert summed(flipped(data, low, high)) != summed(memoryview(data)), (place, apart)


def test_bytes_that_lie_elsewhere_change_the_sum() -> None:
    """As where a packet is lost and another repeated."""
    data = random.Random(1).randbytes(20 * ROW)
    total = summed(memoryview(data))
    assert summed(memoryview(data[8:] + data[:8])) != total
    assert summed(memoryview(data[1400:] + data[:1400])) != total
