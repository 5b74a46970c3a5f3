"""An optimizer's state in shared memory: any process can go on with any piece of any parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.params.optimizers import StateItem
from paceline.params.state import Carve, State, StatePlan
from paceline.params.table import DTYPES, Table, tabulate
from paceline.protocol.partition import ALIGN, Piece, padded, partition


def table_of(*tensors: torch.Tensor) -> Table:
    return tabulate((f"p{number}", 0, tensor) for number, tensor in enumerate(tensors))


def like(table: Table, key: str, dtype: str = "float32") -> list[StateItem]:
    return [StateItem(param, key, "like", dtype, entry.shape) for param, entry in enumerate(table.entries)]


def cells(table: Table, key: str, kind: str = "tensor", shape: tuple[int, ...] = ()) -> list[StateItem]:
    dtype = "float32" if kind == "tensor" else "float64"
    return [StateItem(param, key, kind, dtype, shape) for param in range(len(table.entries))]


class Memory:
    """One area of state, as each process maps it."""

    def __init__(self, table: Table, items: list[StateItem], blocks: Sequence[Piece] | None = None) -> None:
        wholes = [Piece(param, 0, padded(entry.size)) for param, entry in enumerate(table.entries) if entry.size]
        self.table, self.plan = table, StatePlan(table, items, wholes if blocks is None else blocks)
        self._bytes = torch.zeros(max(self.plan.size_bytes, 1), dtype=torch.uint8)

    def view(self) -> State:
        return State(self.table, self.plan, self.carve)

    @property
    def carve(self) -> Carve:
        def cut(dtype: torch.dtype, offset: int, count: int) -> torch.Tensor:
            assert offset + count * dtype.itemsize <= self.plan.size_bytes
            return self._bytes[offset : offset + count * dtype.itemsize].view(dtype)

        return cut


def whole(table: Table, param: int) -> Piece:
    return Piece(param, 0, padded(table.entries[param].size))


def same(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_parameter_without_state_has_none() -> None:
    table = table_of(torch.zeros(3), torch.zeros(4))
    memory = Memory(table, like(table, "mean"))
    memory.view().save(whole(table, 1), {"mean": torch.ones(64)}, whole=False)
    assert memory.view().view(0) == {}
    assert memory.view().view(1) != {}


@pytest.mark.parametrize("state", [{}, {"mean": None}])
def test_a_step_that_kept_nothing_leaves_none(state: dict[str, Any]) -> None:
    """SGD without momentum keeps an empty dictionary, or None under the key."""
    table = table_of(torch.zeros(3))
    memory = Memory(table, like(table, "mean"))
    memory.view().save(whole(table, 0), state, whole=False)
    assert memory.view().view(0) == {}


def test_loaded_values_are_the_shared_ones() -> None:
    table = table_of(torch.zeros(3))
    memory = Memory(table, like(table, "mean") + cells(table, "step"))
    memory.view().save(whole(table, 0), {"mean": torch.ones(64), "step": torch.tensor(1.0)}, whole=False)
    mine = memory.view().load(whole(table, 0), whole=False)
    mine["mean"][1] = 7.0
    mine["step"] += 1
    its = memory.view().view(0)
    assert (its["mean"].tolist(), its["step"].item()) == ([1.0, 7.0, 1.0], 2.0)


def test_saved_values_become_the_shared_ones() -> None:
    """A step that makes its state anew must go on with what others see."""
    table = table_of(torch.zeros(64))
    memory = Memory(table, like(table, "mean") + cells(table, "step"))
    state = {"mean": torch.ones(64), "step": torch.tensor(1.0)}
    memory.view().save(whole(table, 0), state, whole=False)
    state["mean"].fill_(3.0)
    state["step"] += 1
    its = memory.view().view(0)
    assert (its["mean"].sum().item(), its["step"].item()) == (192.0, 2.0)


@pytest.mark.parametrize(
    ("kind", "value"), [("int", 0), ("int", 2**53), ("int", -3), ("float", 0.1), ("float", -1e300)]
)
def test_numbers_keep_value_and_kind(kind: str, value: float) -> None:
    table = table_of(torch.zeros(3))
    memory = Memory(table, cells(table, "count", kind))
    memory.view().save(whole(table, 0), {"count": value}, whole=True)
    loaded = memory.view().view(0)["count"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_a_truth_value_comes_back_as_a_number() -> None:
    table = table_of(torch.zeros(3))
    memory = Memory(table, cells(table, "done", "int"))
    memory.view().save(whole(table, 0), {"done": True}, whole=True)
    assert memory.view().view(0)["done"] == 1


@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,)])
def test_tensors_of_other_shapes_are_kept(shape: tuple[int, ...]) -> None:
    table = table_of(torch.zeros(5), torch.zeros(5))
    memory = Memory(table, cells(table, "rows", shape=shape) + like(table, "mean"))
    for param in (0, 1):
        state = {"rows": torch.full(shape, param + 1.5), "mean": torch.full((5,), param + 7.0)}
        memory.view().save(whole(table, param), state, whole=True)
    for param in (0, 1):
        state = memory.view().view(param)
        assert torch.equal(state["rows"], torch.full(shape, param + 1.5))
        assert torch.equal(state["mean"], torch.full((5,), param + 7.0))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_state_of_a_table_is_loaded_in_whole_rows(parts: int) -> None:
    dense, weight = torch.zeros(50), torch.randn(101, 5)
    table = tabulate([("dense", 0, dense), ("table", 0, weight)], {id(weight)})
    blocks = [piece for share in cut_of(table, parts) for piece in share]
    memory = Memory(table, like(table, "mean"), blocks)
    memory.view().fill(1, {"mean": weight.clone()})
    pieces = [piece for piece in blocks if piece.param == 1]
    loaded = [memory.view().load(piece, whole=False)["mean"] for piece in pieces]
    assert torch.equal(torch.cat(loaded), weight)
    loaded[-1].fill_(3.0)
    assert torch.equal(memory.view().view(1)["mean"][-len(loaded[-1]) :], loaded[-1])
    assert not memory.view().view(0)


def cut_of(table: Table, parts: int) -> tuple[tuple[Piece, ...], ...]:
    entries = table.entries
    return partition([entry.size for entry in entries], parts, grains=[entry.grain for entry in entries])


LAYOUTS = {
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "channels_last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(4.0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_shown_in_the_parameters_own_shape_and_order(layout: str) -> None:
    """A piece lies as its range of the parameter does, so that one value's state is beside the value."""
    tensor = LAYOUTS[layout]
    table = table_of(torch.zeros(7), tensor)
    memory = Memory(table, like(table, "mean"))
    memory.view().save(whole(table, 1), {"mean": tensor.clone()}, whole=True)
    shown = memory.view().view(1)["mean"]
    assert shown.shape == tensor.shape
    assert torch.equal(shown, tensor)
    flat = torch.zeros(padded(tensor.numel()))
    table.view(table.entries[1], torch.cat([torch.zeros(ALIGN), flat]))[...] = 0  # the same layout as the vector's
    vector = torch.zeros(table.sizes["float32"])
    table.view(table.entries[1], vector).copy_(tensor)
    piece = memory.view().load(whole(table, 1), whole=False)["mean"]
    assert torch.equal(piece, vector[ALIGN:])


