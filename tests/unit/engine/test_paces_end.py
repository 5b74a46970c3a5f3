"""Training ends for all workers, at every pace, after the same number of samples; and all stand at the same parameters.

Schedules are drawn or fixed by the test, never timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Async, Bounded, Local, Pace, Quorum, Sync
from paceline.protocol.stopping import CHECK_ROUNDS
from tests.unit.engine.pacing import (
    CASES,
    OPTIMIZERS,
    Turns,
    assert_same_bits,
    drawn,
    make_data,
    make_model,
    on_workers,
    scheduled,
    small_parts,
    train,
)

SCHEDULE = st.lists(st.integers(0, 11), min_size=1, max_size=30)
PACES: list[Pace] = [
    Sync(),
    Quorum(1),
    Quorum(2),
    Bounded(0),
    Bounded(2),
    Async(),
    Async(3),
    Local(1),
    Local(3),
    Local(4, 0.7, 0.9),
]
every_pace = pytest.mark.parametrize("pace", PACES, ids=str)
servers_or_none = pytest.mark.parametrize("servers", [0, 2])


@dataclass
class Seen:
    """One worker's training: steps it took before the end by pass, and how it stood then."""

    steps: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    over: bool = False


def script(
    passes: int,
    samples: int,
    *,
    turns: Turns | None = None,
    loss: Callable[[int], float] = lambda number: 0.0,
    leaves: Callable[[int, int, int], str] = lambda rank, number, index: "",
) -> Callable[[Any], Seen]:
    """SGD of rate 1 with a gradient of -1: at async and bounded the weight counts pushes, elsewhere rounds.

    ``loss(pass)`` is logged. ``leaves(rank, pass, batch)`` says whether a worker leaves "the pass" or "the script".
    """

    def body(run: Any) -> Seen:
        seen = Seen()
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        _, loader = run.wrap(optimizer, DataLoader(TensorDataset(torch.arange(float(samples)))))
        with scheduled(run, turns):
            for number in range(passes):
                seen.steps.append(0)
                for _ in loader:
                    run.log(loss=loss(number))
                    weight.grad = torch.full_like(weight, -1.0)
                    if turns is not None:
                        turns.take(run.rank)
                    before = run.worker.over
                    optimizer.step()
                    if before or run.worker.progress.batch_dropped:  # then the batch comes again
                        continue
                    seen.steps[-1] += 1
                    leaving = leaves(run.rank, number, seen.steps[-1] - 1)
                    if leaving == "the script":
                        seen.weight = weight.tolist()
                        return seen
                    if leaving == "the pass":
                        break
        seen.weight, seen.over = weight.tolist(), run.worker.over
        return seen

    return body


def pushes_of(results: Sequence[Seen]) -> float:
    """What the weight has come to. Fails unless it is the same on all workers, and in all places."""
    (value,) = {value for seen in results for value in seen.weight}
    return value


# --- --steps ---


def is_by_push(pace: Pace) -> bool:
    return isinstance(pace, Bounded | Async)


@settings(max_examples=25)
@given(st.sampled_from(PACES), st.integers(2, 4), st.sampled_from([0, 1, 2]), st.integers(1, 9), SCHEDULE)
def test_steps_are_as_many_samples_at_every_pace(
    pace: Pace, workers: int, servers: int, steps: int, schedule: list[int]
) -> None:
    """S steps of n workers are S n pushes of one batch each, S rounds, or S local steps of all: two passes at most, and
    the other two are empty. With sums of three local steps in a push the last may be of up to two more."""
    body = script(4, workers * 5, turns=Turns(workers, drawn(schedule)))
    results = on_workers(body, workers=workers, servers=servers, pace=pace, steps=steps)
    assert all(seen.over for seen in results)
    total = pushes_of(results)
    if pace == Async(3):
        assert steps * workers <= total <= steps * workers + 2
    elif is_by_push(pace):
        assert total == steps * workers
    elif isinstance(pace, Local):
        assert [sum(seen.steps) for seen in results] == [steps] * workers
        if pace.outer_lr == 1.0:
            assert total == pytest.approx(steps, rel=1e-12)
    else:
        assert total == pytest.approx(steps, rel=1e-12)  # the mean of gradients of -1, in each round


