"""Claims about how numbers are written."""

import os
from pathlib import Path

import pytest

from paceline.cli import figures


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (4.21, "4.2 s"), (58.4, "0:58"), (723, "12:03"), (11523, "3:12:03"), (float("inf"), "-")],
)
def test_durations(seconds: float, text: str) -> None:
    assert figures.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (1.98, "1.98"),
        (2.0, "2.00"),
        (12.34, "12.3"),
        (123.4, "123"),
        (999.7, "1,000"),
        (12400.0, "12,400"),
        (3.1e9, "3.10e+09"),
        (0.000161, "0.000161"),
        (3.1e-6, "3.10e-06"),
        (-0.5, "-0.500"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_losses(value: float | None, text: str) -> None:
    assert figures.loss(value) == text


@pytest.mark.parametrize(
    ("per_s", "text"), [(0, "-"), (27.44, "27.4"), (3896.2, "3,900"), (180791.4, "181,000"), (float("inf"), "-")]
)
def test_rates(per_s: float, text: str) -> None:
    assert figures.rate(per_s) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (950, "950 B"), (13_200_000, "13.2 MB"), (999_700, "1 MB"), (10**13, "10 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert figures.size(count) == text


@pytest.mark.parametrize(("count", "text"), [(650, "650"), (1_600_000, "1.6 M"), (7_000_000_000, "7 B")])
def test_counts(count: int, text: str) -> None:
    assert figures.count(count) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0 %"), (0.001, "<1 %"), (0.04, "4 %"), (1, "100 %")])
def test_shares_are_never_rounded_to_nothing(share: float, text: str) -> None:
    assert figures.percent(share) == text


def test_one_is_singular() -> None:
    assert [figures.plural(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]


def test_paths_below_the_current_folder_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert figures.shown(tmp_path / "runs" / "a") == os.path.join("runs", "a")
    assert figures.shown(tmp_path.parent) == str(tmp_path.parent)
