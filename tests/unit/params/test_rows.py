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
    indices, values, *_ = rows.read(place.area, place.values, 2, 0, 9)
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
    indices, values, *_ = rows.fold(sources, shares, torch.float64)
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
    gradient = torch.sparse_coo_tensor([ids], torch.arange(3.0 * len(ids)).view(-1, 3), (8, 3), check_invariants=True)
    area, values = torch.zeros(9, dtype=torch.int64), torch.zeros(24)
    rows.write(area, values, gradient, raw=True, travels=True)
    assert int(area[0]) == count
    assert torch.equal(rows.gradient_of(rows.read(area, values, 3, 0, 8), (8, 3)).to_dense(), gradient.to_dense())
    rows.write(area, values, gradient, raw=True)
    assert int(area[0]) == -len(ids)


def bags(
    seed: int, count: int, row: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A gradient as of nn.EmbeddingBag, with its numbers and, for each, which bag it is of."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [chance.randint(1, 6) for _ in range(chance.randint(1, count))]
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[:count]
    ids = torch.randint(count, (len(which),), generator=generator)
    values = torch.randn(len(lengths), row, generator=generator, dtype=dtype)
    gradient = torch.sparse_coo_tensor(ids[None], values[which], (count, row), check_invariants=True)
    return gradient, ids, which


@settings(max_examples=100)
@given(st.integers(2, 60), st.integers(1, 18), st.integers(0, 2**30), st.integers(1, 4), st.booleans(), st.booleans())
def test_rows_of_a_bag_are_written_with_their_values_once(
    count: int, row: int, seed: int, parts: int, wide: bool, travels: bool
) -> None:
    gradient, ids, which = bags(seed, count, row, torch.float64 if wide else torch.float32)
    place, chance = Place(count, row, gradient.dtype), random.Random(seed)
    rows.write(place.area, place.values, gradient, raw=True, travels=travels)
    again = sum(a == b for a, b in pairwise(which.tolist()))
    if 8 * again < len(ids) - 1 or len(ids) < 2:
        return  # hardly any: they are written as any others
    assert int(place.area[0]) == -len(ids)
    assert rows.count_values(place.area[1 : len(ids) + 1]) == len(ids) - again
    assert (place.values[(len(ids) - again) * row :] == UNTOUCHED).all()
    ends = [0, *sorted(chance.randrange(count + 1) for _ in range(parts - 1)), count]
    for start, stop in pairwise(ends):
        read = rows.read(place.area, place.values, row, start, stop)
        mine = (ids >= start) & (ids < stop)
        assert torch.equal(read.indices, ids[mine] - start)
        assert torch.equal(read.each, gradient._values()[mine])


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 2**30))
def test_rows_that_share_values_fold_step_and_are_picked_as_any_others(workers: int, count: int, seed: int) -> None:
    sources, plain = [], []
    for own in range(workers):
        gradient, ids, _ = bags(seed + own, count, 8)
        place = Place(count, 8, torch.float32)
        rows.write(place.area, place.values, gradient, raw=True)
        sources.append(rows.read(place.area, place.values, 8, 0, count))
        plain.append(rows.Rows(ids, gradient._values(), sources[-1].unique))
    shares = [(own + 1) / workers for own in range(workers)]
    folded, expected = rows.fold(sources, shares, torch.float32), rows.fold(plain, shares, torch.float32)
    assert torch.equal(folded.indices, expected.indices)
    assert torch.equal(folded.each, expected.each)
    tables = [torch.ones(count, 8) for _ in range(2)]
    for table, some in zip(tables, (folded, expected), strict=True):
        rows.add(table, some, -0.3)
    assert torch.equal(*tables)
    again = Place(2 * len(folded.indices) * workers, 8, torch.float32)
    rows.lay(again.area, again.values, folded)
    assert torch.equal(rows.read(again.area, again.values, 8, 0, len(again.area) - 1).each, expected.each)
    picked = torch.arange(0, len(folded.indices), 3)
    some = folded.select(picked)
    assert torch.equal(some.each, expected.each[picked])
    assert some.which is None or some.which.unique().tolist() == list(range(len(some.values)))
    assert torch.equal(folded.part(slice(1, 5)).each, expected.each[1:5])


def test_values_are_shared_to_the_bit_only() -> None:
    values = torch.tensor([[0.0, 1], [-0.0, 1], [-0.0, 1], [float("nan"), 1], [float("nan"), 1], [2, 1], [2, 3]])
    place = Place(9, 2, torch.float32)
    rows.write(place.area, place.values, sparse([0, 1, 2, 3, 4, 5, 6], values, 9), raw=True)
    assert place.area[:8].tolist() == [-7, 0, 1, ~2, 3, ~4, 5, 6]


@pytest.mark.parametrize(
    ("numbers", "unique", "wrong"),
    [
        ([3, 0, 7], True, None),
        ([3, 0, 8], True, 8),
        ([3, -1, 7], True, -1),
        ([3, ~7, ~0, 7], False, None),
        ([3, ~8, 7], False, ~8),
        ([~3, 7], False, ~3),
        ([8, ~3], False, 8),
        ([], False, None),
    ],
)
def test_numbers_that_a_table_has_not_are_found(numbers: list[int], unique: bool, wrong: int | None) -> None:
    for dtype in (torch.int32, torch.int64):
        assert rows.stray(torch.tensor(numbers, dtype=dtype), 8, unique=unique) == wrong
