"""The table of parameters: where each lies, in its own layout; what cannot be shared is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paceline.errors import ConfigError
from paceline.params.table import DTYPES, Table, differences, dtype_name, tabulate, vector_dtype
from paceline.protocol.partition import ALIGN, padded


def table_of(*tensors: torch.Tensor) -> Table:
    return tabulate((f"p{number}", 0, tensor) for number, tensor in enumerate(tensors))


def refused(*tensors: torch.Tensor) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        table_of(*tensors)
    return caught.value


SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(sorted(DTYPES))), max_size=8))
def test_parameters_lie_one_after_the_other_each_at_an_aligned_place(of: list[tuple[tuple[int, ...], str]]) -> None:
    table = table_of(*(torch.zeros(shape, dtype=DTYPES[dtype]) for shape, dtype in of))
    ends: dict[str, int] = {}
    for number, (entry, (shape, dtype)) in enumerate(zip(table.entries, of, strict=True)):
        assert (entry.name, entry.shape, entry.dtype) == (f"p{number}", shape, dtype)
        assert entry.size == torch.Size(shape).numel()
        assert entry.offset == ends.get(dtype, 0)
        assert entry.offset % ALIGN == 0
        ends[dtype] = entry.offset + padded(entry.size)
    assert table.sizes == ends
    assert table.values == sum(torch.Size(shape).numel() for shape, _ in of)


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(sorted(DTYPES))), max_size=8))
def test_vectors_laid_one_after_the_other_do_not_overlap(of: list[tuple[int, str]]) -> None:
    table = table_of(*(torch.zeros(size, dtype=DTYPES[dtype]) for size, dtype in of))
    offsets = table.offsets_bytes()
    place = 0
    for dtype, size in table.sizes.items():
        assert offsets[dtype] >= place
        assert offsets[dtype] % 64 == 0
        place = offsets[dtype] + size * DTYPES[dtype].itemsize
    assert offsets[""] >= place


LAYOUTS: dict[str, torch.Tensor] = {
    "contiguous": torch.arange(24.0).view(2, 3, 4),
    "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "permuted": torch.arange(24.0).view(2, 3, 4).permute(1, 2, 0),
    "channels_last of one channel": torch.arange(40.0).view(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "one row transposed": torch.arange(4.0).view(1, 4).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_layout_is_kept(layout: str) -> None:
    """channels_last convolutions are faster, and an optimizer must step gradient and parameter in one order."""
    tensor = LAYOUTS[layout]
    table = table_of(torch.zeros(5), tensor)
    vector = torch.zeros(table.sizes["float32"])
    view = table.view(table.entries[1], vector)
    assert view.shape == tensor.shape
    # the stride of a dimension of one says nothing about memory
    long = [number for number, length in enumerate(tensor.shape) if length > 1]
    assert [view.stride(number) for number in long] == [tensor.stride(number) for number in long]
    view.copy_(tensor)
    assert torch.equal(view, tensor)
    # its values are exactly the parameter's range of the vector, each once
    assert sorted(vector[64 : 64 + tensor.numel()].tolist()) == sorted(tensor.flatten().tolist())


GAPPED: dict[str, torch.Tensor] = {
    "expanded": torch.arange(3.0).view(3, 1).expand(3, 4),
    "every other": torch.arange(24.0).view(4, 6)[:, ::2],
    "a column": torch.arange(24.0).view(4, 6)[:, 0],
    "a block": torch.arange(24.0).view(4, 6)[1:3, 2:5],
}


@pytest.mark.parametrize("layout", GAPPED)
def test_a_layout_with_gaps_or_repeats_becomes_contiguous(layout: str) -> None:
    tensor = GAPPED[layout]
    table = table_of(tensor)
    view = table.view(table.entries[0], torch.zeros(table.sizes["float32"]))
    assert view.is_contiguous()
    view.copy_(tensor)
    assert torch.equal(view, tensor)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1)])
def test_scalars_and_empty_parameters_have_a_place(shape: tuple[int, ...]) -> None:
    table = table_of(torch.zeros(2), torch.zeros(shape), torch.ones(3))
    vector = torch.zeros(table.sizes["float32"])
    view = table.view(table.entries[1], vector)
    view.fill_(5.0)
    assert view.shape == shape
    assert vector.sum().item() == 5.0 * torch.Size(shape).numel()


def test_a_view_is_an_alias_also_within_a_longer_memory() -> None:
    table = table_of(torch.zeros(2), torch.zeros(3, 2))
    memory = torch.zeros(1000)
    view = table.view(table.entries[1], memory[128 : 128 + table.sizes["float32"]])
    view[2, 1] = 7.0
    assert memory[128 + 64 + 5].item() == 7.0


def test_parameters_with_rows_lie_in_vectors_of_their_own() -> None:
    """So that what copies all dense parameters leaves the tables alone."""
    dense, tables = torch.zeros(70), [torch.zeros(10, 3), torch.zeros(9, 8), torch.zeros(4, 5, dtype=torch.float64)]
    every = [tables[0], dense, tables[1], tables[2]]
    table = tabulate(((f"p{i}", 0, t) for i, t in enumerate(every)), {id(t) for t in tables})
    assert [(entry.vector, entry.offset) for entry in table.entries] == [
        ("float32 rows", 0),
        ("float32", 0),
        ("float32 rows", 64),
        ("float64 rows", 0),
    ]
    assert [(entry.row, entry.rows, entry.grain) for entry in table.entries] == [
        (3, 10, 192),
        (0, 0, 64),
        (8, 9, 64),
        (5, 4, 320),
    ]
    assert table.sizes == {"float32 rows": 192, "float32": 128, "float64 rows": 64}
    assert table.dense_sizes == {"float32": 128}
    assert [vector_dtype(vector) for vector in table.sizes] == [torch.float32, torch.float32, torch.float64]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=Table) == table


def test_a_table_that_is_sparse_on_one_worker_only_is_a_difference_that_is_told() -> None:
    weight = torch.zeros(4, 2)
    mine, other = tabulate([("w", 0, weight)], {id(weight)}), tabulate([("w", 0, weight)])
    assert "w [4, 2] float32 rows in group 0 on worker 1, w [4, 2] float32 in" in differences(
        mine, other, "worker 1", "worker 0"
    )


def test_groups_are_kept() -> None:
    table = tabulate([("a", 0, torch.zeros(1)), ("b", 2, torch.zeros(1))])
    assert [entry.group for entry in table.entries] == [0, 2]


def test_a_table_is_plain_data() -> None:
    table = table_of(torch.zeros(3, 2), torch.zeros((), dtype=torch.bfloat16), LAYOUTS["channels_last"])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=Table) == table


# --- what is refused ---


def test_two_objects_over_one_memory_are_refused_by_name() -> None:
    weight = torch.zeros(6)
    error = refused(torch.zeros(3), nn.Parameter(weight), nn.Parameter(weight))
    assert error.what == "parameters p1 and p2 are two objects over one memory"
    assert "b.weight = a.weight" in error.fix


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(slice(0, 4), slice(2, 6), id="they overlap"),
        pytest.param(slice(0, 6), slice(3, 6), id="one is a part of the other"),
    ],
)
def test_parameters_that_share_some_memory_are_refused(first: slice, second: slice) -> None:
    """Each would get a range of its own, and what was one weight would be trained as two."""
    weight = torch.zeros(6)
    assert "p0 and p1" in refused(nn.Parameter(weight[first]), nn.Parameter(weight[second])).what


def test_parameters_side_by_side_in_one_memory_are_fine() -> None:
    weight = torch.arange(6.0)
    assert len(table_of(nn.Parameter(weight[:3]), nn.Parameter(weight[3:])).entries) == 2


def test_many_empty_parameters_are_not_taken_for_one() -> None:
    assert len(table_of(torch.zeros(0), torch.zeros(0), torch.zeros(2, 0)).entries) == 3


def test_lazy_parameters_are_refused_by_name() -> None:
    error = refused(torch.zeros(3), nn.LazyLinear(4).weight)
    assert error.what == "parameter p1 is lazy and has no shape yet"
    assert "forward pass" in error.fix


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_parameters_are_refused(sparse: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert "it must be dense" in refused(sparse(torch.eye(3))).what


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex32])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_other_dtypes_are_refused_with_those_there_are(dtype: torch.dtype) -> None:
    error = refused(torch.empty(2, dtype=dtype))
    assert error.what.startswith(f"parameter p0 has dtype {dtype}; it must be one of: float32, float64, bfloat16")


@pytest.mark.parametrize("name", DTYPES)
def test_names_of_dtypes_are_torchs_own(name: str) -> None:
    assert getattr(torch, name) is DTYPES[name]
    assert dtype_name(DTYPES[name], "it") == name


# --- differences ---


def named(*entries: tuple[str, int, torch.Tensor]) -> Table:
    return tabulate(entries)


@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        ([("a", 0, (2,))], [("a", 0, (2,))], ""),
        (
            [("a", 0, (2,)), ("b", 0, (3, 2))],
            [("a", 0, (2,)), ("b", 0, (2, 3))],
            "b [3, 2] float32 in group 0 on worker 1, b [2, 3] float32 in group 0 on worker 0",
        ),
        (
            [("a", 0, (2,))],
            [("b", 0, (2,))],
            "a [2] float32 in group 0 on worker 1, b [2] float32 in group 0 on worker 0",
        ),
        (
            [("a", 0, (2,))],
            [("a", 1, (2,))],
            "a [2] float32 in group 0 on worker 1, a [2] float32 in group 1 on worker 0",
        ),
        ([("a", 0, (2,))], [("a", 0, (2,)), ("b", 0, (2,))], "1 parameters on worker 1, 2 on worker 0"),
    ],
)
def test_the_first_difference_is_told_in_words(mine: Any, other: Any, told: str) -> None:
    tables = [
        named(*((name, group, torch.zeros(shape)) for name, group, shape in entries)) for entries in (mine, other)
    ]
    assert differences(*tables, "worker 1", "worker 0") == told
