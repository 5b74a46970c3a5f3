"""Claims about workers of two hosts, several on each: what a host's workers bring crosses between the hosts once, and
the parameters are the same bits on both. The oracle is the same job with local workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.engine.elsewhere import early, host_push, remote_host
from tests.driver import run_job
from tests.unit.engine.test_remote import EPOCHS, MAKES, SAMPLES, count, data, drawn, several, train

# Who is where; "" is home's host.
PLACES = {"2+2": ("", "", "b", "b"), "1+3": ("", "b", "b", "b"), "2+1": ("", "", "b"), "mixed": ("", "b", "", "b")}


class Seen:
    """What was done in a job: rounds that a host pushed as one, workers that left their host's mirror."""

    def __init__(self) -> None:
        self.as_one = self.left = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    told, push, leave = Seen(), host_push.HostPush._push_as_one, remote_host.RemoteHost.leave

    def pushed(self: Any, number: int) -> None:
        told.as_one += 1
        push(self, number)

    def left(self: Any, one: Any) -> None:
        told.left += 1
        leave(self, one)

    monkeypatch.setattr(host_push.HostPush, "_push_as_one", pushed)
    monkeypatch.setattr(remote_host.RemoteHost, "leave", left)
    return told


def both(body: Callable[[Any], Any], places: tuple[str, ...], **options: Any) -> tuple[list[float], list[float]]:
    """What a job of two hosts, and of local workers, comes to; all workers of the two hosts to the same bits."""
    there = run_job(body, workers=len(places), elsewhere=True, hosts=places, **options)
    assert all(one == there[0] for one in there)
    return there[0], run_job(body, workers=len(places), elsewhere=False, **options)[0]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_two_hosts_train_as_one_to_the_same_bits(
    make: Callable[[Any], optim.Optimizer], places: tuple[str, ...], seen: Seen
) -> None:
    two, one = both(lambda run: train(run, make), places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (EPOCHS * SAMPLES // 4 // len(places), 0)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bucket_bytes", [64, early.BUCKET_BYTES])
def test_passes_may_be_uneven_and_gradients_missing_or_changed(
    places: tuple[str, ...], bucket_bytes: int, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", bucket_bytes)
    two, one = both(several, places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("assign", ["lease", "round_robin"])
@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_each_sample_counts_once_an_epoch(places: tuple[str, ...], assign: str, kind: str) -> None:
    there = run_job(lambda run: count(run, kind), workers=len(places), elsewhere=True, hosts=places, assign=assign)
    assert there == [[float(EPOCHS)] * SAMPLES] * len(places)


@pytest.mark.parametrize("how", [{"norm": True}, {"clip": True}], ids=str)
def test_so_it_is_with_batch_norm_and_with_clipping(how: dict[str, bool], seen: Seen) -> None:
    # Not Adam: a bias before batch norm has a gradient of nothing but rounding, and Adam makes a step of it.
    two, one = both(lambda run: train(run, MAKES["momentum"], **how), PLACES["2+2"])
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.left == (2 if "clip" in how else 0)  # a norm is that of gradients that are at home


def evaluating(run: Any, *, bad: int | None = None) -> list[float]:
    """With an evaluation after every pass, batches of several sizes, and one gradient of worker ``bad`` not finite."""
    net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.float64))
    optimizer = optim.Adam(net.parameters(), lr=0.01)
    loader, test = DataLoader(data(), batch_size=5), DataLoader(data(), batch_size=16)
    net, optimizer, loader, test = run.wrap(net, optimizer, loader, test)
    for epoch in range(EPOCHS):
        net.train()
        for number, (inputs, wanted) in enumerate(loader):
            optimizer.zero_grad()
            ((net(inputs) - wanted) ** 2).mean().backward()
            if (epoch, number, run.rank) == (1, 0, bad):
                net[0].weight.grad[0, 0] = torch.inf
            optimizer.step()
        net.eval()
        for inputs, _ in test:
            net(inputs)
    run.barrier()
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_evaluations_and_gradients_that_are_not_finite(places: tuple[str, ...], bad: int | None, seen: Seen) -> None:
    two, one = both(lambda run: evaluating(run, bad=bad), places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_what_scripts_load_counts_for_all(places: tuple[str, ...], seen: Seen) -> None:
    def body(run: Any) -> tuple[float, float]:
        net = nn.Linear(2, 1, bias=False)
        net, optimizer = run.wrap(net, optim.Adam(net.parameters(), lr=1.0))
        for value in (3.0, 5.0):
            net.load_state_dict({"weight": torch.full((1, 2), value)})
            for _ in range(2):
                net.weight.grad = torch.ones_like(net.weight)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        return float(net.weight.detach().sum()), float(optimizer.state_dict()["state"][0]["step"])

    assert run_job(body, workers=len(places), elsewhere=True, hosts=places) == [(pytest.approx(6.0), 4.0)] * len(places)
    assert (seen.as_one, seen.left) == (4, 0)


def test_sparse_rows_and_half_precision_travel_alone(seen: Seen) -> None:
    def body(run: Any) -> list[float]:
        table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
        half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
        loader = DataLoader(TensorDataset(torch.arange(SAMPLES) % 17), batch_size=4)
        table, first, second, loader = run.wrap(
            table, optim.SGD(table.parameters(), lr=0.1), optim.SGD([half], lr=0.5), loader
        )
        for (numbers,) in loader:
            first.zero_grad()
            (table(numbers) ** 2).sum().backward()
            half.grad = torch.ones_like(half)
            first.step()
            second.step()
        run.barrier()
        return [*table.weight.flatten().tolist(), *half.tolist()]

    two, one = both(body, PLACES["2+2"])
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert (seen.as_one, seen.left) == (0, 0)
