"""Each sample counts once an epoch, at every pace, assignment, number of workers and servers.

A sample's gradient is one in the place of its number and zero elsewhere, the learning rate is 1 and numbers are
float64: so after E epochs every weight is exactly E, whoever trained on what, if nothing was lost or counted twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from paceline.config import ASSIGNMENTS, Async, Bounded, Local, Pace, Quorum, Sync
from paceline.protocol.rounds import Waiting
from tests.driver import run_job

EPOCHS = 2
Slow = dict[int, int]  # worker -> how many batches of the others' it lets pass before its own


class Stream(IterableDataset[torch.Tensor]):
    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(self._samples).double())


def numbers(samples: int) -> TensorDataset:
    return TensorDataset(torch.arange(samples).double())


LOADERS: dict[str, Callable[[int, int], Any]] = {
    "in order": lambda n, size: DataLoader(numbers(n), batch_size=size),
    "shuffled": lambda n, size: DataLoader(numbers(n), batch_size=size, shuffle=True),
    "batch sampler": lambda n, size: DataLoader(
        numbers(n),
        batch_sampler=BatchSampler(RandomSampler(range(n), generator=torch.Generator().manual_seed(3)), size, False),
    ),
    "one sample": lambda n, size: DataLoader(TensorDataset(torch.arange(n).double().view(n, 1)), batch_size=None),
    "stream": lambda n, size: DataLoader(Stream(n), batch_size=size),
    "list": lambda n, size: [torch.arange(i, min(i + size, n)).double() for i in range(0, n, size)],
}


def count(make: Callable[[], Any], samples: int, *, every: int = 1, epochs: int = EPOCHS) -> Callable[[Any], Any]:
    """A script that counts its samples in a weight; a step for ``every`` batches."""

    def body(run: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        optimizer, loader = run.wrap(optimizer, make())
        for _ in range(epochs):
            for number, batch in enumerate(loader, 1):
                found = batch[0] if isinstance(batch, list) else batch
                gradient = torch.zeros_like(weight)
                gradient[found.long().reshape(-1)] = -1.0
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
                if number % every == 0:
                    optimizer.step()
                    weight.grad = None
            if weight.grad is not None:
                optimizer.step()
                weight.grad = None
        if every > 1:  # a step behind the end of the last epoch may be anybody's
            run.barrier()
            run.worker.exchanges[0].refresh()
        return weight.detach().clone()

    return body


def assert_counted(weights: list[torch.Tensor], times: float) -> None:
    for weight in weights:
        assert torch.equal(weight, torch.full_like(weight, times)), weight


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    loader=st.sampled_from(sorted(LOADERS)),
    samples=st.integers(1, 60),
    size=st.integers(1, 7),
    pace=st.sampled_from([Async(), Async(3), Bounded(0), Bounded(2), Quorum(1)]),
    assign=st.sampled_from(ASSIGNMENTS),
    workers=st.integers(1, 4),
    servers=st.integers(0, 3),
)
def test_each_sample_counts_once_an_epoch(
    loader: str, samples: int, size: int, pace: Pace, assign: str, workers: int, servers: int
) -> None:
    body = count(lambda: LOADERS[loader](samples, size), samples)
    assert_counted(run_job(body, workers=workers, servers=servers, pace=pace, assign=assign), EPOCHS)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    loader=st.sampled_from(sorted(LOADERS)),
    samples=st.integers(1, 60),
    size=st.integers(1, 7),
    pace=st.sampled_from([Sync(), Local(1), Local(3), Local(2, outer_momentum=0.5)]),
    assign=st.sampled_from(ASSIGNMENTS),
    workers=st.integers(1, 4),
    servers=st.integers(0, 2),
)
def test_in_rounds_each_sample_is_in_one_step_of_one_worker_an_epoch(
    loader: str, samples: int, size: int, pace: Pace, assign: str, workers: int, servers: int
) -> None:
    """A round takes means, so the weights cannot be counted by; the samples of every step that was taken can."""

    def body(run: Any) -> tuple[list[list[int]], float]:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer, shared = run.wrap(optim.SGD([weight], lr=1.0), LOADERS[loader](samples, size))
        epochs = []
        for _ in range(EPOCHS):
            stepped: list[int] = []
            for batch in shared:
                found = batch[0] if isinstance(batch, list) else batch
                weight.grad = found.mean().reshape(1)
                optimizer.step()
                stepped += [int(number) for number in found.reshape(-1)]
            epochs.append(stepped)
        return epochs, weight.item()

    results = run_job(body, workers=workers, servers=servers, pace=pace, assign=assign)
    for epoch in range(EPOCHS):
        assert sorted(number for epochs, _ in results for number in epochs[epoch]) == list(range(samples))
    assert len({weight for _, weight in results}) == 1


@pytest.mark.parametrize("pace", [Async(), Bounded(1)], ids=str)
@pytest.mark.parametrize("loader", LOADERS)
def test_data_that_worker_0_sends_count_once_too(loader: str, pace: Pace) -> None:
    for assign in ("lease", "round_robin", "hash"):
        body = count(lambda: LOADERS[loader](53, 4), 53)
        assert_counted(run_job(body, workers=3, pace=pace, assign=assign, data="served"), EPOCHS)


@pytest.mark.parametrize("loader", LOADERS)
def test_data_of_ones_own_are_all_trained_on(loader: str) -> None:
    body = count(lambda: LOADERS[loader](31, 4), 31)
    assert_counted(run_job(body, workers=3, pace=Async(), data="own"), EPOCHS * 3)


@pytest.mark.parametrize("pace", [Async(), Bounded(1)], ids=str)
def test_several_batches_a_step_count_once(pace: Pace) -> None:
    body = count(lambda: LOADERS["shuffled"](50, 3), 50, every=4)
    assert_counted(run_job(body, workers=3, pace=pace, assign="lease"), EPOCHS)


@pytest.mark.parametrize("assign", ["lease", "round_robin"])
def test_a_quorum_of_two_averages_what_it_uses_and_the_rest_comes_again(assign: str) -> None:
    """The gradient is the batch's size in each of its places: the mean weighted by samples of two batches of s then
    has s / 2 there, and so has every sample in the end, or s where a round had one push."""
    samples, size = 48, 2
    counted: list[int] = []

    def body(run: Any) -> Any:
        weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        optimizer, loader = run.wrap(optim.SGD([weight], lr=1.0), LOADERS["in order"](samples, size))
        for (batch,) in loader:
            weight.grad = torch.zeros_like(weight)
            weight.grad[batch.long()] = -1.0
            optimizer.step()
        counted.append(run.worker.step_number)
        return weight.detach().clone()

    weights = run_job(body, workers=3, pace=Quorum(2), assign=assign)
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert set(weights[0].tolist()) <= {0.5, 1.0}
    alone = int((weights[0] == 1.0).sum()) // size  # batches in rounds of one push
    assert len(set(counted)) == 1
    assert counted[0] == alone + (samples // size - alone) // 2


@pytest.mark.parametrize("pace", [Async(), Bounded(1)], ids=str)
def test_what_is_evaluated_is_not_leased(pace: Pace) -> None:
    """Each worker evaluates its part of the training data in mid-epoch and after it; worker 0 also all by itself."""
    samples = 40
    evaluated: list[int] = []

    def body(run: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        optimizer, loader = run.wrap(optim.SGD([weight], lr=1.0), LOADERS["shuffled"](samples, 3))
        other = run.wrap(LOADERS["in order"](samples, 3))
        for _ in range(EPOCHS):
            for number, (batch,) in enumerate(loader):
                weight.grad = torch.zeros_like(weight)
                weight.grad[batch.long()] = -1.0
                optimizer.step()
                if number == 1 and run.is_main:
                    with torch.no_grad():
                        evaluated.append(sum(len(found) for (found,) in other))
            with torch.no_grad():
                evaluated.append(sum(len(found) for (found,) in loader))
        return weight.detach().clone()

    assert_counted(run_job(body, workers=3, pace=pace, assign="lease"), EPOCHS)
    assert sum(evaluated) >= EPOCHS * samples


def test_a_pass_without_a_step_gives_its_batches_back() -> None:
    samples = 30

    def body(run: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        optimizer, loader = run.wrap(optim.SGD([weight], lr=1.0), LOADERS["in order"](samples, 2))
        if run.is_main:  # the mean of the data, say
            sum(float(batch.sum()) for (batch,) in loader)
        for (batch,) in loader:
            weight.grad = torch.zeros_like(weight)
            weight.grad[batch.long()] = -1.0
            optimizer.step()
        return weight.detach().clone()

    assert_counted(run_job(body, workers=2, pace=Async()), 1)


def test_who_finds_nothing_left_waits_for_what_the_others_still_train_on() -> None:
    """Though it has read the loader without a step before, and has not trained on it itself."""
    samples = 30
    may_look, has_looked = threading.Event(), threading.Event()

    def body(run: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.zeros(samples, dtype=torch.float64))
        optimizer, loader = run.wrap(optim.SGD([weight], lr=1.0), LOADERS["in order"](samples, 2))
        context = run.worker.context
        if run.is_main:
            sum(float(batch.sum()) for (batch,) in loader)
            context.ring()
            may_look.wait()
        else:
            context.board.wait(lambda: None if context.board.evaluated[0] else Waiting(0, "it reads the loader"))
        for number, (batch,) in enumerate(loader, 1):
            weight.grad = torch.zeros_like(weight)
            weight.grad[batch.long()] = -1.0
            if number == samples // 2:  # all but this one count
                may_look.set()
                context.board.wait(
                    lambda: None if context.board.parked[0] or has_looked.is_set() else Waiting(0, "it is to look")
                )
            optimizer.step()
        found = weight.detach().clone()
        if run.is_main:
            has_looked.set()
            context.ring()
        return found

    assert_counted(run_job(body, workers=2, pace=Async(), assign="lease"), 1)
