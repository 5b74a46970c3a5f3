"""The memory of an exchange: regions apart from each other for any model, and slots that give back what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.params.optimizers import StateItem
from paceline.params.table import DTYPES, Entry, Table
from paceline.protocol.log import STEP
from paceline.protocol.partition import Piece, padded
from paceline.transport import segment
from paceline.transport.slots import ExchangeMemory, Slot, Spec, size_bytes

FLOATS = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128")


def make_table(parameters: list[tuple[tuple[int, ...], str]], *, with_rows: bool = False) -> Table:
    """``with_rows``: gradients of all that is two-dimensional come as sparse rows."""
    entries: list[Entry] = []
    sizes: dict[str, int] = {}
    for number, (shape, dtype) in enumerate(parameters):
        size = torch.Size(shape).numel()
        stride = tuple(torch.empty(shape, device="meta").stride())
        entry = Entry(
            f"p{number}", shape, stride, dtype, 0, 0, size, shape[1] if with_rows and size and len(shape) == 2 else 0
        )
        entries.append(msgspec.structs.replace(entry, offset=sizes.get(entry.vector, 0)))
        sizes[entry.vector] = entries[-1].offset + padded(size)
    return Table(tuple(entries), sizes)


def make_spec(
    table: Table,
    items: list[StateItem],
    workers: int,
    servers: int,
    settings_bytes: int,
    parts: int = 0,
    *,
    whole: bool = False,
) -> Spec:
    return Spec(table, "torch.optim.sgd:SGD", whole, b"", settings_bytes, tuple(items), workers, servers, parts)


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    parameters = draw(st.lists(st.tuples(shapes, st.sampled_from(FLOATS)), min_size=1, max_size=6))
    table = make_table(parameters, with_rows=draw(st.booleans()))
    items = []
    for number, entry in enumerate(table.entries):
        keys = draw(st.lists(st.sampled_from(["step", "mean", "square", "row", "count"]), unique=True, max_size=4))
        for key in keys:
            kind = draw(st.sampled_from(["like", "tensor", "int", "float"]))
            dtype = "float64" if kind in ("int", "float") else draw(st.sampled_from(["float32", entry.dtype, "int64"]))
            shape = {"like": entry.shape, "tensor": draw(shapes)}.get(kind, ())
            items.append(StateItem(number, key, kind, dtype, shape))
    return make_spec(
        table,
        items,
        draw(st.integers(1, 5)),
        draw(st.integers(0, 3)),
        draw(st.integers(0, 300)),
        draw(st.integers(0, 7)),
        whole=draw(st.booleans()),
    )


class Mapped:
    """An exchange's memory, mapped ``views`` times."""

    def __init__(self, spec: Spec, views: int = 1) -> None:
        fd = segment.create("test", size_bytes(spec))
        self.views = [ExchangeMemory(segment.attach(fd), spec) for _ in range(views)]
        os.close(fd)


def regions(memory: ExchangeMemory, spec: Spec) -> Iterator[tuple[str, torch.Tensor]]:
    """Every range of bytes that has a meaning of its own, as uint8 over the shared memory."""
    for name in ("pushed", "stepped", "asked", "answered"):
        yield name, torch.frombuffer(getattr(memory, name), dtype=torch.uint8)
    yield "clocks", torch.frombuffer(memory.clocks, dtype=torch.uint8)
    if spec.parts:
        yield "log", torch.frombuffer(memory.log.words, dtype=torch.uint8)
        yield "applied", torch.frombuffer(memory.applied, dtype=torch.uint8)
    for dtype, vector in memory.params.items():
        yield f"params {dtype}", as_bytes(vector)
    for seat, undo in enumerate(memory.undo):
        yield f"undo header {seat}", torch.frombuffer(undo._words, dtype=torch.uint8)
        yield f"undo {seat}", undo.area
    yield "present", memory.state.present
    for param, items in memory.state._items.items():
        for item, tensors in items:
            for start, tensor in tensors.items():
                yield f"state {param} {start} {item.key}", as_bytes(tensor)
    for worker, slot in enumerate(memory.slots):
        yield f"header {worker}", torch.frombuffer(slot._words, dtype=torch.uint8)
        for name in ("mask", "chosen"):
            yield f"{name} {worker}", torch.frombuffer(getattr(slot, name), dtype=torch.uint8)
        if spec.settings_bytes:
            yield f"settings {worker}", torch.frombuffer(slot._settings, dtype=torch.uint8, count=spec.settings_bytes)
        for dtype, vector in slot.gradient.items():
            yield f"gradient {worker} {dtype}", as_bytes(vector)
        for param, rows in slot.rows.items():
            yield f"rows {worker} {param}", as_bytes(rows)
        for dtype, vector in slot.copy.items():
            yield f"copy {worker} {dtype}", as_bytes(vector)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return flat.reshape(-1).view(torch.uint8)


