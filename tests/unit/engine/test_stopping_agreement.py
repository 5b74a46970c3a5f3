"""All workers take the same decision about the end in the same round, also when one of them is slow to look.

Most of these jobs run with a schedule that is the worst for the claim: the slow worker stands still at every place
where it may, until the fast one can get no further without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.protocol.deals import more_of_pass
from paceline.protocol.rounds import DEAL, Waiting, holding, parked_at
from paceline.protocol.stopping import CHECK_ROUNDS
from tests.driver import run_job

Loss = Callable[[Any, int, int], float]  # (run, pass, batch) -> what the script logs


@dataclass
class Seen:
    """What one worker saw: the rounds that its steps were in, by pass."""

    steps: list[list[int]] = field(default_factory=list)
    contributors: list[tuple[int, ...]] = field(default_factory=list)
    evaluated: list[list[float]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def rounds(self) -> list[int]:
        """The rounds it took part in: a step after the end of training is in none."""
        return sorted({number for numbers in self.steps for number in numbers})


class Weight:
    """A weight to train, alone in its optimizer."""

    def __init__(self) -> None:
        self.values = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.optimizer = optim.SGD([self.values], lr=0.5)

    def step(self) -> None:
        self.values.grad = torch.ones_like(self.values)
        self.optimizer.step()


def numbers(count: int, batch_size: int = 1) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count, dtype=torch.float64)), batch_size=batch_size)


def make_slow(run: Any, behind: int) -> None:
    """From now on, this worker stands still after its rounds and barriers while worker ``behind`` can go on alone."""
    board, me = run.worker.context.board, run.rank
    wait = board.wait

    def can_go_no_further() -> bool | Waiting:
        exchange = run.worker.exchanges[0]._memory
        parked = parked_at(board.parked[behind])
        if board.parked[behind] & DEAL:
            held = isinstance(more_of_pass(behind, board), Waiting)
        else:
            held = parked >= 0 and holding(parked, board.passes(parked)[behind], board) is not None
        ahead = exchange.pushed[behind] > max(exchange.stepped)
        return bool(held or ahead or board.gone[behind] or board.ended[behind]) or Waiting(behind, "it can go on")

    def slow_wait(ask: Any) -> Any:
        answer = wait(ask)
        if run.worker.exchanges:
            memory = run.worker.exchanges[0]._memory
            stepped = memory.stepped[board.workers :] if board.servers else [memory.stepped[me], memory.stepped[behind]]
            if min(stepped) >= memory.pushed[me]:  # else the other one waits for this round as well
                wait(can_go_no_further)
        return answer

    board.wait = slow_wait


def taken_down(run: Any, weight: Weight, seen: Seen) -> None:
    """Step, and note the round it was in, if it was in one."""
    before = run.worker.over
    weight.step()
    if not before:
        seen.steps[-1].append(run.worker.progress.row.key if run.worker.progress.row.stepped else run.step)


def epochs(
    passes: int,
    loss: Loss,
    *,
    count: int = 8,
    slow: tuple[int, int] | None = None,
    leaves: Callable[[int, int, int], bool] = lambda rank, number, index: False,
    evaluates: int = 0,
    last: Callable[[int], int] = lambda rank: 10**9,
) -> Callable[[Any], Seen]:
    """A training loop. ``slow`` is (worker, behind whom); ``leaves(rank, pass, batch)`` breaks out of a pass after that
    batch; ``evaluates`` loops over a second loader follow each pass; ``last(rank)`` is a worker's last pass."""

    def body(run: Any) -> Seen:
        weight, seen = Weight(), Seen()
        _, train, test = run.wrap(weight.optimizer, numbers(count), numbers(6))
        if slow is not None and run.rank == slow[0]:
            make_slow(run, slow[1])
        for number in range(min(passes, last(run.rank) + 1)):
            seen.steps.append([])
            for index, _ in enumerate(train):
                run.log(loss=loss(run, number, index))
                taken_down(run, weight, seen)
                if leaves(run.rank, number, index):
                    break
            for _ in range(evaluates):
                seen.evaluated.append([value for (batch,) in test for value in batch.tolist()])
        return seen

    return body


def without_end(run: Any, loss: Loss, rounds: int, seen: Seen) -> Iterator[int]:
    """Rounds of a script without a loader, until it is over."""
    weight = Weight()
    run.wrap(weight.optimizer)
    seen.steps.append([])
    for number in range(rounds):
        yield number
        run.log(loss=loss(run, 0, number))
        taken_down(run, weight, seen)
        if run.worker.over:
            return


