"""Rows of workers become one record a round, in order, weighted by samples."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.launcher.metrics import ROW, Merger, Row
from paceline.events import Metric, is_behind


def row(step: int, contributors: int = 1, **values: Any) -> bytes:
    return Row(stepped=True, key=step, contributors=contributors, **({"steps": 1} | values)).pack()


def metrics(merger: Merger, *, everything: bool = False) -> list[Metric]:
    return list(merger.ready(everything=everything))


def steps(merger: Merger, *, everything: bool = False) -> list[int]:
    return [metric.step for metric in metrics(merger, everything=everything)]


def test_a_row_is_thirteen_numbers() -> None:
    packed = row(3, 2, epoch=1, time_s=9.5, loss_sum=6.0, loss_samples=4.0, samples=5.0, computing_s=0.25)
    assert ROW.unpack(packed) == (3.0, 2.0, 1.0, 9.5, 1.0, 6.0, 4.0, 5.0, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert ROW.size == 112


def test_a_round_is_told_once_all_its_contributors_have() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 3), 0)
    assert steps(merger) == []
    merger.add(row(1, 3), 0)
    assert steps(merger) == []
    merger.add(row(1, 3), 0)
    assert steps(merger) == [1]
    assert steps(merger, everything=True) == []


def test_losses_are_weighted_by_samples_and_durations_are_means() -> None:
    merger = Merger(started_s=100.0)
    merger.add(
        row(
            1,
            2,
            epoch=2,
            time_s=103.0,
            loss_sum=8.0 * 0.5,
            loss_samples=8.0,
            samples=8.0,
            computing_s=2.0,
            waiting_s=0.25,
            exchanging_s=0.5,
        ),
        0,
    )
    merger.add(
        row(
            1,
            2,
            epoch=2,
            time_s=103.5,
            loss_sum=2.0 * 3.0,
            loss_samples=2.0,
            samples=3.0,
            computing_s=1.0,
            waiting_s=1.25,
            exchanging_s=0.25,
        ),
        0,
    )
    assert metrics(merger) == [
        Metric(
            step=1,
            epoch=2,
            time_s=3.5,
            loss=1.0,
            samples=11,
            computing_s=1.5,
            waiting_s=0.75,
            exchanging_s=0.375,
        )
    ]


def test_a_loss_that_nobody_logged_is_none() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1), 0)
    assert metrics(merger)[0].loss is None


def test_a_loss_that_only_one_worker_logged_is_its_loss() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2, loss_sum=6.0, loss_samples=2.0) + row(1, 2), 0)
    assert metrics(merger)[0].loss == 3.0


def test_other_values_go_with_their_round_the_last_ones_count() -> None:
    merger = Merger(started_s=0.0)
    merger.log(1, {"accuracy": 0.25, "rate": 0.1})
    merger.log(1, {"accuracy": 0.5})
    merger.log(2, {"accuracy": 0.75})
    merger.add(row(1) + row(2) + row(3), 0)
    assert [metric.values for metric in metrics(merger)] == [{"accuracy": 0.5, "rate": 0.1}, {"accuracy": 0.75}, {}]


def test_values_come_with_the_next_round_that_is_told() -> None:
    """Nothing is kept of rounds that nobody tells of, or that are told already."""
    merger = Merger(started_s=0.0)
    merger.log(0, {"before": 1.0})
    merger.add(row(1), 0)
    assert [metric.values for metric in metrics(merger)] == [{"before": 1.0}]
    merger.log(1, {"a": 1.0, "late": 2.0})
    merger.log(2, {"a": 3.0})
    merger.log(3, {"b": 4.0})
    merger.add(row(2) + row(3), 0)
    assert [metric.values for metric in metrics(merger)] == [{"a": 3.0, "late": 2.0}, {"b": 4.0}]
    assert msgspec.msgpack.decode(merger.state())["_values"] == {}


def test_at_the_end_what_is_incomplete_is_told_too() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 1) + row(2, 2, samples=7.0, computing_s=3.0) + row(3, 1), 0)
    assert steps(merger) == [1]
    (second, third) = metrics(merger, everything=True)
    assert (second.step, second.samples, second.computing_s) == (2, 7, 3.0)  # means over those that told
    assert third.step == 3


def test_a_round_waits_for_the_ones_before_it_that_are_incomplete() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2) + row(2, 1), 0)
    assert steps(merger) == []
    merger.add(row(1, 2), 0)
    assert steps(merger) == [1, 2]


def test_a_round_waits_for_the_ones_before_it_that_nobody_has_told_yet() -> None:
    """Worker 0 was alone in round 1 and is slower to tell than worker 1, alone in round 2."""
    merger = Merger(started_s=0.0)
    merger.add(row(2, 1), 0)
    assert steps(merger) == []
    merger.add(row(1, 1), 0)
    assert steps(merger) == [1, 2]


@given(
    st.lists(st.lists(st.integers(0, 4), unique=True, min_size=1, max_size=5), max_size=12),
    st.integers(0, 2**30),
)
def test_in_whatever_order_workers_tell_all_rounds_come_once_in_order(rounds: list[list[int]], seed: int) -> None:
    """Each worker tells its own rounds in order, in portions of any size."""
    random_ = random.Random(seed)
    queues = {
        worker: [row(number, len(by), samples=1.0) for number, by in enumerate(rounds, start=1) if worker in by]
        for worker in range(5)
    }
    merger, found = Merger(started_s=0.0), []
    while any(queues.values()):
        worker = random_.choice([worker for worker, rows in queues.items() if rows])
        count = random_.randint(1, len(queues[worker]))
        merger.add(b"".join(queues[worker][:count]), worker)
        del queues[worker][:count]
        found += metrics(merger)
    assert [metric.step for metric in found] == list(range(1, len(rounds) + 1))
    assert [metric.samples for metric in found] == [len(by) for by in rounds]
    assert metrics(merger, everything=True) == []


def test_the_run_begins_with_its_first_batch() -> None:
    merger = Merger(started_s=100.0)
    assert merger.begun_s is None
    merger.add(row(1, 2, time_s=110.0, computing_s=2.0, waiting_s=1.0, exchanging_s=0.5), 0)
    assert merger.begun_s == 106.5
    merger.add(row(2, 1, time_s=120.0, computing_s=1.0), 0)
    assert merger.begun_s == 106.5


def test_the_first_batch_is_the_earliest_of_any_worker() -> None:
    """The worker that tells first need not be the one that began first."""
    merger = Merger(started_s=100.0)
    merger.add(row(1, 2, time_s=110.0, computing_s=2.0), 0)
    merger.add(row(1, 2, time_s=110.0, computing_s=5.0), 0)
    assert merger.begun_s == 105.0


@pytest.mark.parametrize("portions", [1, 3])
def test_several_rows_may_come_at_once(portions: int) -> None:
    merger = Merger(started_s=0.0)
    data = b"".join(row(number) for number in range(1, 7))
    size = ROW.size * 6 // portions
    for start in range(0, len(data), size):
        merger.add(data[start : start + size], 0)
    assert steps(merger) == [1, 2, 3, 4, 5, 6]


def test_what_a_dead_worker_had_not_told_is_not_waited_for() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2) + row(2, 2) + row(3, 1), 0)
    merger.add(row(1, 2), 1)
    assert steps(merger) == [1]
    merger.lost(1)
    assert steps(merger) == [2, 3]


def test_after_a_death_no_step_is_told_twice_for_one_who_lives_and_is_slow_to_tell() -> None:
    """With a log a step of two workers may be two pushes of the same one."""
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2) + row(1, 2) + row(2, 2), 0)
    merger.lost(1)
    assert steps(merger) == [1]
    merger.add(row(2, 2) + row(3, 2), 1)  # of its newcomer
    merger.add(row(4, 2) + row(4, 2) + row(5, 2), 0)
    assert steps(merger) == [2]  # there may be more of 3
    merger.add(row(3, 2) + row(5, 2), 1)
    assert steps(merger) == [3, 4, 5]


def test_rounds_that_went_on_without_one_who_is_slow_to_tell_wait_for_what_it_was_in() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2), 0)
    merger.add(row(1, 2), 1)
    assert steps(merger) == [1]
    merger.lost(1)
    merger.add(row(4, 1) + row(5, 1), 1)  # of its newcomer, when worker 0 had nothing more to read
    assert steps(merger) == []
    merger.add(row(2, 2) + row(3, 1), 0)
    assert steps(merger) == [2, 3, 4, 5]


def test_what_a_newcomer_tells_late_is_no_step_more() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 2, samples=4.0) + row(2, 2, samples=4.0) + row(2, 2, samples=4.0) + row(3, 2), 0)
    merger.lost(1)
    assert steps(merger) == [1, 2]
    merger.add(row(1, 2, samples=4.0), 1)
    late, rest = metrics(merger, everything=True)
    assert (late.step, late.samples, rest.step) == (2, 4, 3)


def test_a_round_waits_for_a_newcomer_that_was_in_it() -> None:
    merger = Merger(started_s=0.0)
    merger.lost(1)
    merger.add(row(1, 1) + row(2, 2) + row(3, 2), 0)
    assert steps(merger) == [1]
    merger.add(row(2, 2), 1)
    assert steps(merger) == [2]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 2), st.integers(0, 1)), max_size=20), st.integers(0, 20))
def test_another_merger_goes_on_where_one_was(told: list[tuple[int, int, int]], cut: int) -> None:
    whole, first = Merger(started_s=0.0), Merger(started_s=0.0)
    for place, (key, contributors, worker) in enumerate(told):
        if place == cut:
            state, first = first.state(), Merger(started_s=0.0)
            first.restore(state)
        for merger in (whole, first):
            merger.add(row(key, contributors, samples=4.0, time_s=float(place)), worker)
            merger.log(key, {"a": float(place)})
            if place % 7 == 6:
                merger.lost(worker)
        assert metrics(first) == metrics(whole)
    assert metrics(first, everything=True) == metrics(whole, everything=True)
    assert first.dropped == whole.dropped


# --- what is logged behind an epoch ---


def test_what_is_logged_behind_an_epoch_is_told_before_the_next_ones_first_step() -> None:
    merger = Merger(started_s=0.0)
    for worker in (0, 1):
        merger.add(row(1, 2, epoch=1, time_s=3.0), worker)
    assert steps(merger) == [1]
    merger.log_behind(1, 1, 3.0, 1.0, {"a": 9.0})
    merger.log_behind(1, 0, 9.0, 3.0, {"a": 1.0})
    merger.log_behind(1, 0, 1.0, 3.0, {"b": 2.0})
    assert steps(merger) == []
    for worker in (0, 1):
        merger.add(row(2, 2, epoch=2, time_s=4.0), worker)
    first, second = metrics(merger)
    assert (first.step, first.epoch, first.time_s, first.samples) == (1, 1, 3.0, 0)
    assert first.loss == (3.0 * 1 + 1.0 * 3) / 4  # of each worker the last, by samples
    assert first.values == {"a": 1.0, "b": 2.0}  # worker 0's
    assert is_behind(first)
    assert (second.step, second.epoch, second.loss, second.values) == (2, 2, None, {})


def test_what_is_logged_behind_the_last_epoch_is_told_at_the_end() -> None:
    merger = Merger(started_s=0.0)
    merger.add(row(1, 1, epoch=1), 0)
    merger.log_behind(1, 0, None, 4.0, {"a": 1.0})
    assert steps(merger) == [1]
    again = Merger(started_s=0.0)
    again.restore(merger.state())
    (last,) = metrics(again, everything=True)
    assert (last.step, last.epoch, last.loss, last.values) == (1, 1, None, {"a": 1.0})
    assert metrics(again, everything=True) == []
