"""Who is stuck, by what the kernel tells."""

from __future__ import annotations

import pytest

from paceline.engine.launcher.watch import StepTimes, Watch

WORKER = ("worker", 1)


def stat(state: str, ticks: int) -> str:
    return f"7 (a name) with ) {state} 1 1 1 0 -1 4194304 100 0 0 0 {ticks} 2 0 0 20 0 1 0 100 1 1"


def played(looks: list[tuple[float, str, int]], *, hangs: bool) -> list[tuple[float, str]]:
    """When a process that shows these states at these times is told to be stuck, with a limit of 5 s."""
    now: list[str] = []
    watch = Watch(5.0, read=lambda pid: now[-1])
    found = []
    for time_s, state, ticks in looks:
        now.append(stat(state, ticks))
        found += [(time_s, what) for whose, what in watch.look({WORKER: 7}, time_s, lambda *_: hangs)]
    return found


def test_who_is_stopped_for_a_second_is_stuck() -> None:
    looks = [(0.0, "R", 1), (0.5, "T", 1), (1.0, "T", 1), (1.5, "T", 1)]
    assert played(looks, hangs=False) == [(1.5, "has been stopped for 1.0 s")]


def test_who_goes_on_before_that_is_not() -> None:
    assert played([(0.0, "T", 1), (0.9, "T", 1), (1.0, "S", 1), (1.5, "T", 1), (2.4, "T", 1)], hangs=True) == []


def test_who_does_nothing_while_others_wait_is_stuck() -> None:
    looks = [(0.0, "S", 1), (4.0, "S", 1), (5.0, "S", 1)]
    assert played(looks, hangs=True) == [(5.0, "has done nothing for 5 s while others wait for it")]
    assert played(looks, hangs=False) == []


@pytest.mark.parametrize("looks", [[(0.0, "S", 1), (4.0, "S", 2), (8.0, "S", 3)], [(0.0, "R", 1), (9.0, "R", 1)]])
def test_who_computes_is_not(looks: list[tuple[float, str, int]]) -> None:
    assert played(looks, hangs=True) == []


def test_another_process_in_its_place_begins_anew() -> None:
    watch = Watch(5.0, read=lambda pid: stat("T", 1))
    assert list(watch.look({WORKER: 7}, 0.0, lambda *_: False)) == []
    assert list(watch.look({WORKER: 8}, 1.5, lambda *_: False)) == []


def test_a_process_that_is_gone_is_passed_over() -> None:
    assert list(Watch(5.0, read=lambda pid: None).look({WORKER: 7}, 9.0, lambda *_: True)) == []


def overdue(
    looks: list[tuple[float, int]], usual_s: float, longest_s: float = 0, *, hangs: bool = True
) -> list[tuple[float, str]]:
    """The same of one that computes all the time, with this batch in hand, where steps have taken so long before."""
    now: list[int] = []
    times, watch = StepTimes([0, int(longest_s * 1e9)]), Watch(5.0, read=lambda pid: stat("R", len(now)))
    times.add([usual_s] * 9 + [longest_s])
    found = []
    for time_s, batch in looks:
        now.append(batch)
        seen = watch.look({WORKER: 7}, time_s, lambda *_: hangs, lambda *_: now[-1], times)
        found += [(time_s, what) for whose, what in seen]
    return found


SAME = [(0.0, 3), (4.9, 3), (5.0, 3), (9.9, 3)]


def test_who_computes_on_one_batch_for_too_long_is_stuck_and_told_once() -> None:
    assert overdue(SAME, 0.1, 2.4) == [(5.0, "has not finished a step for 5 s while others wait for it")]


def test_who_draws_batches_gets_on() -> None:
    assert overdue([(0.0, 3), (4.0, 4), (8.0, 5), (12.0, 6)], 0.1) == []


def test_nobody_is_overdue_that_nobody_waits_for_or_that_has_no_batch_in_hand() -> None:
    assert overdue(SAME, 0.1, hangs=False) == []
    assert overdue([(time_s, 0) for time_s, _ in SAME], 0.1) == []


@pytest.mark.parametrize(("usual_s", "longest_s"), [(0.5, 0.5), (0.1, 5.0)], ids=["20 medians", "2 of the longest"])
def test_what_steps_take_gives_time(usual_s: float, longest_s: float) -> None:
    assert overdue(SAME, usual_s, longest_s) == []
