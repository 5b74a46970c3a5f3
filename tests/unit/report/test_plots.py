"""Claims about the picture of a run. How it looks is for eyes."""

import math
import struct
from pathlib import Path

import pytest

from paceline.report.plots import loss_plot
from tests.unit.report.test_series import written


def size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", header[16:])
    return width, height


@pytest.mark.parametrize(
    "losses",
    [
        [3.0, 2.0],
        [None, 3.0, None, 2.0],
        [3.0, math.nan, 2.0],
        [10.0 ** -(step / 100) for step in range(600)],
        [0.0, 0.0, 0.0],
        [-5.0, 100.0, -5.0],
        [float(step % 7) for step in range(5000)],
    ],
    ids=["two", "gaps", "nan", "logarithmic", "flat", "negative", "binned"],
)
def test_a_run_with_losses_gets_a_picture(tmp_path: Path, losses: list[float | None]) -> None:
    written(tmp_path, losses)
    path = loss_plot(tmp_path)
    assert path == tmp_path / "plots" / "loss.png"
    assert size(path) == (1152, 720)


@pytest.mark.parametrize("losses", [[], [3.0], [None, None, None]])
def test_a_run_without_losses_gets_none(tmp_path: Path, losses: list[float | None]) -> None:
    written(tmp_path, losses)
    assert loss_plot(tmp_path) is None
    assert not (tmp_path / "plots").exists()


def test_no_metrics_no_picture(tmp_path: Path) -> None:
    assert loss_plot(tmp_path) is None
