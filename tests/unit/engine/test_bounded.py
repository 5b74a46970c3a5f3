"""Pace bounded (Ho et al. 2013): nobody begins a step more than s ahead of the slowest, and what that promises holds.

A clock is how many steps a worker has finished. Step number c (from 0) is computed on parameters in which all updates
of every worker's steps up to c-s-1 are: that is how many of its pushes are seen, at least c-s.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from paceline.config import Bounded
from tests.unit.engine.pacing import Counts, Turns, drawn, on_workers, scheduled, small_parts

SCHEDULE = st.lists(st.integers(0, 11), min_size=1, max_size=30)


@settings(max_examples=25)
@given(st.integers(1, 4), st.sampled_from([0, 1, 2, 3]), st.integers(0, 3), st.integers(1, 25), SCHEDULE)
def test_a_reader_sees_all_updates_but_the_newest_and_clocks_stay_within_the_bound(
    workers: int, servers: int, bound: int, samples: int, schedule: list[int]
) -> None:
    turns = Turns(workers, drawn(schedule))

    def body(run: Any) -> list[int]:
        counts = Counts(workers)
        _, loader = run.wrap(counts.optimizer, DataLoader(TensorDataset(torch.arange(float(samples)))))
        board, clocks = run.worker.context.board, run.worker.exchanges[0]._memory.clocks
        with scheduled(run, turns):
            for step, _ in enumerate(loader):
                seen, at = counts.seen, list(clocks)
                behind = [w for w in range(workers) if not board.parked[w] and not board.gone[w]]
                assert at[run.rank] == step == seen[run.rank]
                assert all(step - at[w] <= bound for w in behind), (step, at)
                for w in range(workers):
                    assert seen[w] >= min(step - bound, len(range(w, samples, workers))), (step, seen)
                counts.bring(run.rank)
                turns.take(run.rank)
                counts.optimizer.step()
        return counts.seen

    with small_parts(1):
        results = on_workers(body, workers=workers, servers=servers, pace=Bounded(bound))
    assert results == [[len(range(w, samples, workers)) for w in range(workers)]] * workers


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_fastest_stands_still_until_the_slowest_has_come_on(bound: int, servers: int) -> None:
    """Worker 1 does not begin its first step before worker 0 can get no further: it has finished s+1 steps by then."""
    stuck = threading.Event()

    def body(run: Any) -> list[int]:
        counts = Counts(2)
        run.wrap(counts.optimizer)
        board, clocks = run.worker.context.board, run.worker.exchanges[0]._memory.clocks
        found: list[int] = []
        if run.rank == 0:
            wait = board.wait

            def told(ask: Any) -> Any:
                if clocks[0] > clocks[1] + bound:
                    found.extend(clocks)
                    stuck.set()
                return wait(ask)

            board.wait = told
        else:
            assert stuck.wait(60)
        for _ in range(6):
            counts.bring(run.rank)
            counts.optimizer.step()
        return found[:2]

    assert on_workers(body, servers=servers, pace=Bounded(bound))[0] == [bound + 1, 0]


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("bound", [1, 2, 5])
def test_the_slowest_never_waits(bound: int, servers: int) -> None:
    """Worker 0 takes s steps and then none; worker 1 takes 2s, as many as it may, and only then lets worker 0 go on."""
    stopped, done = threading.Event(), threading.Event()

    def body(run: Any) -> int:
        counts = Counts(2)
        run.wrap(counts.optimizer)

        def steps(number: int) -> None:
            for _ in range(number):
                counts.bring(run.rank)
                counts.optimizer.step()

        if run.rank == 0:
            steps(bound)
            stopped.set()
            assert done.wait(60)
            steps(bound)
        else:
            assert stopped.wait(60)
            steps(2 * bound)
            done.set()
        return sum(counts.seen)

    assert max(on_workers(body, servers=servers, pace=Bounded(bound))) == 4 * bound


@pytest.mark.parametrize("servers", [0, 2])
@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("leaves", ["the script", "the pass"])
def test_who_is_out_of_data_holds_nobody_back(leaves: str, bound: int, servers: int) -> None:
    """Worker 1 leaves after one batch, worker 0 takes nine: they are all applied, though its clock is far ahead."""
    data = TensorDataset(torch.arange(18.0))

    def body(run: Any) -> list[int]:
        counts = Counts(2)
        _, loader = run.wrap(counts.optimizer, DataLoader(data))
        for _ in loader:
            counts.bring(run.rank)
            counts.optimizer.step()
            if run.rank == 1 and leaves == "the script":
                return counts.seen
            if run.rank == 1:
                break
        for _ in loader:
            break
        return counts.seen

    assert on_workers(body, servers=servers, pace=Bounded(bound))[0] == [9, 1]


@pytest.mark.parametrize("servers", [0, 1])
@pytest.mark.parametrize("bound", [0, 1])
def test_nobody_waits_for_the_steps_of_a_past_pass(bound: int, servers: int) -> None:
    """Worker 1 leaves every pass after one batch of five. When the next begins, both clocks are the furthest one's."""

    def body(run: Any) -> list[int]:
        counts, begun = Counts(2), []
        _, loader = run.wrap(counts.optimizer, DataLoader(TensorDataset(torch.arange(10.0))))
        clocks = run.worker.exchanges[0]._memory.clocks
        for _ in range(3):
            for number, _ in enumerate(loader):
                if number == 0:
                    begun.append(clocks[run.rank])
                counts.bring(run.rank)
                counts.optimizer.step()
                if run.rank == 1:
                    break
        return begun

    assert on_workers(body, servers=servers, pace=Bounded(bound)) == [[0, 5, 10]] * 2


@settings(max_examples=30)
@given(st.integers(1, 4), st.sampled_from([0, 2]), st.integers(1, 11), SCHEDULE)
def test_a_bound_of_nothing_finishes_every_pass_of_uneven_data(
    workers: int, servers: int, samples: int, schedule: list[int]
) -> None:
    turns = Turns(workers, drawn(schedule))

    def body(run: Any) -> list[int]:
        counts = Counts(workers)
        _, loader = run.wrap(counts.optimizer, DataLoader(TensorDataset(torch.arange(float(samples)))))
        with scheduled(run, turns):
            for _ in range(3):
                for _ in loader:
                    counts.bring(run.rank)
                    turns.take(run.rank)
                    counts.optimizer.step()
        return counts.seen

    results = on_workers(body, workers=workers, servers=servers, pace=Bounded(0))
    assert results == [[3 * len(range(w, samples, workers)) for w in range(workers)]] * workers
