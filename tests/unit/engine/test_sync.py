"""Lockstep against its oracle: n workers are one process on the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.errors import ConfigError
from tests.driver import run_job

ROUNDS = 6
BATCH = 8
Parameters = Any

OPTIMIZERS: dict[str, Callable[[Parameters], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "adadelta": lambda p: optim.Adadelta(p),
    "adamax": lambda p: optim.Adamax(p),
    "nadam": lambda p: optim.NAdam(p),
    "radam": lambda p: optim.RAdam(p),
    "asgd": lambda p: optim.ASGD(p, t0=2),
    "rprop": lambda p: optim.Rprop(p),
    "adafactor": lambda p: optim.Adafactor(p),
    "foreach": lambda p: optim.AdamW(p, foreach=True),
    "fused": lambda p: optim.AdamW(p, fused=True),
}


def make_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 3)).to(dtype)


def make_data(samples: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 5, generator=generator, dtype=dtype)
    return TensorDataset(x, torch.sin(x[:, :3]) + 0.1)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).pow(2).mean()


def train(
    run: Any,
    model: nn.Module,
    make: Callable[[Parameters], optim.Optimizer],
    data: TensorDataset,
    *,
    batch: int = BATCH,
    epochs: int = 1,
) -> list[torch.Tensor]:
    optimizer = make(model.parameters())
    loader: Any = DataLoader(data, batch_size=batch)
    if run is not None:
        model, optimizer, loader = run.wrap(model, optimizer, loader)
    for _ in range(epochs):
        for x, y in loader:
            loss = loss_of(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def on_workers(name: str, workers: int, servers: int, samples: int) -> list[list[torch.Tensor]]:
    data, model = make_data(samples), make_model()
    return run_job(
        lambda run: train(run, copy.deepcopy(model), OPTIMIZERS[name], data), workers=workers, servers=servers
    )


def assert_close(mine: list[torch.Tensor], other: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_bits(mine: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.sampled
@pytest.mark.parametrize("servers", [0, 1, 2])
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_workers_equal_one_process_on_the_whole_batch(name: str, workers: int, servers: int) -> None:
    samples = ROUNDS * BATCH * workers
    alone = train(None, make_model(), OPTIMIZERS[name], make_data(samples), batch=BATCH * workers)
    results = on_workers(name, workers, servers, samples)
    # a step's error is 1e-12 at most; sqrt and division in the adaptive ones carry it through ROUNDS steps
    assert_close(results[0], alone, 1e-12 * ROUNDS)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("name", ["momentum", "adamw", "rmsprop", "adafactor"])
def test_the_number_of_shards_changes_no_bit(name: str) -> None:
    results = [on_workers(name, 2, servers, ROUNDS * BATCH * 2)[0] for servers in (0, 1, 3)]
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("servers", [0, 2])
def test_uneven_batches_are_weighted_by_their_samples(workers: int, servers: int) -> None:
    """The last round has short batches, or workers without any; the plain mean must fail the same test."""
    samples = BATCH * workers * 2 + BATCH + 3
    data, model, make = make_data(samples), make_model(), OPTIMIZERS["momentum"]

    def oracle(weighted: bool) -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        optimizer = make(own.parameters())
        x, y = data.tensors
        for start in range(0, samples, BATCH * workers):
            parts = [
                (x[at : at + BATCH], y[at : at + BATCH])
                for at in range(start, min(start + BATCH * workers, samples), BATCH)
            ]
            total = sum(len(part[0]) for part in parts)
            optimizer.zero_grad()
            for part in parts:
                share = len(part[0]) / total if weighted else 1 / len(parts)
                (share * loss_of(own, *part)).backward()
            optimizer.step()
        return [p.detach().clone() for p in own.parameters()]

    results = run_job(lambda run: train(run, copy.deepcopy(model), make, data), workers=workers, servers=servers)
    assert_close(results[0], oracle(weighted=True), 1e-11)
    with pytest.raises(AssertionError):
        assert_close(results[0], oracle(weighted=False), 1e-11)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_workers_seeded_differently_start_equal() -> None:
    common = make_model()

    def body(run: Any) -> list[torch.Tensor]:
        model = copy.deepcopy(common)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += run.rank
        model.register_buffer("mean", torch.full((3,), float(run.rank)))
        for parameter in model[0].parameters():
            parameter.requires_grad_(False)
        optimizer = optim.SGD(model[2].parameters(), lr=0.1)
        run.wrap(model, optimizer)
        return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]

    results = run_job(body, workers=3)
    expected = [*common.parameters(), torch.zeros(3)]
    for result in results:
        assert_same_bits(result, [t.detach() for t in expected])


@pytest.mark.parametrize("servers", [0, 1])
def test_epochs_whose_last_round_lacks_workers_leave_the_state_whole(servers: int) -> None:
    """Shares move when a worker is out of data; moments, and the count of steps, must move with them."""
    samples = BATCH * 5
    model, data = make_model(), make_data(samples)
    for name in ("adamw", "adagrad", "momentum", "asgd", "adafactor", "nadam"):
        results = run_job(
            lambda run, name=name: train(run, copy.deepcopy(model), OPTIMIZERS[name], data, epochs=3),
            workers=3,
            servers=servers,
        )
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS[name](own.parameters())
        for _ in range(3):
            for x, y in DataLoader(data, batch_size=BATCH * 3):
                optimizer.zero_grad()
                loss_of(own, x, y).backward()
                optimizer.step()
        assert_close(results[0], [p.detach() for p in own.parameters()], 1e-10)
        assert_same_bits(results[0], results[2])


class Odd(nn.Module):
    """Tied, frozen and unused layers, a layer used only now and then, a scalar, a transposed weight, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 6).double()
        self.tied = nn.Linear(6, 6).double()
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).double().requires_grad_(False)
        self.unused = nn.Linear(6, 6).double()
        self.sometimes = nn.Linear(6, 6).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(6, 6, dtype=torch.float64).t())
        self.small = nn.Parameter(torch.randn(6, dtype=torch.float32))
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        x = torch.tanh(self.tied(torch.tanh(self.first(x))))
        x = self.frozen(x) * self.scale @ self.turned
        return self.sometimes(x) if use else x


