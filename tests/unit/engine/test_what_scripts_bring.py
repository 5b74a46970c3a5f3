"""Buffers, loss scaling, checkpoints and schedulers of a script, at every pace."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Pace, parse_pace
from paceline.errors import ConfigError
from tests.driver import run_job

PACES = [parse_pace(word) for word in ("sync", "quorum:2", "bounded:1", "async", "async:2", "local:2")]
every_pace = pytest.mark.parametrize("pace", PACES, ids=str)
servers_or_none = pytest.mark.parametrize("servers", [0, 2])
GENERATOR = torch.Generator().manual_seed(11)
X = torch.randn(24, 4, generator=GENERATOR)
Y = X.sum(1, keepdim=True)
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))


def fit(model: nn.Module, optimizer: optim.Optimizer, loader: Any) -> None:
    for x, y in loader:
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()


# --- buffers ---


class Counted(nn.Module):
    """Keeps the mean of what its worker has seen, and how many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))


@every_pace
def test_floating_buffers_become_their_mean_by_samples_and_counts_the_largest(pace: Pace) -> None:
    """Worker 0 has two batches of 3, worker 1 one of 3 and one of 1: 6 and 4 samples."""

    def body(run: Any) -> tuple[float, int, float]:
        model = Counted()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        data = TensorDataset(torch.arange(10.0))
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(data, batch_size=3))
        for _ in range(2):
            model.mean.fill_(10.0 if run.rank == 0 else 20.0)
            for _ in loader:
                model.weight.grad = torch.ones(1)
                optimizer.step()
                if not run.worker.progress.batch_dropped:
                    model.batches += 1 + run.rank
            between = model.mean.item()
        return model.mean.item(), int(model.batches), between

    assert run_job(body, pace=pace, assign="round_robin") == [(14.0, 4 + 4, 14.0)] * 2


def test_batch_norm_ends_equal_on_all_workers_and_near_one_process() -> None:
    common = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))

    def body(run: Any) -> list[torch.Tensor]:
        model = copy.deepcopy(common)
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=4))
        for _ in range(4):
            fit(model, optimizer, loader)
        return [tensor.detach().clone() for tensor in model.state_dict().values()]

    first, *others = run_job(body, workers=3)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# --- GradScaler ---


@every_pace
@servers_or_none
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_a_push_of_no_weight(pace: Pace, servers: int, fused: bool) -> None:
    """Worker 1's gradient overflows once: nobody falls out of step, and no infinity gets into the parameters."""

    def body(run: Any) -> list[torch.Tensor]:
        model = copy.deepcopy(MODEL)
        optimizer: Any = optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=4))
        for _ in range(2):
            for number, (x, y) in enumerate(loader):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = (model(x) - y).pow(2).mean()
                if run.rank == 1 and number == 1:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        return [parameter.detach().clone() for parameter in model.parameters()]

    first, *others = run_job(body, workers=2, servers=servers, pace=pace, assign="round_robin")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in first)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_at_sync_a_skipped_step_leaves_the_others_mean() -> None:
    """Worker 0's gradient is 1, worker 1's overflows: the step is worker 0's alone."""

    def body(run: Any) -> float:
        weight = nn.Parameter(torch.zeros(1))
        optimizer = optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer, loader = run.wrap(optimizer, DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2))
        for _ in loader:
            scaler.scale(weight.sum() * (1.0 if run.rank == 0 else float("inf"))).backward()
            scaler.step(optimizer)
            scaler.update()
        return weight.item()

    assert run_job(body, workers=2) == [-1.0, -1.0]


# --- checkpoints loaded after wrap ---


@every_pace
@servers_or_none
def test_what_is_loaded_after_wrap_counts_for_all(pace: Pace, servers: int) -> None:
    loaded = copy.deepcopy(MODEL).state_dict()
    for tensor in loaded.values():
        tensor.fill_(0.25)

    def body(run: Any) -> tuple[list[float], int]:
        model = copy.deepcopy(MODEL)
        optimizer: Any = optim.Adam(model.parameters(), lr=0.0)
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=4))
        fit(model, optimizer, loader)
        model.load_state_dict(loaded)
        optimizer.load_state_dict(optim.Adam(model.parameters(), lr=0.0).state_dict())
        forgotten = len(optimizer.state_dict()["state"]) if run.is_main else 0
        run.barrier()
        fit(model, optimizer, loader)
        return sorted({value for p in model.parameters() for value in p.flatten().tolist()}), forgotten

    for values, forgotten in run_job(body, workers=2, servers=servers, pace=pace, assign="round_robin"):
        assert values == [0.25]
        assert forgotten == 0