def all_rounds(results: list[Seen]) -> list[int]:
    """The rounds of the run. Fails unless every worker was in all of them."""
    assert all(result.rounds == results[0].rounds for result in results), [result.rounds[-3:] for result in results]
    return results[0].rounds


SLOW = [None, (1, 0), (0, 1)]


# --- looks ---


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("slow", SLOW)
def test_a_look_within_a_pass_is_at_the_losses_of_that_round(slow: tuple[int, int] | None, servers: int) -> None:
    """Worker 0 loses 10 a round up to the look, worker 1 nothing: the mean is 5, and far from the goal. Then worker 0
    loses nothing either. Who looks late must not take worker 0's next push for the one that was looked at."""

    def body(run: Any) -> Seen:
        seen = Seen()
        for number in without_end(run, lambda run, _, n: 10.0 * (run.rank == 0 and n < CHECK_ROUNDS), 350, seen):
            if number == CHECK_ROUNDS - 3 and slow is not None and run.rank == slow[0]:
                make_slow(run, slow[1])
        return seen

    assert all_rounds(run_job(body, servers=servers, until_loss=1.0))[-1] == 2 * CHECK_ROUNDS


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("slow", SLOW)
def test_an_interrupt_is_obeyed_in_one_round(slow: tuple[int, int] | None, servers: int) -> None:
    """It comes after the fast worker's fourth round, when the slow one has yet to find out that the round is over."""

    def body(run: Any) -> Seen:
        seen, fast = Seen(), 1 - slow[0] if slow else 0
        if slow is not None and run.rank == slow[0]:
            make_slow(run, slow[1])
        try:
            for number in without_end(run, lambda *_: 0.0, 20, seen):
                if number == 4 and run.rank == fast:
                    run.worker.context.board.set_interrupt()
        except KeyboardInterrupt:
            seen.interrupted = True
            seen.steps[-1].append(run.worker.progress.row.key)
        return seen

    results = run_job(body, servers=servers)
    assert all(result.interrupted for result in results)
    assert all_rounds(results) in ([1, 2, 3, 4], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("evaluates", [0, 1, 2])
def test_patience_runs_out_for_all_at_once(slow: tuple[int, int] | None, evaluates: int) -> None:
    """The best loss is that of pass 1; two looks without a better one end the run with pass 3."""
    losses = [1.0, 2.0, 2.5, 2.4, 2.6, 2.7]
    results = run_job(epochs(6, lambda run, number, _: losses[number], slow=slow, evaluates=evaluates), patience=2)
    assert all_rounds(results) == list(range(1, 13))


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("evaluates", [0, 1, 2])
def test_a_worker_that_left_a_pass_early_has_looked_at_it_like_the_others(
    slow: tuple[int, int] | None, evaluates: int
) -> None:
    """Worker 1 breaks out of pass 1 and comes to the evaluation first. Its look at pass 1 must not be another one, or
    be missing: then its patience would end in another pass than worker 0's."""
    losses = [1.0, 2.0, 2.5, 2.4, 2.6, 2.7]
    body = epochs(
        6,
        lambda run, number, _: losses[number],
        slow=slow,
        evaluates=evaluates,
        leaves=lambda rank, number, index: rank == 1 and number == 0 and index == 1,
    )
    fast, left_early = run_job(body, patience=2)
    assert fast.rounds == list(range(1, 13))
    assert left_early.rounds == [1, 2, *range(5, 13)]


def test_the_losses_of_a_worker_that_has_left_do_not_count_for_ever() -> None:
    """Worker 1 ends after two bad passes; from then on worker 0 alone decides what the loss is."""

    def loss(run: Any, number: int, index: int) -> float:
        return 100.0 if number < 2 else 0.0

    stayed, left = run_job(epochs(8, loss, last=lambda rank: 1 if rank == 1 else 7), until_loss=1.0)
    assert left.rounds == list(range(1, 9))
    assert stayed.rounds == list(range(1, 13))  # pass 3 is the first with a small loss


@pytest.mark.parametrize("count", [2, 7, 9])
@pytest.mark.parametrize("slow", [None, (2, 0), (0, 1)])
def test_uneven_data_ends_in_one_round_too(count: int, slow: tuple[int, int] | None) -> None:
    """Some workers are out of data in the last round of a pass, or always."""
    body = epochs(9, lambda run, number, _: 10.0 - number, count=count, slow=slow)
    results = run_job(body, workers=3, until_loss=7.5)
    a_pass = -(-count // 3)
    assert max(result.rounds[-1] for result in results if result.rounds) == 4 * a_pass
    for rank, result in enumerate(results):
        mine = [4 * [1] for _ in range(a_pass)][: len(range(rank, count, 3))]
        assert len(result.rounds) == 4 * len(mine)


# --- steps and epochs ---


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_steps_are_rounds_of_all(steps: int, slow: tuple[int, int] | None, servers: int) -> None:
    """Seven batches for two workers: worker 1 is not in rounds 4, 8 and so on, and the run may end in one of those."""
    fast, other = run_job(epochs(9, lambda *_: 0.0, count=7, slow=slow), servers=servers, steps=steps)
    assert fast.rounds == list(range(1, steps + 1))
    assert other.rounds == [number for number in fast.rounds if number % 4]


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("count", [1, 7, 8])
def test_epochs_are_passes_of_all(slow: tuple[int, int] | None, count: int) -> None:
    results = run_job(epochs(9, lambda *_: 0.0, count=count, slow=slow), epochs=3)
    for rank, result in enumerate(results):
        assert [len(steps) for steps in result.steps if steps] == [len(range(rank, count, 2))] * 3 * (rank < count)


@pytest.mark.parametrize("before", ["a look at the first batch", "an evaluation on the training data"])
def test_a_pass_without_steps_is_no_epoch(before: str) -> None:
    """``--epochs 2`` trains twice on the data, whatever else the script reads it for."""

    def body(run: Any) -> list[int]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(8))
        if before == "a look at the first batch":
            next(iter(loader))
        steps = []
        for _ in range(5):
            if before == "an evaluation on the training data":
                for _ in loader:
                    pass
            for _ in loader:
                weight.step()
            steps.append(run.step)
        return steps

    assert run_job(body, epochs=2) == [[4, 8, 8, 8, 8]] * 2


def test_an_evaluation_during_others_rounds_is_no_training() -> None:
    """Worker 1 leaves pass 1 early and evaluates, while worker 0 still trains: the rounds it sees go by are not its
    own, so that the second loader's passes do not count as epochs."""
    body = epochs(5, lambda *_: 0.0, evaluates=2, leaves=lambda rank, number, index: rank == 1 and index == 0)
    stayed, left_early = run_job(body, epochs=3)
    assert [len(steps) for steps in stayed.steps] == [4, 4, 4, 0, 0]
    assert [len(steps) for steps in left_early.steps] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 7}])