def odd_groups(model: Odd) -> list[dict[str, Any]]:
    slow = [model.scale, model.turned, model.frozen.weight]
    rest = [p for p in model.parameters() if all(p is not s for s in slow)]
    return [{"params": rest, "lr": 0.02}, {"params": slow, "lr": 0.004, "weight_decay": 0.0}]


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD, optim.RMSprop])
def test_groups_schedulers_accumulation_and_odd_layers_together(
    kind: type[optim.Optimizer], workers: int, servers: int
) -> None:
    samples, accumulate, batch = 96, 2, 4
    model_of = Odd()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x.flip(1))
    options: dict[str, Any] = {"weight_decay": 0.01, "lr": 0.01}
    if kind is optim.SGD:
        options["momentum"] = 0.9

    def uses(step: int, rank: int) -> bool:
        return step >= 2 and step % 2 == 0 and rank == 0

    def body(run: Any) -> tuple[list[torch.Tensor], list[float]]:
        model = copy.deepcopy(model_of)
        optimizer = kind(odd_groups(model), **options)
        scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        loader: Any = DataLoader(data, batch_size=batch)
        model, optimizer, scheduler, loader = run.wrap(model, optimizer, scheduler, loader)
        rates, step = [], 0
        for number, (a, b) in enumerate(loader):
            (loss_of_odd(model, a, b, uses(step, run.rank)) / accumulate).backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                rates.append(optimizer.param_groups[0]["lr"])
                step += 1
        return [p.detach().clone() for p in model.parameters()], rates

    def oracle() -> tuple[list[torch.Tensor], list[float]]:
        model = copy.deepcopy(model_of)
        optimizer = kind(odd_groups(model), **options)
        scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        rates = []
        batches = list(DataLoader(data, batch_size=batch))
        for step, start in enumerate(range(0, len(batches), workers * accumulate)):
            optimizer.zero_grad()
            for number in range(workers * accumulate):
                a, b = batches[start + number]
                use = uses(step, number % workers)
                (loss_of_odd(model, a, b, use) / accumulate / workers).backward()
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        return [p.detach().clone() for p in model.parameters()], rates

    results = run_job(body, workers=workers, servers=servers)
    expected, rates = oracle()
    for got, got_rates in results:
        for mine, other in zip(got, expected, strict=True):
            tolerance = 1e-11 if mine.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
        assert got_rates == rates
        assert_same_bits(got, results[0][0])


def loss_of_odd(model: Odd, x: torch.Tensor, y: torch.Tensor, use: bool) -> torch.Tensor:
    # the float32 parameter has a loss of its own: its rounding would show in the others' twelfth digit
    return (model(x, use) - y).pow(2).mean() + (model.small - 1).pow(2).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex128])
def test_other_dtypes_train_and_stay_equal_on_all_workers(dtype: torch.dtype) -> None:
    def body(run: Any) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(70, dtype=dtype))
        optimizer = run.wrap(optim.SGD([weight], lr=0.5))
        for step in range(3):
            weight.grad = torch.full_like(weight, (run.rank + 1) * 2.0**-step)
            optimizer.step()
        return weight.detach().clone()

    first, second = run_job(body)
    assert torch.equal(first, second)
    expected = torch.full((70,), 1 - 0.5 * 1.5 * (1 + 0.5 + 0.25)).to(dtype)
    torch.testing.assert_close(first, expected)


