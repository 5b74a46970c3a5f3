"""Paces async, async:H and bounded apply each push once, in one order, and that order explains every bit."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Async, Bounded, Pace, parse_pace
from paceline.protocol.log import Entry
from tests.unit.engine.pacing import (
    CASES,
    OPTIMIZERS,
    Tensors,
    Turns,
    assert_close,
    assert_same_bits,
    batches_of,
    drawn,
    gradient,
    in_order,
    make_data,
    make_model,
    on_workers,
    parameters,
    plain,
    scheduled,
    small_parts,
    train,
)

BATCH = 4
SCHEDULE = st.lists(st.integers(0, 11), min_size=1, max_size=30)
ON_ARRIVAL = st.one_of(st.integers(0, 3).map(Bounded), st.integers(1, 4).map(Async))


# --- each push is applied exactly once ---


@settings(max_examples=30)
@given(
    st.integers(1, 4),
    st.integers(0, 3),
    ON_ARRIVAL,
    st.integers(0, 30),
    st.integers(1, 4),
    st.integers(1, 2),
    SCHEDULE,
)
def test_the_last_weight_is_the_sum_of_all_samples(
    workers: int, servers: int, pace: Pace, samples: int, batch: int, epochs: int, schedule: list[int]
) -> None:
    """SGD of rate 1 with the sum of the batch as gradient, in whole numbers; sums of local steps are brought at the
    end of a pass at the latest. All workers end with it."""
    turns = Turns(workers, drawn(schedule))

    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        values = torch.arange(1.0, samples + 1, dtype=torch.float64)
        run.wrap(optimizer)
        loader = run.wrap(DataLoader(TensorDataset(values), batch_size=batch))
        with scheduled(run, turns):
            for _ in range(epochs):
                for (numbers,) in loader:
                    weight.grad = numbers.sum() * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
                    turns.take(run.rank)
                    optimizer.step()
        return weight.tolist()

    with small_parts(1):
        results = on_workers(body, workers=workers, servers=servers, pace=pace)
    total = epochs * samples * (samples + 1) / 2
    assert results == [[-total, -2 * total, -4 * total]] * workers


# --- one worker ---


@pytest.mark.sampled
@pytest.mark.parametrize("pace", [Async(), Bounded(0)], ids=str)
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_one_worker_is_the_plain_loop_to_the_bit(name: str, servers: int, pace: Pace) -> None:
    model, data = make_model(), make_data(BATCH * 5 + 2)
    alone = plain(model, OPTIMIZERS[name], batches_of(data, BATCH), epochs=2)
    body = train(model, OPTIMIZERS[name], data, batch=BATCH, epochs=2)
    with small_parts():
        assert_same_bits(on_workers(body, workers=1, servers=servers, pace=pace)[0], alone)
        damped = on_workers(body, workers=1, servers=servers, pace=pace, staleness_damping=True)
    assert_same_bits(damped[0], alone)


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("every", [2, 3, 100])
def test_one_worker_with_summed_gradients_of_sgd_is_the_plain_loop(every: int, servers: int) -> None:
    model, data = make_model(), make_data(BATCH * 7)
    alone = plain(model, OPTIMIZERS["sgd"], batches_of(data, BATCH), epochs=2)
    body = train(model, OPTIMIZERS["sgd"], data, batch=BATCH, epochs=2)
    assert_close(on_workers(body, workers=1, servers=servers, pace=Async(every))[0], alone, 1e-12)


def test_pushing_every_step_is_plain_async() -> None:
    assert parse_pace("async:1") == parse_pace("async") == Async()


# --- the log explains everything ---


def replay(
    common: nn.Module, make: Callable[[Any], optim.Optimizer], data: TensorDataset, workers: int, log: list[Entry]
) -> tuple[Tensors, list[int]]:
    """Apply the log on one thread: a worker's n-th entry is its n-th batch, whose gradient is taken at the parameters
    of as many entries ago as the entry is stale. The parameters at the end, and each worker's number of entries."""
    batches = batches_of(data, BATCH)
    model, reader = copy.deepcopy(common), copy.deepcopy(common)
    optimizer, of_reader = make(model.parameters()), make(reader.parameters())
    versions = [parameters(model)]
    taken: dict[int, int] = defaultdict(int)
    for entry in log:
        (worker,) = entry.members
        number = taken[worker]
        taken[worker] += 1
        mine = batches[worker::workers]
        with torch.no_grad():
            for parameter, value in zip(reader.parameters(), versions[-1 - entry.staleness], strict=True):
                parameter.copy_(value)
        gradient(reader, of_reader, mine[number % len(mine)])
        for parameter, of in zip(model.parameters(), reader.parameters(), strict=True):
            parameter.grad = of.grad
        optimizer.step()
        versions.append(parameters(model))
    return versions[-1], [taken[worker] for worker in range(workers)]


