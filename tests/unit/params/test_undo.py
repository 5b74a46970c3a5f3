"""A process is killed in the midst of a step: whoever goes on comes to what it would have left, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim

from paceline.params import optimizers, rows
from paceline.params.chunk import Target
from paceline.params.shard import Shard
from paceline.params.state import State, StatePlan
from paceline.params.table import tabulate
from paceline.params.undo import HEADER_WORDS, Undo, area_bytes
from paceline.protocol.partition import grid
from tests.unit.params.test_shard import (
    OPTIMIZERS,
    Given,
    Job,
    all_state,
    assert_same_bits,
    assert_same_state,
    start,
    vectors_of,
)


class Killed(Exception):
    pass


class Dying(Undo):
    """An undo area whose process dies at its n-th word of progress: before it is stored, or right after."""

    def __init__(self, words: memoryview, area: torch.Tensor, left: int) -> None:
        super().__init__(words, area)
        self._left = left

    def advance(self, progress: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed
        super().advance(progress)
        self._left -= 1
        if self._left == 0:
            raise Killed


def area_of(size: int) -> tuple[memoryview, torch.Tensor]:
    return memoryview(bytearray(8 * HEADER_WORDS)).cast("Q"), torch.zeros(size, dtype=torch.uint8)


@pytest.mark.sampled
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whoever_goes_on_leaves_the_same_bits(name: str, before: int) -> None:
    """Died at each word of its first or third step, once or twice over; the oracle was never interrupted."""
    gradients = [start(name, seed=step + 1) for step in range(4)]

    def play(deaths: list[int]) -> tuple[Job, int]:
        job = Job(OPTIMIZERS[name], start(name), cut_into=2, chunk_bytes=2500)
        area = area_of(area_bytes(job.table, job.state.plan, job.chunk_bytes))
        died = 0
        for step, gradient in enumerate(gradients):
            given = [Given(vectors_of(job.table, gradient)), Given(vectors_of(job.table, gradients[0]))]
            for left in deaths if step == before else []:
                (shard,) = job.shards(1)
                shard.fold(given, [1.0, 3.0])
                try:
                    shard.step(None, None, undo=Dying(*area, left), number=step + 1)
                except Killed:
                    died += 1
            (shard,) = job.shards(1)
            shard.fold(given, [1.0, 3.0])
            shard.step(None, None, undo=Undo(*area), number=step + 1)
        return job, died

    expected, _ = play([])
    moment, chunks = 1, 0
    while True:
        job, died = play([moment, 3])
        assert_same_bits(job.values(), expected.values())
        assert_same_state(all_state(job), all_state(expected))
        if not died:
            break
        chunks, moment = moment // 4 + 1, moment + 1
    assert chunks > 1


SPARSE: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "sparse adam": lambda p: optim.SparseAdam(p, lr=0.1),
}


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("name", SPARSE)
def test_rows_are_gone_on_with_too(name: str, raw: bool) -> None:
    """A table of which no step's rows fit into the undo area at once: counts go up once a step all the same."""
    if raw and name != "sgd":
        pytest.skip("only plain SGD takes rows with their duplicates")
    size, row = 4000, 4

    class Tables:
        def __init__(self) -> None:
            weight = torch.nn.Parameter(torch.randn(size, row, generator=torch.Generator().manual_seed(0)))
            optimizer = SPARSE[name]([weight])
            data = weight.detach()
            self.table = tabulate([("table", 0, data)], {id(data)})
            entry = self.table.entries[0]
            groups = optimizers.decode(optimizers.encode(optimizers.settings(optimizer)))

            def make(asked: list[dict[str, Any]]) -> optim.Optimizer:
                return optimizers.clone(vars(optimizer), type(optimizer), asked)

            own = optimizer.state.get(weight) or {}
            items = optimizers.describe_state(self.table, groups, make, [own], elementwise=True)
            blocks = grid([entry.size], 1, most=64, grains=[entry.grain], tables={0})
            self.plan = StatePlan(self.table, items, blocks)
            memory = torch.zeros(self.plan.size_bytes, dtype=torch.uint8)
            self.state = State(
                self.table, self.plan, lambda dtype, at, n: memory[at : at + n * dtype.itemsize].view(dtype)
            )
            if own:
                self.state.fill(0, dict(own))
            self.vectors = {entry.vector: torch.zeros(self.table.sizes[entry.vector])}
            self.table.view(entry, self.vectors[entry.vector]).copy_(data)
            self.area = area_of(area_bytes(self.table, self.plan, 8192))
            target = Target(self.table, self.vectors, self.state, make, groups, whole=False)
            self.make = lambda: Shard(target, blocks, 8192)

        def step(self, number: int, undo: Undo) -> None:
            shard = self.make()
            shard.resume()
            shard.fold(given(number), [1.0, 2.0])
            shard.step(None, None, undo=undo, number=number)

    def given(number: int) -> list[Given]:
        pushed = []
        for worker in range(2):
            generator = torch.Generator().manual_seed(10 * number + worker)
            indices = torch.randint(0, size, (1500,), generator=generator)
            gradient = torch.sparse_coo_tensor(indices[None], torch.randn(1500, row, generator=generator), (size, row))
            area, values = torch.zeros(size + 1, dtype=torch.int64), torch.zeros(size * row)
            rows.write(area, values, gradient, raw=raw)
            pushed.append(Given({"float32 rows": values}, {0: area}))
        return pushed

    def play(death: int | None) -> tuple[Tables, bool]:
        tables, died = Tables(), False
        for number in (1, 2, 3):
            if number == 2 and death:
                try:
                    tables.step(number, Dying(*tables.area, death))
                except Killed:
                    died = True
            tables.step(number, Undo(*tables.area))
        return tables, died

    expected, _ = play(None)
    moment = 1
    while True:
        tables, died = play(moment)
        assert torch.equal(tables.vectors["float32 rows"], expected.vectors["float32 rows"])
        shown, wanted = tables.state.view(0), expected.state.view(0)
        assert_same_state([shown], [wanted])
        assert int(wanted.get("step", 3)) == 3
        if not died:
            break
        moment += 1
    assert moment > 8  # more than two chunks of rows


def test_the_header_tells_how_far_a_step_has_come() -> None:
    undo = Undo(*area_of(0))
    assert undo.begin(7) == 0
    undo.advance(5)
    assert undo.begin(7) == 5
    assert undo.begin(8) == 0
