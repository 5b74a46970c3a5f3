"""Claims about workers of two hosts, several on each: what a host's workers bring crosses between the hosts once, and
the parameters are the same bits on both. The oracle is the same job with local workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader

from paceline.engine.elsewhere import early, host_push, mail, outbox, remote_host
from paceline.engine.elsewhere.remote_gradients import RemoteGradients
from paceline.errors import ConfigError
from tests.driver import run_job
from tests.unit.engine.test_remote import EPOCHS, MAKES, SAMPLES, count, data, drawn, several, train

# Who is where; "" is home's host.
PLACES = {"2+2": ("", "", "b", "b"), "1+3": ("", "b", "b", "b"), "2+1": ("", "", "b"), "mixed": ("", "b", "", "b")}


class Seen:
    """What was done in a job: rounds that a host pushed as one, norms that it asked for as one, folds that were sent,
    gradients that were sent alone, workers that left their host's mirror."""

    def __init__(self) -> None:
        self.as_one = self.norms = self.folds = self.alone = self.left = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    told, bring, leave = Seen(), host_push.HostPush._bring_as_one, remote_host.RemoteHost.leave
    send_fold, send_own = RemoteGradients.send_fold, RemoteGradients.send_own

    def brought(self: Any, number: int, norm: int | None) -> None:
        if norm is None:
            told.as_one += 1
        else:
            told.norms += 1
        bring(self, number, norm)

    def sent(self: Any, asked: Any, one: Any) -> None:
        told.folds += 1
        send_fold(self, asked, one)

    def sent_alone(self: Any, one: Any) -> None:
        told.alone += 1
        send_own(self, one)

    def left(self: Any, one: Any) -> None:
        told.left += 1
        leave(self, one)

    monkeypatch.setattr(host_push.HostPush, "_bring_as_one", brought)
    monkeypatch.setattr(RemoteGradients, "send_fold", sent)
    monkeypatch.setattr(RemoteGradients, "send_own", sent_alone)
    monkeypatch.setattr(remote_host.RemoteHost, "leave", left)
    return told


def both(body: Callable[[Any], Any], places: tuple[str, ...], **options: Any) -> tuple[list[float], list[float]]:
    """What a job of two hosts, and of local workers, comes to; all workers of the two hosts to the same bits."""
    there = run_job(body, workers=len(places), elsewhere=True, hosts=places, **options)
    assert all(one == there[0] for one in there)
    return there[0], run_job(body, workers=len(places), elsewhere=False, **options)[0]


