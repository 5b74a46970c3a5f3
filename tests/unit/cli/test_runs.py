"""Claims about ``paceline runs``: a line a run, and the details of one."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console as Screen

from paceline.cli.options import JobFlags, ShowFlags
from paceline.cli.run import run_script
from paceline.cli.runs import show_list, show_run
from paceline.errors import ScriptError, UsageError
from tests.unit.cli.played import Played


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that is done and one that has failed."""
    monkeypatch.chdir(tmp_path)
    for name, failure in (("train", None), ("other", ScriptError("worker 0 raised ValueError: bad"))):
        (tmp_path / f"{name}.py").touch()
        run_script(f"{name}.py", (), JobFlags(), ShowFlags(quiet=True), None, Played(failure=failure))
    return tmp_path / "runs"


def screen() -> tuple[Screen, io.StringIO]:
    stream = io.StringIO()
    return Screen(file=stream, width=20, highlight=False, markup=False), stream


def test_list_is_a_table_with_whole_names_however_narrow_the_screen(runs: Path) -> None:
    console, stream = screen()
    assert show_list(runs, False, console) == 0
    rows = [line.split() for line in stream.getvalue().splitlines()]
    assert rows == [
        ["run", "status", "pace", "workers", "steps", "loss", "samples/s"],
        ["20260131-0901-other-sync", "failed", "sync", "2", "20", "2.00", "320"],
        ["20260131-0901-train-sync", "done", "sync", "2", "20", "2.00", "320"],
    ]


def test_list_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_list(runs, True, screen()[0])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["status"]) for row in rows] == [
        ("20260131-0901-other-sync", "failed"),
        ("20260131-0901-train-sync", "done"),
    ]


def test_no_runs_is_said(tmp_path: Path) -> None:
    console, stream = screen()
    assert show_list(tmp_path / "absent", False, console) == 0
    assert stream.getvalue().startswith("no runs in ")


def test_show_says_what_the_files_say(runs: Path) -> None:
    console, stream = screen()
    assert show_run(runs, "train", False, console) == 0
    lines = [line.split(maxsplit=1) for line in stream.getvalue().splitlines()]
    shown = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    assert lines[0] == ["20260131-0901-train-sync"]
    assert shown["status"] == "done"
    assert shown["processes"] == "2 workers, pace sync, engine local"
    assert shown["time"] == "computing 80 %, exchanging 5 %, waiting 15 %"
    assert shown["plot"] == "runs/20260131-0901-train-sync/plots/loss.png"


def test_show_names_the_exit_code_of_a_failure(runs: Path) -> None:
    console, stream = screen()
    show_run(runs, "other", False, console)
    assert "failed (exit code 1)" in stream.getvalue()


def test_show_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_run(runs, None, True, screen()[0])
    shown = json.loads(capsys.readouterr().out)
    assert shown["run"] == "20260131-0901-train-sync"
    assert (shown["summary"]["steps"], shown["info"]["workers"]) == (20, 2)


def test_a_run_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text('{"run": "bro')
    with pytest.raises(UsageError, match="cannot be read"):
        show_run(tmp_path, "broken", False, screen()[0])