@settings(max_examples=150)
@given(specs())
def test_no_region_overlaps_another(spec: Spec) -> None:
    """Every region is filled with a number of its own, then all are read through another mapping."""
    mapped = Mapped(spec, views=2)
    names = []
    for number, (name, region) in enumerate(regions(mapped.views[0], spec)):
        names.append(name)
        region.fill_(number % 251 + 1)
    for number, (name, region) in enumerate(regions(mapped.views[1], spec)):
        assert name == names[number]
        assert bool((region == number % 251 + 1).all()), f"{name} was overwritten in {spec}"


@settings(max_examples=150)
@given(specs())
def test_everything_lies_within_the_size_that_was_asked_for_and_is_aligned(spec: Spec) -> None:
    fd = segment.create("test", size_bytes(spec))
    memory = segment.attach(fd)
    os.close(fd)
    start, end = segment.address(memory), segment.address(memory) + size_bytes(spec)
    exchange = ExchangeMemory(memory, spec)
    for name, region in regions(exchange, spec):
        if region.numel():
            assert start <= region.data_ptr(), name
            assert region.data_ptr() + region.numel() <= end, name
    vectors = [exchange.params, *(slot.gradient for slot in exchange.slots), *(slot.copy for slot in exchange.slots)]
    assert all(vector.data_ptr() % 64 == 0 for by_dtype in vectors for vector in by_dtype.values() if vector.numel())


def test_a_segment_that_is_too_small_is_refused() -> None:
    spec = make_spec(make_table([((5000,), "float64")]), [], 2, 0, 0)
    fd = segment.create("test", size_bytes(spec) - 1 - segment.PAGE)
    with pytest.raises(AssertionError, match="smaller than its spec"):
        ExchangeMemory(segment.attach(fd), spec)
    os.close(fd)


def test_tables_with_rows_have_numbers_in_every_slot_and_no_copies() -> None:
    table = make_table([((5, 3), "float32"), ((7,), "float32"), ((4, 2), "float64")], with_rows=True)
    spec = msgspec.structs.replace(make_spec(table, [], 2, 0, 0), parts=2)
    (memory,) = Mapped(spec).views
    for slot in memory.slots:
        assert {param: len(rows) for param, rows in slot.rows.items()} == {0: 6, 2: 5}
        assert list(slot.gradient) == ["float32 rows", "float32", "float64 rows"]
        assert list(slot.copy) == ["float32"]
    assert list(memory.params) == ["float32 rows", "float32", "float64 rows"]


def test_columns_have_a_cell_for_each_member() -> None:
    (memory,) = Mapped(make_spec(make_table([((3,), "float32")]), [], 3, 2, 0)).views
    lengths = [len(getattr(memory, name)) for name in ("pushed", "stepped", "asked", "answered")]
    assert lengths == [3, 5, 3, 3]
    assert len(memory.slots) == 3


def test_only_with_parts_are_there_a_log_and_copies() -> None:
    table = make_table([((3,), "float32"), ((200,), "float64")])
    (without,) = Mapped(make_spec(table, [], 3, 2, 0)).views
    assert (list(without.applied), len(without.clocks)) == ([], 3)
    assert all(slot.copy == {} for slot in without.slots)
    (memory,) = Mapped(make_spec(table, [], 3, 2, 0, 4)).views
    assert (list(memory.applied), len(memory.clocks)) == ([0] * 4, 3)
    for slot in memory.slots:
        assert {dtype: vector.numel() for dtype, vector in slot.copy.items()} == table.sizes
    assert memory.log.appended == 0


@given(specs())
def test_parts_cut_all_values_once(spec: Spec) -> None:
    for parts in (1, 2, 5):
        cut = spec.cut(parts)
        assert len(cut) == parts
        for param, entry in enumerate(spec.table.entries):
            pieces = sorted((piece.start, piece.stop) for part in cut for piece in part if piece.param == param)
            assert [stop for _, stop in pieces] == [*[start for start, _ in pieces[1:]], padded(entry.size)][
                : len(pieces)
            ]
            assert not spec.whole or len(pieces) <= 1
            assert sum(stop - start for start, stop in pieces) == padded(entry.size)


def test_an_entry_appended_by_one_process_is_read_by_another() -> None:
    mapped = Mapped(make_spec(make_table([((3,), "float32")]), [], 70, 0, 0, 2), views=2)
    mine, its = mapped.views
    entry = mine.log.append(STEP, 69, (0, 68, 69), 5)
    assert (its.log.appended, its.log.version, its.log.entry(1)) == (1, 1, entry)
    assert its.log.fate(68).number == 1
    mine.applied[1] = 1
    mine.clocks[69] = 7
    assert (list(its.applied), its.clocks[69], its.clocks[68]) == ([0, 1], 7, 0)


# --- one slot ---


