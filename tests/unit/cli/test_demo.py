"""Claims about ``paceline demo``: which example, with how many workers, and what it says it gained."""

import importlib.util
import json
from pathlib import Path

import pytest

from paceline.cli import demo
from paceline.cli.demo import NEXT, TRIAL_STEPS, WORKERS, example, loss_of_speed, run_demo
from paceline.cli.host import cores
from paceline.cli.options import JobFlags, ShowFlags
from paceline.config import Job
from paceline.errors import HostError, UsageError
from tests.unit.cli.played import Played


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(
    engine: Played,
    name: str | None,
    *args: str,
    flags: JobFlags | None = None,
    show: ShowFlags | None = None,
    compare: bool = False,
) -> int:
    return run_demo(name, args, flags or JobFlags(), show or ShowFlags(), compare, engine)


@pytest.mark.parametrize("name", WORKERS)
def test_every_example_that_is_offered_is_there(name: str) -> None:
    path = example(name)
    assert path.is_file()
    assert "paceline.init()" in path.read_text()


@pytest.mark.parametrize(("name", "workers"), [("linear", 5), ("digits", 2)])
def test_an_example_runs_alone_with_its_own_number_of_workers(
    capsys: pytest.CaptureFixture[str], name: str, workers: int
) -> None:
    engine = Played()
    assert run(engine, name, "--method", "sgd") == 0
    assert [(job.name, job.workers) for job in engine.jobs] == [(name, workers)]
    assert engine.programs[0].args == ("--method", "sgd")
    assert capsys.readouterr().out.splitlines()[-1] == f"  next    {NEXT[name]}"


def test_flags_and_environment_win_over_the_examples_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Played()
    monkeypatch.setenv("PACELINE_WORKERS", "3")
    run(engine, "linear")
    run(engine, "linear", flags=JobFlags(workers="4"))
    assert [job.workers for job in engine.jobs] == [3, 4]


def test_text_is_the_default_and_is_compared_with_one_process(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    engine = Played(speeds={1: 10, 2: 19})
    assert run(engine, None, flags=JobFlags(epochs="2", servers="1")) == 0

    alone, together = engine.jobs
    assert (alone.workers, alone.servers, alone.steps, alone.epochs) == (1, 0, TRIAL_STEPS, None)
    assert (together.workers, together.servers, together.steps, together.epochs) == (2, 1, None, 2)
    assert [path.name for path in (folder / "runs").iterdir()] == ["20260131-0902-text-sync"]
    assert not alone.runs.exists()
    lines = capsys.readouterr().out.splitlines()
    assert "measuring one process first" in lines
    assert any(" · 1.9x one process · " in line for line in lines)
    assert lines[-1] == "  next    paceline demo linear"


def test_a_loss_of_speed_is_said_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Played(speeds={1: 10, 2: 8}), "digits", compare=True) == 0
    assert " · 0.8x one process: " in capsys.readouterr().out


def test_the_reason_follows_from_the_runs_figures() -> None:
    many, one = Job("text", workers=cores() + 1), Job("text", workers=1)
    assert loss_of_speed(many, 0.5).endswith(f"share {cores()} core" + "s" * (cores() != 1))
    assert "too small to gain" in loss_of_speed(one, 0.5)
    assert "already keeps the cores busy" in loss_of_speed(one, 0.01)


def test_the_gain_is_in_the_object(capsys: pytest.CaptureFixture[str]) -> None:
    run(Played(speeds={1: 10, 2: 19}), "text", show=ShowFlags(json=True))
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["speedup"] == pytest.approx(1.9)
    assert answer["one_process_samples_per_s"] == pytest.approx(100)


def test_one_worker_is_not_compared_with_itself() -> None:
    engine = Played()
    run(engine, "text", flags=JobFlags(workers="1"))
    assert len(engine.jobs) == 1


def test_dry_run_starts_nothing(folder: Path) -> None:
    engine = Played()
    assert run(engine, "linear", show=ShowFlags(dry_run=True)) == 0
    assert engine.jobs == []
    assert list(folder.iterdir()) == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="must be one of: text, linear, digits"):
        example("cifar")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HostError) as raised:
        demo.example("digits")
    assert "pip install 'paceline[examples]'" in str(raised.value)
