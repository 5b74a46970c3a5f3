"""Claims about reading metrics.jsonl into a short series."""

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.events import Metric
from paceline.report.series import final_loss, read_series, smoothed


def written(folder: Path, losses: Sequence[float | None]) -> Path:
    path = folder / "metrics.jsonl"
    lines = [
        msgspec.json.encode(Metric(step, 1, float(step), loss, 8, 0.08, 0.015, 0.005))
        for step, loss in enumerate(losses, start=1)
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@given(
    losses=st.lists(st.none() | st.floats(-1e6, 1e6), max_size=300),
    most=st.integers(1, 40),
)
def test_no_round_is_lost_in_however_few_bins(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], most: int
) -> None:
    bins = read_series(written(tmp_path_factory.mktemp("run"), losses), most)
    had = [loss for loss in losses if loss is not None]

    assert len(bins) <= 2 * most
    assert sum(bin.rounds for bin in bins) == len(losses)
    assert sum(bin.losses for bin in bins) == len(had)
    assert math.isclose(sum(bin.loss_sum for bin in bins), sum(had), abs_tol=1e-3)
    assert max((bin.high for bin in bins), default=-math.inf) == max(had, default=-math.inf)
    assert min((bin.low for bin in bins), default=math.inf) == min(had, default=math.inf)
    assert [bin.step for bin in bins] == sorted({bin.step for bin in bins})
    assert not bins or bins[-1].step == len(losses)
    assert math.isclose(sum(bin.waiting_s for bin in bins), 0.015 * len(losses), abs_tol=1e-9)


def test_few_rounds_are_left_as_they_are(tmp_path: Path) -> None:
    bins = read_series(written(tmp_path, [3.0, None, 1.0]))
    assert [(bin.step, bin.losses) for bin in bins] == [(1, 1), (2, 0), (3, 1)]
    assert [bin.loss for bin in bins if bin.losses] == [3.0, 1.0]


def test_a_line_cut_short_and_one_of_garbage_are_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, [3.0, 2.0])
    whole = path.read_bytes()
    path.write_bytes(b"\xff\xfe not json\n\n" + whole + whole[:40])
    assert [bin.step for bin in read_series(path)] == [1, 2]


def test_a_missing_file_is_an_empty_one(tmp_path: Path) -> None:
    assert read_series(tmp_path / "absent.jsonl") == []


def test_a_loss_that_is_not_a_number_is_no_loss(tmp_path: Path) -> None:
    bins = read_series(written(tmp_path, [2.0, math.nan, math.inf]))
    assert [bin.losses for bin in bins] == [1, 0, 0]


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_a_running_mean_stays_within_its_values(values: list[float]) -> None:
    mean = smoothed(values)
    slack = 1e-9 * max(map(abs, values)) + 1e-12
    assert len(mean) == len(values)
    assert min(values) - slack <= min(mean) <= max(mean) <= max(values) + slack


def test_a_running_mean_does_not_lag() -> None:
    straight = [float(value) for value in range(1000)]
    mean = smoothed(straight)
    assert all(abs(mean[at] - straight[at]) < 1 for at in range(300, 700))


@pytest.mark.parametrize("most", [5, 1500])
def test_final_loss_is_the_mean_over_the_last_twentieth(tmp_path: Path, most: int) -> None:
    losses = [*[9.0] * 95, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert final_loss(read_series(written(tmp_path, losses))) == 3.0
    assert final_loss(read_series(written(tmp_path, [7.0, None]))) == 7.0
    flat = [2.0] * 1000
    assert final_loss(read_series(written(tmp_path, flat), most)) == 2.0


def test_what_is_logged_behind_an_epoch_is_a_loss_of_its_last_step(tmp_path: Path) -> None:
    path = written(tmp_path, [None, 3.0, None])
    with path.open("ab") as lines:
        lines.write(msgspec.json.encode(Metric(3, 1, 3.0, 1.0, 0, 0.0, 0.0, 0.0)) + b"\n")
    bins = read_series(path)
    assert [(bin.step, bin.rounds, bin.losses) for bin in bins] == [(1, 1, 0), (2, 1, 1), (3, 1, 1)]
    assert final_loss(bins) == 1.0
