"""What a plain loop sees of a run: its end, passes left early, evaluation, and workers that stop on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.errors import ConfigError
from tests.driver import Failed, run_job

Seen = dict[str, Any]


def samples(count: int) -> TensorDataset:
    """Sample i is the number i."""
    return TensorDataset(torch.arange(count, dtype=torch.float64))


class Summing:
    """A weight whose gradient is the mean of a batch, stepped at rate 1: it counts what it was trained on."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.optimizer = optim.SGD([self.weight], lr=1.0)

    def train(self, run: Any, batch: torch.Tensor) -> None:
        self.weight.grad = batch.mean().reshape(1)
        self.optimizer.step()
        run.log(loss=batch.mean())


def loop(
    passes: int, batch_size: int = 2, count: int = 22, leave: Callable[[int, int, int], bool] | None = None
) -> Any:
    """A training loop of ``passes``; ``leave(rank, pass, batch)`` breaks out of a pass."""

    def body(run: Any) -> Seen:
        model = Summing()
        _, loader = run.wrap(model.optimizer, DataLoader(samples(count), batch_size=batch_size))
        drawn: list[list[float]] = []
        steps = []
        for number in range(passes):
            drawn.append([])
            for index, (batch,) in enumerate(loader):
                drawn[-1] += batch.tolist()
                model.train(run, batch)
                steps.append(run.step)
                if leave is not None and leave(run.rank, number, index):
                    break
        return {"drawn": drawn, "steps": steps, "weight": model.weight.item(), "end": run.step}

    return body


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_sample_is_drawn_once_a_pass(workers: int, servers: int) -> None:
    results = run_job(loop(3), workers=workers, servers=servers)
    for number in range(3):
        together = sorted(value for result in results for value in result["drawn"][number])
        assert together == list(range(22))


@pytest.mark.parametrize("steps", [1, 4, 6, 11])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_steps_ends_all_workers_in_the_same_round(workers: int, steps: int) -> None:
    results = run_job(loop(30), workers=workers, steps=steps)
    assert {result["end"] for result in results} == {steps}
    assert len({result["weight"] for result in results}) == 1


def test_after_the_end_a_pass_has_one_batch_and_steps_do_nothing() -> None:
    (result, _) = run_job(loop(6), workers=2, epochs=2)
    assert [len(drawn) for drawn in result["drawn"]] == [12, 12, 2, 2, 2, 2]
    assert result["end"] == 12  # 11 batches for 2 workers are 6 rounds a pass


def test_until_loss_and_patience_end_all_workers_together() -> None:
    falling = run_job(loop(20), workers=3, until_loss=1e9)
    assert {result["end"] for result in falling} == {4}  # the first look is at the end of the first pass
    level = run_job(loop(20), workers=2, patience=3)  # the loss is the same in every pass
    assert {result["end"] for result in level} == {6 * 4}


@pytest.mark.parametrize("servers", [0, 1])
def test_leaving_a_pass_early_holds_nobody_up(servers: int) -> None:
    together = run_job(loop(3, leave=lambda rank, number, index: index == 1), workers=2, servers=servers)
    assert {result["end"] for result in together} == {6}
    alone = run_job(loop(3, leave=lambda rank, number, index: rank == 1 and index == 1), workers=3, servers=servers)
    assert alone[0]["weight"] == alone[2]["weight"]  # worker 1 has left its last pass, and the run, before them


def test_a_worker_that_ends_early_leaves_the_others_training() -> None:
    def body(run: Any) -> float:
        model = Summing()
        _, loader = run.wrap(model.optimizer, DataLoader(samples(24), batch_size=2))
        for number in range(4):
            if run.rank == 1 and number == 1:
                return 0.0
            for (batch,) in loader:
                model.train(run, batch)
        return float(run.step)

    assert run_job(body, workers=3) == [16.0, 0.0, 16.0]


def test_an_evaluation_weighs_nothing() -> None:
    """Samples drawn for an evaluation are not behind the next gradient: uneven ones would shift the mean."""

    def body(run: Any, evaluate: bool) -> float:
        model = Summing()
        train, test = DataLoader(samples(7), batch_size=2), DataLoader(samples(5), batch_size=2)
        _, train, test = run.wrap(model.optimizer, train, test)
        for _ in range(3):
            for (batch,) in train:
                model.train(run, batch)
            for (batch,) in test if evaluate else ():
                run.log(loss=batch.sum())
        return model.weight.item()

    with_it = run_job(lambda run: body(run, True), workers=2)
    without = run_job(lambda run: body(run, False), workers=2)
    assert with_it == without


def test_a_script_without_a_loader_counts_each_step_as_one() -> None:
    def body(run: Any) -> float:
        model = Summing()
        run.wrap(model.optimizer)
        for _ in range(4):
            model.train(run, torch.tensor([run.rank + 1.0], dtype=torch.float64))
        return model.weight.item()

    assert run_job(body, workers=3) == [-8.0] * 3


def test_batches_that_cannot_be_counted_are_refused_unless_told_how() -> None:
    batches = ["abc", "de"]

    def body(run: Any, **options: Any) -> int:
        model = Summing()
        loader = run.wrap(batches, **options)
        run.wrap(model.optimizer)
        for batch in loader:
            model.train(run, torch.ones(len(batch), dtype=torch.float64))
        return int(run.step)

    with pytest.raises(ConfigError, match="cannot count the samples in a batch of type str"):
        run_job(body)
    assert run_job(lambda run: body(run, count=len)) == [1, 1]


def test_a_model_changed_after_wrap_is_named() -> None:
    def replaced(run: Any) -> None:
        model = nn.Linear(2, 1)
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        run.wrap(model, optimizer)
        model.weight.data = torch.zeros(1, 2)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    with pytest.raises(ConfigError, match="parameter weight was given other memory"):
        run_job(replaced)

    def added(run: Any) -> None:
        model = Summing()
        run.wrap(model.optimizer)
        model.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        model.train(run, torch.ones(1, dtype=torch.float64))

    with pytest.raises(ConfigError, match="had 1 parameters when it was wrapped and has 2 now"):
        run_job(added)


def test_workers_with_different_models_are_told_the_first_difference() -> None:
    def body(run: Any) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1 + run.rank))
        run.wrap(model, optim.SGD(model.parameters(), lr=1.0))

    with pytest.raises(ConfigError, match=r"1\.weight \[2, 3\] .* on worker 1, 1\.weight \[1, 3\] .* on worker 0"):
        run_job(body)


def test_wrap_on_one_worker_only_is_an_error_and_not_a_hang() -> None:
    def body(run: Any) -> None:
        if run.is_main:
            run.wrap(Summing().optimizer)

    with pytest.raises(Failed, match=r"worker 1 ended without the run\.wrap that worker 0 waits in"):
        run_job(body)


def test_one_run_for_a_process_alone_changes_nothing() -> None:
    from paceline.run.session import Run

    run, model, loader = Run(None), Summing(), DataLoader(samples(4))
    assert run.wrap(model.optimizer, loader) == (model.optimizer, loader)
    assert run.wrap(loader) is loader
    assert (run.rank, run.num_workers, run.is_main, run.step) == (0, 1, True, 0)
    run.log(loss=torch.ones(3))  # not even looked at