@pytest.mark.parametrize("pace", [Async(), Bounded(2)], ids=str)
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_replaying_the_log_on_one_thread_gives_the_same_bits(name: str, servers: int, pace: Pace) -> None:
    workers, samples, epochs = 3, BATCH * 10 + 1, 2
    model, data = make_model(), make_data(samples)
    log: list[Entry] = []
    turns = Turns(workers, drawn([0, 0, 2, 1, 0, 0, 1, 2, 2, 2, 0]))
    body = train(model, OPTIMIZERS[name], data, batch=BATCH, epochs=epochs, turns=turns, entries=log)
    with small_parts():
        results = on_workers(body, workers=workers, servers=servers, pace=pace)
    expected, taken = replay(model, OPTIMIZERS[name], data, workers, log)
    assert taken == [epochs * len(range(w, -(-samples // BATCH), workers)) for w in range(workers)]
    assert [entry.version for entry in log] == list(range(1, sum(taken) + 1))
    assert max(entry.staleness for entry in log) > 0
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("servers", [0, 2])
def test_replaying_an_order_that_nobody_decided_gives_the_same_bits(servers: int) -> None:
    workers, model, data = 4, make_model(), make_data(BATCH * 60)
    log: list[Entry] = []
    with small_parts():
        body = train(model, OPTIMIZERS["adamw"], data, batch=BATCH, entries=log)
        results = on_workers(body, workers=workers, servers=servers, pace=Async())
    expected, taken = replay(model, OPTIMIZERS["adamw"], data, workers, log)
    assert taken == [15] * workers
    for result in results:
        assert_same_bits(result, expected)


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_replaying_summed_gradients_of_local_steps_gives_the_same(name: str, servers: int) -> None:
    """Each worker steps a copy of what it last pulled with its own optimizer, and its gradients are summed; the shared
    optimizer applies the sums in the order of the log."""
    workers, every, model, make = 2, 3, make_model(), OPTIMIZERS[name]
    data = make_data(BATCH * 17)
    log: list[Entry] = []
    turns = Turns(workers, drawn([0, 0, 0, 1, 0, 1, 1]))
    body = train(model, make, data, batch=BATCH, turns=turns, entries=log)
    results = on_workers(body, workers=workers, servers=servers, pace=Async(every))

    batches = batches_of(data, BATCH)
    shared = copy.deepcopy(model)
    stepped_by = make(shared.parameters())
    replicas = [copy.deepcopy(model) for _ in range(workers)]
    own = [make(replica.parameters()) for replica in replicas]
    left = [batches[worker::workers] for worker in range(workers)]
    versions = [parameters(shared)]
    for entry in log:
        (worker,) = entry.members
        replica, sums = replicas[worker], list[torch.Tensor]()
        with torch.no_grad():
            for parameter, value in zip(replica.parameters(), versions[-1 - entry.staleness], strict=True):
                parameter.copy_(value)
        period, left[worker] = left[worker][:every], left[worker][every:]
        for batch in period:
            gradient(replica, own[worker], batch)
            mine = [p.grad.clone() for p in replica.parameters() if p.grad is not None]
            sums = [a + b for a, b in zip(sums, mine, strict=True)] if sums else mine
            own[worker].step()
        for parameter, total in zip(shared.parameters(), sums, strict=True):
            parameter.grad = total
        stepped_by.step()
        versions.append(parameters(shared))
    assert left == [[], []]
    assert len(log) == 6
    for result in results:
        assert_close(result, versions[-1], 1e-12)


# --- what staleness does to a push ---


def apart(run: Any, turns: Turns, gradients: list[list[float]]) -> tuple[list[list[float]], list[float]]:
    """Steps with these gradients of this worker's, SGD of rate 1; the weight after each, and its staleness."""
    weight = nn.Parameter(torch.tensor([8.0, -2.0], dtype=torch.float64))
    optimizer = optim.SGD([weight], lr=1.0)
    run.wrap(optimizer)
    seen, stale = [], []
    with scheduled(run, turns):
        for mine in gradients:
            weight.grad = torch.tensor(mine, dtype=torch.float64)
            turns.take(run.rank)
            optimizer.step()
            seen.append(weight.tolist())
            stale.append(run.worker.progress.row.staleness)
        run.worker.go()
    return seen, stale


@pytest.mark.parametrize("servers", [0, 1, 2])
@pytest.mark.parametrize("pace", [Async(), Bounded(3)], ids=str)
def test_the_rate_is_divided_by_the_staleness_of_the_push(pace: Pace, servers: int) -> None:
    """Worker 0 pushes three times before worker 1's first, which is three steps old then. Its next is one step old."""
    turns = Turns(2, in_order(0, 0, 0, 1, 0, 1))
    (seen, stale), (other, other_stale) = on_workers(
        lambda run: apart(run, turns, [[1.0, 0.0]] * 4 if run.rank == 0 else [[0.0, 3.0], [0.0, 3.0]]),
        servers=servers,
        pace=pace,
        staleness_damping=True,
    )
    assert (stale, other_stale) == ([0, 0, 0, 1], [3, 1])
    assert seen == [[7.0, -2.0], [6.0, -2.0], [5.0, -2.0], [4.0, -3.0]]
    assert other == [[5.0, -3.0], [4.0, -6.0]]


@pytest.mark.parametrize("servers", [0, 1])
def test_without_damping_a_stale_push_counts_in_full(servers: int) -> None:
    turns = Turns(2, in_order(0, 0, 0, 1))
    (seen, _), (other, _) = on_workers(
        lambda run: apart(run, turns, [[1.0, 0.0]] * 3 if run.rank == 0 else [[0.0, 3.0]]),
        servers=servers,
        pace=Async(),
    )
    assert (seen[-1], other) == ([5.0, -2.0], [[5.0, -5.0]])


@pytest.mark.parametrize("damping", [False, True])
@pytest.mark.parametrize("servers", [0, 1, 2])
@pytest.mark.parametrize("pace", [Async(), Bounded(3)], ids=str)
def test_a_stale_gradient_is_compensated_for_the_delay(pace: Pace, servers: int, damping: bool) -> None:
    """g + lambda g^2 (w - w_pulled), by hand (Zheng et al. 2017, equation 10). Worker 1 has pulled (8, -2)."""
    turns = Turns(2, in_order(0, 0, 1, 0))
    (seen, _), (other, _) = on_workers(
        lambda run: apart(run, turns, [[1.0, 0.5], [1.0, -1.0], [2.0, 0.0]] if run.rank == 0 else [[3.0, 2.0]]),
        servers=servers,
        pace=pace,
        compensate=0.25,
        staleness_damping=damping,
    )
    assert seen[:2] == [[7.0, -2.5], [6.0, -1.5]]  # it is alone until then: nothing to compensate
    rate = 0.5 if damping else 1.0
    expected = [6.0 - rate * (3.0 + 0.25 * 9.0 * (6.0 - 8.0)), -1.5 - rate * (2.0 + 0.25 * 4.0 * (-1.5 + 2.0))]
    assert other == [expected]
    last = [expected[0] - (2.0 + 0.25 * 4.0 * (expected[0] - 6.0)), expected[1]]
    assert seen[2] == last


@pytest.mark.parametrize("servers", [0, 2])
def test_a_compensation_of_nothing_changes_no_bit(servers: int) -> None:
    model, data = make_model(), make_data(BATCH * 12)
    results = []
    for compensate in (None, 0.0):
        turns = Turns(2, in_order(*[0, 0, 1, 0, 1, 1] * 2))
        body = train(model, OPTIMIZERS["adamw"], data, batch=BATCH, turns=turns)
        results.append(on_workers(body, servers=servers, pace=Async(), compensate=compensate)[0])
    assert_same_bits(*results)
