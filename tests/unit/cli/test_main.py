"""Claims about command lines: what reaches a command, what is refused, and with which exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paceline
from paceline.cli.main import answer, main
from paceline.errors import ConfigError
from paceline.transport.keys import read_job_key

COMMANDS = (
    "run",
    "demo",
    "doctor",
    "key",
    "export",
    "export slurm",
    "export k8s",
    "runs",
    "runs list",
    "runs show",
    "config",
    "config show",
)
ROOT = Path(paceline.__file__).parent.parent
LATER = ("compare", "plan", "simulate", "lr-find")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert answer([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"paceline {command}" in out
    assert command in ("runs", "config", "export") or "Examples:\n" in out


def test_help_names_only_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("run", "resume", "demo", "doctor", "runs", "config"))
    assert not any(command in out for command in LATER)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"paceline {paceline.__version__}"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rum", ["unknown command 'rum'", "fix:   did you mean 'run'?"]),
        ("runs lsit", ["unknown command 'lsit'", "fix:   did you mean 'list'?"]),
        ("xyzzy", ["the commands are: ", "fix:   paceline --help"]),
        ("--versoin", ["unknown option '--versoin'", "fix:   did you mean '--version'?"]),
        ("run --wrokers 4 a.py", ["unknown option '--wrokers'", "fix:   did you mean '--workers'?"]),
        ("run --wrokers=4 a.py", ["unknown option '--wrokers'", "fix:   did you mean '--workers'?"]),
        ("run --workers", ["--workers needs a value", "fix:   paceline run --help"]),
        ("run --workers 1 --workers 2 a.py", ["--workers is given more than once"]),
        ("run --pace synk train.py", ["pace 'synk' is not known", "fix:   did you mean 'sync'?"]),
        ("run --workers 0 train.py", ["workers is 0; it must be 1 or more"]),
        ("run --workers two train.py", ["--workers is 'two'; it must be a whole number"]),
        ("run --json=5 train.py", ["--json"]),
        ("runs list a", ["there is no place for 'a' here"]),
        ("runs show", ["no runs in 'runs'"]),
        ("run absent.py", ["script 'absent.py' does not exist"]),
        ("demo txet", ["demo 'txet' is not known", "fix:   did you mean 'text'?"]),
        ("demo --engine ray linear", ["engine is 'ray'; paceline demo trains on this machine"]),
        ("run --engine torchrun train.py", ["paceline run does not start torchrun", "fix:   torchrun --nproc"]),
    ],
)
def test_a_wrong_command_line_is_one_block_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    says: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert answer(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert all(text in err for text in says), err
    assert list(tmp_path.iterdir()) == [tmp_path / "train.py"]


@pytest.mark.parametrize("line", ["run --json --pace synk train.py", "run --json --bad train.py"])
def test_json_is_kept_as_promised_where_a_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    assert answer(line.split()) == 2
    refused = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (refused["status"], refused["run"], refused["exit_code"]) == ("failed", None, 2)
    assert {"steps", "samples_per_s", "loss"} < set(refused)


def test_a_key_is_made_once_and_not_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert answer(["key"]) == 0
    made, out = (tmp_path / "job.key").read_text(), capsys.readouterr().out
    assert read_job_key("job.key").fingerprint in out
    assert made.strip() not in out
    assert answer(["key"]) == ConfigError.exit_code
    assert "job.key exists already" in capsys.readouterr().err
    assert (tmp_path / "job.key").read_text() == made


@pytest.mark.parametrize("option", ["--port=1", "--interface=lo", "--insecure", "--ray-address=auto"])
def test_where_workers_come_to_is_asked_for_runs_that_they_come_to(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str
) -> None:
    (tmp_path / "train.py").touch()
    assert answer(["run", option, "--dry-run", str(tmp_path / "train.py")]) == 2
    assert f"{option.partition('=')[0]} is for workers that come from elsewhere" in capsys.readouterr().err
    assert answer(["run", "--engine", "ray", option, "--dry-run", str(tmp_path / "train.py")]) == 0


def test_config_show_names_each_source(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("epochs = 3\nworkers = 9\n")
    monkeypatch.setenv("PACELINE_SEED", "7")
    assert answer(["config", "show", "--workers", "4", "--config", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["workers"] == {"value": 4, "source": "--workers"}
    assert shown["seed"] == {"value": 7, "source": "PACELINE_SEED"}
    assert shown["epochs"] == {"value": 3, "source": str(file)}
    assert shown["pace"] == {"value": "sync", "source": "default"}


def test_main_ends_the_process_with_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["rum"])
    assert ended.value.code == 2


@pytest.mark.parametrize("line", ["--help", "run --help", "config show", "runs list"])
def test_what_trains_nothing_imports_nothing_heavy(line: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from paceline.cli.main import answer\n"
        "answer(sys.argv[1:])\n"
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_a_reader_that_has_enough_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "paceline", "run", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
