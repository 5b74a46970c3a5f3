"""Claims about servers on several hosts: nothing of a run is different for where they are. The oracle is the same job
with all servers and workers on one host; where that is not defined to the bit, each sample counts once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import parse_pace
from paceline.engine.elsewhere import early
from tests.driver import run_job
from tests.unit.engine.test_remote import EPOCHS, MAKES, SAMPLES, Counting, count, drawn, embed, several, train

# So many servers on so many hosts: one elsewhere, two on one host, on two.
SPREADS = {"1 of 2": (2, 2), "2 of 4": (4, 2), "2 of 3": (3, 3)}
spreads = pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)


def apart(body: Callable[[Any], Any], spread: tuple[int, int] = (2, 2), workers: int = 2, **options: Any) -> list[Any]:
    """With the workers on hosts of their own."""
    servers, hosts = spread
    names = [f"w{worker}" for worker in range(workers)]
    told = {"servers": servers, "server_hosts": hosts, "servers_apart": True, "engine": "torchrun"}
    return run_job(body, workers=workers, elsewhere=True, hosts=names, **told, **_plain(options))


def here(body: Callable[[Any], Any], spread: tuple[int, int] = (2, 2), workers: int = 2, **options: Any) -> list[Any]:
    return run_job(body, workers=workers, elsewhere=False, servers=spread[0], **_plain(options))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return options | ({"pace": parse_pace(options["pace"])} if "pace" in options else {})


@pytest.mark.sampled
@spreads
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_rounds_come_to_the_same_bits(make: Callable[[Any], optim.Optimizer], spread: tuple[int, int]) -> None:
    assert apart(lambda run: train(run, make), spread) == here(lambda run: train(run, make), spread)


@pytest.mark.parametrize("how", [{"norm": True}, {"clip": True}], ids=str)
def test_so_they_do_with_batch_norm_and_with_clipping(how: dict[str, bool]) -> None:
    there = apart(lambda run: train(run, MAKES["adam"], **how))
    assert there == here(lambda run: train(run, MAKES["adam"], **how))


@pytest.mark.parametrize("bucket_bytes", [64, early.BUCKET_BYTES])
def test_what_goes_early_does_not_count_before_the_step(bucket_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven passes too: who comes back from the end of one asks the servers for what it has missed."""
    monkeypatch.setattr(early, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    assert apart(several) == here(several)


@pytest.mark.sampled
@spreads
@pytest.mark.parametrize("kind", [optim.SGD, optim.SparseAdam, optim.Adagrad])
def test_rows_go_to_the_server_that_has_them(kind: Callable[..., optim.Optimizer], spread: tuple[int, int]) -> None:
    assert apart(lambda run: embed(run, lambda p: kind(p, lr=0.1)), spread) == here(
        lambda run: embed(run, lambda p: kind(p, lr=0.1)), spread
    )


@pytest.mark.sampled
@spreads
@pytest.mark.parametrize("pace", ["quorum:1", "quorum:2", "bounded:0", "bounded:2", "async"])
def test_each_sample_counts_once_an_epoch(pace: str, spread: tuple[int, int]) -> None:
    for counts in apart(count, spread, workers=3, pace=pace):
        assert counts == [float(EPOCHS)] * SAMPLES


@pytest.mark.sampled
@pytest.mark.parametrize("servers", [2, 3])  # the last of them has the parameters: one elsewhere, or one at home
@pytest.mark.parametrize("pace", ["quorum:1", "bounded:2", "async"])
def test_who_has_ended_a_pass_has_all_that_was_brought_in_it(pace: str, servers: int) -> None:
    """Also what others have brought while its own last step was on the way. Who is faster may be in the next pass."""

    def body(run: Any) -> list[list[float]]:
        counts = nn.Parameter(torch.zeros(12, dtype=torch.float64))
        batches = DataLoader(TensorDataset(torch.arange(12)), batch_size=2)
        optimizer, loader = run.wrap(Counting([counts]), batches)
        seen = []
        for _ in range(40):
            for (numbers,) in loader:
                counts.grad = torch.zeros_like(counts)
                counts.grad[numbers] = 1.0
                optimizer.step()
            seen.append(counts.tolist())
        return seen

    for seen in apart(body, (servers, 2), workers=3, pace=pace):
        for epoch, values in enumerate(seen, 1):
            assert all(epoch <= value <= min(epoch + 1, 40) for value in values), (epoch, values)


@pytest.mark.parametrize("options", [{}, {"staleness_damping": True}, {"compensate": 0.1}, {"clip": 0.5}], ids=str)
def test_one_worker_is_the_same_on_arrival(options: dict[str, Any]) -> None:
    told = options | {"pace": "async", "workers": 1}
    assert apart(lambda run: train(run, MAKES["adam"]), **told) == here(lambda run: train(run, MAKES["adam"]), **told)


@pytest.mark.parametrize("kind", [optim.SGD, optim.SparseAdam, optim.Adagrad])
def test_one_worker_is_the_same_on_arrival_with_rows(kind: Callable[..., optim.Optimizer]) -> None:
    def body(run: Any) -> list[float]:
        return embed(run, lambda p: kind(p, lr=0.1))

    assert apart(body, workers=1, pace="async") == here(body, workers=1, pace="async")


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_the_optimizers_state_is_shown_and_loaded(pace: str) -> None:
    def body(run: Any) -> tuple[float, float]:
        weight = nn.Parameter(torch.zeros(300))
        optimizer = run.wrap(optim.Adam([weight], lr=0.1))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        run.barrier()
        state = copy.deepcopy(optimizer.state_dict())
        run.barrier()
        optimizer.load_state_dict(state)
        run.barrier()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        again = optimizer.state_dict()
        return float(state["state"][0]["exp_avg"].sum()), float(again["state"][0]["exp_avg"].sum())

    assert apart(body, workers=1, pace=pace) == here(body, workers=1, pace=pace)
    assert apart(body, pace="sync") == here(body, pace="sync")


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_what_a_script_loads_into_its_model_counts_for_all(pace: str) -> None:
    """And the optimizer's state stays."""

    def body(run: Any) -> list[float]:
        net = drawn(nn.Linear(64, 4, bias=False))
        net, optimizer = run.wrap(net, optim.SGD(net.parameters(), lr=1.0, momentum=0.5))
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
        run.barrier()
        net.load_state_dict({"weight": torch.full((4, 64), 3.0)})
        run.barrier()
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
        run.barrier()
        return sorted(set(net.weight.detach().flatten().tolist()))

    workers = 2 if pace == "sync" else 1
    assert apart(body, workers=workers, pace=pace) == here(body, workers=workers, pace=pace)


def test_a_gradient_that_is_not_finite_is_dropped() -> None:
    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(300, dtype=torch.float64))
        optimizer = run.wrap(optim.SGD([weight], lr=0.1))
        for step in range(4):
            weight.grad = torch.ones_like(weight)
            if step == 1 + run.rank:
                weight.grad[7] = torch.nan
            optimizer.step()
        run.barrier()
        return list(weight.detach().tolist())

    assert apart(body) == here(body)


def test_two_optimizers_have_each_their_ranges() -> None:
    def body(run: Any) -> list[float]:
        net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 1)).to(torch.float64))
        first, second = optim.Adam(net[0].parameters(), lr=0.01), optim.SGD(net[1].parameters(), lr=0.01)
        data = TensorDataset(torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
        net, first, second, loader = run.wrap(net, first, second, DataLoader(data, batch_size=4))
        for _ in range(EPOCHS):
            for (inputs,) in loader:
                first.zero_grad()
                second.zero_grad()
                net(inputs).pow(2).mean().backward()
                first.step()
                second.step()
        run.barrier()
        return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]

    assert apart(body) == here(body)


def test_a_store_is_with_home() -> None:
    def body(run: Any) -> float:
        store = run.store(value=torch.zeros(8))
        run.barrier()
        store.push(value=torch.ones(8))
        store.wait()
        run.barrier()
        return float(store.pull("value").sum())

    assert apart(body, pace="async") == here(body, pace="async")
