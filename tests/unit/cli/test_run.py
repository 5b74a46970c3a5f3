"""Claims about ``paceline run``, from what was typed to the last line, with an engine that plays records."""

import json
from pathlib import Path

import pytest

from paceline.cli.options import JobFlags, ShowFlags
from paceline.cli.resume import resume_run
from paceline.cli.run import run_script
from paceline.errors import Diverged, HostError, Interrupted, PacelineError, ScriptError, UsageError
from tests.unit.cli.played import Played

PROMISED = (
    *("run", "status", "pace", "workers", "servers", "steps", "samples", "seconds"),
    *("samples_per_s", "loss", "waiting", "bytes_sent"),
)
QUIET = ShowFlags(quiet=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with one script in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    return tmp_path


def run(
    engine: Played,
    script: str | None = "train.py",
    *args: str,
    flags: JobFlags | None = None,
    show: ShowFlags | None = None,
    config: str | None = None,
) -> int:
    return run_script(script, args, flags or JobFlags(), show or ShowFlags(), config, engine)


def test_a_run_is_told_from_header_to_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Played(said=["hello\n"]), flags=JobFlags(workers="3")) == 0

    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("paceline ")
    assert " · 3 workers on this machine (" in lines[0]
    assert lines[1:] == [
        "run runs/20260131-0901-train-sync",
        "train · 1.6 M parameters · AdamW · 6.4 MB of shared memory",
        "hello",
        "done in 2.0 s · loss 2.00 · 320 samples/s · waited 15 % of the time",
        "  plot    runs/20260131-0901-train-sync/plots/loss.png",
        "  next    paceline runs show 20260131-0901-train-sync",
    ]
    assert err == ""


def test_a_run_of_torchruns_is_resumed_by_torchrun(folder: Path) -> None:
    run(Played(), show=QUIET)
    (directory,) = (folder / "runs").iterdir()
    (directory / "config.toml").write_text('script = "train.py"\nengine = "torchrun"\n')
    with pytest.raises(UsageError, match="were started by torchrun") as raised:
        resume_run(None, JobFlags(), QUIET, folder / "runs", Played())  # type: ignore[arg-type]
    assert f"PACELINE_RESUME={directory.name} torchrun" in raised.value.fix


def test_the_plot_that_is_named_exists(folder: Path) -> None:
    run(Played(), show=QUIET)
    assert (folder / "runs/20260131-0901-train-sync/plots/loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_script_gets_its_arguments_untouched() -> None:
    engine = Played()
    run(engine, "train.py", "--help", "--workers", "9", "--", "-x", show=QUIET)
    assert engine.programs[0].args == ("--help", "--workers", "9", "--", "-x")
    assert (engine.jobs[0].name, engine.jobs[0].workers) == ("train", 2)


def test_json_is_the_last_line_of_stdout_and_ours_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Played(said=["hello\n", "no end"]), show=ShowFlags(json=True)) == 0

    out, err = capsys.readouterr()
    hello, no_end, last = out.splitlines()
    assert (hello, no_end) == ("hello", "no end")
    answer = json.loads(last)
    assert [key for key in PROMISED if key not in answer] == []
    assert (answer["status"], answer["steps"], answer["loss"], answer["workers"]) == ("done", 20, 2.0, 2)
    assert answer["plot"] == "runs/20260131-0901-train-sync/plots/loss.png"
    assert "paceline" in err
    assert "done in" in err


def test_quiet_leaves_only_the_scripts_output(capsys: pytest.CaptureFixture[str]) -> None:
    run(Played(said=["hello\n"]), show=QUIET)
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize(
    ("failure", "code", "status"),
    [
        (ScriptError("worker 1 raised ValueError: bad"), 1, "failed"),
        (HostError("memory is full"), 4, "failed"),
        (Diverged("the loss is nan at step 3"), 6, "failed"),
        (Interrupted("stopped by Ctrl-C"), 130, "interrupted"),
    ],
)
def test_a_failure_is_one_block_an_exit_code_and_an_object(
    capsys: pytest.CaptureFixture[str], failure: PacelineError, code: int, status: str
) -> None:
    assert run(Played(failure=failure), show=ShowFlags(json=True)) == code

    out, err = capsys.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert (answer["status"], answer["exit_code"], answer["error"]) == (status, code, failure.what)
    assert f"\nerror: {failure.what}\n" in err
    assert f"{status} after 2.0 s" in err


