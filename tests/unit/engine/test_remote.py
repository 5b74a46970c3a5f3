"""Claims about workers elsewhere, each a stub with a deputy at home: they do what local workers do, to the bit where
that is defined. The oracle is the same job with local workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.engine.elsewhere import early
from paceline.errors import ConfigError
from paceline.params.table import tabulate
from tests.driver import run_job

SAMPLES, EPOCHS = 48, 3


def data() -> TensorDataset:
    made = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 6, generator=made, dtype=torch.float64)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def model(*, norm: bool = False) -> nn.Sequential:
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 1)]
    return drawn(nn.Sequential(*layers).to(torch.float64))


def drawn(net: Any) -> Any:
    """The same parameters every time, whatever other threads draw."""
    own = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=own, dtype=parameter.dtype) - 0.5)
    return net


def train(run: Any, make: Callable[[Any], optim.Optimizer], *, norm: bool = False, clip: bool = False) -> list[float]:
    """All parameters and buffers at the end, as one list."""
    net = model(norm=norm)
    optimizer = make(net.parameters())
    schedule = optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    net, optimizer, schedule, loader = run.wrap(net, optimizer, schedule, DataLoader(data(), batch_size=4))
    for _ in range(EPOCHS):
        for inputs, wanted in loader:
            optimizer.zero_grad()
            loss = ((net(inputs) - wanted) ** 2).mean()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            run.log(loss=loss.item())
    return [value for tensor in net.state_dict().values() for value in tensor.flatten().tolist()]


# Where two workers are: both beside home, so that they map its memory; the second on a host of its own, so that it
# has a mirror; both away from home, which is then a third host.
PLACES: dict[str, tuple[str, ...]] = {"beside": ("", ""), "mirror": ("", "b"), "away": ("a", "b")}

MAKES: dict[str, Callable[[Any], optim.Optimizer]] = {
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.01, momentum=0.9),
}


@pytest.mark.sampled
@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("options", [{}, {"servers": 1}, {"pace": "local:3"}], ids=str)
def test_workers_elsewhere_are_local_workers_to_the_bit(
    make: Callable[[Any], optim.Optimizer], options: dict[str, Any], hosts: tuple[str, ...]
) -> None:
    told = _plain(options)
    assert run_job(lambda run: train(run, make), elsewhere=True, hosts=hosts, **told) == run_job(
        lambda run: train(run, make), elsewhere=False, **told
    )


@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b")], ids="".join)
def test_workers_away_from_servers_send_gradients_while_backward_goes_on(hosts: tuple[str, str]) -> None:
    """Also where all of them are on one host, which is not home's."""

    def tells(run: Any) -> tuple[list[float], bool]:
        return train(run, MAKES["adam"]), run.worker._exchanges[0].early is not None

    apart = run_job(tells, elsewhere=True, hosts=hosts, servers=2, engine="torchrun", servers_apart=True)
    here = run_job(lambda run: train(run, MAKES["adam"]), elsewhere=False, servers=2)
    assert apart == [(values, True) for values in here]


@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("how", [{"norm": True}, {"clip": True}], ids=str)
def test_so_they_are_with_batch_norm_and_with_clipping(how: dict[str, bool], hosts: tuple[str, ...]) -> None:
    there = run_job(lambda run: train(run, MAKES["adam"], **how), elsewhere=True, hosts=hosts)
    here = run_job(lambda run: train(run, MAKES["adam"], **how), elsewhere=False)
    if "clip" in how and len(set(hosts)) > 1:  # the fold is multiplied, in place of the gradients that have gone
        assert there[0] == there[1]
        assert there[0] == pytest.approx(here[0], rel=1e-12, abs=1e-12)
    else:
        assert there == here


