"""Two wrapped optimizers and one ``clip_grad_norm_`` over both: whoever has a gradient, the norm is that of all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.errors import ConfigError
from tests.driver import run_job

BATCH = 4
# By batch: 1 if it has anything for the first net, 2 for the second, 3 for both. The passes of two workers are uneven.
FOR = (3, 1, 2, 1, 1, 1, 0, 3, 0, 0, 2, 3, 1)
# Where workers are: local ones; both beside home; the second on a host of its own; both away from home; hosts
# with several; hosts that fold in shares.
PLACES: dict[str, dict[str, Any]] = {
    "local": {"elsewhere": False},
    "server": {"elsewhere": False, "servers": 1},
    "three": {"elsewhere": False, "workers": 3},
    "beside": {"elsewhere": True, "hosts": ("", "")},
    "mirror": {"elsewhere": True, "hosts": ("", "b")},
    "away": {"elsewhere": True, "hosts": ("a", "b")},
    "a host of two": {"elsewhere": True, "hosts": ("", "b", "b"), "workers": 3},
    "shares": {"elsewhere": True, "hosts": ("", "b", "c"), "workers": 3},
    "shares of several": {"elsewhere": True, "hosts": ("", "b", "c", "b", ""), "workers": 5},
}
places = pytest.mark.parametrize("how", PLACES.values(), ids=PLACES)


def make_nets() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Linear(5, 3).to(torch.float64), nn.Linear(5, 2).to(torch.float64)]


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(BATCH * len(FOR), 5, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.tensor([number for number in FOR for _ in range(BATCH)]))


def backward(nets: list[nn.Module], x: torch.Tensor, whose: torch.Tensor) -> None:
    """A net that no sample of the batch is for is not called, and has no gradients then."""
    for place, net in enumerate(nets):
        chosen = whose.bitwise_and(1 << place).ne(0)
        if chosen.any():
            (net(x).pow(2).sum(1) * chosen).mean().backward()


def steps(nets: list[nn.Module], optimizers: list[Any], loader: Any) -> list[float]:
    """The norms, then all parameters."""
    norms = []
    both = [p for net in nets for p in net.parameters()]
    for x, whose in loader:
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(nets, x, whose)
        norms.append(float(nn.utils.clip_grad_norm_(both, 0.3)))
        for optimizer in optimizers:
            optimizer.step()
    return norms + [value for p in both for value in p.flatten().tolist()]


def make_optimizers(nets: list[nn.Module]) -> list[Any]:
    return [optim.SGD(nets[0].parameters(), lr=0.1, momentum=0.9), optim.Adam(nets[1].parameters(), lr=0.01)]


@places
def test_who_has_no_gradient_of_one_of_them_is_in_the_norm_of_both(how: dict[str, Any]) -> None:
    common = make_nets()

    def body(run: Any) -> list[float]:
        nets = copy.deepcopy(common)
        optimizers = [run.wrap(optimizer) for optimizer in make_optimizers(nets)]
        return steps(nets, optimizers, run.wrap(DataLoader(make_data(), batch_size=BATCH)))

    results = run_job(body, **{"workers": 2} | how)
    workers = how.get("workers", 2)
    expected = steps(common, make_optimizers(common), DataLoader(make_data(), batch_size=BATCH * workers))
    # Who has no gradient at all is told the norm in single precision, as torch makes it.
    assert results[0] == pytest.approx(expected, rel=1e-7, abs=1e-9)
    for result in results[1:]:
        assert result[-1 - 17 :] == results[0][-1 - 17 :]


# Which of two optimizers' parameters each worker clips, and whether before the step of the first.
@places
@pytest.mark.parametrize(("main", "other"), [((0, 1), (0,)), ((0, 1), (1,)), ((0,), (1,)), ((1,), ()), ((0, 1), ())])
@pytest.mark.parametrize("swapped", [False, True])
def test_clipping_other_parameters_than_the_others_is_an_error(
    main: tuple[int, ...], other: tuple[int, ...], swapped: bool, how: dict[str, Any]
) -> None:
    common = make_nets()

    def body(run: Any) -> None:
        nets = copy.deepcopy(common)
        optimizers = [run.wrap(optimizer) for optimizer in make_optimizers(nets)]
        clipped = main if run.is_main is not swapped else other
        for net in nets:
            net(torch.ones(4, 5, dtype=torch.float64)).sum().backward()
        if clipped:
            nn.utils.clip_grad_norm_([p for place in clipped for p in nets[place].parameters()], 0.3)
        for optimizer in optimizers:
            optimizer.step()

    with pytest.raises(ConfigError, match=r"that worker . leaves out|worker . clips its gradients in round 1, worker"):
        run_job(body, **{"workers": 2} | how)


@places
def test_who_has_no_gradient_at_all_is_clipped_with_the_others_by_the_option(how: dict[str, Any]) -> None:
    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = run.wrap(optim.SGD([weight], lr=1.0))
        if run.is_main:
            (weight * torch.tensor([3.0, 0.0, 4.0])).sum().backward()
        optimizer.step()
        run.barrier()
        return weight.tolist()

    for result in run_job(body, clip=0.5, **{"workers": 2} | how):
        assert result == pytest.approx([-0.3, 0.0, -0.4], rel=1e-5)