def test_the_users_traceback_comes_before_the_block(capsys: pytest.CaptureFixture[str]) -> None:
    traceback = 'Traceback (most recent call last):\n  File "train.py", line 3\nValueError: bad\n'
    failure = ScriptError("worker 1 raised ValueError: bad", why="w", fix="f", traceback=traceback)
    run(Played(failure=failure), show=QUIET)
    assert capsys.readouterr().err == f"{traceback}\nerror: {failure.what}\nwhy:   w\nfix:   f\n"


def test_options_that_went_to_the_script_are_pointed_out(capsys: pytest.CaptureFixture[str]) -> None:
    run(Played(failure=ScriptError("worker 0: the script exited with 2")), "train.py", "--workers=4", show=QUIET)
    assert "write it before: paceline run --workers=4 ... train.py" in capsys.readouterr().err


def test_so_is_one_that_is_misspelt(capsys: pytest.CaptureFixture[str]) -> None:
    run(Played(failure=ScriptError("worker 0: the script exited with 2")), "train.py", "--wokers=4", show=QUIET)
    assert "--wokers was given to the script; if it was meant for paceline: paceline run --workers ... train.py" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("args", "noted"),
    [(("--pace", "async"), "--pace"), (("--lr", "1", "--pce", "async"), "--pce"), (("--epochs", "3"), "")],
)
def test_a_run_says_at_once_that_an_option_of_ours_went_to_the_script(
    args: tuple[str, ...], noted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Played(), "train.py", *args) == 0
    note = f"note: {noted} stands after the script and goes to it; paceline's options stand before it"
    note += ": did you mean --pace?" if noted == "--pce" else ""
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ([note] if noted else [])


def test_a_run_without_a_loss_has_no_plot(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Played(steps=0)) == 0
    assert "plot" not in capsys.readouterr().out


def test_dry_run_shows_values_and_sources_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_SEED", "7")
    engine = Played()
    flags = JobFlags(workers="3", threads="1", servers="1")
    assert run(engine, "train.py", "--lr", "1", flags=flags, show=ShowFlags(dry_run=True)) == 0

    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["workers", "3", "--workers"] in rows
    assert ["seed", "7", "PACELINE_SEED"] in rows
    assert ["assign", "round_robin", "default"] in rows
    assert "would start 3 workers of 1 thread and 1 server, each worker running: train.py --lr 1\n" in out
    assert engine.jobs == []
    assert sorted(path.name for path in folder.iterdir()) == ["train.py"]


def test_dry_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    run(Played(), "train.py", "-x", show=ShowFlags(dry_run=True, json=True))
    answer = json.loads(capsys.readouterr().out)
    assert (answer["status"], answer["script"], answer["args"]) == ("dry-run", "train.py", ["-x"])
    assert answer["job"]["pace"] == "sync"


def test_a_config_file_brings_the_script_and_a_typed_one_replaces_it(folder: Path) -> None:
    (folder / "a.toml").write_text("script = 'train.py'\nargs = ['--lr', '1']\nname = 'other'\nsteps = 5\n")
    (folder / "new.py").touch()
    engine = Played()
    run(engine, None, show=QUIET, config="a.toml")
    run(engine, "new.py", show=QUIET, config="a.toml")

    first, second = engine.programs
    assert (str(first.path), first.args) == ("train.py", ("--lr", "1"))
    assert (str(second.path), second.args) == ("new.py", ())
    assert [(job.name, job.steps) for job in engine.jobs] == [("train", 5), ("new", 5)]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("trian.py", "did you mean 'train.py'?"),
        ("sub/mne.py", "did you mean 'sub/mine.py'?"),
        ("sub", "script 'sub' is a folder"),
        ("absent/train.py", "script 'absent/train.py' does not exist"),
        (None, "no script is given"),
    ],
)
def test_a_script_that_is_not_there(folder: Path, script: str | None, says: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "mine.py").touch()
    engine = Played()
    with pytest.raises(UsageError) as raised:
        run(engine, script)
    assert says in str(raised.value)
    assert engine.jobs == []