@every_pace
def test_copies_of_a_model_are_the_scripts_own(pace: Pace) -> None:
    """Of its moving average, say, or of the best so far; in memory, and in a file with nothing of the run in it."""

    def body(run: Any) -> tuple[float, float, bytes]:
        model = nn.Linear(4, 1, bias=False)
        optimizer: Any = optim.SGD(model.parameters(), lr=0.0)
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=4))
        fit(model, optimizer, loader)
        best = copy.deepcopy(model)
        average = optim.swa_utils.AveragedModel(model)
        file = io.BytesIO()
        torch.save(model, file)  # noqa: TID251  as scripts do
        file.seek(0)
        for other in (best, average.module, torch.load(file, weights_only=False)):  # noqa: TID251
            other.load_state_dict({"weight": torch.full((1, 4), run.rank + 1.0)})
            other.zero_grad()
        run.barrier()
        was = model.weight.detach().sum().item()
        run.barrier()
        nn.ModuleDict({"part": model}).load_state_dict({"part.weight": torch.full((1, 4), 0.25)})
        fit(model, optimizer, loader)
        return was, model.weight.sum().item(), file.getvalue()

    found = run_job(body, workers=2, pace=pace, assign="round_robin")
    assert len({was for was, *_ in found}) == 1
    assert abs(found[0][0]) < 2.0  # what a linear layer begins with; the copies have 4 and 8
    for _, now, file in found:
        assert now == 1.0
        assert b"paceline" not in file


@servers_or_none
def test_an_optimizers_state_loaded_after_wrap_is_gone_on_with(servers: int) -> None:
    """The oracle: a plain loop that stops after one pass, saves, and goes on in another process."""
    plain = copy.deepcopy(MODEL)
    steps = optim.Adam(plain.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    fit(plain, steps, loader)
    saved = copy.deepcopy((plain.state_dict(), steps.state_dict()))
    fit(plain, steps, loader)

    def body(run: Any) -> list[torch.Tensor]:
        model = copy.deepcopy(MODEL)
        optimizer: Any = optim.Adam(model.parameters(), lr=0.5)
        model, optimizer, own = run.wrap(model, optimizer, DataLoader(TensorDataset(X, Y), batch_size=4))
        fit(model, optimizer, own)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        fit(model, optimizer, own)
        return [parameter.detach().clone() for parameter in model.parameters()]

    for pace in ("sync", "async", "quorum:1"):
        (found,) = run_job(body, workers=1, servers=servers, pace=parse_pace(pace))
        for mine, its in zip(found, plain.parameters(), strict=True):
            torch.testing.assert_close(mine, its.detach(), rtol=1e-6, atol=1e-6)


# --- schedulers, and optimizers that evaluate again ---


@pytest.mark.parametrize("pace", PACES, ids=str)
def test_a_scheduler_of_known_length_keeps_its_last_rate(pace: Pace) -> None:
    def body(run: Any) -> float:
        model = copy.deepcopy(MODEL)
        optimizer: Any = optim.SGD(model.parameters(), lr=0.01)
        scheduler: Any = optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=3)
        loader: Any = DataLoader(TensorDataset(X, Y), batch_size=4)
        model, optimizer, scheduler, loader = run.wrap(model, optimizer, scheduler, loader)
        for x, y in loader:
            optimizer.zero_grad()
            (model(x) - y).pow(2).mean().backward()
            optimizer.step()
            scheduler.step()
        return float(scheduler.get_last_lr()[0])

    alone = nn.Parameter(torch.zeros(1))
    plain = optim.SGD([alone], lr=0.01)
    scheduler = optim.lr_scheduler.OneCycleLR(plain, 0.01, total_steps=3)
    for _ in range(2):
        plain.step()
        scheduler.step()
    for rate in run_job(body, workers=1, pace=parse_pace("quorum:1") if str(pace).startswith("quorum") else pace):
        assert rate == pytest.approx(scheduler.get_last_lr()[0])


class Twice(optim.SGD):
    """Looks at the loss again within a step, as sharpness-aware minimisation does."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


@pytest.mark.parametrize("make", [Twice, optim.LBFGS])
def test_optimizers_that_evaluate_the_loss_again_are_refused_in_words(make: Any) -> None:
    def body(run: Any) -> None:
        run.wrap(make([nn.Parameter(torch.zeros(1))], lr=0.1))

    with pytest.raises(ConfigError, match="gradients cannot be exchanged once"):
        run_job(body, workers=1)
