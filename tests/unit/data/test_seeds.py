"""Claims about random numbers of scripts that name no generator."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from paceline.data.seeds import part_ways, seed_all, seeded


@pytest.fixture(autouse=True)
def apart() -> Iterator[None]:
    """The tests' own numbers go on behind each of these."""
    with seeded(0):
        yield


def draw() -> tuple[float, ...]:
    return torch.rand(()).item(), random.random(), float(np.random.random())


def of_rank(rank: int) -> tuple[float, ...]:
    seed_all(7)
    draw()
    part_ways(rank)
    return draw()


def test_what_is_seeded_draws_the_same() -> None:
    seed_all(2**40)
    first = draw()
    seed_all(2**40)
    assert draw() == first


def test_workers_part_ways_each_the_same_in_every_run() -> None:
    seed_all(7)
    draw()
    alone = draw()
    drawn = [of_rank(rank) for rank in range(4)]
    assert drawn[0] == alone
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [4, 4, 4]
    assert drawn == [of_rank(rank) for rank in range(4)]


def test_behind_a_seeded_stretch_the_scripts_own_numbers_go_on() -> None:
    seed_all(1)
    wanted = [draw(), draw()]
    seed_all(1)
    first = draw()
    with seeded(5):
        draw()
    assert [first, draw()] == wanted
