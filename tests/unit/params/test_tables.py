"""Tables with sparse rows, stepped share by share: consecutive blocks of a table are one chunk, and no bit tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import optim

from paceline.params import optimizers, rows
from paceline.params.chunk import Target
from paceline.params.shard import Shard
from paceline.params.state import State, StatePlan
from paceline.params.table import tabulate
from paceline.params.undo import Undo, area_bytes, chunks
from paceline.protocol.partition import deal, grid
from tests.unit.params.test_shard import Given, assert_same_state
from tests.unit.params.test_undo import Dying, Killed, area_of

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "sparse adam": lambda p: optim.SparseAdam(p, lr=0.1),
}
KINDS = [("sgd", True), *((name, False) for name in OPTIMIZERS)]  # only plain SGD takes rows with their duplicates
WORKERS, MOST_BYTES = 2, 8192


class Tables:
    """One table and its state, in a grid for ``parts``; between two dense parameters where the optimizer takes such."""

    def __init__(self, name: str, size: int, row: int, parts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(size, row)] if name == "sparse adam" else [(70,), (size, row), (130,)]
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = OPTIMIZERS[name](parameters)
        named = [(f"p{i}", 0, p.detach()) for i, p in enumerate(parameters)]
        self.param = next(i for i, shape in enumerate(shapes) if len(shape) == 2)
        self.table = tabulate(named, {id(named[self.param][2])})
        entries = self.table.entries
        groups = optimizers.decode(optimizers.encode(optimizers.settings(optimizer)))

        def make(asked: list[dict[str, Any]]) -> optim.Optimizer:
            return optimizers.clone(vars(optimizer), type(optimizer), asked)

        own = [optimizer.state.get(p) or {} for p in parameters]
        items = optimizers.describe_state(self.table, groups, make, own, elementwise=True)
        sizes, grains = [entry.size for entry in entries], [entry.grain for entry in entries]
        self.blocks = grid(sizes, parts, most=64, grains=grains, tables={self.param})
        self.plan = StatePlan(self.table, items, self.blocks)
        memory = torch.zeros(self.plan.size_bytes, dtype=torch.uint8)
        self.state = State(self.table, self.plan, lambda dtype, at, n: memory[at : at + n * dtype.itemsize].view(dtype))
        for number, state in enumerate(own):
            if state:
                self.state.fill(number, dict(state))
        self.vectors = {vector: torch.zeros(n) for vector, n in self.table.sizes.items()}
        for entry, parameter in zip(entries, parameters, strict=True):
            self.table.view(entry, self.vectors[entry.vector]).copy_(parameter.detach())
        self.areas = [area_of(area_bytes(self.table, self.plan, MOST_BYTES)) for _ in range(parts)]
        self._target = Target(self.table, self.vectors, self.state, make, groups, whole=False)

    def undo(self, share: int) -> Undo:
        return Undo(*self.areas[share])

    def step(self, number: int, given: Sequence[Given], undo: Undo | None, share: int = 0, shares: int = 1) -> None:
        """A process that has never stepped this share does."""
        shard = Shard(self._target, deal(self.blocks, shares)[share], MOST_BYTES)
        shard.resume()
        shard.fold(given, [1.0, 2.0])
        shard.step(None, None, undo=undo, number=number)

    def given(self, number: int, looked_up: int, *, raw: bool) -> list[Given]:
        """What workers bring to this step: rows of which some are brought twice by one, and some by all."""
        entry, pushed = self.table.entries[self.param], []
        for worker in range(WORKERS):
            generator = torch.Generator().manual_seed(10 * number + worker)
            vectors = {vector: torch.randn(n, generator=generator) for vector, n in self.table.sizes.items()}
            indices = torch.randint(0, entry.rows // 2, (looked_up,), generator=generator) * 2
            values = torch.randn(looked_up, entry.row, generator=generator)
            gradient = torch.sparse_coo_tensor(indices[None], values, entry.shape)
            area = torch.zeros(entry.rows + 1, dtype=torch.int64)
            rows.write(area, vectors[entry.vector], gradient, raw=raw)
            pushed.append(Given(vectors, {self.param: area}))
        return pushed


def assert_same(mine: Tables, other: Tables) -> None:
    for vector, values in mine.vectors.items():
        assert torch.equal(values, other.vectors[vector])
    params = range(len(mine.table.entries))
    assert_same_state([mine.state.view(p) for p in params], [other.state.view(p) for p in params])


@pytest.mark.parametrize(("name", "raw"), KINDS)
@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("size", [4001, 500])
def test_blocks_that_are_stepped_as_one_leave_the_same_bits(name: str, raw: bool, saves: bool, size: int) -> None:
    """The oracle steps every block by itself. Of the larger table rows are fetched into the cache, and there are more
    in a step than fit into an undo area; in one of the smaller there may be more than a block has."""
    row, parts = (80, 8) if size > 1000 else (3, 5)
    shares_of = (1, 2, parts, 1)  # from one round to the next others contribute
    cut, expected = Tables(name, size, row, parts), Tables(name, size, row, parts)
    assert sum(block.param == cut.param for block in cut.blocks) > 1
    for number, shares in enumerate(shares_of, 1):
        given = cut.given(number, size // 3, raw=raw)
        for share in range(shares):
            cut.step(number, given, cut.undo(share) if saves else None, share, shares)
        for place, block in enumerate(expected.blocks):
            shard = Shard(expected._target, [block], MOST_BYTES)
            shard.resume()
            shard.fold(given, [1.0, 2.0])
            shard.step(None, None, undo=expected.undo(0) if saves else None, number=number * 1000 + place)
    assert_same(cut, expected)
    for block in cut.blocks:  # of every block by itself: how often it was stepped
        mine, other = cut.state.load(block, whole=False), expected.state.load(block, whole=False)
        assert mine.get("step") == other.get("step") == (None if name == "sgd" else len(shares_of))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("name", "raw"), KINDS)
def test_rows_are_gone_on_with_in_the_midst_of_a_step(name: str, raw: bool, parts: int) -> None:
    """A table of which no step's rows fit into the undo area at once: counts go up once a step all the same, in each of
    the blocks that are stepped as one."""
    died_in, steps = 2, 3

    def play(death: int | None) -> tuple[Tables, bool]:
        tables, died = Tables(name, 4000, 4, parts), False
        for number in range(1, steps + 1):
            given = tables.given(number, 1500, raw=raw)
            if number == died_in and death:
                try:
                    tables.step(number, given, Dying(*tables.areas[0], death))
                except Killed:
                    died = True
            tables.step(number, given, tables.undo(0))
        return tables, died

    expected, _ = play(None)
    moment = 1
    while True:
        tables, died = play(moment)
        assert_same(tables, expected)
        for block in tables.blocks:
            assert tables.state.load(block, whole=False).get("step", steps) == steps
        if not died:
            break
        moment += 1
    assert moment > 8  # more than two chunks of rows


def test_all_blocks_of_a_table_are_one_chunk() -> None:
    tables = Tables("adagrad", 4000, 4, 3)
    cut = chunks(tables.blocks, tables.table, tables.plan, MOST_BYTES)
    assert [block for one in cut for block in one] == list(tables.blocks)
    by_rows = [one for one in cut if any(block.param == tables.param for block in one)]
    assert [[block.param for block in one] for one in by_rows] == [[tables.param] * 3]
