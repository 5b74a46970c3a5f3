"""Loaders, optimizers and models of all kinds in whole jobs: nobody hangs, nothing is lost, errors say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from paceline.config import Async, Local
from paceline.errors import ConfigError
from paceline.protocol.rounds import Waiting
from tests.driver import run_job


def numbers(count: int, batch_size: int = 1, **options: Any) -> DataLoader[Any]:
    """Sample i is the number i."""
    return DataLoader(TensorDataset(torch.arange(count, dtype=torch.float64)), batch_size=batch_size, **options)


class Weight:
    """A weight of which the gradient is the mean of a batch, stepped at rate 1: it counts what it was trained on."""

    def __init__(self) -> None:
        self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.optimizer = optim.SGD([self.value], lr=1.0)

    def step(self, batch: torch.Tensor) -> None:
        self.value.grad = batch.mean().reshape(1)
        self.optimizer.step()


class Stuck(Exception):
    """All workers wait at ends of passes, for each other."""


_asked: dict[int, dict[int, Callable[[], Any]]] = {}  # by job: what each of its workers waits for


def watch(run: Any) -> None:
    """Raise Stuck, instead of hanging, once every worker stands at an end of a pass and none of them is free to go."""
    board, rank = run.worker.context.board, run.rank
    waiting = _asked.setdefault(id(run.worker.context.job), {})
    wait = board.wait

    def standing() -> list[Callable[[], Any]] | None:
        here = [waiting.get(worker) for worker in range(board.workers) if not board.gone[worker]]
        parked = all(board.parked[worker] for worker in range(board.workers) if not board.gone[worker])
        return here if parked and all(ask is not None and isinstance(ask(), Waiting) for ask in here) else None

    def watched_wait(ask: Any) -> Any:
        def ask_or_fail() -> Any:
            before = standing()
            # Who has not left its wait between two looks has changed nothing: what was seen is one moment's.
            if before is not None and before == standing():
                raise Stuck
            return ask()

        waiting[rank] = ask
        try:
            return wait(ask_or_fail)
        finally:
            waiting.pop(rank, None)

    board.wait = watched_wait


# --- evaluation ---


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize(("workers", "count"), [(2, 6), (2, 5), (3, 7), (3, 8)])
def test_evaluating_every_few_steps_hangs_nobody(workers: int, count: int, servers: int) -> None:
    """With uneven data, one worker comes to an evaluation that another has no step for."""

    def body(run: Any) -> tuple[int, float]:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(count), numbers(4))
        watch(run)
        evaluations, step = 0, 0
        for _ in range(2):
            for (batch,) in train:
                weight.step(batch)
                step += 1
                if step % 3 == 0:
                    evaluations += 1
                    for _ in test:
                        pass
        return evaluations, weight.value.item()

    results = run_job(body, workers=workers, servers=servers)
    assert len({value for _, value in results}) == 1
    assert [seen for seen, _ in results] == [2 * len(range(rank, count, workers)) // 3 for rank in range(workers)]


@pytest.mark.parametrize(("when", "guarded"), [("before training", True), ("after each pass", False)])
def test_an_evaluation_of_fewer_batches_than_workers_takes_nobody_out_of_training(when: str, guarded: bool) -> None:
    """The whole test set as one batch is worker 0's; the others have nothing to evaluate, and must not wait there until
    the run is over, while worker 0 trains alone. ``guarded``: the evaluation is under ``torch.no_grad()``."""

    def body(run: Any) -> tuple[int, list[int]]:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(8), numbers(5, batch_size=5))
        watch(run)
        mine, seen = 0, []

        def evaluate() -> None:
            with torch.set_grad_enabled(not guarded):
                seen.append(sum(len(batch) for (batch,) in test))

        if when == "before training":
            evaluate()
        for _ in range(3):
            for (batch,) in train:
                weight.step(batch)
                mine += 1
            if when == "after each pass":
                evaluate()
        return mine, seen

    results = run_job(body, workers=2)
    times = 1 if when == "before training" else 3
    assert results == [(12, [5] * times), (12, [0] * times)]


@pytest.mark.parametrize("pace", [Local(every=4), Async(every=4)])
def test_an_evaluation_with_nothing_to_read_keeps_the_local_steps_of_an_open_period(pace: Local | Async) -> None:
    """Worker 1 has no batch to evaluate; what it has learned since the last meeting must still be there afterwards."""

    def body(run: Any) -> list[float]:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(12), numbers(5, batch_size=5))
        lost = []
        for step, (batch,) in enumerate(train, start=1):
            weight.step(batch + 1)
            before = weight.value.item()
            if step % 4:
                for _ in test:
                    pass
                lost.append(weight.value.item() - before)
        return lost

    results = run_job(body, workers=2, pace=pace, assign="round_robin")
    assert results == [[0.0] * 5] * 2


def test_an_evaluation_on_worker_0_alone_does_not_take_it_out_of_training() -> None:
    """``if run.is_main:`` around an evaluation is what scripts for DDP do; it sees worker 0's part of the data."""

    def body(run: Any) -> tuple[list[int], float]:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(8), numbers(4))
        watch(run)
        steps = []
        for _ in range(3):
            for (batch,) in train:
                weight.step(batch)
            if run.is_main:
                for _ in test:
                    pass
            steps.append(run.step)
        return steps, weight.value.item()

    results = run_job(body)
    assert results[0] == results[1] == ([4, 8, 12], -3 * sum(range(8)) / 2)