def test_private_copies_follow_the_shared_parameters() -> None:
    data, model = make_data(64), make_model()

    def body(run: Any, share: bool) -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adamw"](own.parameters())
        run.wrap(own, optimizer, share_parameters=share)
        loader = run.wrap(DataLoader(data, batch_size=BATCH))
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(own, x, y).backward()
            optimizer.step()
        return [p.detach().clone() for p in own.parameters()]

    shared = run_job(lambda run: body(run, True))
    private = run_job(lambda run: body(run, False))
    assert_same_bits(shared[0], private[0])
    assert_same_bits(shared[0], private[1])


def test_the_users_optimizer_shows_the_state_and_brings_a_loaded_one() -> None:
    data, model = make_data(64), make_model()
    alone = OPTIMIZERS["adamw"](model.parameters())
    for x, y in DataLoader(data, batch_size=32):
        alone.zero_grad()
        loss_of(model, x, y).backward()
        alone.step()
    saved = copy.deepcopy(alone.state_dict())

    def body(run: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adamw"](own.parameters())
        if run.is_main:
            optimizer.load_state_dict(copy.deepcopy(saved))
        own, optimizer, loader = run.wrap(own, optimizer, DataLoader(data, batch_size=BATCH))
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(own, x, y).backward()
            optimizer.step()
        return [p.detach().clone() for p in own.parameters()], copy.deepcopy(optimizer.state_dict())

    results = run_job(body)
    for x, y in DataLoader(data, batch_size=BATCH * 2):
        alone.zero_grad()
        loss_of(model, x, y).backward()
        alone.step()
    assert_close(results[0][0], [p.detach() for p in model.parameters()], 1e-11)
    for _, state in results:
        for number, expected in alone.state_dict()["state"].items():
            for key, value in expected.items():
                torch.testing.assert_close(state["state"][number][key].to(value.dtype), value, rtol=1e-11, atol=1e-11)


def test_several_optimizers_have_rounds_of_their_own() -> None:
    def body(run: Any) -> tuple[float, float]:
        a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        first, second = run.wrap(optim.SGD([a], lr=1.0), optim.SGD([b], lr=1.0))
        for step in range(6):
            a.grad = torch.full_like(a, run.rank + 1.0)
            first.step()
            if step % 2:
                b.grad = torch.full_like(b, 10.0 * (run.rank + 1))
                second.step()
        return a.item(), b.item()

    for servers in (0, 1):
        assert run_job(body, servers=servers) == [(-9.0, -45.0)] * 2


@pytest.mark.parametrize("order", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize(("workers", "servers"), [(1, 0), (2, 0), (3, 0), (2, 1)])
def test_clipping_in_the_loop_is_by_the_norm_of_the_whole_gradient(workers: int, servers: int, order: float) -> None:
    samples = BATCH * workers * 4 + BATCH + 2
    data, common = make_data(samples), make_model()

    def steps(model: nn.Module, loader: Any, optimizer: optim.Optimizer, norms: list[float]) -> list[torch.Tensor]:
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05, order)))
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    def body(run: Any) -> tuple[list[torch.Tensor], list[float]]:
        model, norms = copy.deepcopy(common), list[float]()
        wrapped = run.wrap(model, OPTIMIZERS["momentum"](model.parameters()), DataLoader(data, batch_size=BATCH))
        return steps(model, wrapped[2], wrapped[1], norms), norms

    results = run_job(body, workers=workers, servers=servers)
    model, norms = copy.deepcopy(common), list[float]()
    whole = DataLoader(data, batch_size=BATCH * workers)
    expected = steps(model, whole, OPTIMIZERS["momentum"](model.parameters()), norms)
    assert_close(results[0][0], expected, 1e-11)
    torch.testing.assert_close(results[0][1], norms, rtol=1e-11, atol=0)
    for result in results[1:]:
        assert_same_bits(result[0], results[0][0])


def test_the_option_clips_by_the_same_norm_whatever_the_batches() -> None:
    data, common = make_data(BATCH * 3 + 5), make_model()

    def body(run: Any, *, in_loop: bool) -> list[torch.Tensor]:
        model = copy.deepcopy(common)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = run.wrap(model, optimizer, DataLoader(data, batch_size=BATCH))
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            if in_loop:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    one = run_job(lambda run: body(run, in_loop=True))[0]
    assert_same_bits(run_job(lambda run: body(run, in_loop=False), clip=0.05)[0], one)


def test_clipping_on_some_workers_only_is_an_error() -> None:
    def body(run: Any) -> None:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = run.wrap(optim.SGD([weight], lr=1.0))
        weight.grad = torch.ones(3)
        if run.is_main:
            nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    with pytest.raises(ConfigError, match="worker 0 clips its gradients in round 1, worker 1 does not"):
        run_job(body)
