"""Who trains on what: every number has one owner, whoever computes it and whenever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import ASSIGNMENTS
from paceline.data.assign import epoch_seed, mix, owners

WORKERS = st.integers(1, 256)
SEEDS = st.integers(0, 2**63 - 1)
EPOCHS = st.integers(0, 10**6)


@given(st.sampled_from(ASSIGNMENTS), st.integers(0, 400), WORKERS, SEEDS, EPOCHS)
def test_every_number_has_one_owner_among_the_workers(
    assign: str, total: int, workers: int, seed: int, epoch: int
) -> None:
    found = owners(assign, np.arange(total), total, workers, seed, epoch)
    assert found.shape == (total,)
    assert found.dtype == np.int64
    assert ((found >= 0) & (found < workers)).all()


@given(st.sampled_from(ASSIGNMENTS), st.integers(1, 10**12), WORKERS, SEEDS, EPOCHS, st.data())
def test_an_owner_does_not_depend_on_what_else_is_asked(
    assign: str, total: int, workers: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    numbers = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20)))
    together = owners(assign, numbers, total, workers, seed, epoch)
    alone = [owners(assign, np.array([number]), total, workers, seed, epoch)[0] for number in numbers]
    assert together.tolist() == alone


def test_round_robin_deals_in_turn() -> None:
    assert owners("round_robin", np.arange(7), 7, 3, 0, 0).tolist() == [0, 1, 2, 0, 1, 2, 0]


@given(st.integers(1, 500), st.integers(1, 40))
def test_blocks_are_contiguous_and_equal_but_for_one(total: int, workers: int) -> None:
    found = owners("block", np.arange(total), total, workers, 0, 0)
    assert (np.diff(found) >= 0).all()
    held = np.bincount(found, minlength=workers)
    assert held.max() - held.min() <= 1


@given(SEEDS, SEEDS, EPOCHS, EPOCHS)
def test_a_hash_keeps_its_owner_over_epochs_and_runs(seed: int, other: int, epoch: int, later: int) -> None:
    numbers = np.arange(50)
    assert (owners("hash", numbers, 50, 7, seed, epoch) == owners("hash", numbers, 50, 7, other, later)).all()


def test_the_hash_is_the_same_in_every_release() -> None:
    """Holders of data are told once which samples are theirs."""
    assert owners("hash", np.arange(16), 16, 5, 0, 0).tolist() == HASHED


HASHED = [0, 0, 2, 4, 1, 4, 0, 4, 3, 2, 0, 4, 2, 1, 3, 0]


@pytest.mark.parametrize("assign", ["hash", "random"])
@pytest.mark.parametrize("workers", [2, 3, 16])
def test_hashed_and_drawn_shares_are_nearly_even(assign: str, workers: int) -> None:
    total = 40_000
    held = np.bincount(owners(assign, np.arange(total), total, workers, 3, 4), minlength=workers)
    even = total / workers
    assert (abs(held - even) < 6 * np.sqrt(even)).all()


def test_random_owners_are_drawn_anew_for_every_epoch_and_seed() -> None:
    numbers = np.arange(1000)
    draws = [owners("random", numbers, 1000, 4, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for place, one in enumerate(draws):
        for other in draws[place + 1 :]:
            assert 0.15 < (one == other).mean() < 0.35  # a quarter, by chance


@given(st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=50))
def test_mixing_is_one_to_one(values: list[int]) -> None:
    mixed = mix(np.array(values, dtype=np.uint64))
    assert len(set(mixed.tolist())) == len(values)


def test_mixing_is_splitmix64() -> None:
    """The first outputs of the published generator with seed 1234567."""
    state, found = 1234567, []
    for _ in range(5):
        found.append(int(mix(np.uint64(state))))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(SEEDS, EPOCHS)
def test_epoch_seeds_are_small_enough_for_torch_and_numpy(seed: int, epoch: int) -> None:
    assert 0 <= epoch_seed(seed, epoch) < 2**63
    assert epoch_seed(seed, epoch) == epoch_seed(seed, epoch)


def test_epoch_seeds_differ() -> None:
    found = {epoch_seed(seed, epoch) for seed in range(50) for epoch in range(50)}
    assert len(found) == 2500
