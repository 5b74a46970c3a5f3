"""What a run's last loss is, however long the run."""

from __future__ import annotations

import pytest

from paceline.engine.launcher.losses import _BINS, Losses


@pytest.mark.parametrize("steps", [1, 19, 20, 399, 2 * _BINS - 1])
def test_it_is_the_mean_of_the_last_twentieth(steps: int) -> None:
    losses = Losses()
    for step in range(steps):
        losses.add(float(step))
    tail = range(steps)[-max(1, steps // 20) :]
    assert losses.last() == pytest.approx(sum(tail) / len(tail))


@pytest.mark.parametrize("steps", [2 * _BINS, 2 * _BINS + 1, 50_001])
def test_in_a_long_run_it_is_that_of_a_few_more(steps: int) -> None:
    losses = Losses()
    for step in range(steps):
        losses.add(float(step))
    assert losses.last() == pytest.approx(steps * (1 - 1 / 40), rel=1e-3)
    assert len(losses._sums) < 2 * _BINS


def test_without_losses_there_is_none() -> None:
    assert Losses().last() is None