def several(run: Any) -> list[float]:
    """Uneven passes, gradients over two batches of which one is left out, and one that is changed after backward."""
    net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 1)).to(torch.float64))
    optimizer = optim.Adam(net.parameters(), lr=0.01)
    few = TensorDataset(*(tensor[:44] for tensor in data().tensors))
    net, optimizer, loader = run.wrap(net, optimizer, DataLoader(few, batch_size=4))
    for _ in range(EPOCHS):
        for number, (inputs, wanted) in enumerate(loader):
            ((net(inputs) - wanted) ** 2).mean().backward()
            if number == 1:
                continue
            if number == 3:
                net[2].weight.grad.data.mul_(0.5)
            if number == 4:
                net[0].bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
    run.barrier()
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bucket_bytes", [64, early.BUCKET_BYTES])
def test_what_goes_early_does_not_count_before_the_step(
    hosts: tuple[str, ...], bucket_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    assert run_job(several, elsewhere=True, hosts=hosts) == run_job(several, elsewhere=False)


@pytest.mark.parametrize("least", [1, 200, 10**6])
def test_buckets_are_all_of_a_vector_from_its_end(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", least)
    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    tensors = [torch.zeros(size) for size in (40, 7, 300, 5, 64)]
    table = tabulate((f"p{n}", 0, tensor) for n, tensor in enumerate(tensors))
    made = early.buckets(table)
    assert [param for bucket in made for param in bucket.params] == [4, 3, 2, 1, 0]
    assert [bucket.stop for bucket in made] == [table.sizes["float32"], *(bucket.start for bucket in made[:-1])]
    assert made[-1].start == 0
    assert all(4 * (bucket.stop - bucket.start) >= least for bucket in made[:-1])


class Counting(optim.Optimizer):
    """Adds one wherever the gradient is not zero, whatever it was divided by."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_((parameter.grad != 0).to(parameter.dtype))


def count(run: Any, kind: str = "plain") -> list[float]:
    counts = nn.Parameter(torch.zeros(SAMPLES, dtype=torch.float64))
    optimizer = Counting([counts])
    batches: Any = DataLoader(TensorDataset(torch.arange(SAMPLES)), batch_size=4, shuffle=True)
    if kind == "stream":
        batches = [(torch.arange(first, first + 4),) for first in range(0, SAMPLES, 4)]
    optimizer, loader = run.wrap(optimizer, batches)
    for _ in range(EPOCHS):
        for (numbers,) in loader:
            optimizer.zero_grad()
            counts.grad = torch.zeros_like(counts)
            counts.grad[numbers] = 1.0
            optimizer.step()
            run.log(loss=0.0)
    return list(counts.tolist())


@pytest.mark.parametrize("pace", ["sync", "quorum:1", "quorum:2", "bounded:0", "bounded:2", "async"])
@pytest.mark.parametrize("assign", ["lease", "round_robin"])
@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_each_sample_counts_once_an_epoch_at_every_pace(pace: str, assign: str, kind: str) -> None:
    told = _plain({"pace": pace, "assign": assign})
    for counts in run_job(lambda run: count(run, kind), workers=3, elsewhere=True, **told):
        assert counts == [float(EPOCHS)] * SAMPLES


@pytest.mark.parametrize("pace", ["async:2", "async:5", "local:2", "local:2:nesterov"])
def test_paces_with_local_steps_end_as_with_local_workers(pace: str) -> None:
    def final(run: Any) -> float:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = run.wrap(optim.SGD([weight], lr=0.01))
        for _ in range(10):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        run.barrier()
        return float(weight.detach().sum())

    told = _plain({"pace": pace, "workers": 1})
    assert run_job(final, elsewhere=True, **told) == run_job(final, elsewhere=False, **told)


def embed(run: Any, make: Callable[[Any], optim.Optimizer]) -> list[float]:
    table = drawn(nn.Embedding(20, 3, sparse=True, dtype=torch.float64))
    optimizer = make(table.parameters())
    loader = DataLoader(TensorDataset(torch.arange(SAMPLES) % 17), batch_size=4)
    table, optimizer, loader = run.wrap(table, optimizer, loader)
    for _ in range(EPOCHS):
        for (numbers,) in loader:
            optimizer.zero_grad()
            (table(numbers) ** 2).sum().backward()
            optimizer.step()
    run.barrier()
    return list(table.weight.flatten().tolist())


@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", [optim.SGD, optim.SparseAdam, optim.Adagrad])
def test_rows_travel_as_rows_and_give_the_same_bits(
    kind: Callable[..., optim.Optimizer], hosts: tuple[str, ...]
) -> None:
    there = run_job(lambda run: embed(run, lambda p: kind(p, lr=0.1)), elsewhere=True, hosts=hosts)
    assert there == run_job(lambda run: embed(run, lambda p: kind(p, lr=0.1)), elsewhere=False)


@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
def test_the_optimizers_state_is_shown_and_loaded(hosts: tuple[str, ...]) -> None:
    def body(run: Any) -> tuple[float, float]:
        weight = nn.Parameter(torch.zeros(3))
        optimizer = run.wrap(optim.Adam([weight], lr=0.1))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = optimizer.state_dict()
        run.barrier()
        optimizer.load_state_dict(state)
        run.barrier()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        again = optimizer.state_dict()
        return float(state["state"][0]["step"]), float(again["state"][0]["step"])

    assert run_job(body, elsewhere=True, hosts=hosts) == [(1.0, 2.0)] * 2


@pytest.mark.parametrize("hosts", PLACES.values(), ids=PLACES)
def test_what_a_script_loads_into_its_model_counts_for_all(hosts: tuple[str, ...]) -> None:
    def body(run: Any) -> float:
        net = nn.Linear(2, 1, bias=False)
        net, optimizer = run.wrap(net, optim.SGD(net.parameters(), lr=1.0))
        net.load_state_dict({"weight": torch.full((1, 2), 3.0)})
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
        return float(net.weight.detach().sum())

    assert run_job(body, elsewhere=True, hosts=hosts) == [4.0] * 2


def test_training_ends_after_the_same_step() -> None:
    for pace in ("sync", "bounded:1", "local:4"):
        told = _plain({"pace": pace, "steps": 10})
        steps = run_job(lambda run: train(run, MAKES["momentum"]) and run.step, elsewhere=True, **told)
        assert min(steps) >= 10, pace


class Keeping(optim.SGD):
    """Keeps a number in the object."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.seen = 0


def test_an_optimizer_that_home_cannot_make_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="keeps 'seen' in the object"):
        run_job(lambda run: run.wrap(Keeping([nn.Parameter(torch.zeros(2))])), elsewhere=True)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    from paceline.config import parse_pace

    return options | ({"pace": parse_pace(options["pace"])} if "pace" in options else {})
