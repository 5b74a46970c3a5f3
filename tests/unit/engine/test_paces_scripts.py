"""What scripts do besides stepping, at every pace: one worker is the plain loop, several end equal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Async, Bounded, Local, Pace, Quorum
from paceline.protocol.log import Entry
from tests.unit.engine.pacing import (
    OPTIMIZERS,
    Tensors,
    Turns,
    assert_close,
    assert_same_bits,
    gradient,
    in_order,
    make_data,
    make_model,
    note_entries,
    on_workers,
    parameters,
    scheduled,
    small_parts,
)

PACES: list[Pace] = [Quorum(1), Bounded(1), Async(), Async(3), Local(1), Local(3)]
every_pace = pytest.mark.parametrize("pace", PACES, ids=str)
stepping_pace = pytest.mark.parametrize("pace", [p for p in PACES if p != Async(3)], ids=str)
servers_or_none = pytest.mark.parametrize("servers", [0, 2])
BATCH = 4


class Odd(nn.Module):
    """Tied, frozen and unused layers, a layer used only now and then, a scalar, a transposed weight."""

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
        self.empty = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))

    def forward(self, x: torch.Tensor, use: bool) -> torch.Tensor:
        x = self.frozen(torch.tanh(self.tied(torch.tanh(self.first(x))))) * self.scale @ self.turned
        return self.sometimes(x) if use else x


def odd_script(run: Any, kind: type[optim.Optimizer], common: Odd, data: TensorDataset) -> Tensors:
    """Groups, a scheduler, accumulation over two batches, clipping, gradients that are None at times."""
    model = copy.deepcopy(common)
    slow = [model.scale, model.turned, model.frozen.weight]
    rest = [p for p in model.parameters() if all(p is not s for s in slow)]
    groups = [{"params": rest, "lr": 0.02}, {"params": slow, "lr": 0.004, "weight_decay": 0.0}]
    options: dict[str, Any] = {"momentum": 0.9} if kind is optim.SGD else {}
    optimizer = kind(groups, lr=0.01, weight_decay=0.01, **options)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    loader: Any = DataLoader(data, batch_size=BATCH)
    if run is not None:
        run.wrap(model, optimizer, scheduler)
        loader = run.wrap(loader)
    step = 0
    for _ in range(2):
        for number, (x, y) in enumerate(loader):
            ((model(x, step > 1 and step % 2 == 0) - y).pow(2).mean() / 2).backward()
            if number % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
    return parameters(model)


@pytest.mark.sampled
@stepping_pace
@servers_or_none
@pytest.mark.parametrize("kind", [optim.AdamW, optim.SGD, optim.RMSprop])
def test_one_worker_does_all_that_the_plain_script_does(kind: type[optim.Optimizer], servers: int, pace: Pace) -> None:
    common = Odd()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH * 12, 6, generator=generator, dtype=torch.float64)
    data = TensorDataset(x, x.flip(1))
    alone = odd_script(None, kind, common, data)
    with small_parts():
        (mine,) = on_workers(lambda run: odd_script(run, kind, common, data), workers=1, servers=servers, pace=pace)
    assert_close(mine, alone, 1e-11)


@pytest.mark.sampled
@stepping_pace
@servers_or_none
@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "adafactor"])
def test_an_optimizer_brings_the_state_that_was_loaded(name: str, servers: int, pace: Pace) -> None:
    """The state goes with the parameters, wherever they are stepped."""
    model, data = make_model(), make_data(BATCH * 9)
    before = OPTIMIZERS[name](model.parameters())
    batches = list(DataLoader(data, batch_size=BATCH))
    for batch in batches[:4]:
        gradient(model, before, batch)
        before.step()
    saved, common = copy.deepcopy(before.state_dict()), copy.deepcopy(model)
    for batch in batches:
        gradient(model, before, batch)
        before.step()

    def body(run: Any) -> Tensors:
        own = copy.deepcopy(common)
        optimizer = OPTIMIZERS[name](own.parameters())
        optimizer.load_state_dict(copy.deepcopy(saved))
        run.wrap(own, optimizer)
        for batch in run.wrap(DataLoader(data, batch_size=BATCH)):
            gradient(own, optimizer, batch)
            optimizer.step()
        return parameters(own)

    with small_parts():
        (mine,) = on_workers(body, workers=1, servers=servers, pace=pace)
    assert_close(mine, parameters(model), 1e-11)


@stepping_pace
@servers_or_none
def test_the_users_optimizer_shows_the_state(servers: int, pace: Pace) -> None:
    model, data = make_model(), make_data(BATCH * 5)
    alone = copy.deepcopy(model)
    own = OPTIMIZERS["adamw"](alone.parameters())
    for batch in DataLoader(data, batch_size=BATCH):
        gradient(alone, own, batch)
        own.step()

    def body(run: Any) -> Any:
        mine = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adamw"](mine.parameters())
        run.wrap(mine, optimizer)
        for batch in run.wrap(DataLoader(data, batch_size=BATCH)):
            gradient(mine, optimizer, batch)
            optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    with small_parts():
        (state,) = on_workers(body, workers=1, servers=servers, pace=pace)
    for number, expected in own.state_dict()["state"].items():
        for key, value in expected.items():
            torch.testing.assert_close(state["state"][number][key].to(value.dtype), value, rtol=1e-11, atol=1e-11)


@every_pace
@servers_or_none
def test_private_copies_follow_the_same_way(servers: int, pace: Pace) -> None:
    if pace == Quorum(1):
        pytest.skip("how often a batch comes again, and so the order of the pushes, is not the schedule's to say")
    data, model = make_data(BATCH * 12), make_model()

    def body(run: Any, share: bool, turns: Turns) -> Tensors:
        own = copy.deepcopy(model)
        optimizer = OPTIMIZERS["adamw"](own.parameters())
        run.wrap(own, optimizer, share_parameters=share)
        loader = run.wrap(DataLoader(data, batch_size=BATCH))
        with scheduled(run, turns):
            for batch in loader:
                gradient(own, optimizer, batch)
                turns.take(run.rank)
                optimizer.step()
        return parameters(own)

    order = [0, 1] * 6 if isinstance(pace, Local | Bounded) else [0, 0, 1, 0, 1, 1] * 2
    results = []
    for share in (True, False):
        turns = Turns(2, in_order(*order))
        results += on_workers(lambda run, s=share, t=turns: body(run, s, t), servers=servers, pace=pace)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@every_pace
@servers_or_none
def test_several_optimizers_meet_apart_from_each_other(servers: int, pace: Pace) -> None:
    """The second steps every other time, by ten. Whole numbers, so that at async the order makes no difference."""

    def body(run: Any) -> tuple[float, float]:
        a, b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
        first, second = run.wrap(optim.SGD([a], lr=1.0), optim.SGD([b], lr=1.0))
        loader = run.wrap(DataLoader(TensorDataset(torch.arange(12.0))))
        for number, _ in enumerate(loader):
            a.grad = torch.ones_like(a)
            first.step()
            if number % 2:
                b.grad = torch.full_like(b, 10.0)
                second.step()
        return a.item(), b.item()

    results = on_workers(body, servers=servers, pace=pace)
    assert results[0] == results[1]
    if isinstance(pace, Bounded | Async):
        assert results[0] == (-12.0, -60.0)
    elif isinstance(pace, Local):
        assert results[0] == (-6.0, -30.0)


@every_pace
@servers_or_none
def test_evaluations_between_passes_and_on_one_worker_alone_hold_nobody(servers: int, pace: Pace) -> None:
    def body(run: Any) -> list[int]:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        train = run.wrap(DataLoader(TensorDataset(torch.arange(10.0))))
        test = run.wrap(DataLoader(TensorDataset(torch.arange(6.0))))
        read = []
        for _ in range(3):
            for number, _ in enumerate(train):
                weight.grad = torch.ones_like(weight)
                optimizer.step()
                if run.is_main and number == 2:
                    read.append(sum(1 for _ in test))
            read.append(sum(1 for _ in test))
        return [*read, round(weight.item(), 6)]

    results = on_workers(body, servers=servers, pace=pace)
    assert results[0][:-1] == [3] * 6
    assert results[1][:-1] == [3] * 3
    assert results[0][-1] == results[1][-1]
    if isinstance(pace, Bounded | Async):
        assert results[0][-1] == -30


@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async(), Local(2)], ids=str)
@servers_or_none
def test_settings_of_a_push_are_those_of_its_worker(servers: int, pace: Pace) -> None:
    """Worker 1 alone halves its rate. At quorum the lowest worker's settings hold, at local each one's own."""
    turns = Turns(2, in_order(0, 1, 0, 1))

    def body(run: Any) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        with scheduled(run, turns):
            for _ in range(2):
                weight.grad = torch.ones_like(weight)
                turns.take(run.rank)
                optimizer.step()
                if run.rank == 1:
                    optimizer.param_groups[0]["lr"] /= 2
            run.worker.go()
        return weight.item()

    last = min(on_workers(body, servers=servers, pace=pace))
    assert last == {"quorum": -2.0, "bounded": -3.5, "async": -3.5, "local": -1.75}[str(pace).partition(":")[0]]


@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async(), Async(2), Local(2)], ids=str)
@servers_or_none
def test_a_parameter_nobody_has_a_gradient_for_is_not_stepped(servers: int, pace: Pace) -> None:
    """None is not a gradient of zero: weight decay would pull the parameter down."""

    def body(run: Any) -> tuple[float, float]:
        a, b = (nn.Parameter(torch.ones(70, dtype=torch.float64)) for _ in range(2))
        optimizer = optim.SGD([a, b], lr=0.5, weight_decay=0.5)
        run.wrap(optimizer)
        for _ in run.wrap(DataLoader(TensorDataset(torch.arange(8.0)))):
            a.grad = torch.ones_like(a)
            optimizer.step()
        return a[0].item(), b[0].item()

    with small_parts():
        for moved, kept in on_workers(body, servers=servers, pace=pace):
            assert moved < 1.0
            assert kept == 1.0


@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async(), Async(2), Local(2)], ids=str)
@servers_or_none
def test_a_step_that_an_overflow_skips_changes_nothing_and_holds_nobody(servers: int, pace: Pace) -> None:
    """As after a GradScaler that found an infinite gradient on worker 1, always, and on worker 0 in its first step."""
    entries: list[Entry] = []

    def body(run: Any) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        if not isinstance(pace, Local):
            note_entries(run, entries)
        for number, _ in enumerate(run.wrap(DataLoader(TensorDataset(torch.arange(8.0))))):
            weight.grad = torch.full_like(weight, -1.0)
            run.worker.exchange(0, void=run.rank == 1 or number == 0)
        return weight.item()

    results = on_workers(body, servers=servers, pace=pace)
    assert results[0] == results[1]
    assert results[0] == 3.0


@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async()], ids=str)
@pytest.mark.parametrize("servers", [0, 1, 3])
def test_what_is_loaded_over_the_parameters_is_what_all_go_on_with(servers: int, pace: Pace) -> None:
    """Both workers load, as a script does that restores a checkpoint; the first one's is taken, once."""

    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(200, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0, momentum=0.5)
        run.wrap(optimizer)
        exchange = run.worker.exchanges[0]
        loader = run.wrap(DataLoader(TensorDataset(torch.arange(4.0))))
        for loads, value in enumerate((100.0, 1000.0), 1):
            for _ in loader:
                weight.grad = torch.zeros_like(weight)
                optimizer.step()

            def write(value: float = value) -> None:
                exchange._memory.params["float64"].fill_(value)
                exchange._memory.state.clear()

            exchange._arrivals.load(loads, write)
        return sorted(set(weight.tolist()))

    with small_parts():
        assert on_workers(body, servers=servers, pace=pace) == [[1000.0]] * 2
