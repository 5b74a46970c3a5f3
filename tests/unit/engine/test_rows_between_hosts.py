"""Claims about embedding tables with sparse gradients on several hosts: rows go from each host to all others, every
host folds them, and the parameters are the same bits on all. The oracle is the same job with local workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.engine.elsewhere import owners, peers
from paceline.engine.elsewhere.table_parts import TableParts
from paceline.engine.exchange.replica import Apart
from paceline.params.rows import Rows, read
from paceline.params.table import Table, tabulate
from paceline.protocol import owners as protocol
from paceline.protocol.link import Senseless
from tests.driver import run_job
from tests.unit.engine.test_hosts import Seen, both
from tests.unit.engine.test_hosts import seen as seen
from tests.unit.engine.test_owners import kinds_in
from tests.unit.engine.test_remote import EPOCHS, drawn

# Of two hosts with a worker each, the one follows what the other pushes (mirror.py).
PLACES = {
    "2+2": ("", "", "b", "b"),
    "1+2": ("", "b", "b"),
    "2+1": ("", "", "b"),
    "3": ("", "b", "c"),
    "2+2+1": ("", "b", "c", "b", ""),
    "4": ("", "b", "c", "d"),
}
KINDS = {"sgd": optim.SGD, "momentum": lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9), "adagrad": optim.Adagrad}
FIRST = {("sgd", "2+2"), ("sgd", "3"), ("sgd", "2+2+1"), ("adagrad", "2+1"), ("adagrad", "4"), ("momentum", "1+2")}
SAMPLES = 48


def words(run: Any, kind: Callable[..., optim.Optimizer] = optim.SGD, *, dense: bool = True) -> list[float]:
    """Sentences of unequal length, of common words and rare ones; passes are uneven. One step in five has no gradient
    of the table, one was multiplied after backward, one is over two batches."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(40, (SAMPLES - 3, 7), generator=generator) ** 2 % 40
    table = drawn(nn.EmbeddingBag(40, 3, mode="sum", sparse=True, dtype=torch.float64))
    head = drawn(nn.Linear(3, 2, dtype=torch.float64))
    parameters = [*table.parameters(), *head.parameters()] if dense else table.parameters()
    table, head, optimizer, loader = run.wrap(
        table, head, kind(parameters, lr=0.05), DataLoader(TensorDataset(ids), batch_size=4)
    )
    for _ in range(EPOCHS):
        for number, (batch,) in enumerate(loader):
            optimizer.zero_grad()
            head(table(batch)).pow(2).mean().backward()
            if number % 5 == 1:
                table.weight.grad.data.mul_(0.5)
            if number % 5 == 2:
                head(table(batch.flip(0)[:2])).pow(2).mean().backward()
            if number % 5 == 3 and dense:
                table.weight.grad = None
            optimizer.step()
    run.barrier()
    return [*table.weight.flatten().tolist(), *head.weight.flatten().tolist()]


@pytest.mark.parametrize(
    ("kind", "places"),
    [
        pytest.param(kind, places, id=f"{name}-{where}", marks=[] if (name, where) in FIRST else pytest.mark.long)
        for name, kind in KINDS.items()
        for where, places in PLACES.items()
    ],
)
def test_rows_go_to_all_and_each_host_folds_them(
    kind: Callable[..., optim.Optimizer], places: tuple[str, ...], seen: Seen
) -> None:
    apart, one = both(lambda run: words(run, kind), places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["3"]], ids=["2+2", "3"])
