"""Claims about where a run stands, from its records alone."""

import pytest

from paceline.cli.progress import WARM_UP_ROUNDS, Progress
from paceline.config import Job
from paceline.events import Epoch, Metric
from tests.unit.cli.played import metric


def fed(progress: Progress, first: int, last: int) -> None:
    for step in range(first, last + 1):
        progress.add(metric(step))


def test_rate_and_time_left_come_from_the_records_times() -> None:
    progress = Progress(Job("train", epochs=3))
    progress.epoch_begins(Epoch(0.0, 2, 200))
    fed(progress, 1, 50)  # ten rounds of 32 samples a second
    standing = progress.look()

    assert standing.label == "epoch 2/3"
    assert standing.share == 0.25
    assert standing.samples_per_s == pytest.approx(320)
    assert standing.left_s == pytest.approx(15)


def test_rate_forgets_what_lies_long_back() -> None:
    progress = Progress(Job("train"))
    fed(progress, 1, 100)
    progress.look()
    for step in range(101, 401):  # from here ten times as fast
        progress.add(metric(step, time_s=10 + (step - 100) / 100))
        if step % 10 == 0:
            progress.look()
    for step in range(401, 1401):
        progress.add(metric(step, time_s=13 + (step - 400) / 100))
        if step % 10 == 0:
            progress.look()
    assert progress.look().samples_per_s == pytest.approx(3200)


def test_loss_is_a_running_mean_without_a_bias_to_zero() -> None:
    progress = Progress(Job("train"))
    assert progress.look().loss is None
    progress.add(metric(1, loss=5.0))
    assert progress.look().loss == pytest.approx(5.0)
    progress.add(metric(2, loss=None))
    assert progress.look().loss == pytest.approx(5.0)


def test_an_epoch_ends_early_where_the_job_does() -> None:
    progress = Progress(Job("train", steps=40))
    progress.epoch_begins(Epoch(0.0, 1, 1000))
    fed(progress, 1, 10)
    assert progress.look().total == 40
    assert progress.look().share == 0.25


def test_without_a_length_the_bar_is_the_jobs_or_there_is_none() -> None:
    limited, endless = Progress(Job("train", steps=40)), Progress(Job("train"))
    for progress in (limited, endless):
        progress.epoch_begins(Epoch(0.0, 1, None))
        fed(progress, 1, 10)
    assert (limited.look().label, limited.look().share) == ("steps", 0.25)
    assert (endless.look().share, endless.look().left_s) == (None, None)


def test_steady_speed_leaves_out_the_warm_up() -> None:
    progress = Progress(Job("train"))
    for step in range(1, WARM_UP_ROUNDS + 1):
        progress.add(metric(step, time_s=step * 10.0))
    assert progress.steady_samples_per_s is None
    for step in range(1, 21):
        progress.add(metric(WARM_UP_ROUNDS + step, time_s=WARM_UP_ROUNDS * 10.0 + step / 10))
    assert progress.steady_samples_per_s == pytest.approx(320)
    assert progress.overhead == pytest.approx(0.2)


def test_what_is_logged_behind_an_epoch_is_shown_and_is_no_round() -> None:
    progress = Progress(Job("train"))
    fed(progress, 1, 20)
    before = progress.look()
    progress.add(Metric(20, 1, 2.0, 1.0, 0, 0.0, 0.0, 0.0, values={"accuracy": 0.5}))
    after = progress.look()
    assert (after.done, after.values) == (before.done, {"accuracy": 0.5})
    assert after.loss is not None
    assert before.loss is not None
    assert after.loss < before.loss