def test_a_look_at_the_first_batch_on_worker_0_alone_does_not_take_it_out_of_training() -> None:
    def body(run: Any) -> tuple[int, float]:
        weight = Weight()
        _, train = run.wrap(weight.optimizer, numbers(8))
        watch(run)
        if run.is_main:
            next(iter(train))
        for _ in range(3):
            for (batch,) in train:
                weight.step(batch)
        return run.step, weight.value.item()

    assert run_job(body) == [(12, -3 * sum(range(8)) / 2)] * 2


@pytest.mark.parametrize("when", ["in the pass", "after it"])
def test_an_evaluation_changes_no_weight_of_the_next_step(when: str) -> None:
    """Batches of 3 and 1 samples are weighted 3 to 1, also when an uneven evaluation came between draw and step."""

    def body(run: Any, evaluate: bool) -> float:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(16, batch_size=3), numbers(5, batch_size=2))
        for _ in range(2):
            for (batch,) in train:
                if evaluate and when == "in the pass":
                    for _ in test:
                        pass
                weight.step(batch)
            if evaluate and when == "after it":
                for _ in test:
                    pass
        return weight.value.item()

    assert run_job(lambda run: body(run, True)) == run_job(lambda run: body(run, False))


def test_an_evaluation_between_backward_and_step_changes_no_weight() -> None:
    """Gradient accumulation: the samples before the evaluation count, those of the evaluation do not."""

    def body(run: Any, evaluate: bool) -> float:
        weight = Weight()
        _, train, test = run.wrap(weight.optimizer, numbers(22, batch_size=3), numbers(7, batch_size=2))
        for number, (batch,) in enumerate(train):
            (weight.value * batch).sum().backward()
            if evaluate and number == 1:
                with torch.no_grad():
                    for _ in test:
                        pass
            if number % 2:
                weight.optimizer.step()
                weight.optimizer.zero_grad()
        return weight.value.item()

    assert run_job(lambda run: body(run, True)) == run_job(lambda run: body(run, False))


# --- passes of all shapes ---


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_workers_without_any_data_wait_and_stay_equal(count: int, servers: int) -> None:
    def body(run: Any) -> tuple[int, float]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(count))
        watch(run)
        for _ in range(3):
            for (batch,) in loader:
                weight.step(batch + 1)
        return run.step, weight.value.item()

    rounds = 3 if count else 0
    assert (
        run_job(body, workers=3, servers=servers) == [(rounds, -rounds * sum(range(1, count + 1)) / max(count, 1))] * 3
    )


@pytest.mark.parametrize("assign", ["round_robin", "hash", "random", "block"])
@pytest.mark.parametrize("servers", [0, 1])
def test_every_assignment_trains_on_every_sample_in_lockstep(assign: str, servers: int) -> None:

    def body(run: Any) -> tuple[float, float]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(23, shuffle=True))
        watch(run)
        drawn = 0.0
        for _ in range(2):
            for (batch,) in loader:
                drawn += batch.item()
                weight.step(batch)
        return drawn, weight.value.item()

    results = run_job(body, workers=3, servers=servers, assign=assign)
    assert sum(drawn for drawn, _ in results) == 2 * sum(range(23))
    assert len({value for _, value in results}) == 1


