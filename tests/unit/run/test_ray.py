"""Claims about what is said before Ray has started anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from paceline.cli.main import answer


def test_without_ray_its_engine_says_what_to_install(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not there
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert answer(["run", "--engine", "ray", "train.py"]) == 3
    said = capsys.readouterr()
    assert "2 workers started by Ray, home on this machine" in said.out
    assert "--engine ray needs Ray, which is not installed\nfix:   pip install 'paceline[ray]'" in said.err
    assert not (tmp_path / "runs").exists()
