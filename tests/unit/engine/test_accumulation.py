"""Gradients of several batches a step: none is left over at the end of a pass, and a push weighs as many samples as
have a gradient in it.

The oracle: in each round one process steps with the mean of what each worker would have stepped with alone, by the
samples behind that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import parse_pace
from tests.driver import run_job

EVERY = 2  # batches to a step


def data(samples: int, batch: int) -> DataLoader[Any]:
    made = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, 3, generator=made, dtype=torch.float64)
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=batch)


def model() -> tuple[nn.Linear, optim.Optimizer]:
    net = nn.Linear(3, 1).to(torch.float64)
    with torch.no_grad():
        net.weight.fill_(0.1)
        net.bias.fill_(0.2)
    return net, optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def values(net: nn.Module) -> list[float]:
    return [value for parameter in net.parameters() for value in parameter.detach().flatten().tolist()]


def loss_of(net: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(net(batch[0]), batch[1])


Group = tuple[Sequence[Any], float]  # batches to a step, and what each batch's loss is divided by


def one_process(rounds: Sequence[Sequence[Group]]) -> list[float]:
    """A round is what each worker brings to it."""
    net, optimizer = model()
    for round_ in rounds:
        total = sum(len(batch[0]) for batches, _ in round_ for batch in batches)
        optimizer.zero_grad()
        for batches, divided_by in round_:
            samples = sum(len(batch[0]) for batch in batches)
            for batch in batches:
                (loss_of(net, batch) / divided_by * samples / total).backward()
        optimizer.step()
    return values(net)


def groups_of(batches: Sequence[Any], workers: int) -> list[list[Group]]:
    """The rounds of an epoch whose batches are dealt in turn, ``EVERY`` to a step, the rest at the end."""
    parts = [batches[rank::workers] for rank in range(workers)]
    steps = -(-len(parts[0]) // EVERY)
    cut = [[part[EVERY * step : EVERY * (step + 1)] for part in parts] for step in range(steps)]
    return [[(group, float(EVERY)) for group in round_ if group] for round_ in cut]


def close(results: Sequence[list[float]], expected: list[float]) -> None:
    assert all(result == results[0] for result in results)
    assert results[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "how", [{}, {"servers": 1}, {"elsewhere": True}, {"workers": 3}, {"data": "served"}], ids=lambda how: str([*how])
)
@pytest.mark.parametrize("samples", [20, 22, 26, 30])
def test_the_usual_script_steps_with_all_that_it_reads(samples: int, how: dict[str, Any]) -> None:
    def body(run: Any) -> list[float]:
        net, optimizer = model()
        net, optimizer, loader = run.wrap(net, optimizer, data(samples, 4))
        for _ in range(2):
            optimizer.zero_grad()
            for number, batch in enumerate(loader):
                (loss_of(net, batch) / EVERY).backward()
                if (number + 1) % EVERY == 0 or number + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
        return values(net)

    how = {"workers": 2, **how}
    rounds = groups_of(list(data(samples, 4)), how["workers"])
    close(run_job(body, **how), one_process(2 * rounds))


ZEROING: dict[str, Callable[[nn.Module, optim.Optimizer], None]] = {
    "the optimizer": lambda net, optimizer: optimizer.zero_grad(),
    "with zeros": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model": lambda net, optimizer: net.zero_grad(),
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("how", ZEROING)
def test_what_is_dropped_at_the_next_pass_weighs_nothing(how: str, elsewhere: bool) -> None:
    """Six batches, the last one short: worker 1 drops that one; it weighs nothing in the next pass' first round."""

    def body(run: Any) -> list[float]:
        net, optimizer = model()
        net, optimizer, loader = run.wrap(net, optimizer, data(23, 4))
        for _ in range(2):
            for number, batch in enumerate(loader):
                if number % EVERY == 0:
                    ZEROING[how](net, optimizer)
                (loss_of(net, batch) / EVERY).backward()
                if number % EVERY == EVERY - 1:
                    optimizer.step()
        return values(net)

    first, _ = groups_of(list(data(23, 4)), 2)
    close(run_job(body, elsewhere=elsewhere), one_process([first, first]))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("where", ["before backward", "behind it", "before zero_grad"])
