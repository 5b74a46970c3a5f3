"""The random numbers that a script draws without naming a generator: torch's, numpy's and Python's own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """A script that seeds nothing draws the same on every worker from here on."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def part_ways(rank: int) -> None:
    """From here on workers draw different numbers, each the same in every run; worker 0 what it would have drawn."""
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)
        random.seed(random.getrandbits(63) + rank)
        np.random.seed((np.random.randint(2**31) + rank) % 2**32)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In here numbers are those of this seed; the script's own go on behind it where they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
