"""Claims about which run is gone on with: what is damaged in another one's files is told of, and hinders nobody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.cli.options import JobFlags, ShowFlags
from paceline.cli.resume import asked_for, directory_of, resume_run
from paceline.engine.checkpoint.checkpoints import Checkpoints
from paceline.errors import ConfigError, UsageError

QUIET = ShowFlags(quiet=True)
LAST = {"PACELINE_RESUME": "last"}
DAMAGED = ["pace = ", 'pce = "sync"\n', "workers = 1\n\udcff", "workers = 'many'\n"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of three runs of one script, with a checkpoint each, and of a newer one of another script."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    (tmp_path / "other.py").touch()
    for number, script in enumerate(["train.py", "train.py", "train.py", "other.py"], 1):
        directory = tmp_path / "runs" / f"2026013{number}-0900-train-sync"
        directory.mkdir(parents=True)
        (directory / "run.json").write_text("{}")
        (directory / "config.toml").write_text(f"script = {json.dumps(script)}\n")
        Checkpoints(directory).write(number, {"model": {}, "optimizer": {}}, {"state": {"step": number}})
    return tmp_path / "runs"


def damage(folder: Path, number: int, text: str = DAMAGED[0]) -> str:
    name = f"2026013{number}-0900-train-sync"
    (folder / name / "config.toml").write_text(text, errors="surrogateescape")
    return name


def last(folder: Path) -> str | None:
    loaded = asked_for(LAST, Path("train.py"), folder)
    return directory_of(loaded).name if loaded is not None else None


def test_last_is_the_newest_run_of_the_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert last(folder) == "20260133-0900-train-sync"
    assert asked_for({}, Path("train.py"), folder) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize(("damaged", "found"), [((4,), 3), ((3,), 2), ((4, 3, 2), 1), ((1,), 3), ((4, 3, 2, 1), None)])
def test_last_passes_over_runs_that_cannot_be_looked_at(
    folder: Path, text: str, damaged: tuple[int, ...], found: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [damage(folder, number, text) for number in damaged]
    assert last(folder) == (None if found is None else f"2026013{found}-0900-train-sync")
    told = capsys.readouterr().err.splitlines()
    if found is None:
        assert told.pop() == "note: no run of train.py has a checkpoint, so PACELINE_RESUME=last begins a new one"
    seen = [name for number, name in zip(damaged, names, strict=True) if number > (found or 0)]
    assert [line.partition(" is passed over: ")[0] for line in told] == [f"note: run {name!r}" for name in seen]
    assert all("config.toml" in line for line in told)


def test_last_begins_anew_where_the_newest_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "20260133-0900-train-sync"
    info = {"run": name, "status": "done", "argv": [], "seed": 0, "pace": "sync", "workers": 2, "servers": 0}
    (folder / name / "run.json").write_text(json.dumps(info))
    assert last(folder) is None
    assert capsys.readouterr().err == f"note: run '{name}' is done, so PACELINE_RESUME=last begins a new one\n"


def test_a_run_that_is_named_is_not_passed_over(folder: Path) -> None:
    name = damage(folder, 3)
    with pytest.raises(ConfigError, match="is not TOML"):
        resume_run(name, JobFlags(), QUIET, folder, None)  # type: ignore[arg-type]


def test_resume_without_a_name_takes_the_newest_that_can_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = damage(folder, 4)
    dry = ShowFlags(dry_run=True)
    assert resume_run(None, JobFlags(), dry, folder, None) == 0  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert err.startswith(f"note: run {name!r} is passed over: ")
    assert "running: train.py" in out


def test_where_none_can_be_read_the_newest_ones_fault_is_told(folder: Path) -> None:
    for number in (1, 2, 3, 4):
        damage(folder, number)
    with pytest.raises(ConfigError, match=r"20260134-0900-train-sync/config\.toml is not TOML"):
        resume_run(None, JobFlags(), QUIET, folder, None)  # type: ignore[arg-type]


def test_an_empty_folder_has_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no runs in"):
        resume_run(None, JobFlags(), QUIET, tmp_path, None)  # type: ignore[arg-type]


def test_a_run_that_is_done_and_has_no_checkpoint_is_told_so(folder: Path) -> None:
    name = "20260139-0900-train-sync"
    (folder / name).mkdir()
    (folder / name / "config.toml").write_text('script = "train.py"\n')
    info = {"run": name, "status": "done", "argv": [], "seed": 0, "pace": "sync", "workers": 2, "servers": 0}
    (folder / name / "run.json").write_text(json.dumps(info))
    with pytest.raises(UsageError) as caught:
        resume_run(name, JobFlags(), QUIET, folder, lambda *_, **__: pytest.fail("it was started"))
    assert caught.value.what == f"run '{name}' is done and has left no checkpoint: there is nothing to go on with"
    assert f"paceline runs show {name}" in caught.value.fix