@pytest.mark.sampled
@every_pace
@servers_or_none
@pytest.mark.parametrize("workers", [1, 3])
def test_steps_end_training_in_mid_pass_without_a_schedule(workers: int, servers: int, pace: Pace) -> None:
    if isinstance(pace, Quorum) and pace.count > workers:
        pace = Quorum(workers)
    results = on_workers(script(3, 40 * workers), workers=workers, servers=servers, pace=pace, steps=6)
    assert all(seen.over for seen in results)
    total = pushes_of(results)
    if is_by_push(pace):
        assert 6 * workers <= total <= 6 * workers + (2 if pace == Async(3) else 0)
    elif not isinstance(pace, Local) or pace.outer_lr == 1.0:
        assert total == pytest.approx(6, rel=1e-12)


# --- the other rules ---


@pytest.mark.sampled
@every_pace
@servers_or_none
@pytest.mark.parametrize("samples", [1, 7, 8])
def test_epochs_are_passes_of_all(samples: int, servers: int, pace: Pace) -> None:
    """Each worker has its part of three passes, and no more."""
    results = on_workers(script(9, samples), servers=servers, pace=pace, epochs=3)
    assert all(seen.over for seen in results)
    for rank, seen in enumerate(results):
        assert seen.steps == [len(range(rank, samples, 2))] * 3 + [0] * 6
    if is_by_push(pace):
        assert pushes_of(results) == 3 * samples
    else:
        pushes_of(results)


@every_pace
@servers_or_none
def test_a_low_loss_at_the_end_of_a_pass_ends_training_for_all(servers: int, pace: Pace) -> None:
    """10, 9, 8, 7 ...: the third pass is the first with 8 or less."""
    body = script(9, 15, loss=lambda number: 10.0 - number)
    results = on_workers(body, workers=3, servers=servers, pace=pace, until_loss=8.0)
    assert all(seen.over for seen in results)
    assert [seen.steps for seen in results] == [[5] * 3 + [0] * 6] * 3
    pushes_of(results)


@every_pace
@servers_or_none
def test_patience_runs_out_for_all_after_the_same_pass(servers: int, pace: Pace) -> None:
    """The best loss is that of the first pass; two looks without a better one end the run with the third."""
    losses = [1.0, 2.0, 2.5, 2.4, 2.6, 2.7]
    results = on_workers(script(6, 8, loss=lambda number: losses[number]), servers=servers, pace=pace, patience=2)
    assert all(seen.over for seen in results)
    assert [seen.steps for seen in results] == [[4] * 3 + [0] * 3] * 2
    pushes_of(results)


@pytest.mark.parametrize("pace", [p for p in PACES if p not in (Async(3), Local(3), Local(4, 0.7, 0.9))], ids=str)
def test_a_look_in_mid_pass_ends_training_for_all(pace: Pace) -> None:
    """A look comes every CHECK_ROUNDS rounds, or as many pushes of each worker."""
    body = script(1, 3 * CHECK_ROUNDS * 2, loss=lambda number: 1.0)
    results = on_workers(body, pace=pace, until_loss=2.0)
    assert all(seen.over for seen in results)
    assert pushes_of(results) == CHECK_ROUNDS * (2 if is_by_push(pace) else 1)


@every_pace
@servers_or_none
def test_ctrl_c_ends_training_for_all(servers: int, pace: Pace) -> None:
    """Worker 1 has it set in mid-pass, after its fourth step."""

    def body(run: Any) -> str:
        def interrupt(rank: int, number: int, index: int) -> str:
            if rank == 1 and index == 3:
                run.worker.context.board.set_interrupt()
            return ""

        try:
            script(1, 2000, leaves=interrupt)(run)
        except KeyboardInterrupt:
            return "interrupted"
        return "over" if run.worker.over else "not ended"

    results = on_workers(body, servers=servers, pace=pace)
    assert "interrupted" in results
    assert "not ended" not in results


# --- leaving ---