@pytest.fixture
def pair() -> tuple[Slot, Slot]:
    """Worker 1's slot, as two processes see it."""
    mapped = Mapped(make_spec(make_table([((3, 2), "float32"), ((), "float64")]), [], 2, 0, 64), views=2)
    return mapped.views[0].slots[1], mapped.views[1].slots[1]


NUMBERS = st.floats(allow_nan=False)


@given(NUMBERS, NUMBERS, NUMBERS, st.booleans(), NUMBERS, st.integers(1, 2**53))
def test_the_header_comes_back(weight: float, loss: float, samples: float, stop: bool, norm: float, steps: int) -> None:
    mapped = Mapped(make_spec(make_table([((1,), "float32")]), [], 1, 0, 64), views=2)
    mine, its = mapped.views[0].slots[0], mapped.views[1].slots[0]
    mine.write_settings(b"lr")
    mine.write_norm(norm)
    mine.write(7, weight, (loss, samples), stop, steps)
    mine.write(8, 0.5, (1.5, 2.5), not stop)
    assert (its.weight(7), its.loss(7), its.stop(7), its.norm) == (weight, (loss, samples), stop, norm)
    assert (its.steps(7), its.steps(8)) == (steps, 1)
    assert its.pushed_in(7)
    assert its.pushed_in(8)
    assert not its.pushed_in(6)
    assert its.settings == b"lr"


def test_a_factor_is_one_where_none_was_given(pair: tuple[Slot, Slot]) -> None:
    mine, its = pair
    mine.write(7, 1.0, (0.0, 0.0), False, factor=0.25)
    mine.write(8, 1.0, (0.0, 0.0), False)
    assert [(its.factor(n), its.is_as_measured(n)) for n in (7, 8)] == [(0.25, True), (1.0, False)]
    mine.write(9, 1.0, (0.0, 0.0), False)
    assert (its.factor(9), its.is_as_measured(9)) == (1.0, False)


def test_a_new_slot_is_empty(pair: tuple[Slot, Slot]) -> None:
    _, its = pair
    assert (its.weight(1), its.loss(1), its.stop(1), its.settings, its.settings_version) == (0, (0, 0), False, b"", 0)
    assert bytes(its.mask) == bytes(2) == bytes(its.chosen)


def test_settings_come_back_with_a_new_version_each_time(pair: tuple[Slot, Slot]) -> None:
    mine, its = pair
    for version, data in enumerate([b"x" * 64, b"short", b"", b"y" * 63], start=1):
        mine.write_settings(data)
        assert (its.settings, its.settings_version) == (data, version)


def test_settings_larger_than_their_room_are_refused(pair: tuple[Slot, Slot]) -> None:
    with pytest.raises(AssertionError, match="settings of 65 bytes in room for 64"):
        pair[0].write_settings(bytes(65))


def test_masks_and_gradients_come_back(pair: tuple[Slot, Slot]) -> None:
    mine, its = pair
    mine.mask[:] = b"\x01\x00"
    mine.chosen[:] = b"\x00\x01"
    mine.gradient["float32"][:6] = torch.arange(6.0)
    mine.gradient["float64"][0] = 7.0
    assert (bytes(its.mask), bytes(its.chosen)) == (b"\x01\x00", b"\x00\x01")
    assert its.gradient["float32"][:7].tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert its.gradient["float64"][0].item() == 7.0


def test_other_workers_slots_are_others() -> None:
    (memory,) = Mapped(make_spec(make_table([((3,), "float32")]), [], 3, 0, 64)).views
    for worker, slot in enumerate(memory.slots):
        slot.write(1, float(worker), (0.0, 0.0), False)
        slot.gradient["float32"].fill_(worker)
    assert [slot.weight(1) for slot in memory.slots] == [0.0, 1.0, 2.0]
    assert [slot.gradient["float32"].sum().item() for slot in memory.slots] == [0.0, 64.0, 128.0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_state_written_by_one_process_is_loaded_by_another(dtype: str) -> None:
    table = make_table([((2, 3), dtype), ((4,), dtype)])
    items: list[StateItem] = []
    for param, entry in enumerate(table.entries):
        items.append(StateItem(param, "mean", "like", dtype, entry.shape))
        items.append(StateItem(param, "step", "tensor", "float32", ()))
    mapped = Mapped(make_spec(table, items, 1, 0, 0), views=2)
    mine, its = (view.state for view in mapped.views)
    state: dict[str, Any] = {"mean": torch.full((2, 3), 2.5).to(DTYPES[dtype]), "step": torch.tensor(3.0)}
    mine.save(Piece(0, 0, 64), state, whole=True)
    loaded = its.view(0)
    assert torch.equal(loaded["mean"], torch.full((2, 3), 2.5).to(DTYPES[dtype]))
    assert loaded["step"].item() == 3.0
    assert its.view(1) == {}