@pytest.mark.parametrize(("first", "second"), [(4, 7), (7, 4), (5, 5)])
def test_two_loaders_side_by_side(first: int, second: int) -> None:
    """``zip`` leaves the longer one in the middle of its pass; the next pass begins anew on all workers."""

    def body(run: Any) -> tuple[list[int], float]:
        weight = Weight()
        _, one, other = run.wrap(weight.optimizer, numbers(first), numbers(second))
        watch(run)
        pairs = []
        for _ in range(3):
            pairs.append(0)
            for (a,), (b,) in zip(one, other, strict=False):
                pairs[-1] += 1
                weight.step(a + b)
        return pairs, weight.value.item()

    results = run_job(body)
    assert results[0][1] == results[1][1]
    for rank, (pairs, _) in enumerate(results):
        assert pairs == [min(len(range(rank, first, 2)), len(range(rank, second, 2)))] * 3


def test_a_loader_that_is_wrapped_anew_for_every_pass() -> None:
    def body(run: Any) -> tuple[int, float]:
        weight = Weight()
        run.wrap(weight.optimizer)
        for _ in range(20):
            for (batch,) in run.wrap(numbers(5)):
                weight.step(batch)
        return run.step, weight.value.item()

    results = run_job(body)
    assert results[0] == results[1]
    assert results[0][0] == 60


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(11, dtype=torch.float64))


SOURCES: dict[str, Callable[[], Any]] = {
    "a list": lambda: [torch.full((2,), float(number), dtype=torch.float64) for number in range(7)],
    "a stream": lambda: DataLoader(Stream(), batch_size=2),
    "an iterator": lambda: iter([torch.full((2,), float(number), dtype=torch.float64) for number in range(7)]),
}


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("name", SOURCES)
def test_other_sources_train_in_lockstep(name: str, servers: int) -> None:
    def body(run: Any) -> tuple[list[float], float]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, SOURCES[name]())
        drawn = []
        for batch in loader:
            drawn += batch.tolist()
            weight.step(batch)
        return drawn, weight.value.item()

    results = run_job(body, workers=2, servers=servers)
    alone: list[float] = []
    for batch in SOURCES[name]():
        alone += batch.tolist()
    assert sorted(value for drawn, _ in results for value in drawn) == sorted(alone)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("servers", [0, 2])
def test_passes_left_at_different_places(servers: int) -> None:
    """Each worker breaks where it likes, another not at all."""

    def body(run: Any) -> float:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(15))
        watch(run)
        for number in range(4):
            for index, (batch,) in enumerate(loader):
                if (run.rank, number) in ((0, 1), (2, 2), (2, 3)) and index == 1 + run.rank * number % 3:
                    break
                weight.step(batch)
        for _ in loader:  # one more, so that all have come through the barriers of those passes
            pass
        return weight.value.item()

    results = run_job(body, workers=3, servers=servers)
    assert len(set(results)) == 1


def test_steps_after_the_loop_are_rounds_of_all() -> None:
    """What is left of an accumulation is stepped behind the loop, by workers with uneven leftovers."""

    def body(run: Any) -> tuple[int, float]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(7, batch_size=1))
        watch(run)
        for _ in range(2):
            for number, (batch,) in enumerate(loader):
                (weight.value * batch).sum().backward()
                if number % 2:
                    weight.optimizer.step()
                    weight.optimizer.zero_grad()
            weight.optimizer.step()
            weight.optimizer.zero_grad()
        return run.step, weight.value.item()

    results = run_job(body)
    assert results[0] == results[1]


# --- clipping ---


@pytest.mark.parametrize("how", [{"steps": 3}, {"epochs": 1}])
def test_clipping_after_the_end_hangs_nobody(how: dict[str, int]) -> None:
    def body(run: Any) -> float:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(5))
        watch(run)
        for _ in range(4):
            for (batch,) in loader:
                weight.value.grad = batch.mean().reshape(1)
                nn.utils.clip_grad_norm_([weight.value], 1.0)
                weight.optimizer.step()
        return weight.value.item()

    first, second = run_job(body, **how)
    assert first == second


# --- what cannot be shared ---


def refused(body: Callable[[Any], Any], **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        run_job(body, **options)
    return caught.value


def test_a_lazy_model_is_refused_with_what_to_do() -> None:
    def body(run: Any) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(4))
        run.wrap(model, optim.SGD(model.parameters(), lr=0.1))

    error = refused(body)
    assert error.what == "parameter 1.weight is lazy and has no shape yet"
    assert "forward pass" in error.fix