def test_an_evaluation_after_the_end_is_still_a_whole_one(how: dict[str, int]) -> None:
    """What a script prints last is the accuracy on its test data, not on the first batch of it."""
    results = run_job(epochs(4, lambda *_: 0.0, evaluates=1), **how)
    for rank, result in enumerate(results):
        assert result.evaluated == [list(range(rank, 6, 2))] * 4


@pytest.mark.parametrize("servers", [0, 2])
def test_everyone_learns_the_same_contributors(servers: int) -> None:
    """Worker 0 leaves its pass after round 1 and steps on outside, in round 2 with worker 1; worker 2 is out of data
    and waits for worker 1's end of the pass. Then it may push round 3 before worker 0 has seen who was in round 2."""

    def body(run: Any) -> list[tuple[int, tuple[int, ...]]]:
        weight = Weight()
        _, loader = run.wrap(weight.optimizer, numbers(5))
        exchange, rounds = run.worker.exchanges[0], []
        board, memory = run.worker.context.board, exchange._memory
        step, wait = exchange.step, board.wait

        def noted(push: Any) -> Any:
            round_ = step(push)
            rounds.append((round_.number, round_.contributors))
            return round_

        def slow_wait(ask: Any) -> Any:
            answer = wait(ask)
            stepped = min(memory.stepped[3:]) if servers else memory.stepped[0]
            if run.rank == 0 and memory.pushed[0] == 2 == stepped:
                wait(lambda: memory.pushed[2] == 3 or Waiting(2, "it has not pushed yet"))
            return answer

        exchange.step, board.wait = noted, slow_wait
        for _ in loader:
            weight.step()
            if run.rank == 0:
                break
        for _ in range(2 if run.rank == 0 else 1):
            weight.step()
        return rounds

    all_three = [(1, (0, 1, 2)), (2, (0, 1)), (3, (0, 1, 2))]
    assert run_job(body, workers=3, servers=servers) == [all_three, all_three, [all_three[0], all_three[2]]]
