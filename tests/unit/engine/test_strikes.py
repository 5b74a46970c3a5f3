"""Workers whose gradients are not finite: whom the run goes on without, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import parse_pace
from paceline.errors import Diverged, Poisoned
from paceline.run.session import Run
from tests.driver import run_job

STEPS = 40


def body(is_bad: Callable[[int, int], bool], value: float = math.nan) -> Callable[[Run], list[float]]:
    """Trains two layers; ``is_bad(rank, step)`` says where a gradient of the second is spoiled."""

    def train(run: Run) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loader = DataLoader(TensorDataset(torch.ones(2 * STEPS * run.num_workers, 3)), batch_size=2)
        model, optimizer, loader = run.wrap(model, optimizer, loader)
        for step, (x,) in enumerate(loader, 1):
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            if is_bad(run.rank, step):
                model[1].weight.grad[0, 1] = value
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()

    return train


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("pace", ["sync", "bounded:2", "async:2", "local:2", "quorum:1"])
def test_one_worker_of_two_is_out_after_three_in_a_row(pace: str, value: float) -> None:
    with pytest.raises(Poisoned) as caught:
        run_job(body(lambda rank, step: rank == 1 and step in (2, 3, 4), value), pace=parse_pace(pace))
    assert caught.value.what.startswith("worker 1: the gradient of step ")
    assert caught.value.what.endswith(
        " was not finite and was dropped; first in 1.weight, in 1 of 4 parameters, the 3rd in a row"
    )


def test_more_than_half_of_a_workers_last_are_too_many() -> None:
    with pytest.raises(Poisoned, match="one of 9 among its last 16"):
        run_job(body(lambda rank, step: rank == 1 and step % 5 in (0, 2, 4)))


@pytest.mark.parametrize("pace", ["sync", "async"])
def test_every_second_is_not(pace: str) -> None:
    for values in run_job(body(lambda rank, step: rank == 1 and step % 2 == 0), pace=parse_pace(pace)):
        assert all(map(math.isfinite, values))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_when_most_gradients_are_like_that_the_run_has_diverged(workers: int) -> None:
    with pytest.raises(Diverged) as caught:
        run_job(body(lambda rank, step: step >= 5 and rank < 2), workers=workers)
    assert type(caught.value) is Diverged
    assert "of step 7 was not finite and was dropped; first in 1.weight" in caught.value.what
    assert "more than half of all workers' gradients" in caught.value.what
    assert "lower the learning rate" in caught.value.fix
