"""Pace local against copies that train alone and are averaged by hand, and against DiLoCo written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Local, Sync
from tests.unit.engine.pacing import (
    CASES,
    OPTIMIZERS,
    Make,
    Tensors,
    assert_close,
    assert_same_bits,
    batches_of,
    gradient,
    make_data,
    make_model,
    on_workers,
    parameters,
    plain,
    small_parts,
    train,
)

BATCH = 4
UNEVEN = BATCH * 9 + 1  # a short batch, and a last round without some of the workers
Outer = Callable[[Tensors, Tensors], Tensors]  # (shared parameters, mean of shared - own) -> the next


class Averaging:
    """The outer step that leaves the mean of the workers' own parameters."""

    def __call__(self, shared: Tensors, mean: Tensors) -> Tensors:
        return [s - m for s, m in zip(shared, mean, strict=True)]


class DiLoCo:
    """SGD with Nesterov momentum by Sutskever et al. 2013, as torch has it: m = mu m + d, w = w - lr (d + mu m)."""

    def __init__(self, lr: float, momentum: float) -> None:
        self._lr, self._momentum, self._buffer = lr, momentum, Tensors()

    def __call__(self, shared: Tensors, mean: Tensors) -> Tensors:
        mu, before = self._momentum, self._buffer or [torch.zeros_like(d) for d in mean]
        self._buffer = [mu * m + d for m, d in zip(before, mean, strict=True)]
        return [s - self._lr * (d + mu * m) for s, d, m in zip(shared, mean, self._buffer, strict=True)]


def by_hand(
    common: nn.Module, make: Make, batches: list[Any], workers: int, every: int, outer: Outer, *, epochs: int = 1
) -> Tensors:
    """Each worker has a copy and an optimizer that it keeps; after ``every`` steps, or at the end of its part of a
    pass, those who have trained since meet: the mean of (shared - own) weighted by samples goes to the outer step."""
    models = [copy.deepcopy(common) for _ in range(workers)]
    optimizers = [make(model.parameters()) for model in models]
    shared = parameters(common)
    for _ in range(epochs):
        parts = [batches[worker::workers] for worker in range(workers)]
        for start in range(0, max(map(len, parts)), every):
            periods = [(w, part[start : start + every]) for w, part in enumerate(parts) if part[start : start + every]]
            total = sum(len(x) for _, period in periods for x, _ in period)
            mean = [torch.zeros_like(value) for value in shared]
            for worker, period in periods:
                model = models[worker]
                with torch.no_grad():
                    for parameter, value in zip(model.parameters(), shared, strict=True):
                        parameter.copy_(value)
                for batch in period:
                    gradient(model, optimizers[worker], batch)
                    optimizers[worker].step()
                share = sum(len(x) for x, _ in period) / total
                for m, value, own in zip(mean, shared, parameters(model), strict=True):
                    m += share * (value - own)
            shared = outer(shared, mean)
    return shared


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("samples", [BATCH * 12, UNEVEN])
def test_averaging_after_every_step_of_sgd_is_sync(workers: int, servers: int, samples: int) -> None:
    body = train(make_model(), OPTIMIZERS["sgd"], make_data(samples), batch=BATCH, epochs=2)
    together = on_workers(body, workers=workers, servers=servers, pace=Sync())
    for result in on_workers(body, workers=workers, servers=servers, pace=Local(1)):
        assert_close(result, together[0], 1e-12)