@pytest.mark.parametrize("how", ZEROING)
def test_a_batch_that_is_skipped_weighs_nothing(how: str, where: str, elsewhere: bool) -> None:
    """Worker 0 leaves out its second batch of four; worker 1, whose last one is short, none."""

    def body(run: Any) -> list[float]:
        net, optimizer = model()
        net, optimizer, loader = run.wrap(net, optimizer, data(30, 4))
        for number, batch in enumerate(loader):
            bad = number == 1 and run.rank == 0
            if bad and where == "before zero_grad":
                continue
            ZEROING[how](net, optimizer)
            if bad and where == "before backward":
                continue
            loss_of(net, batch).backward()
            if bad:
                ZEROING[how](net, optimizer)
                continue
            optimizer.step()
        return values(net)

    batches = list(data(30, 4))
    own, others = [batches[0], batches[4], batches[6]], batches[1::2]
    pairs = [[([one], 1.0) for one in pair] for pair in zip(own, others[:3], strict=True)]
    close(run_job(body, elsewhere=elsewhere), one_process([*pairs, [([others[3]], 1.0)]]))


def test_two_optimizers_that_share_a_batch_both_weigh_it() -> None:
    """As in adversarial training: one's gradients are dropped behind the other's backward pass, the batch is not."""

    def body(run: Any) -> list[float]:
        (first, of_first), (second, of_second) = model(), model()
        first, of_first, second, of_second, loader = run.wrap(first, of_first, second, of_second, data(23, 4))
        for batch in loader:
            of_first.zero_grad()
            (loss_of(first, batch) + loss_of(second, batch)).backward()
            of_first.step()
            of_second.zero_grad()
            loss_of(second, batch).backward()
            of_second.step()
        assert values(first) == values(second)
        return values(first)

    rounds = [[([batch], 1.0) for batch in pair] for pair in zip(*[iter(data(23, 4))] * 2, strict=True)]
    close(run_job(body), one_process(rounds))


def test_batches_of_two_loaders_in_hand_both_weigh() -> None:
    def body(run: Any) -> list[float]:
        net, optimizer = model()
        net, optimizer, some, more = run.wrap(net, optimizer, data(23, 4), data(11, 2))
        weights = []
        for one, other in zip(some, more, strict=False):
            optimizer.zero_grad()
            (loss_of(net, one) + loss_of(net, other)).backward()
            optimizer.step()
            weights.append(run.worker.exchanges[0].memory.slots[run.rank].weight(run.step))
        return weights

    assert run_job(body, elsewhere=False) == [[6.0, 6.0, 6.0], [6.0, 6.0, 4.0]]


def test_what_is_left_over_is_in_the_next_step_and_weighs_there() -> None:
    """A script that has asked for the length before the pass, where worker 0's part is the longer one."""

    def body(run: Any) -> list[float]:
        net, optimizer = model()
        net, optimizer, loader = run.wrap(net, optimizer, data(28, 4))
        length, weights = len(loader), []
        for _ in range(2):
            for number, batch in enumerate(loader):
                (loss_of(net, batch) / EVERY).backward()
                if (number + 1) % EVERY == 0 or number + 1 == length:
                    optimizer.step()
                    optimizer.zero_grad()
                    weights.append(run.worker.exchanges[0].memory.slots[run.rank].weight(run.step))
        return weights

    assert run_job(body, elsewhere=False) == [[8.0, 8.0, 8.0, 8.0], [8.0, 12.0]]


@pytest.mark.sampled
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("pace", ["sync", "bounded:2", "async"])
def test_by_lease_nothing_is_left_over_either(pace: str, ahead: int) -> None:
    """Who asks whether a batch is its last has the next one kept for it, whatever the others draw."""

    def body(run: Any) -> list[int]:
        net, optimizer = model()
        source = data(91, 4)
        loader = DataLoader(source.dataset, batch_size=4, num_workers=ahead)
        net, optimizer, loader = run.wrap(net, optimizer, loader)
        left, read, first = 0, 0, len(loader)
        for _ in range(3):
            for number, batch in enumerate(loader):
                loss_of(net, batch).backward()
                left, read = left + 1, read + len(batch[0])
                assert len(loader) in (number + 1, max(first, number + 2))
                if (number + 1) % EVERY == 0 or number + 1 == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
                    left = 0
        return [left, read]

    results = run_job(body, workers=3, assign="lease", pace=parse_pace(pace), elsewhere=False)
    assert [left for left, _ in results] == [0, 0, 0]
    assert sum(read for _, read in results) == 3 * 91
