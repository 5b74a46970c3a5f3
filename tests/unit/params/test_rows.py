"""Rows of gradients in a slot against the dense gradient that they stand for."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paceline.params import rows

UNTOUCHED = -7


class Place:
    """A slot's areas for a table of so many rows, filled with what must not be read."""

    def __init__(self, count: int, row: int, dtype: torch.dtype = torch.float64) -> None:
        self.area = torch.full((count + 1,), UNTOUCHED)
        self.values = torch.full((count * row,), float(UNTOUCHED), dtype=dtype)


def sparse(indices: list[int], values: torch.Tensor, count: int) -> torch.Tensor:
    """An embedding's gradient: rows in the order of the batch, with repeats."""
    place = torch.tensor([indices], dtype=torch.int64)
    return torch.sparse_coo_tensor(place, values, (count, values.shape[1]), check_invariants=True)


@settings(max_examples=100)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(0, 60), st.integers(0, 2**30), st.integers(1, 4), st.booleans()
)
def test_what_is_written_is_read_in_any_ranges_with_repeats_summed(
    count: int, row: int, looked_up: int, seed: int, parts: int, raw: bool
) -> None:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    gradient = sparse(
        [chance.randrange(count) for _ in range(looked_up)],
        torch.randn(looked_up, row, generator=generator, dtype=torch.float64),
        count,
    )
    place = Place(count, row)
    rows.write(place.area, place.values, gradient, raw=raw)
    ends = [0, *sorted(chance.randrange(count + 1) for _ in range(parts - 1)), count]
    read = []
    for start, stop in pairwise(ends):
        part = rows.read(place.area, place.values, row, start, stop)
        assert part.unique or (raw and looked_up <= count)
        if part.unique:
            assert torch.equal(part.indices, part.indices.unique())
        read.append(rows.gradient_of(part, (stop - start, row)).to_dense())
    torch.testing.assert_close(torch.cat(read), gradient.to_dense(), rtol=1e-13, atol=1e-13)


def test_only_what_the_rows_need_is_touched() -> None:
    place = Place(1000, 2)
    rows.write(place.area, place.values, sparse([900, 3, 900], torch.ones(3, 2, dtype=torch.float64), 1000))
    assert place.area[:3].tolist() == [2, 3, 900]
    assert place.values[:4].tolist() == [1, 1, 2, 2]
    assert (place.area[3:] == UNTOUCHED).all()
    assert (place.values[4:] == UNTOUCHED).all()
    rows.write(place.area, place.values, None)
    assert place.area[:3].tolist() == [0, 3, 900]
    assert [len(part) for part in rows.read(place.area, place.values, 2, 0, 1000)[:2]] == [0, 0]


def test_of_a_dense_gradient_the_rows_that_are_not_zero_are_written() -> None:
    gradient = torch.zeros(6, 3, dtype=torch.float64)
    gradient[1, 2], gradient[4, 0] = 5.0, float("nan")
    for given_ in (gradient, gradient.to_sparse()):
        place = Place(6, 3)
        rows.write(place.area, place.values, given_)
        assert place.area[:3].tolist() == [2, 1, 4]
        assert place.values[:3].tolist() == [0, 0, 5]


def test_every_row_may_be_there() -> None:
    place, gradient = Place(5, 2), torch.ones(5, 2, dtype=torch.float64)
    rows.write(place.area, place.values, gradient)
    assert place.area.tolist() == [5, 0, 1, 2, 3, 4]
    assert place.values.tolist() == [1.0] * 10


def test_one_workers_rows_are_not_copied() -> None:
    place = Place(9, 2)
    rows.write(place.area, place.values, sparse([4, 6], torch.ones(2, 2, dtype=torch.float64), 9))
    indices, values, _ = rows.read(place.area, place.values, 2, 0, 9)
    gradient = rows.gradient_of(rows.Rows(indices, values), (9, 2))
    assert gradient.is_coalesced()
    assert gradient.values().data_ptr() == place.values.data_ptr()
    assert gradient.indices().data_ptr() == place.area[1:].data_ptr()


@settings(max_examples=100)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**30))
def test_a_fold_is_the_weighted_sum_row_by_row(workers: int, count: int, seed: int) -> None:
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dense = torch.randn(workers, count, 3, generator=generator, dtype=torch.float64)
    sources = []
    for own in dense:
        there = sorted(chance.sample(range(count), chance.randint(0, count)))
        own[[row for row in range(count) if row not in there]] = 0
        sources.append(rows.Rows(torch.tensor(there, dtype=torch.int64), own[there]))
    shares = [chance.random() for _ in range(workers)]
    indices, values, _ = rows.fold(sources, shares, torch.float64)
    expected = torch.zeros(count, 3, dtype=torch.float64)
    for own, share in zip(dense, shares, strict=True):  # in their order: no bit depends on who else has a row
        expected.add_(own * share)
    assert torch.equal(rows.gradient_of(rows.Rows(indices, values), (count, 3)).to_dense(), expected)
    assert sorted({int(i) for source in sources for i in source.indices}) == indices.tolist()


def test_sums_of_16_bit_rows_run_in_32_bits() -> None:
    small = 2.0**-8
    own = [torch.full((1, 1), value, dtype=torch.bfloat16) for value in (1.0, small, small)]
    sources = [rows.Rows(torch.zeros(1, dtype=torch.int64), values) for values in own]
    assert own[0].add(own[1]).add(own[2]).item() == 1.0
    assert rows.fold(sources, [1.0, 1.0, 1.0], torch.float32)[1].item() == 1 + 2 * small


def test_tables_are_the_weights_of_sparse_embeddings_wherever_they_are_in_a_model() -> None:
    inner = nn.ModuleList([nn.Embedding(4, 2, sparse=True), nn.Embedding(4, 2)])
    model = nn.Sequential(nn.Linear(2, 2), inner, nn.EmbeddingBag(3, 2, sparse=True), nn.Embedding(0, 2, sparse=True))
    other = nn.Embedding(4, 2, sparse=True)
    other.weight = nn.Parameter(torch.zeros(2, 4).t())
    found = rows.parameters_with_rows([model, other])
    assert found == {id(inner[0].weight), id(model[2].weight)}
    assert rows.parameters_with_rows([]) == set()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_parameter_in_two_modules_is_a_table_if_one_of_them_is_sparse(kind: type) -> None:
    one, two = kind(4, 2, sparse=True), nn.Linear(2, 4)
    two.weight = one.weight
    assert rows.parameters_with_rows([nn.ModuleList([two, one])]) == {id(one.weight)}


@pytest.mark.parametrize(("ids", "count"), [([1, 5, 1, 1], -2), ([1, 5, 2], -3)], ids=["often", "seldom"])
def test_raw_rows_that_come_often_are_summed_before_they_travel(ids: list[int], count: int) -> None:
    gradient = torch.sparse_coo_tensor([ids], torch.ones(len(ids), 3), (8, 3))
    area, values = torch.zeros(9, dtype=torch.int64), torch.zeros(24)
    rows.write(area, values, gradient, raw=True, travels=True)
    assert int(area[0]) == count
    assert torch.equal(rows.gradient_of(rows.read(area, values, 3, 0, 8), (8, 3)).to_dense(), gradient.to_dense())
    rows.write(area, values, gradient, raw=True)
    assert int(area[0]) == -len(ids)
