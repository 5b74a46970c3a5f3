"""A process is killed in the midst of a step: whoever goes on comes to what it would have left, to the last bit."""

from __future__ import annotations

import pytest
import torch

from paceline.params.undo import HEADER_WORDS, Undo, area_bytes
from tests.unit.params.test_shard import (
    OPTIMIZERS,
    Given,
    Job,
    all_state,
    assert_same_bits,
    assert_same_state,
    start,
    vectors_of,
)


class Killed(Exception):
    pass


class Dying(Undo):
    """An undo area whose process dies at its n-th word of progress: before it is stored, or right after."""

    def __init__(self, words: memoryview, area: torch.Tensor, left: int) -> None:
        super().__init__(words, area)
        self._left = left

    def advance(self, progress: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed
        super().advance(progress)
        self._left -= 1
        if self._left == 0:
            raise Killed


def area_of(size: int) -> tuple[memoryview, torch.Tensor]:
    return memoryview(bytearray(8 * HEADER_WORDS)).cast("Q"), torch.zeros(size, dtype=torch.uint8)


@pytest.mark.sampled
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whoever_goes_on_leaves_the_same_bits(name: str, before: int) -> None:
    """Died at each word of its first or third step, once or twice over; the oracle was never interrupted."""
    gradients = [start(name, seed=step + 1) for step in range(4)]

    def play(deaths: list[int]) -> tuple[Job, int]:
        job = Job(OPTIMIZERS[name], start(name), cut_into=2, chunk_bytes=2500)
        area = area_of(area_bytes(job.table, job.state.plan, job.chunk_bytes))
        died = 0
        for step, gradient in enumerate(gradients):
            given = [Given(vectors_of(job.table, gradient)), Given(vectors_of(job.table, gradients[0]))]
            for left in deaths if step == before else []:
                (shard,) = job.shards(1)
                shard.fold(given, [1.0, 3.0])
                try:
                    shard.step(None, None, undo=Dying(*area, left), number=step + 1)
                except Killed:
                    died += 1
            (shard,) = job.shards(1)
            shard.fold(given, [1.0, 3.0])
            shard.step(None, None, undo=Undo(*area), number=step + 1)
        return job, died

    expected, _ = play([])
    moment, chunks = 1, 0
    while True:
        job, died = play([moment, 3])
        assert_same_bits(job.values(), expected.values())
        assert_same_state(all_state(job), all_state(expected))
        if not died:
            break
        chunks, moment = moment // 4 + 1, moment + 1
    assert chunks > 1


def test_the_header_tells_how_far_a_step_has_come() -> None:
    undo = Undo(*area_of(0))
    assert undo.begin(7) == 0
    undo.advance(5)
    assert undo.begin(7) == 5
    assert undo.begin(8) == 0