def test_keys_dtypes_and_parameters_do_not_share_memory() -> None:
    table = table_of(torch.zeros(70), torch.zeros(3, dtype=torch.bfloat16), torch.zeros(5), torch.zeros(0))
    items = like(table, "mean") + like(table, "wide", "float64") + cells(table, "step") + cells(table, "count", "int")
    memory = Memory(table, items)
    for param, entry in enumerate(table.entries[:3]):
        state = {
            "mean": torch.full(entry.shape, param + 0.25),
            "wide": torch.full(entry.shape, param + 0.5, dtype=torch.float64),
            "step": torch.tensor(param + 1.0),
            "count": param + 10,
        }
        memory.view().save(whole(table, param), state, whole=True)
    assert memory.view().view(3) == {}
    for param, entry in enumerate(table.entries[:3]):
        state = memory.view().view(param)
        assert torch.equal(state["mean"], torch.full(entry.shape, param + 0.25))
        assert torch.equal(state["wide"], torch.full(entry.shape, param + 0.5, dtype=torch.float64))
        assert (state["step"].item(), state["count"]) == (param + 1.0, param + 10)


@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from(["float32", "bfloat16", "complex128"])), min_size=1, max_size=6
    )
)
def test_a_plan_is_the_same_wherever_it_is_made(of: list[tuple[int, str]]) -> None:
    table = table_of(*(torch.zeros(size, dtype=DTYPES[dtype]) for size, dtype in of))
    items = like(table, "mean") + cells(table, "step")
    blocks = pieces_of([entry.size for entry in table.entries], 3)
    one, other = StatePlan(table, items, blocks), StatePlan(table, tuple(items), tuple(blocks))
    assert (one.vectors, one.cells, one.size_bytes) == (other.vectors, other.cells, other.size_bytes)


