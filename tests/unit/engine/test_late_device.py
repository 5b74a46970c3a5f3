"""A GPU for tests on machines without one: a tensor subclass that says "cuda" and is as late as a device may be.

What is queued from the device to the host is not there before the stream is waited for: until then the place holds
NaN. What is queued from the host must not change before that: the stream compares what it finds then with what there
was. Everything else runs on the CPU, so a run must come to the bits of one without the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Async, Bounded, Local, Pace, Quorum, Sync
from tests.driver import run_job


class Stream:
    """The queue of one thread's device."""

    def __init__(self) -> None:
        self._queued: list[Callable[[], None]] = []
        self.waits = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if isinstance(target, Late):
            before = source.clone()

            def check() -> None:
                assert torch.equal(source, before), "the host wrote over what a queued copy still reads"

            self._queued.append(check)
            plain(target).copy_(source)
        else:
            value = plain(source).clone()
            target.fill_(torch.nan)
            self._queued.append(lambda: _fill(target, value))

    def synchronize(self) -> None:
        self.waits += 1
        queued, self._queued = self._queued, []
        for act in queued:
            act()


def _fill(target: torch.Tensor, value: torch.Tensor) -> None:
    target.copy_(value)


class _Streams(threading.local):
    def __init__(self) -> None:
        self.mine = Stream()


_streams = _Streams()


class Late(torch.Tensor):
    """A tensor on the device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda:0")
        if func in (torch.Tensor.copy_, torch._foreach_copy_):
            if kwargs.get("non_blocking"):
                many = func is torch._foreach_copy_
                for target, source in zip(args[0], args[1], strict=True) if many else [(args[0], args[1])]:
                    _streams.mine.copy(target, source)
                return args[0]
            _streams.mine.synchronize()
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.to and torch.device("cpu") in args:
            _streams.mine.synchronize()
            return plain(result)
        return result


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.as_subclass(torch.Tensor)


def late(value: torch.Tensor) -> torch.Tensor:
    return value.as_subclass(Late)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The address and length of all memory that was pinned."""
    pinned: list[tuple[int, int]] = []
    runtime = SimpleNamespace(cudaHostRegister=lambda address, size, flags: pinned.append((address, size)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda result: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _streams.mine)
    return pinned


def train(
    place: Callable[[torch.Tensor], torch.Tensor], make: Callable[[list[nn.Parameter]], optim.Optimizer]
) -> Callable[[Any], list[torch.Tensor]]:
    """Fit a line; ``place`` puts a tensor on the device."""

    def body(run: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        inputs = torch.randn(24, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        weights = [
            nn.Parameter(place(torch.ones(3, 2, dtype=torch.float64))),
            nn.Parameter(place(torch.zeros(2).double())),
        ]
        optimizer, loader = run.wrap(make(weights), DataLoader(TensorDataset(inputs), batch_size=2))
        for _ in range(2):
            for (batch,) in loader:
                optimizer.zero_grad()
                given = place(batch)
                ((given @ weights[0] + weights[1] - 3.0) ** 2).mean().backward()
                for weight in weights:
                    weight.grad = place(weight.grad)  # autograd keeps the values, not the class
                optimizer.step()
        _streams.mine.synchronize()
        return [plain(weight.detach()).clone() for weight in weights]

    return body


PACES: list[tuple[Pace, int]] = [
    (Sync(), 3),
    (Local(4), 2),
    (Local(3, outer_momentum=0.5), 2),
    (Quorum(1), 1),
    (Bounded(0), 1),
    (Async(), 1),
    (Async(3), 1),
]


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize(("pace", "workers"), PACES, ids=str)
def test_a_late_device_comes_to_the_same_bits(
    pace: Pace, workers: int, servers: int, device: list[tuple[int, int]]
) -> None:
    def make(weights: list[nn.Parameter]) -> optim.Optimizer:
        return optim.AdamW(weights, lr=0.05)

    expected = run_job(train(lambda x: x, make), workers=workers, servers=servers, pace=pace, assign="round_robin")
    assert not device
    found = run_job(train(late, make), workers=workers, servers=servers, pace=pace, assign="round_robin")
    assert len(device) == 2 * workers, "each worker pins the parameters and its own slot, once"
    for there, here in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("pace", [Quorum(2), Bounded(2), Async(), Async(3)], ids=str)
def test_no_queued_copy_is_overtaken_by_the_pushes_of_others(
    pace: Pace, servers: int, device: list[tuple[int, int]]
) -> None:
    def make(weights: list[nn.Parameter]) -> optim.Optimizer:
        return optim.SGD(weights, lr=0.05)

    results = run_job(train(late, make), workers=3, servers=servers, pace=pace)
    for mine in results:
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(mine, results[0], strict=True))