@settings(max_examples=25)
@given(
    st.sampled_from(PACES),
    st.integers(2, 4),
    st.sampled_from([0, 2]),
    st.sampled_from(["the pass", "the script"]),
    st.dictionaries(st.tuples(st.integers(0, 3), st.integers(0, 2)), st.integers(0, 4), max_size=5),
    SCHEDULE,
)
def test_who_leaves_early_holds_nobody_and_takes_no_step_away(
    pace: Pace, workers: int, servers: int, what: str, early: dict[tuple[int, int], int], schedule: list[int]
) -> None:
    """``early[worker, pass]`` is the batch after which a worker leaves that pass, or the script."""
    samples, passes = 6 * workers - 1, 3
    early = {key: index for key, index in early.items() if key[0] < workers - (what == "the script")}

    def leaves(rank: int, number: int, index: int) -> str:
        return what if early.get((rank, number)) == index else ""

    body = script(passes, samples, turns=Turns(workers, drawn(schedule)), leaves=leaves)
    results = on_workers(body, workers=workers, servers=servers, pace=pace)
    for rank, seen in enumerate(results):
        whole = len(range(rank, samples, workers))
        expected = [min(whole, early.get((rank, number), whole) + 1) for number in range(passes)]
        if what == "the script":
            gone_in = min((number for of, number in early if of == rank), default=passes)
            expected = expected[: gone_in + 1]
        assert seen.steps == expected
    if is_by_push(pace):
        last = max(max(seen.weight) for seen in results)
        assert last == sum(sum(seen.steps) for seen in results) or _left_the_last(early, passes, what)


def _left_the_last(early: dict[tuple[int, int], int], passes: int, what: str) -> bool:
    """Then no worker may have looked at the parameters after the last push: there was no barrier."""
    return what == "the pass" and any(number == passes - 1 for _, number in early)


@pytest.mark.sampled
@every_pace
@servers_or_none
@pytest.mark.parametrize("leaver", [0, 1])
def test_the_others_go_on_when_one_has_left_the_script(leaver: int, servers: int, pace: Pace) -> None:
    """Six batches a pass for each of two; one leaves after its second. The other's twelve steps all count."""
    body = script(2, 12, leaves=lambda rank, _, index: "the script" if (rank, index) == (leaver, 1) else "")
    results = on_workers(body, servers=servers, pace=pace)
    assert results[1 - leaver].steps == [6, 6]
    assert results[leaver].steps == [2]
    (weight,) = set(results[1 - leaver].weight)
    if is_by_push(pace):
        assert weight == 14
    elif isinstance(pace, Sync):
        assert weight == 12


@every_pace
@servers_or_none
def test_steps_end_training_of_those_who_are_left(servers: int, pace: Pace) -> None:
    body = script(12, 12, leaves=lambda rank, _, index: "the script" if (rank, index) == (1, 2) else "")
    results = on_workers(body, servers=servers, pace=pace, steps=20)
    assert results[0].over
    assert results[0].steps[-1] == 0
    (weight,) = set(results[0].weight)
    if is_by_push(pace):
        assert 40 <= weight <= 42


# --- all workers end equal ---


@pytest.mark.sampled
@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async(), Async(3), Local(3), Local(2, 0.7, 0.9)], ids=str)
@pytest.mark.parametrize(("name", "servers"), CASES)
def test_all_workers_end_with_the_same_parameters(name: str, servers: int, pace: Pace) -> None:
    body = train(make_model(), OPTIMIZERS[name], make_data(4 * 13 + 1), batch=4, epochs=2)
    with small_parts():
        results = on_workers(body, workers=3, servers=servers, pace=pace)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.sampled
@pytest.mark.parametrize("pace", [Quorum(2), Bounded(1), Async(), Async(3), Local(3), Local(2, 0.7, 0.9)], ids=str)
@servers_or_none
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_all_workers_end_with_the_same_parameters_when_steps_are_done(steps: int, servers: int, pace: Pace) -> None:
    turns = Turns(3, drawn([2, 0, 0, 1, 2, 1]))
    body = train(make_model(), OPTIMIZERS["adamw"], make_data(4 * 31), batch=4, epochs=3, turns=turns)
    results = on_workers(body, workers=3, servers=servers, pace=pace, steps=steps)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@settings(max_examples=20)
@given(st.sampled_from(PACES), st.sampled_from([0, 2]), st.integers(1, 9), SCHEDULE)
def test_without_a_loader_all_workers_see_the_last_push_when_steps_are_done(
    pace: Pace, servers: int, steps: int, schedule: list[int]
) -> None:
    """There is no end of a pass to meet at: who learns of the end takes what others have pushed until then."""
    turns = Turns(3, drawn(schedule))

    def body(run: Any) -> list[float]:
        weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = optim.SGD([weight], lr=1.0)
        run.wrap(optimizer)
        with scheduled(run, turns):
            while not run.worker.over:
                weight.grad = torch.full_like(weight, -1.0)
                turns.take(run.rank)
                optimizer.step()
        return weight.tolist()

    results = on_workers(body, workers=3, servers=servers, pace=pace, steps=steps)
    assert results == [results[0]] * 3
