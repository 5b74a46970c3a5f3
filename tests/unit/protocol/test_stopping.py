"""When training is over: the rule that every worker feeds with the same numbers."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.protocol.stopping import Stopping

LOSSES = st.lists(st.one_of(st.floats(-5, 5), st.sampled_from([math.nan, math.inf, -math.inf])), max_size=30)


def first_reason(rule: Stopping, losses: list[float]) -> tuple[int, str] | None:
    for number, loss in enumerate(losses):
        reason = rule.look(loss)
        if reason is not None:
            return number, reason
    return None


def test_nothing_asked_for_never_ends() -> None:
    rule = Stopping()
    assert rule.after_round(10**9) is None
    assert rule.after_pass(10**9) is None
    assert first_reason(rule, [1.0] * 1000 + [-math.inf]) is None
    assert not rule.needs_loss


@pytest.mark.parametrize(("number", "reason"), [(1, None), (6, None), (7, "7 steps done"), (8, "8 steps done")])
def test_steps(number: int, reason: str | None) -> None:
    rule = Stopping(steps=7)
    assert rule.after_round(number) == reason
    assert rule.after_pass(number) is None


def test_one_is_singular() -> None:
    assert Stopping(steps=1).after_round(1) == "1 step done"
    assert Stopping(epochs=1).after_pass(1) == "1 epoch done"


@pytest.mark.parametrize(("number", "reason"), [(1, None), (2, "2 epochs done"), (3, "3 epochs done")])
def test_epochs(number: int, reason: str | None) -> None:
    rule = Stopping(epochs=2)
    assert rule.after_pass(number) == reason
    assert rule.after_round(number) is None


@pytest.mark.parametrize(("loss", "ends"), [(0.5001, False), (0.5, True), (-3.0, True), (math.nan, False)])
def test_until_loss_is_reached_at_or_below_it(loss: float, ends: bool) -> None:
    rule = Stopping(until_loss=0.5)
    assert rule.needs_loss
    assert (rule.look(loss) is not None) is ends


def test_the_reason_names_the_loss_and_the_goal() -> None:
    assert Stopping(until_loss=0.5).look(0.25) == "loss 0.25 reached 0.5"


@given(LOSSES, st.integers(1, 5))
def test_patience_ends_at_the_first_stretch_without_a_new_best(losses: list[float], patience: int) -> None:
    expected = None
    best, stretch = math.inf, 0
    for number, loss in enumerate(losses):
        stretch = 0 if loss < best else stretch + 1
        best = loss if loss < best else best
        if stretch == patience:
            expected = number
            break
    found = first_reason(Stopping(patience=patience), losses)
    assert (found[0] if found else None) == expected
    if found:
        assert found[1] == f"no better loss than {best:.6g} in {patience} looks"


def test_an_equal_loss_is_no_gain() -> None:
    found = first_reason(Stopping(patience=2), [1.0, 1.0, 1.0])
    assert found is not None
    assert found[0] == 2


def test_a_loss_that_is_no_number_is_no_gain() -> None:
    assert first_reason(Stopping(patience=3), [math.nan] * 3) is not None


@given(LOSSES, st.integers(1, 4), st.floats(-5, 5))
def test_workers_fed_alike_decide_alike(losses: list[float], patience: int, until: float) -> None:
    one = Stopping(until_loss=until, patience=patience)
    other = copy.deepcopy(one)
    assert [one.look(loss) for loss in losses] == [other.look(loss) for loss in losses]
