"""Which worker trains on what: pure functions of numbers that every worker knows.

``round_robin`` deals whole batches of the seeded global order in turn, so that round r of n workers is batches
rn to rn+n-1 of it: n workers then see what one process with n times the batch would. The others own samples:
``hash`` by a hash of the sample's number (the same in every epoch and run), ``block`` by
equal contiguous ranges, ``random`` drawn anew for every epoch. Where samples have no numbers (batch samplers of
the user's own, streams) batches take their place.

What is left of an epoch may be dealt once more, to others: by another hash each time, or all that was one worker's
might be one worker's again. So are then the samples of a ``block``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Owners = NDArray[np.int64]


def owners(
    assign: str, numbers: NDArray[np.int64], total: int, workers: int, seed: int, epoch: int, deal: int = 0
) -> Owners:
    """The worker of each of ``numbers`` (int64[k], each in [0, total)); int64[k]. ``deal``: so many deals of the epoch
    were before this one."""
    if assign == "round_robin":
        return numbers % workers
    if assign == "block" and not deal:
        return numbers * workers // max(total, 1)
    salt = mix(np.uint64(0 if assign == "hash" else epoch_seed(seed, epoch)))
    if deal:
        salt = mix(salt ^ np.uint64(deal))
    mixed = mix(numbers.astype(np.uint64) ^ salt)
    return (mixed % np.uint64(workers)).astype(np.int64)


def mix(value: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): uint64 -> uint64, one to one."""
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed for the global order of an epoch, the same in every worker; below 2**63."""
    return int(mix(np.uint64(seed) ^ mix(np.uint64(epoch)))) >> 1
