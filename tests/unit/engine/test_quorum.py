"""Pace quorum: a round is closed by the first k pushes, the others go on with what it left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Quorum, Sync
from paceline.protocol.log import Entry
from tests.unit.engine.pacing import (
    CASES,
    OPTIMIZERS,
    Counts,
    Turns,
    assert_close,
    assert_same_bits,
    batches_of,
    drawn,
    gradient,
    in_order,
    make_data,
    make_model,
    note_entries,
    note_uses,
    on_workers,
    parameters,
    plain,
    scheduled,
    small_parts,
    train,
)

BATCH = 4


@pytest.mark.sampled
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_a_quorum_of_all_is_sync_to_the_bit(name: str, servers: int, workers: int) -> None:
    """Also with a short batch, and rounds in which some have nothing left."""
    body = train(make_model(), OPTIMIZERS[name], make_data(BATCH * (2 * workers + 1) + 3), batch=BATCH, epochs=2)
    together = on_workers(body, workers=workers, servers=servers, pace=Sync())
    with small_parts():
        mine = on_workers(body, workers=workers, servers=servers, pace=Quorum(workers))
    for result in mine:
        assert_same_bits(result, together[0])


@pytest.mark.parametrize(("name", "servers"), CASES)
def test_one_worker_is_the_plain_loop_to_the_bit(name: str, servers: int) -> None:
    model, data = make_model(), make_data(BATCH * 5 + 2)
    alone = plain(model, OPTIMIZERS[name], batches_of(data, BATCH), epochs=2)
    body = train(model, OPTIMIZERS[name], data, batch=BATCH, epochs=2)
    assert_same_bits(on_workers(body, workers=1, servers=servers, pace=Quorum(1))[0], alone)


def count_up(workers: int, steps: Sequence[int], turns: Turns, entries: list[Entry], scale: float) -> Any:
    """A script without a loader, of so many steps a worker; answers, for each, with what it saw after it and
    whether it was used."""

    def body(run: Any) -> list[tuple[list[int], bool]]:
        counts, seen, uses = Counts(workers, scale), [], list[bool]()
        run.wrap(counts.optimizer)
        note_entries(run, entries)
        note_uses(run, uses)
        with scheduled(run, turns):
            for _ in range(steps[run.rank]):
                counts.bring(run.rank)
                turns.take(run.rank)
                counts.optimizer.step()
                seen.append(counts.seen)
            run.worker.go()
        return list(zip(seen, uses, strict=True))

    return body


@pytest.mark.parametrize("servers", [0, 2])
def test_a_late_push_is_dropped_and_its_worker_goes_on_with_the_newest_parameters(servers: int) -> None:
    entries: list[Entry] = []
    turns = Turns(3, in_order(0, 1, 2, 2, 1))
    told = on_workers(count_up(3, [1, 2, 2], turns, entries, 2.0), workers=3, servers=servers, pace=Quorum(2))
    assert [entry.members for entry in entries] == [(0, 1), (1, 2)]
    # Worker 2's first push was computed on version 0, when version 1 was there.
    assert told[2] == [([1, 1, 0], False), ([1, 2, 1], True)]
    assert told[0] == [([1, 1, 0], True)]
    assert told[1] == [([1, 1, 0], True), ([1, 2, 1], True)]


@settings(max_examples=15)
@given(
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(st.lists(st.integers(1, 6), min_size=n, max_size=n), st.integers(1, n))
    ),
    st.integers(0, 2),
    st.lists(st.integers(0, 11), min_size=1, max_size=20),
)
def test_each_round_has_k_pushes_or_as_many_as_there_are_workers_left(
    steps_and_count: tuple[list[int], int], servers: int, schedule: list[int]
) -> None:
    """And every push is either in exactly one round or told to have been dropped. Each worker's gradient is 12, which
    the mean of 1, 2, 3 or 4 divides without a rest."""
    steps, count = steps_and_count
    workers = len(steps)
    entries: list[Entry] = []
    turns = Turns(workers, drawn(schedule))
    told = on_workers(
        count_up(workers, steps, turns, entries, 12.0), workers=workers, servers=servers, pace=Quorum(count)
    )
    left = steps[:]
    for entry in entries:
        assert len(set(entry.members)) == len(entry.members)
        assert len(entry.members) <= count
        if len(entry.members) < count:  # then nobody else is there
            last = {worker for worker in range(workers) if left[worker] and worker not in entry.members}
            assert all(worker not in later.members for later in entries[entries.index(entry) :] for worker in last)
        for member in entry.members:
            left[member] -= 1
    for worker in range(workers):
        assert sum(worker in entry.members for entry in entries) == sum(used for _, used in told[worker])
        assert len(told[worker]) == steps[worker]
    # Who is in the last round has seen what it left: 12 / (pushes of the round) for each of its members.
    expected = [
        sum(12 // len(entry.members) for entry in entries if worker in entry.members) for worker in range(workers)
    ]
    assert told[entries[-1].members[0]][-1][0] == expected


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("leaves", ["the script", "the pass"])
def test_a_worker_without_data_holds_nobody(leaves: str, servers: int) -> None:
    """Three workers of six batches each; two leave after their second. The quorum of two is then one."""
    entries: list[Entry] = []
    data, turns = TensorDataset(torch.arange(18.0)), Turns(3, drawn([0, 1, 2]))

    def body(run: Any) -> list[int]:
        counts = Counts(3, 2.0)
        _, loader = run.wrap(counts.optimizer, DataLoader(data))
        note_entries(run, entries)
        with scheduled(run, turns):
            for number, _ in enumerate(loader):
                counts.bring(run.rank)
                turns.take(run.rank)
                counts.optimizer.step()
                if run.rank and number == 1:
                    if leaves == "the script":
                        run.worker.go()
                        return counts.seen
                    break
            for _ in loader:
                break
        return counts.seen

    results = on_workers(body, workers=3, servers=servers, pace=Quorum(2))
    mine = [entry.members for entry in entries if 0 in entry.members]
    assert sum(members == (0,) for members in mine) >= 2
    expected = [sum(2 // len(e.members) for e in entries if worker in e.members) for worker in range(3)]
    assert results[0] == expected


@settings(max_examples=12)
@given(
    st.sampled_from(["momentum", "adamw", "adafactor"]),
    st.integers(1, 3),
    st.sampled_from([0, 2]),
    st.lists(st.integers(0, 11), min_size=1, max_size=30),
)
def test_replaying_the_rounds_on_one_thread_gives_the_same(
    name: str, count: int, servers: int, schedule: list[int]
) -> None:
    """Three workers; which batch a push was of is known from how many the worker had brought before."""
    workers, epochs = 3, 2
    common, data, make = make_model(), make_data(BATCH * 10 + 1), OPTIMIZERS[name]
    entries: list[Entry] = []
    used: list[list[Any]] = [[] for _ in range(workers)]

    def body(run: Any) -> Any:
        model, uses = copy.deepcopy(common), list[bool]()
        optimizer = make(model.parameters())
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(data, batch_size=BATCH))
        note_entries(run, entries)
        note_uses(run, uses)
        with scheduled(run, turns):
            for _ in range(epochs):
                for batch in loader:
                    gradient(model, optimizer, batch)
                    turns.take(run.rank)
                    optimizer.step()
                    if uses[-1]:
                        used[run.rank].append(batch)
        return parameters(model)

    turns = Turns(workers, drawn(schedule))
    results = on_workers(body, workers=workers, servers=servers, pace=Quorum(count))
    model = copy.deepcopy(common)
    optimizer = make(model.parameters())
    at = [0] * workers
    for entry in entries:
        batches = [used[worker][at[worker]] for worker in entry.members]
        for worker in entry.members:
            at[worker] += 1
        total = sum(len(x) for x, _ in batches)
        folded: list[torch.Tensor] = []
        for x, y in batches:
            gradient(model, optimizer, (x, y))
            share = len(x) / total
            mine = [share * p.grad for p in model.parameters() if p.grad is not None]
            folded = [a + b for a, b in zip(folded, mine, strict=True)] if folded else mine
        for parameter, grad in zip(model.parameters(), folded, strict=True):
            parameter.grad = grad
        optimizer.step()
    assert at == [len(used[worker]) for worker in range(workers)]
    for result in results:
        assert_close(result, parameters(model), 1e-11)