@pytest.mark.sampled
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
    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    two, one = both(several, places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


@pytest.mark.sampled
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
    assert not seen.left
    steps = EPOCHS * SAMPLES // 4 // 4
    assert (seen.as_one, seen.norms, seen.folds) == (steps, steps if "clip" in how else 0, steps)


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


@pytest.mark.sampled
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("bad", [None, 0, 1, 2], ids="worker {}".format)
def test_evaluations_and_gradients_that_are_not_finite(places: tuple[str, ...], bad: int | None, seen: Seen) -> None:
    two, one = both(lambda run: evaluating(run, bad=bad), places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one
    assert not seen.left


def test_a_fold_on_its_way_does_not_come_over_a_gradient_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """What the first worker of a host sends early is under way when its script makes its gradient infinite."""
    add, finish, put = mail.Letters.add, outbox.Outbox.finish, RemoteGradients._put
    is_on, is_made, may_go = threading.Event(), threading.Event(), threading.Event()

    def adds(self: Any, name: str, tensor: Any, start: int, stop: int) -> int:
        is_early = name.startswith("gradient/") and threading.current_thread().name == "paceline-outbox"
        if is_early and is_on.is_set() and not is_made.is_set():
            is_made.set()
            assert may_go.wait(20)
        return add(self, name, tensor, start, stop)

    def finishes(self: Any, number: int, weights: Any) -> None:
        if is_made.is_set():
            may_go.set()
        finish(self, number, weights)

    def puts(self: Any, one: Any, some: Any) -> None:
        put(self, one, some)
        if is_made.is_set():
            may_go.set()

    monkeypatch.setattr(early, "LEAST_BYTES", 0)
    monkeypatch.setattr(mail.Letters, "add", adds)
    monkeypatch.setattr(outbox.Outbox, "finish", finishes)
    monkeypatch.setattr(RemoteGradients, "_put", puts)

    def body(run: Any) -> float:
        net = nn.Linear(1, 1, bias=False)
        net, optimizer = run.wrap(net, optim.SGD(net.parameters(), lr=1.0))
        net.load_state_dict({"weight": torch.zeros(1, 1)})
        for step in range(3):
            is_bad = (step, run.rank) == (1, 2)
            if is_bad:
                is_on.set()
            optimizer.zero_grad()
            net(torch.full((1, 1), (5.0 if run.rank == 2 else 1.0) * (step + 1))).sum().backward()
            if is_bad:
                assert is_made.wait(20)
                net.weight.grad[0, 0] = torch.inf
            optimizer.step()
        return float(net.weight.detach())

    assert run_job(body, workers=4, elsewhere=True, hosts=PLACES["2+2"]) == [-10.0] * 4
    assert (may_go.is_set(), seen.as_one) == (True, 2)


def loading(run: Any) -> tuple[float, float]:
    """Twice: loads parameters, takes two steps, loads the optimizer's state. What the parameters sum to, and the
    steps."""
    net = nn.Linear(2, 1, bias=False)
    net, optimizer = run.wrap(net, optim.Adam(net.parameters(), lr=1.0))
    for value in (3.0, 5.0):
        net.load_state_dict({"weight": torch.full((1, 2), value)})
        for _ in range(2):
            net.weight.grad = torch.ones_like(net.weight)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return float(net.weight.detach().sum()), float(optimizer.state_dict()["state"][0]["step"])


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_what_scripts_load_counts_for_all(places: tuple[str, ...], seen: Seen) -> None:
    assert run_job(loading, workers=len(places), elsewhere=True, hosts=places) == [(pytest.approx(6.0), 4.0)] * len(
        places
    )
    assert (seen.as_one, seen.left) == (4, 0)


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("places", [PLACES["2+2"], PLACES["mixed"], PLACES["1+3"]], ids=["2+2", "mixed", "1+3"])
def test_half_precision_is_folded_too(
    places: tuple[str, ...], clips: bool, dtype: torch.dtype, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "BUCKET_BYTES", 64)
    monkeypatch.setattr(early, "LEAST_BYTES", 0)

    def body(run: Any) -> list[float]:
        net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype))
        net, optimizer, loader = run.wrap(net, optim.SGD(net.parameters(), lr=0.1), DataLoader(data(), batch_size=4))
        for _ in range(EPOCHS):
            for inputs, wanted in loader:
                optimizer.zero_grad()
                ((net(inputs.to(dtype)) - wanted.to(dtype)) ** 2).mean().backward()
                if clips:
                    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
        run.barrier()
        return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]

    two, one = both(body, places)
    assert two == pytest.approx(one, rel=0.05, abs=0.02)
    assert (seen.as_one, seen.folds, seen.left) == (EPOCHS * 3, EPOCHS * 3, 0)


def _accumulates(net: nn.Module, rank: int, again: Callable[[], None]) -> list[float]:
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    again()
    return [float(norm)]


def _scales(net: nn.Module, rank: int, again: Callable[[], None]) -> list[float]:
    norm = nn.utils.clip_grad_norm_(net.parameters(), torch.inf)
    for parameter in net.parameters():
        if parameter.grad is not None and norm > 0.3:
            parameter.grad.data.mul_(0.3 / norm)
    return [float(norm)]


def _in_two_calls(net: nn.Module, rank: int, again: Callable[[], None]) -> list[float]:
    weights, biases = (part := list(net.parameters()))[::2], part[1::2]
    return [float(nn.utils.clip_grad_norm_(some, 0.2)) for some in (weights, biases, weights)]


def _changes_one(net: nn.Module, rank: int, again: Callable[[], None]) -> list[float]:
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    if rank == 2:
        next(net.parameters()).grad = None
    return [float(norm)]


def _clips(most: Callable[[int], float], **how: Any) -> Callable[..., list[float]]:
    return lambda net, rank, again: [float(nn.utils.clip_grad_norm_(net.parameters(), most(rank), **how))]


# How scripts clip -> of 9 rounds, in how many the host's workers do not push as one.
CLIPS: dict[str, tuple[Callable[..., list[float]], int]] = {
    "by norm": (_clips(lambda rank: 0.5), 0),
    "seldom": (_clips(lambda rank: 5.0), 0),
    "by the largest": (_clips(lambda rank: 0.1, norm_type=torch.inf, error_if_nonfinite=True), 0),
    "order 3": (_clips(lambda rank: 0.1, norm_type=3.0), 0),
    "each host otherwise": (_clips(lambda rank: 0.3 if rank < 2 else 0.5), 0),
    "home's workers otherwise": (_clips(lambda rank: (0.3, 0.4, 0.5, 0.5)[rank]), 0),
    "each otherwise": (_clips(lambda rank: (0.3, 0.4, 0.5, 0.6)[rank]), 9),
    "to nothing": (_clips(lambda rank: 0.0), 0),
    "accumulates after it": (_accumulates, 0),
    "by its own means": (_scales, 0),
    "in several calls": (_in_two_calls, 0),
    "one drops one after it": (_changes_one, 9),
}