def pieces_of(sizes: list[int], parts: int) -> list[Piece]:
    return [piece for part in partition(sizes, parts) for piece in part]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(1, 6))
def test_every_block_has_cells_of_its_own(sizes: list[int], parts: int) -> None:
    """Pieces of one parameter are stepped at different times: each counts its own steps, in memory that all see."""
    table, pieces = table_of(*(torch.zeros(size) for size in sizes)), pieces_of(sizes, parts)
    memory = Memory(table, like(table, "mean") + cells(table, "step") + cells(table, "count", "int"), pieces)
    mine, its = memory.view(), memory.view()
    for number, piece in enumerate(pieces):
        assert its.load(piece, whole=False) == {}
        values = torch.full((piece.stop - piece.start,), number + 0.5)
        mine.save(piece, {"mean": values, "step": torch.tensor(number + 1.0), "count": number}, whole=False)
    for number, piece in enumerate(pieces):
        state = its.load(piece, whole=False)
        assert state["mean"].tolist() == [number + 0.5] * (piece.stop - piece.start)
        assert (state["step"].item(), state["count"]) == (number + 1.0, number)
        state["step"] += 100  # an alias: what one process counts the other reads
        assert mine.load(piece, whole=False)["step"].item() == number + 101.0
    for param, size in enumerate(sizes):
        shown = mine.view(param)
        first = next((n for n, piece in enumerate(pieces) if piece.param == param), None)
        assert (first is None) == (shown == {}) == (size == 0)
        if first is not None:
            assert (shown["step"].item(), shown["count"]) == (first + 101.0, first)
            assert shown["mean"].shape == (size,)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=4), st.integers(1, 6))
def test_a_loaded_state_of_a_whole_parameter_is_in_all_its_blocks(sizes: list[int], parts: int) -> None:
    table, pieces = table_of(*(torch.zeros(size) for size in sizes)), pieces_of(sizes, parts)
    memory = Memory(table, like(table, "mean") + cells(table, "step") + cells(table, "count", "float"), pieces)
    for param, size in enumerate(sizes):
        if size:
            state = {"mean": torch.arange(size) + 1000.0 * param, "step": torch.tensor(7.0), "count": param + 0.5}
            memory.view().fill(param, state)
    for piece in pieces:
        state = memory.view().load(piece, whole=False)
        real = max(0, min(piece.stop, sizes[piece.param]) - piece.start)
        assert torch.equal(state["mean"][:real], torch.arange(piece.start, piece.start + real) + 1000.0 * piece.param)
        assert (state["step"].item(), state["count"]) == (7.0, piece.param + 0.5)


def test_a_piece_that_was_stepped_first_does_not_make_the_others_have_state() -> None:
    table = table_of(torch.zeros(128))
    memory = Memory(table, like(table, "mean") + cells(table, "step"), pieces_of([128], 2))
    memory.view().save(Piece(0, 64, 128), {"mean": torch.ones(64), "step": torch.tensor(1.0)}, whole=False)
    assert memory.view().load(Piece(0, 0, 64), whole=False) == {}
    assert memory.view().load(Piece(0, 64, 128), whole=False)["step"].item() == 1.0


@pytest.mark.parametrize("parts", [1, 3])
def test_cleared_state_is_none_in_any_view(parts: int) -> None:
    table = table_of(torch.zeros(200), torch.zeros(70))
    memory = Memory(table, like(table, "mean") + cells(table, "step"), pieces_of([200, 70], parts))
    for param, size in enumerate((200, 70)):
        memory.view().fill(param, {"mean": torch.ones(size), "step": torch.tensor(2.0)})
    its = memory.view()
    assert its.view(1)["step"].item() == 2.0
    memory.view().clear()
    assert its.view(0) == its.view(1) == {}


@pytest.mark.parametrize(("kind", "numbers"), [("int", True), ("float", True), ("tensor", False)])
def test_only_numbers_must_be_looked_at_again(kind: str, numbers: bool) -> None:
    table = table_of(torch.zeros(3))
    assert Memory(table, cells(table, "step", kind)).view().has_numbers is numbers
