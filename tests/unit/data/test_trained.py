"""What is left of an epoch that was dealt to other workers: everything but what they had trained on, in order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.assign import owners
from paceline.data.trained import Trained
from paceline.protocol.deals import ALL


@given(
    st.integers(1, 60),
    st.integers(1, 5),
    st.sampled_from(["round_robin", "hash", "block", "random"]),
    st.lists(st.integers(0, 6) | st.just(ALL), min_size=4, max_size=4),
    st.integers(0, 3),
)
def test_done_and_left_are_the_whole_epoch(samples: int, size: int, assign: str, done: list[int], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(samples)
    left = Trained(2, 4, assign, seed, tuple(done)).samples_left(order, size, samples)
    gone: list[int] = []
    for worker in range(4):
        if assign == "round_robin":
            mine = [order[b * size : (b + 1) * size] for b in range(worker, -(-samples // size), 4)]
            gone += [int(number) for batch in mine[: done[worker]] for number in batch]
        else:
            held = order[owners(assign, order, samples, 4, seed, 2) == worker]
            gone += held[: done[worker] * size].tolist()
    assert sorted([*left.tolist(), *gone]) == list(range(samples))
    places = {int(number): place for place, number in enumerate(order)}
    assert [places[number] for number in left.tolist()] == sorted(places[number] for number in left.tolist())


def test_by_lease_what_came_back_is_left() -> None:
    trained = Trained(0, 2, "lease", 0, (), first=5, before=(1, 3))
    assert list(trained.batches_left("abcdefg", None)) == ["b", "d", "f", "g"]
    assert trained.samples_left(np.arange(13), 2, 13).tolist() == [2, 3, 6, 7, 10, 11, 12]


def test_batches_of_a_stream_are_counted_by_their_owner() -> None:
    trained = Trained(0, 3, "round_robin", 0, (2, 0, 1))
    assert list(trained.batches_left("abcdefgh", None)) == ["b", "e", "f", "g", "h"]