def clipping(run: Any, how: Callable[..., list[float]]) -> tuple[list[float], list[float]]:
    """All norms, and all parameters at the end."""
    net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.float64))
    optimizer = optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net, optimizer, loader = run.wrap(net, optimizer, DataLoader(data(), batch_size=4))
    norms = []
    for _ in range(EPOCHS):
        for inputs, wanted in loader:

            def backward(given: torch.Tensor = inputs, target: torch.Tensor = wanted) -> None:
                ((net(given) - target) ** 2).mean().backward()

            optimizer.zero_grad()
            backward()
            norms += how(net, run.rank, backward)
            optimizer.step()
    run.barrier()
    return norms, [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


@pytest.mark.parametrize(("how", "apart"), CLIPS.values(), ids=CLIPS)
def test_a_norm_is_that_of_all_and_the_fold_is_clipped(how: Callable[..., list[float]], apart: int, seen: Seen) -> None:
    there = run_job(lambda run: clipping(run, how), workers=4, elsewhere=True, hosts=PLACES["2+2"])
    here = run_job(lambda run: clipping(run, how), workers=4, elsewhere=False)
    assert all(one == there[0] for one in there)
    for found, wanted in zip(there[0], here[0], strict=True):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    assert any(norm > 0.5 for norm in there[0][0])
    assert (seen.as_one, seen.left) == (EPOCHS * 3 - apart, 0)
    assert seen.norms


def test_what_was_sent_for_a_norm_is_not_sent_again(seen: Seen) -> None:
    run_job(lambda run: clipping(run, _clips(lambda rank: 0.5)), workers=4, elsewhere=True, hosts=PLACES["2+2"])
    assert (seen.norms, seen.folds, seen.as_one, seen.alone) == (9, 9, 9, 0)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_option_clips_likewise(places: tuple[str, ...], seen: Seen) -> None:
    two, one = both(several, places, clip=0.2)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.norms
    assert not seen.left
    assert two != pytest.approx(run_job(several, workers=len(places))[0], rel=1e-3)


@pytest.mark.parametrize("bad", [0, 2, 3])
def test_a_gradient_that_is_not_finite_is_in_no_norm(bad: int, seen: Seen) -> None:
    two, one = both(lambda run: evaluating(run, bad=bad), PLACES["2+2"], clip=0.2)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one == seen.norms > 0
    assert not seen.left


@pytest.mark.parametrize("without", range(4))
def test_who_steps_without_clipping_is_told(without: int) -> None:
    how = _clips(lambda rank: 0.5)
    with pytest.raises(ConfigError, match=rf"clips its gradients in round 1, worker {without} does not"):
        run_job(
            lambda run: clipping(run, (lambda *_: []) if run.rank == without else how),
            workers=4,
            elsewhere=True,
            hosts=PLACES["2+2"],
        )


def leaving_out(run: Any) -> list[float]:
    """With some steps that are not taken after their norm was asked."""
    net = drawn(nn.Linear(6, 1).to(torch.float64))
    net, optimizer, loader = run.wrap(net, optim.SGD(net.parameters(), lr=0.05), DataLoader(data(), batch_size=4))
    for epoch in range(EPOCHS):
        for number, (inputs, wanted) in enumerate(loader):
            optimizer.zero_grad()
            ((net(inputs) - wanted) ** 2).mean().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            if (epoch + number) % 3:
                optimizer.step()
    run.barrier()
    return [value for parameter in net.parameters() for value in parameter.flatten().tolist()]


def test_a_step_may_be_left_out_after_its_norm(seen: Seen) -> None:
    two, one = both(leaving_out, PLACES["2+2"])
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert not seen.left


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_clipping_after_the_end_hangs_nobody(places: tuple[str, ...]) -> None:
    how = _clips(lambda rank: 0.5)
    two, one = both(lambda run: clipping(run, how)[1], places, steps=2)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_two_optimizers_are_clipped_by_one_norm(places: tuple[str, ...], seen: Seen) -> None:
    def body(run: Any) -> list[float]:
        net = drawn(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.float64))
        first, second = optim.SGD(net[0].parameters(), lr=0.05), optim.Adam(net[2].parameters(), lr=0.01)
        net, first, second, loader = run.wrap(net, first, second, DataLoader(data(), batch_size=4))
        norms = []
        for inputs, wanted in loader:
            net.zero_grad()
            ((net(inputs) - wanted) ** 2).mean().backward()
            norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
            first.step()
            second.step()
        run.barrier()
        return [*norms, *(value for parameter in net.parameters() for value in parameter.flatten().tolist())]

    two, one = both(body, places)
    assert two == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert seen.as_one == seen.norms == seen.folds > 0
    assert (seen.left, seen.alone) == (0, 0)