@pytest.mark.parametrize("kind", [optim.SGD, optim.SparseAdam])
def test_a_model_may_be_nothing_but_a_table(
    kind: Callable[..., optim.Optimizer], places: tuple[str, ...], seen: Seen
) -> None:
    apart, one = both(lambda run: words(run, kind, dense=False), places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["3"]], ids=["2+2", "3"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_rows_that_are_not_finite_are_in_no_fold(bad: int, places: tuple[str, ...], seen: Seen) -> None:
    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        table, optimizer = run.wrap(table, optim.SGD(table.parameters(), lr=0.1))
        for step in range(6):
            optimizer.zero_grad()
            loss = table(torch.arange(step, step + 4) * (run.rank + 1) % 20).pow(2).sum()
            (loss * torch.inf if (step, run.rank) == (2, bad) else loss).backward()
            optimizer.step()
        return list(table.weight.flatten().tolist())

    apart, one = both(body, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (5, 0)


@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["3"]], ids=["2+2", "3"])
@pytest.mark.parametrize("without", [0, 1, 2])
def test_who_has_no_rows_brings_none_to_a_round_that_goes_home(
    without: int, places: tuple[str, ...], seen: Seen
) -> None:
    """It had some in such a round before, and others have some now."""
    bad = (without + 1) % 3

    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        table, optimizer = run.wrap(table, optim.SGD(table.parameters(), lr=0.1))
        for step in range(5):
            optimizer.zero_grad()
            loss = table(torch.arange(step, step + 4) * (run.rank + 1) % 20).pow(2).sum()
            (loss * torch.inf if step in (1, 3) and run.rank == bad else loss).backward()
            if (step, run.rank) == (3, without):
                table.weight.grad = None
            optimizer.step()
        return list(table.weight.flatten().tolist())

    apart, one = both(body, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (3, 0)


@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["3"]], ids=["2+2", "3"])
def test_clipped_rows_go_home(places: tuple[str, ...], seen: Seen) -> None:
    """A norm is asked of the fold, and rows that are multiplied since are others."""

    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        table, optimizer = run.wrap(table, optim.SGD(table.parameters(), lr=0.1))
        norms = []
        for step in range(4):
            optimizer.zero_grad()
            table(torch.arange(step, step + 4) * (run.rank + 1) % 20).pow(2).sum().backward()
            if step % 2:
                norms.append(float(nn.utils.clip_grad_norm_(table.parameters(), 0.5)))
            optimizer.step()
        return [*norms, *table.weight.flatten().tolist()]

    apart, one = both(body, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert any(norm > 0.5 for norm in apart[:2])
    assert (seen.as_one, seen.norms, seen.left) == (2, 2, 0)


@pytest.mark.parametrize("kind", ["Rows", "Given"])
def test_a_link_that_ends_as_rows_are_sent_makes_it_a_star(
    kind: str, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    send, sent = peers.Peers.send, 0

    def send_or_end(self: Any, other: int, message: Any, payload: Any = None) -> None:
        nonlocal sent
        if (self.rank, other) == (1, 2) and kind in kinds_in(message):
            sent += 1
            if sent == 4:
                self._links[other].end("it is cut")
        send(self, other, message, payload)

    monkeypatch.setattr(peers.Peers, "send", send_or_end)
    apart, one = both(words, PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert seen.left == 3


@pytest.mark.parametrize("number", [pytest.param(-1, marks=pytest.mark.long), 40])
def test_rows_that_the_table_has_not_are_not_stepped(number: int, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    """Who sends them is not an owner any more; what it brings goes home, where it is looked at."""
    give, given = TableParts.give, 0

    def give_another(self: Any, own: Rows) -> tuple[int, memoryview]:
        nonlocal given
        count, payload = give(self, own)
        if self._rank == 1:
            given += bool(count)
            if given == 3:
                payload.cast("i")[0] = number
        return count, payload

    monkeypatch.setattr(TableParts, "give", give_another)
    apart, one = both(words, PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert seen.left == 3


def test_who_cannot_fold_any_more_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    fold, folds = TableParts.fold, 0

    def fold_or_fail(self: Any, shares: Sequence[float]) -> None:
        nonlocal folds
        folds += self._rank == 1
        if folds == 3 and self._rank == 1:
            raise MemoryError
        fold(self, shares)

    monkeypatch.setattr(TableParts, "fold", fold_or_fail)
    apart, one = both(words, PLACES["3"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert seen.left == 3


def test_a_table_of_two_hosts_that_do_not_reach_each_other_trains_by_home(
    monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    monkeypatch.setattr(peers.Peers, "meet", lambda self: False)
    apart, one = both(words, PLACES["2+2"])
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (0, 0)


@pytest.mark.parametrize(("places", "folds"), [(PLACES["2+2"], 6), (PLACES["4"], 0)], ids=["2+2", "4"])
def test_of_two_optimizers_each_goes_its_own_way(places: tuple[str, ...], folds: int, seen: Seen) -> None:
    """Rows to all; dense gradients of two hosts from the one to the other, of more in shares."""

    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        net = drawn(nn.Linear(3, 2, dtype=torch.float64))
        table, net, first, second = run.wrap(
            table, net, optim.SGD(table.parameters(), lr=0.1), optim.Adam(net.parameters(), lr=0.1)
        )
        for step in range(6):
            first.zero_grad()
            second.zero_grad()
            net(table(torch.arange(step, step + 4) * (run.rank + 1) % 20)).pow(2).sum().backward()
            first.step()
            second.step()
        return [*table.weight.flatten().tolist(), *net.weight.flatten().tolist()]

    apart, one = both(body, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.folds, seen.left) == (12, folds, 0)


def test_each_sample_counts_once(seen: Seen) -> None:
    def body(run: Any) -> list[float]:
        counts = nn.Embedding(SAMPLES, 1, sparse=True, dtype=torch.float64, _weight=torch.zeros(SAMPLES, 1).double())
        loader = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=4)
        counts, optimizer, loader = run.wrap(counts, optim.SGD(counts.parameters(), lr=1.0), loader)
        for _ in range(EPOCHS):
            for (numbers,) in loader:
                optimizer.zero_grad()
                (-counts(numbers)).sum().backward()
                optimizer.step()
        run.barrier()
        return list(counts.weight.flatten().tolist())

    there = run_job(body, workers=3, elsewhere=True, hosts=PLACES["3"])
    assert there[0] == pytest.approx([EPOCHS / 3] * SAMPLES)  # a round's gradient is the mean of three
    assert seen.as_one


def _rows(numbers: list[int], *, unique: bool) -> Rows:
    values = torch.arange(3.0 * len(numbers), dtype=torch.float64).view(-1, 3) + 1
    return Rows(torch.tensor(numbers, dtype=torch.int64), values, unique)


def _bags(numbers: list[int], which: list[int]) -> Rows:
    """Rows of bags: ``which`` of the values each has."""
    values = torch.arange(3.0 * (which[-1] + 1), dtype=torch.float64).view(-1, 3) + 1
    return Rows(torch.tensor(numbers), values, unique=False, which=torch.tensor(which))


def _table_of_eight() -> Table:
    weight = torch.zeros(8, 3, dtype=torch.float64)
    return tabulate([("table", 0, weight)], {id(weight)})


def _table(rank: int) -> tuple[TableParts, Apart]:
    table = _table_of_eight()
    folds = Apart.of(table)
    return TableParts(0, table.entries[0], rank, (0, 1, 2), folds), folds


def _give(giver: TableParts, taker: TableParts, sender: int, rows: Rows) -> None:
    """As it comes over a link."""
    count, payload = giver.give(rows)
    for start in range(0, len(payload), 5):
        piece = payload[start : start + 5]
        place = taker.place(sender, count, start, len(piece))
        assert place is not None
        place[:] = piece
        taker.take(sender, said(count, start, ends=start + 5 >= len(payload)), len(piece))
    if not payload:
        taker.take(sender, said(0), 0)


def said(count: int, start: int = 0, *, ends: bool = True) -> protocol.Rows:
    return protocol.Rows(0, 1, 0, count, start, ends)


@pytest.mark.parametrize(
    "given",
    [
        [_rows([1, 3], unique=True), _rows([], unique=True), _rows([0, 1, 7], unique=True)],
        [_rows([3, 1, 3], unique=False), _rows([2], unique=False), _rows([5, 5], unique=False)],
        [_rows([3, 1, 3], unique=False), _rows([2, 4], unique=True), _rows([7], unique=False)],
        [_rows([3, 1, 3, 3, 1], unique=False), _rows([2, 2, 2], unique=False), _rows([7, 6], unique=False)],
        [_bags([3, 1, 3], [0, 0, 1]), _rows([2], unique=False), _bags([5, 5], [0, 0])],
        [_bags([3, 1, 3], [0, 0, 1]), _rows([2, 4], unique=True), _bags([5, 5], [0, 0])],
        [_bags([3, 1, 3, 2, 2], [0, 0, 0, 1, 1]), _bags([5, 5], [0, 0]), _bags([7, 6], [0, 0])],
    ],
    ids=["unique", "raw", "mixed", "raw, more than the table has", "bags", "bags and unique", "bags, more than that"],
)
def test_a_fold_is_the_weighted_sum_of_all_rows(given: list[Rows]) -> None:
    shares = [0.5, 0.2, 0.3]
    expected = torch.zeros(8, 3, dtype=torch.float64)
    for rows, share in zip(given, shares, strict=True):
        expected.index_add_(0, rows.indices, rows.each * share)
    for rank in range(3):
        parts, folds = _table(rank)
        for sender in {0, 1, 2} - {rank}:
            _give(_table(sender)[0], parts, sender, given[sender])
        parts.give(given[rank])
        parts.fold(shares)
        other = Apart.of(_table_of_eight())
        parts.lay_fold(other)
        found = torch.zeros(8, 3, dtype=torch.float64)
        (values,) = other.gradient.values()
        folded = read(other.rows[0], values, 3, 0, 8)
        found.index_add_(0, folded.indices, folded.each)
        torch.testing.assert_close(found, expected)
        assert torch.equal(other.rows[0], folds.rows[0])


@pytest.mark.parametrize(
    ("count", "start", "size"), [(9, 0, 8), (-9, 0, 8), (2, 0, 65), (2, 60, 5), (2, -8, 8), (2, 64, 0), (2**62, 0, 8)]
)
def test_what_cannot_be_rows_of_the_table_has_no_place(count: int, start: int, size: int) -> None:
    parts, _ = _table(0)
    assert parts.place(1, 2, 0, 16 + 2 * 24) is not None
    assert parts.place(1, 2, 60, 4) is not None
    assert parts.place(1, count, start, size) is None
    assert parts.place(5, 2, 0, 8) is None


@pytest.mark.parametrize(
    ("count", "numbers"), [(9, [0]), (-(2**62), [0]), (2, [0, 8]), (-2, [-1, 3]), (-2, [3, ~8]), (2, [3, ~3])]
)
def test_what_cannot_be_rows_of_the_table_is_not_taken(count: int, numbers: list[int]) -> None:
    parts, _ = _table(0)
    place = parts.place(1, len(numbers), 0, 4 * len(numbers))
    assert place is not None
    place.cast("i")[:] = memoryview(torch.tensor(numbers, dtype=torch.int32).numpy())
    with pytest.raises(Senseless, match="of a table of 8"):
        parts.take(1, said(count), 16 + abs(count) * 24)


@pytest.mark.parametrize(
    "pieces",
    [
        [(said(2), 63)],
        [(said(2), 0)],
        [(said(0), 1)],
        [(said(2, 32), 32)],
        [(said(2, ends=False), 32), (said(2, 16), 48)],
        [(said(2, ends=False), 32), (said(-2, 32), 32)],
        [(said(2, ends=False), 32), (said(2, 32), 16)],
        [(said(2, 2**61, ends=False), 32)],
        [(said(-2), 16 + 24)],
        [(said(-2), 16 + 3 * 24)],
    ],
)
def test_rows_of_which_some_have_not_come_are_not_taken(pieces: list[tuple[protocol.Rows, int]]) -> None:
    parts, _ = _table(0)
    *before, (last, size_bytes) = pieces
    for one, size in before:
        parts.take(1, one, size)
    with pytest.raises(Senseless, match="only some have come"):
        parts.take(1, last, size_bytes)


@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["3"]], ids=["2+2", "3"])
def test_many_rows_come_in_pieces(places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    monkeypatch.setattr(owners, "PIECE_BYTES", 100)
    apart, one = both(words, places)
    assert apart == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