@pytest.mark.sampled
@pytest.mark.parametrize("every", [2, 3, 100])
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_averaging_is_the_mean_by_samples_of_what_the_workers_came_to(name: str, servers: int, every: int) -> None:
    """Each with an optimizer of its own, whose state it keeps; a period ends early at the end of a pass."""
    workers, model, data, make = 2, make_model(), make_data(UNEVEN), OPTIMIZERS[name]
    expected = by_hand(model, make, batches_of(data, BATCH), workers, every, Averaging(), epochs=2)
    body = train(model, make, data, batch=BATCH, epochs=2)
    results = on_workers(body, workers=workers, servers=servers, pace=Local(every))
    for result in results:
        assert_close(result, expected, 1e-11)
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("workers", [3, 4])
@pytest.mark.parametrize("servers", [0, 1, 3])
def test_more_workers_average_too(workers: int, servers: int) -> None:
    model, data, make = make_model(), make_data(UNEVEN + BATCH * 4), OPTIMIZERS["momentum"]
    expected = by_hand(model, make, batches_of(data, BATCH), workers, 2, Averaging(), epochs=3)
    body = train(model, make, data, batch=BATCH, epochs=3)
    with small_parts():
        for result in on_workers(body, workers=workers, servers=servers, pace=Local(2)):
            assert_close(result, expected, 1e-11)


@pytest.mark.sampled
@pytest.mark.parametrize("every", [1, 3, 100])
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_one_worker_that_averages_with_nobody_is_the_plain_loop(name: str, servers: int, every: int) -> None:
    """With the sign of the outer gradient turned it would not be."""
    model, data = make_model(), make_data(BATCH * 7 + 2)
    alone = plain(model, OPTIMIZERS[name], batches_of(data, BATCH), epochs=2)
    body = train(model, OPTIMIZERS[name], data, batch=BATCH, epochs=2)
    assert_close(on_workers(body, workers=1, servers=servers, pace=Local(every))[0], alone, 1e-12)


@pytest.mark.sampled
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.0)])
@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nesterov_is_diloco(name: str, workers: int, servers: int, lr: float, momentum: float) -> None:
    """Several rounds, so that the momentum counts; in the last of a pass some workers are not."""
    model, data, make = make_model(), make_data(UNEVEN), OPTIMIZERS[name]
    expected = by_hand(model, make, batches_of(data, BATCH), workers, 2, DiLoCo(lr, momentum), epochs=2)
    body = train(model, make, data, batch=BATCH, epochs=2)
    results = on_workers(body, workers=workers, servers=servers, pace=Local(2, lr, momentum))
    for result in results:
        assert_close(result, expected, 1e-11)
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("servers", [0, 1])
def test_each_worker_keeps_the_state_of_its_own_optimizer(servers: int) -> None:
    """Momentum of worker w's own gradients alone: w+1 in every step, 0.5 kept."""

    def body(run: Any) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0, momentum=0.5)
        run.wrap(optimizer)
        for _ in range(4):
            weight.grad = torch.full_like(weight, run.rank + 1.0)
            optimizer.step()
        return float(optimizer.state_dict()["state"][0]["momentum_buffer"])

    assert on_workers(body, workers=3, servers=servers, pace=Local(2)) == [1.875, 3.75, 5.625]


@pytest.mark.parametrize("servers", [0, 2])
def test_between_rounds_workers_differ_and_nothing_is_seen_of_the_others(servers: int) -> None:
    """Whole numbers: worker w steps by w+1; after three steps both stand at the mean of 3 and 6."""

    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        seen = []
        for _ in range(6):
            weight.grad = torch.full_like(weight, -(run.rank + 1.0))
            optimizer.step()
            seen.append(weight.item())
        return seen

    assert on_workers(body, servers=servers, pace=Local(3)) == [[1, 2, 4.5, 5.5, 6.5, 9], [2, 4, 4.5, 6.5, 8.5, 9]]


@pytest.mark.parametrize("servers", [0, 1])
def test_the_end_of_a_pass_ends_the_period(servers: int) -> None:
    """Five and four batches, periods of three: the second round is of two steps and one, and weighs them so."""

    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        loader = run.wrap(DataLoader(TensorDataset(torch.arange(9.0))))
        for _ in loader:
            weight.grad = torch.full_like(weight, -6.0)
            optimizer.step()
        return [weight.item(), run.step]

    # round 1: both at 18; round 2: (2 x 30 + 1 x 24) / 3
    assert on_workers(body, servers=servers, pace=Local(3)) == [[28.0, 5]] * 2
