"""What the tests of the paces share: models, optimizers, and schedules that a test decides."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.engine.exchange import spec
from paceline.protocol.log import STEP, Entry
from paceline.protocol.rounds import Waiting
from tests.driver import run_job

Tensors = list[torch.Tensor]
Make = Callable[[Any], optim.Optimizer]
_HANG_S = 60


class WholeSGD(optim.SGD):
    """A class that is not known, so that its parameters are never cut."""


# As they are stepped: fused where the engine chooses it, so that a plain loop is equal in every bit.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, fused=True),
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1, fused=True),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: optim.Adafactor(p),
    "whole": lambda p: WholeSGD(p, lr=0.05, momentum=0.9),
}


def served(name: str, servers: int) -> bool:
    """Can servers step it? Not a class that lives in a test."""
    return not servers or name != "whole"


CASES = [(name, servers) for name in OPTIMIZERS for servers in (0, 2) if served(name, servers)]


@contextmanager
def small_parts(values: int = 64) -> Iterator[None]:
    """Cut even small models into several parts where there are no servers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "_VALUES_PER_PART", values)
        yield


def make_model() -> nn.Module:
    """Every parameter has whole multiples of 64 values: a shorter rest is stepped alone in a plain loop, padded in an
    exchange, and torch's kernels round the last bit of those differently."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3, bias=False)).double()


def make_data(samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.sin(x[:, :3]) + 0.1)


def parameters(model: nn.Module) -> Tensors:
    return [p.detach().clone() for p in model.parameters()]


def gradient(model: nn.Module, optimizer: optim.Optimizer, batch: Sequence[torch.Tensor]) -> float:
    """Forward and backward, as a script does it."""
    x, y = batch
    loss = (model(x) - y).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    return float(loss.detach())


def plain(common: nn.Module, make: Make, batches: Sequence[Any], epochs: int = 1) -> Tensors:
    """The loop of one process."""
    model = copy.deepcopy(common)
    optimizer = make(model.parameters())
    for _ in range(epochs):
        for batch in batches:
            gradient(model, optimizer, batch)
            optimizer.step()
    return parameters(model)


def batches_of(data: TensorDataset, size: int) -> list[Any]:
    return list(DataLoader(data, batch_size=size))


def train(
    common: nn.Module,
    make: Make,
    data: TensorDataset,
    *,
    batch: int = 4,
    epochs: int = 1,
    turns: Turns | None = None,
    entries: list[Entry] | None = None,
) -> Callable[[Any], Tensors]:
    """A training script that answers with its parameters. ``entries`` takes in what is applied, in order."""

    def body(run: Any) -> Tensors:
        model = copy.deepcopy(common)
        optimizer = make(model.parameters())
        loader: Any
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(data, batch_size=batch))
        if entries is not None:
            note_entries(run, entries)
        with scheduled(run, turns):
            for _ in range(epochs):
                for one in loader:
                    gradient(model, optimizer, one)
                    if turns is not None:
                        turns.take(run.rank)
                    optimizer.step()
        return parameters(model)

    return body


def note_entries(run: Any, entries: list[Entry]) -> None:
    """From now on the STEPs that this worker appends to its first exchange's log are in ``entries`` too; it happens
    under the run's lock, so they are in the log's order."""
    arrivals = run.worker.exchanges[0]._arrivals
    close = arrivals._close

    def noted(entry: Entry) -> None:
        assert entry.kind == STEP
        entries.append(entry)
        close(entry)

    arrivals._close = noted


def note_uses(run: Any, uses: list[bool]) -> None:
    """From now on ``uses`` tells of every push of this worker through its first exchange: was it used?"""
    exchange = run.worker.exchanges[0]
    step = exchange.step

    def noted(push: Any) -> Any:
        round_ = step(push)
        uses.append(round_.counted)
        return round_

    exchange.step = noted


class Turns:
    """Workers begin their steps one by one, in an order that ``choose`` decides.

    It is asked when every worker is ready to begin a step, waits for another in the midst of one, or has left. It
    gets the ranks that are ready and answers with one of them, or None to let those that wait come on first.
    """

    def __init__(self, workers: int, choose: Callable[[list[int]], int | None]) -> None:
        self._choose = choose
        self._running, self._ready = set(range(workers)), set[int]()
        self._chosen: int | None = None
        self._changed = threading.Condition()

    def take(self, rank: int) -> None:
        """Block until it is this worker's turn to begin a step."""
        with self._changed:
            self._running.discard(rank)
            self._ready.add(rank)
            self._look()
            assert self._changed.wait_for(lambda: self._chosen == rank, _HANG_S), f"worker {rank} has no turn"
            self._chosen = None
            self._ready.discard(rank)
            self._running.add(rank)

    def pause(self, rank: int) -> None:
        """The worker waits for another, or has left."""
        with self._changed:
            self._running.discard(rank)
            self._look()

    def come_on(self, rank: int) -> None:
        with self._changed:
            self._running.add(rank)

    def _look(self) -> None:
        if self._running or not self._ready or self._chosen is not None:
            return
        self._chosen = self._choose(sorted(self._ready))
        self._changed.notify_all()


def in_order(*ranks: int) -> Callable[[list[int]], int | None]:
    """These workers, one after the other; the lowest that can when the list is at its end."""
    left = list(ranks)

    def choose(ready: list[int]) -> int | None:
        if not left:
            return ready[0]
        return left.pop(0) if left[0] in ready else None

    return choose


def drawn(numbers: Sequence[int]) -> Callable[[list[int]], int]:
    """One of those that can, by these numbers, over and over."""
    again = itertools.cycle(numbers)
    return lambda ready: ready[next(again) % len(ready)]


@contextmanager
def scheduled(run: Any, turns: Turns | None) -> Iterator[None]:
    """Tell ``turns`` whenever this worker waits for another."""
    if turns is None:
        yield
        return
    board, rank = run.worker.context.board, run.rank
    wait = board.wait

    def told(ask: Callable[[], Any]) -> Any:
        answer = ask()
        if not isinstance(answer, Waiting):
            return answer
        turns.pause(rank)
        try:
            return wait(ask)
        finally:
            turns.come_on(rank)

    board.wait = told
    try:
        yield
    finally:
        board.wait = wait
        turns.pause(rank)


class Counts:
    """A vector with a value for each worker: SGD of rate 1 with a gradient that is 1 in the worker's own place. Its
    values are, with the sign turned, how many of each worker's pushes have been applied to what is looked at."""

    def __init__(self, workers: int, scale: float = 1.0) -> None:
        self.values = nn.Parameter(torch.zeros(workers, dtype=torch.float64))
        self.optimizer = optim.SGD([self.values], lr=1.0)
        self._scale = scale

    def bring(self, rank: int) -> None:
        self.values.grad = torch.zeros_like(self.values)
        self.values.grad[rank] = self._scale

    @property
    def seen(self) -> list[int]:
        numbers = [-value for value in self.values.tolist()]
        assert all(number == int(number) for number in numbers), numbers
        return [int(number) for number in numbers]


def on_workers(body: Callable[[Any], Any], **options: Any) -> list[Any]:
    return run_job(body, assign="round_robin", **options)


def assert_close(mine: Tensors, other: Tensors, tolerance: float) -> None:
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_bits(mine: Tensors, other: Tensors) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