def test_a_lazy_model_without_an_optimizer_is_refused_too() -> None:
    assert "weight is lazy" in refused(lambda run: run.wrap(nn.LazyLinear(4))).what


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (optim.LBFGS, "LBFGS"),
        (optim.SparseAdam, "SparseAdam"),
        (lambda p: optim.SGD([{"params": p, "mine": object()}], lr=0.1), "a setting that cannot be sent"),
    ],
    ids=["LBFGS", "SparseAdam", "an object as a setting"],
)
def test_optimizers_that_cannot_be_shared_are_refused(make: Callable[[Any], optim.Optimizer], says: str) -> None:
    assert says in refused(lambda run: run.wrap(make(list(nn.Linear(2, 2).parameters())))).what


def test_tied_memory_is_refused_with_the_models_names() -> None:
    def body(run: Any) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = nn.Parameter(model[0].weight.data)
        run.wrap(model, optim.SGD(model.parameters(), lr=0.1))

    assert refused(body).what == "parameters 0.weight and 1.weight are two objects over one memory"


@pytest.mark.parametrize(
    ("differs", "told"),
    [
        ("names", "first.weight [2, 2] float32 in group 0 on worker 1, second.weight [2, 2] float32 in group 0"),
        ("dtypes", "weight [2, 2] float64 in group 0 on worker 1, weight [2, 2] float32 in group 0 on worker 0"),
        ("classes", "the optimizer is torch.optim.adam:Adam on worker 1, torch.optim.sgd:SGD on worker 0"),
        ("rates", "settings or state differ on worker 1 and worker 0"),
        ("buffers", "1 parameters on worker 1, 2 on worker 0"),
    ],
)
def test_workers_that_differ_are_told_in_what(differs: str, told: str) -> None:
    def body(run: Any) -> None:
        mine = run.rank == 1
        layer = nn.Linear(2, 2, bias=False).to(torch.float64 if mine and differs == "dtypes" else torch.float32)
        model: nn.Module = nn.ModuleDict({"first" if mine else "second": layer}) if differs == "names" else layer
        kind = optim.Adam if mine and differs == "classes" else optim.SGD
        optimizer = kind(model.parameters(), lr=0.2 if mine and differs == "rates" else 0.1)
        if differs == "buffers":
            for name in ("a",) if mine else ("a", "b"):
                model.register_buffer(name, torch.zeros(2))
        run.wrap(model, optimizer)

    assert told in refused(body).what


class Scaled(optim.SGD):
    """A class of the user's that keeps something of its own beside its groups."""

    def __init__(self, params: Any, scale: float) -> None:
        super().__init__(params, lr=1.0)
        self.scale = scale

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)
        return super().step(closure)


def scaled(run: Any) -> float:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = run.wrap(Scaled([weight], scale=10.0))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    return weight.item()


def test_a_class_of_the_users_keeps_its_attributes_on_workers() -> None:
    assert run_job(scaled) == [-10.0, -10.0]


def test_a_class_that_needs_its_attributes_is_refused_for_servers() -> None:
    """A server has the class and the settings of the groups, not the user's object."""
    error = refused(scaled, servers=1)
    assert "Scaled" in error.what
    assert "--servers 0" in error.fix


@pytest.mark.parametrize("number", [float, torch.tensor, np.float64, np.float32])
@pytest.mark.parametrize("servers", [0, 1])
def test_rates_that_a_schedule_computed_are_taken_as_they_are(number: Callable[[float], Any], servers: int) -> None:
    """A schedule written with numpy leaves its numbers in the groups; a tensor may be changed in place."""

    def body(run: Any) -> float:
        weight = Weight()
        run.wrap(weight.optimizer)
        (group,) = weight.optimizer.param_groups
        for rate in (1.0, 0.5, 0.5, 0.25):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = number(rate)
            weight.step(torch.ones(1, dtype=torch.float64))
        return weight.value.item()

    assert run_job(body, servers=servers) == [-2.25] * 2


class Listed(optim.SGD):
    """Multiplies gradients by a setting that is a list."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1.0)
        self.param_groups[0]["scales"] = [1.0, 1.0]

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(group["scales"][0])
        return super().step(closure)


@pytest.mark.parametrize("servers", [0, 1])
def test_a_setting_that_is_changed_in_place_is_seen(servers: int) -> None:
    def body(run: Any) -> float:
        value = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = run.wrap(Listed([value]))
        for scale in (1.0, 10.0):
            optimizer.param_groups[0]["scales"][0] = scale
            value.grad = torch.ones_like(value)
            optimizer.step()
        return value.item()

    assert run_job(body, servers=servers) == [-11.0] * 2
